"""docs/resources.md: what every CUDA and Triton kernel takes of a multiprocessor, from what the compilers said when they were built.

`make resources` builds both for every target and runs this. tests/test_cuda_builds.py and tests/test_triton_builds.py hold the kernels to
their budgets at every change; this table is for people.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "resources.md"
SOURCES = {"CUDA C++ (nvcc)": "cuda", "Triton": "triton"}


def family(kernel: str) -> str:
    """A kernel's name without template arguments, dtype and sizes."""
    return re.sub(r"<.*|-(fp32|fp16|bf16|i8|i16|i32|i64)\b.*|-\d.*", "", kernel)


def table(rows: list[dict]) -> list[str]:
    """A line a kernel: the most that any of its instantiations takes, on each target."""
    targets = sorted({str(row["target"]).removeprefix("sm_") for row in rows}, key=int)
    lines = [
        f"| kernel | builds | registers: {', '.join(f'sm_{t}' for t in targets)} | shared bytes | spilled bytes |",
        "|---|---|---|---|---|",
    ]
    for name in sorted({family(row["kernel"]) for row in rows}):
        of = [row for row in rows if family(row["kernel"]) == name]
        most = lambda what, some: max(row[what] for row in some)  # noqa: E731
        registers = (most("registers", [r for r in of if str(r["target"]).removeprefix("sm_") == t]) for t in targets)
        builds = len({row["kernel"] for row in of})
        lines.append(
            f"| `{name}` | {builds} | {', '.join(map(str, registers))} | {most('shared', of):,} | {most('spill_bytes', of):,} |"
        )
    return lines


def main() -> None:
    lines = [
        "# What the GPU kernels take",
        "",
        "A line a kernel: the most that any of its builds (dtypes, sizes, options) takes, of registers a thread, shared memory a block and",
        "spilled bytes a thread. Dynamic shared memory of the CUDA kernels is asked for at launch and not in it. Made by `make resources`.",
    ]
    for title, folder in SOURCES.items():
        path = ROOT / "build" / folder / "resources.json"
        if not path.exists():
            sys.exit(f"bench/resources.py: {path.relative_to(ROOT)} is not there: run `make resources`")
        lines += ["", f"## {title}", "", *table(json.loads(path.read_text()))]
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
