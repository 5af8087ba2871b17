"""Writes resnet_three_tasks.ipynb, with outputs, from resnet_three_tasks.py: `python examples/notebook.py` runs it cell by cell."""

import contextlib
import io
import json
from pathlib import Path

SOURCE = Path(__file__).parent / "resnet_three_tasks.py"


def parts() -> list[str]:
    """The docstring, then the code of each cell, which begins at a line with `# %%`."""
    first, *cells = SOURCE.read_text().split("\n# %%")
    return [first + "\n", *(f"# %%{cell}\n" for cell in cells[:-1]), f"# %%{cells[-1]}"]


def main() -> None:
    first, *cells = parts()
    found = [{"cell_type": "markdown", "id": "what", "metadata": {}, "source": first.strip().strip('"').splitlines(True)[:1]}]
    names = {"__name__": "__main__"}
    for number, code in enumerate(cells, 1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, SOURCE.name, "exec"), names)
        output = [{"name": "stdout", "output_type": "stream", "text": printed.getvalue().splitlines(True)}]
        cell = {"cell_type": "code", "execution_count": number, "id": f"cell-{number}", "metadata": {}}
        found.append({**cell, "outputs": output if printed.getvalue() else [], "source": code.rstrip().splitlines(True)})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    book = {"cells": found, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    SOURCE.with_suffix(".ipynb").write_text(json.dumps(book, indent=1) + "\n")


if __name__ == "__main__":
    main()
