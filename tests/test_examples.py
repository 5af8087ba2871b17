"""The examples run, say what they are to say, and are short; the notebook has the first one's code and what it printed."""

import json
import re
import runpy

import pytest
from device import DEVICE, ON_CPU
from launch import ROOT, launch
from zoo import CASES

import subnet_kernels as sk

pytestmark = pytest.mark.skipif(not ON_CPU, reason=f"the examples run on the CPU, and this run is on {DEVICE}")
EXAMPLES = ROOT / "examples"
PROGRAMS = ("resnet_three_tasks", "supsup_mlp", "piggyback_vit", "ddp")
with_transformers = pytest.mark.skipif(
    CASES["ViT (transformers)"].missing() is not None, reason=f"{CASES['ViT (transformers)'].missing()}"
)


def printed(name, capsys):
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.parametrize("name", PROGRAMS)
def test_under_sixty_lines(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 60


@with_transformers
def test_resnet_three_tasks(capsys):
    text = printed("resnet_three_tasks", capsys)
    assert "12 masked layers" in text
    shares = re.findall(r"^\d to \d: (\d+)% right", text, re.M)
    assert len(shares) == 3
    assert all(int(share) >= 80 for share in shares)
    assert "a batch of 24 rows of 3 tasks: logits (24, 4)" in text


def test_supsup_mlp(capsys):
    text = printed("supsup_mlp", capsys)
    assert "5 of 5 tasks found without being told" in text
    assert int(re.search(r"(\d+)% of their images right", text)[1]) >= 70


@with_transformers
def test_piggyback_vit(capsys):
    rows = re.findall(
        r"^([\w ]+): (\d+)% right with its mask, (\d+)% by the backbone alone", printed("piggyback_vit", capsys), re.M
    )
    assert [view for view, *_ in rows] == ["upright", "upside down", "negative"]
    for view, mine, alone in rows[1:]:
        assert int(mine) >= int(alone) + 20, view


@pytest.mark.long
def test_ddp(tmp_path):
    launch(EXAMPLES / "ddp.py", log=tmp_path / "log")
    assert len(re.findall(r"the same on 2 of 2 processes", (tmp_path / "log").read_text())) == 2


def test_what_the_page_for_users_says(capsys):
    """The code of docs/drop-in.md runs, from top to bottom."""
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "drop-in.md").read_text(), re.S)
    assert len(blocks) == 4
    for block in blocks[:3]:
        exec(block, names)
    assert capsys.readouterr().out == "['cats', 'owls']\n"
    assert names["y"].shape == (3, 3)
    assert int(sk.count(names["bank"].live_bits()["0"])) == 1000  # every weight is open at first
    exec(blocks[3], names)
    bank = names["bank"]
    first, second = ({key: sk.unpack(b, (50, 20)) for key, b in bank.bits(name).items()}["0"] for name in ("first", "second"))
    assert int(first.sum()) == 400
    assert int(second.sum()) == 600
    assert second[first].all()  # the second task uses what the first one owns


def test_the_notebook_is_the_example():
    book = json.loads((EXAMPLES / "resnet_three_tasks.ipynb").read_text())
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    first, *cells = runpy.run_path(str(EXAMPLES / "notebook.py"))["parts"]()
    text, *code = book["cells"]
    assert "".join(text["source"]).strip() in first
    assert ["".join(cell["source"]) for cell in code] == [cell.rstrip() for cell in cells]
    assert [len(cell["outputs"]) for cell in code] == [1, 0, 1, 1]
    assert len({cell["id"] for cell in book["cells"]}) == len(book["cells"])
