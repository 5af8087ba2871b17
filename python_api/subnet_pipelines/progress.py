"""What a run shows of itself: nothing, plain lines, or a progress bar."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any


class Quiet:
    """Shows nothing; the interface of the others."""

    def __enter__(self) -> Quiet:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def begin(self, what: str, steps: int, done: int) -> None:
        """A stretch of `steps` steps begins, `done` of which are made."""

    def steps(self, done: int) -> None:
        """So many steps of the stretch are made."""

    def epoch(self, line: dict[str, Any]) -> None:
        """An epoch ended; the line of metrics.jsonl."""

    def row(self, line: dict[str, Any]) -> None:
        """A row of the matrix was measured; the line of metrics.jsonl."""

    def say(self, text: str) -> None:
        """A message for people."""


class Plain(Quiet):
    """A line at each row of the matrix, and at most one a few seconds in between; on stdout."""

    every = 5.0

    def __init__(self, title: str = ""):
        self.title, self.what, self.total, self.shown = title, "", 0, time.monotonic()

    def begin(self, what: str, steps: int, done: int) -> None:
        self.what, self.total = what, steps

    def epoch(self, line: dict[str, Any]) -> None:
        if time.monotonic() - self.shown >= self.every:
            self.say(f"{self.what}: {describe(line)}")

    def steps(self, done: int) -> None:
        if time.monotonic() - self.shown >= 4 * self.every:
            self.say(f"{self.what}: step {done} of {self.total}")

    def row(self, line: dict[str, Any]) -> None:
        self.say(summarise(line))

    def say(self, text: str) -> None:
        self.shown = time.monotonic()
        print(f"{self.title}{text}", flush=True)


class Bar(Plain):
    """A bar for the steps of the current stretch, the rows of the matrix above it."""

    def __enter__(self) -> Bar:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            transient=True,
        )
        self.bar.start()
        self.task = self.bar.add_task("", total=1, note="")
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.remove_task(self.task)
        self.bar.stop()

    def begin(self, what: str, steps: int, done: int) -> None:
        self.bar.reset(self.task, total=steps, completed=done, description=f"{self.title}{what}", note="")

    def steps(self, done: int) -> None:
        self.bar.update(self.task, completed=done)

    def epoch(self, line: dict[str, Any]) -> None:
        self.bar.update(self.task, note=describe(line))

    def say(self, text: str) -> None:
        self.bar.console.print(f"{self.title}{text}", highlight=False, markup=False)


def describe(line: dict[str, Any]) -> str:
    """An epoch's line for people."""
    numbers = [f"{name} {line[name]:.4g}" for name in line if isinstance(line[name], float) and name != "seconds"]
    return f"epoch {line['epoch'] + 1}, {', '.join(numbers)}"


def summarise(line: dict[str, Any]) -> str:
    """A matrix row's line for people."""
    known = [v for v in line["accuracy"].values() if v is not None]
    average = f", mean of {len(known)} {sum(known) / len(known):.2f} %" if len(known) > 1 else ""
    own = line["accuracy"].get(str(line["row"]))
    return f"row {line['row']}:" + (f" own task {own:.2f} %" if own is not None else "") + average


def shown_on(stream: Any = None, title: str = "") -> Quiet:
    """A bar where the stream (stdout) is a terminal, else plain lines."""
    return Bar(title) if (stream or sys.stdout).isatty() else Plain(title)


@contextlib.contextmanager
def count_bar(total: int) -> Iterator[Any]:
    """A bar of finished runs on a terminal, a line for each elsewhere; on stderr.

    Gives a function of a line, and of whether a run is finished with it (True).
    """
    if not sys.stderr.isatty():
        yield lambda line, finished=True: print(line, file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"{total} runs", total=total)

        def say(line: str, finished: bool = True) -> None:
            progress.console.print(line, highlight=False, markup=False)
            progress.advance(task, int(finished))

        yield say
