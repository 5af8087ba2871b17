"""`subnet-kernels bank show`: what it says of a saved bank is what the bank itself says."""

import json

import pytest
import torch
from banks import learnt
from device import generator
from safetensors.torch import load_file, save_file
from torch import nn

import subnet_kernels as sk
from subnet_kernels import codec, reference
from subnet_pipelines.bank_show import show
from subnet_pipelines.capacity import joint_huffman
from subnet_pipelines.cli import main
from subnet_pipelines.errors import Refusal
from subnet_pipelines.reuse import reuse_report

pytest.importorskip("subnet_kernels._codec", reason="the codec is not compiled: pip install with pybind11 there")
N = 60 * 50


def bank_of(tasks, train_weights=True, **config):
    """Masks of 20 % over 3,000 weights, of which each keeps much of the one before it."""
    model = sk.convert(nn.Linear(60, 50, bias=False), sk.SubnetConfig(train_weights=train_weights, **config))
    bank, chance = sk.MaskBank(model), generator(0)
    opened = torch.zeros(N, dtype=torch.bool)
    for t in range(tasks):
        opened = (opened & (torch.rand(N, generator=chance) < 0.7)) | (torch.rand(N, generator=chance) < 0.1)
        bank.commit(f"task {t}", bits={"": reference.pack(opened)} if not config else None)
    return bank


def table(lines, first):
    """Rows of the table whose heading begins so, {first cell: cells}."""
    start = next(i for i, line in enumerate(lines) if line.startswith(first))
    rows = {}
    for line in lines[start + 1 :]:
        if not line:
            break
        name, *cells = line.rsplit(maxsplit=8 if first == "mask" else 3)
        rows[name.strip()] = cells
    return rows


@pytest.mark.parametrize("form", ["plain", "coded", "one file"])
@pytest.mark.parametrize("train_weights", [True, False])
def test_the_numbers_are_the_banks(tmp_path, form, train_weights):
    bank = bank_of(9, train_weights)
    bank.pack_file(tmp_path / "zoo", coded=True) if form == "one file" else bank.save(tmp_path / "zoo", coded=form == "coded")
    lines = list(show(tmp_path / "zoo"))
    assert lines[0].startswith(f"{tmp_path / 'zoo'}: 9 masks, 0 combinations, over 3,000 weights in 1 layers that ")
    assert ("learn" in lines[0], "fixed" in lines[0]) == (train_weights, not train_weights)
    rows, forms = table(lines, "mask"), table(lines, "all masks")
    assert list(rows) == bank.masks
    shares = reuse_report(bank, {"": N})
    masks = [bank.bits(name)[""] for name in bank.masks]
    none, coded, given = torch.zeros_like(masks[0]), 0, 0.0
    for t, bits in enumerate(masks):
        owned = none.clone()
        for other in masks[:t]:
            owned |= other
        context = [owned, *(masks[i] if i >= 0 else none for i in (t - 1, t - 2))] if train_weights else []
        data, least = codec.seal(bits, N, context), codec.entropy(bits, N, context)
        coded, given = coded + len(data), given + least
        stored = bits.numel() if form == "plain" else len(data)
        cells = [100 * int(sk.count(bits)) / N, *(100 * shares["tasks"][key][t] for key in ("all", "some", "none"))]
        assert rows[f"task {t}"][:4] == [f"{value:.1f}" for value in cells]
        bits_a_weight = [8 * stored / N, 8 * len(data) / N, least / N, codec.entropy(bits, N) / N]
        assert rows[f"task {t}"][4:] == [f"{value:.4f}" for value in bits_a_weight]
    huffman = joint_huffman([{"": bits} for bits in masks], {"": N})
    expected = {
        "float32": 9 * 4 * N,
        "as stored": 9 * masks[0].numel() if form == "plain" else coded,
        "a bit a weight": 9 * N / 8,
        "joint Huffman of 7 tasks": (huffman["code_bits"] + huffman["table_bits"]) / 8,
        "coded": coded,
        "entropy, given what the decoder knows": given / 8,
    }
    for name, size in expected.items():
        assert forms[name][0] == f"{size:,.0f}"
    measured = shares["pairs"]["all"]["measured"]
    assert f"open in two masks, mean over pairs: {measured:.2f} % of the weights" in "\n".join(lines)
    assert f"open in any mask: {100 * bank.capacity()['used_fraction']:.2f} % of the weights" in lines


