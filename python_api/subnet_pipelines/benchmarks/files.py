"""Where a data set's files are: under --data-dir, or downloaded to it with their checksum."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from subnet_kernels.files import write_atomic
from subnet_pipelines.errors import Refusal


class Source(NamedTuple):
    """The official address of a file, and its checksum as pooch writes it, `sha256:...` or `md5:...`."""

    url: str
    checksum: str


def default_data_dir() -> Path:
    """$SUBNET_DATA_DIR, else the user's cache."""
    if found := os.environ.get("SUBNET_DATA_DIR"):
        return Path(found).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "subnet-kernels"


def data_folder(data_dir: Path | str | None) -> Path:
    """The folder of the data sets: the given one, else the default."""
    return Path(data_dir or default_data_dir()).expanduser()


def find(
    title: str, names: Sequence[str], data_dir: Path, folders: Sequence[str], sources: Mapping[str, Source] | None = None
) -> list[Path]:
    """Paths of a set's files: each in the first of these folders of data_dir that has it, `.gz` or without, else downloaded to folders[0].

    Raises Refusal that names the files that are missing and where to put them.
    """
    home = data_dir / folders[0]
    found = {name: _there(name, data_dir, folders) for name in names}
    missing = [name for name in names if found[name] is None]
    reason = "no official download is known" if set(missing) - set(sources or {}) else None
    try:
        for name in missing if reason is None else []:
            found[name] = download(home, name, sources[name])
    except Exception as error:
        reason = f"no download: {error if isinstance(error, ValueError) else f'{type(error).__name__} at {sources[name].url}'}"
    if reason is not None:
        raise Refusal(
            f"{title}: {home} lacks {', '.join(missing)} ({reason}); put what is missing there, or name the folder that holds "
            f"{Path(folders[0], missing[0])} with --data-dir"
        )
    return list(found.values())


def _there(name: str, data_dir: Path, folders: Sequence[str]) -> Path | None:
    for folder in folders:
        for candidate in dict.fromkeys((data_dir / folder / name, data_dir / folder / name.removesuffix(".gz"))):
            if candidate.is_file():
                return candidate
    return None


def download(folder: Path, name: str, source: Source) -> Path:
    """Download a file to a folder; it is there whole and with its checksum, or not at all. Raises what pooch raises."""
    import pooch  # here, as it is only needed by those who lack the data

    pooch.get_logger().setLevel("ERROR")
    with tempfile.TemporaryDirectory() as temporary:
        bar = progress_bar("downloading") if sys.stderr.isatty() else False
        got = pooch.retrieve(source.url, source.checksum, name, temporary, progressbar=bar)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / name, Path(got).read_bytes())
    return folder / name


def progress_bar(what: str) -> object:
    """A progress bar with the three methods that pooch calls, drawn by rich; its `total` is set by who uses it."""
    from rich.progress import Progress

    class Bar:
        total = 0

        def __init__(self):
            self.progress = Progress(transient=True)
            self.task = None

        def update(self, n: int) -> None:
            if self.task is None:
                self.progress.start()
                self.task = self.progress.add_task(what, total=self.total)
            self.progress.update(self.task, advance=n)

        def reset(self) -> None:
            if self.task is not None:
                self.progress.reset(self.task)

        def close(self) -> None:
            self.progress.stop()

    return Bar()