def test_many_masks_have_the_first_and_the_last_lines(tmp_path):
    bank = bank_of(45)
    bank.save(tmp_path)
    rows = table(list(show(tmp_path)), "mask")
    assert list(rows) == [*bank.masks[:20], "(5 more)", *bank.masks[25:]]


def test_signed_masks(tmp_path):
    bank = bank_of(3, False, select="signed", density=0.5)
    for coded in (False, True):
        bank.save(tmp_path / str(coded), coded=coded)
        lines = list(show(tmp_path / str(coded)))
        assert "3 masks with signs" in lines[0]
        bits = bank.bits("task 1")[""]
        least = codec.entropy(bits[0], N) + codec.entropy(bits[1], N, [bits[0]])
        assert table(lines, "mask")["task 1"][6] == f"{least / N:.4f}"
        assert table(lines, "all masks")["a bit a weight"][0] == f"{3 * 2 * N / 8:,.0f}"


def test_a_bank_of_a_network_and_pictures(tmp_path, capsys):
    _, bank, _ = learnt()
    bank.commit("mix", alphas=torch.ones(3) / 3)
    bank.save(tmp_path / "zoo", coded=True)
    assert main(["bank", "show", str(tmp_path / "zoo"), "--plot", str(tmp_path / "pictures")]) == 0
    text = capsys.readouterr().out
    assert "3 masks, 1 combinations, over 288 weights in 2 layers that learn" in text
    drawn = {"reuse_tasks.png", "reuse_layers.png", "correlation.png", "overlap.png"}
    assert {p.name for p in (tmp_path / "pictures").iterdir()} == drawn
    assert all(name in text for name in drawn)


def test_an_empty_bank(tmp_path):
    bank_of(0).save(tmp_path)
    assert len(list(show(tmp_path))) == 1


def test_without_the_codec_plain_files_are_shown(tmp_path, monkeypatch):
    bank_of(3).save(tmp_path)
    monkeypatch.setattr(codec, "_compiled", lambda: (_ for _ in ()).throw(RuntimeError("not compiled")))
    lines = list(show(tmp_path))
    assert table(lines, "mask")["task 1"][5] == "–"
    assert "coded" not in table(lines, "all masks")


def shape(*sizes):
    def spoil(folder):
        path = folder / "manifest.json"
        found = json.loads(path.read_text())
        found["layers"][""]["shape"] = list(sizes)
        path.write_text(json.dumps(found))

    return spoil


def without_mask(folder):
    path = next(folder.glob("*.safetensors"))
    tensors = {key: value for key, value in load_file(path).items() if not key.startswith("coded")}
    save_file(tensors, path)


SPOILT = {
    "nothing there": (lambda f: (f / "manifest.json").unlink(), r"must be a readable bank manifest"),
    "a huge shape": (shape(2**40, 2**30), r"must have sizes as the shape of layer ''"),
    "a shape larger than the file": (shape(2**20, 2**20), r"must hold a mask of the weights of layer ''"),
    "another shape": (shape(60, 51), r"must hold a coded mask for layer ''"),
    "a negative shape": (shape(-60, -50), r"must have sizes as the shape of layer ''"),
    "a shape of words": (shape("60", 50), r"must have sizes as the shape of layer ''"),
    "no mask": (without_mask, r"must hold a mask of the weights of layer ''"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_bank_is_refused_in_a_sentence(tmp_path, capsys, case):
    spoil, message = SPOILT[case]
    bank_of(1).save(tmp_path, coded=True)
    spoil(tmp_path)
    with pytest.raises(Refusal, match=message):
        list(show(tmp_path))
    assert main(["bank", "show", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_is_no_command_is_refused(tmp_path):
    for words in (["bank"], ["bank", "hide", str(tmp_path)], ["bank", "show"]):
        assert main(words) == 2
