"""Masks coded in a bank's files, one file of a whole bank, and entries that are read when they are first used."""

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from banks import clone, images, learn, learnt, model_of, net, outputs, same
from device import generator
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import subnet_kernels as sk
from subnet_kernels import codec, manifest, reference, storage
from subnet_pipelines.bank_show import SavedMasks

pytest.importorskip("subnet_kernels._codec", reason="the codec is not compiled: pip install with pybind11 there")


DOCS = Path(__file__).parent.parent / "docs"


def bits_of(bank):
    return {name: clone(bank.bits(name)) for name in bank.masks}


def signed():
    """A bank of signed masks, and the logits of each."""
    torch.manual_seed(0)
    model = sk.convert(nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4)), sk.SubnetConfig(select="signed"))
    bank, x = sk.MaskBank(model), torch.randn(5, 20)
    for t in range(3):
        bank.begin(scores="init")
        bank.commit(f"task {t}")
    return model, bank, x


@pytest.fixture(params=["learn", "fixed"])
def made(request):
    """A model, its bank of three masks and a combination, and the logits of each."""
    model, bank, logits = learnt(3, train_weights=request.param == "learn")
    bank.activate("task 1")
    bank.commit("mix", alphas=torch.tensor([0.5, 0.25, 0.25]), tensors={"prototype": torch.arange(6.0)}, accuracy=91.5)
    bank.activate(None)
    logits["mix"] = outputs(model, bank)["mix"]
    return model, bank, logits


def save(bank, path, form):
    """Write the bank there in one of its forms."""
    bank.pack_file(path, coded="coded" in form) if "one file" in form else bank.save(path, coded="coded" in form)


KINDS = ["learn", "fixed", "signed"]
FORMS = ["folder", "folder, coded", "one file", "one file, coded"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_comes_back(made, tmp_path, form):
    model, bank, logits = made
    save(bank, tmp_path / "zoo", form)
    before = torch.get_rng_state()
    other = sk.MaskBank.load(tmp_path / "zoo", model)
    assert torch.equal(before, torch.get_rng_state())
    assert other.names == bank.names
    assert other.masks == bank.masks
    assert same(outputs(model, other), logits)
    assert all(same(bits, other.bits(name)) for name, bits in bits_of(bank).items())
    assert same(other.owned(), bank.owned())
    assert torch.equal(other["mix"].tensors["prototype"].cpu(), torch.arange(6.0, device="cpu"))
    assert (other["mix"].over, other["mix"].facts) == (("task 0", "task 1", "task 2"), {"accuracy": 91.5})
    assert other.capacity() == bank.capacity()
    other.verify()


@pytest.mark.parametrize("form", FORMS)
def test_a_bank_goes_on_from_every_form(made, tmp_path, form):
    model, bank, logits = made
    save(bank, tmp_path / "zoo", form)
    other = sk.MaskBank.load(tmp_path / "zoo", model)
    other.begin(scores="init", per_task={"fc": 3})
    learn(model, 7)
    logits["more"] = model(images()).detach()
    other.commit("more")
    assert same(outputs(model, other), logits)
    other.save(tmp_path / "next", coded=True)
    fresh = net(model.conv.train_weight)
    fresh.load_state_dict({**sk.dense_state_dict(model), **{f"fc.{k}": v for k, v in fresh.fc.state_dict().items()}})
    again = sk.MaskBank.load(tmp_path / "next", fresh.eval())
    assert same(outputs(fresh, again), logits)
    again.remove("mix")
    again.remove("task 1")
    again.pack_file(tmp_path / "last", coded=True)
    last = sk.MaskBank.load(tmp_path / "last", fresh)
    assert last.names == ["task 0", "task 2", "more"]
    assert same(outputs(fresh, last), {name: logits[name] for name in last.names})


@pytest.mark.parametrize("coded", [False, True])
def test_what_weights_own_is_restored(tmp_path, coded):
    model, bank, logits = learnt()
    state = clone(sk.dense_state_dict(model))
    bank.pack_file(tmp_path / "zoo", coded=coded)
    other = model_of(state)
    with torch.no_grad():
        for layer in (other.conv, other.hidden):
            layer.weight.normal_()
    with pytest.raises(ValueError, match=r"weights in layer 'conv' must be those that .*zoo, entry 00000, was learnt on"):
        sk.MaskBank.load(tmp_path / "zoo", other)
    assert same(outputs(other, sk.MaskBank.load(tmp_path / "zoo", other, restore=True)), logits)


@pytest.mark.parametrize("form", FORMS)
def test_signed_masks(tmp_path, form):
    model, bank, x = signed()
    logits = {}
    for name in bank.names:
        bank.activate(name)
        logits[name] = model(x)
    bank.activate(None)
    save(bank, tmp_path / "zoo", form)
    other = sk.MaskBank.load(tmp_path / "zoo", model)
    for name in other.names:
        other.activate(name)
        assert torch.equal(model(x), logits[name])
        assert same(bank.bits(name), other.bits(name))
    other.activate(None)
    assert same(other.owned(), bank.owned())


@pytest.fixture(scope="module")
def reader():
    """What docs/bank-format.md prints, with the decoder that docs/codec.md prints: path -> {mask: {layer: planes}}."""
    functions = []
    for page, name in (("codec.md", "read"), ("bank-format.md", "masks")):
        names = {}
        exec(re.search(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)[1], names)
        functions.append(names[name])
    decode, masks = functions
    return lambda path: masks(path, decode)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_printed_reader_reads(reader, monkeypatch, tmp_path, kind, form):
    monkeypatch.setattr(storage, "SEGMENT", 2)
    model, bank, _ = signed() if kind == "signed" else learnt(5, train_weights=kind == "learn")
    if kind == "learn":  # larger masks that are coded and not kept as they are
        model = sk.convert(nn.Linear(90, 40, bias=False), sk.SubnetConfig(density=0.1, train_weights=True))
        bank = sk.MaskBank(model)
        masks_that_overlap(bank, 5, 3600)
    save(bank, tmp_path / "zoo", form)
    found = reader(tmp_path / "zoo")
    assert list(found) == bank.masks
    for name, layers in found.items():
        for layer, bits in bank.bits(name).items():
            n = bank.model.get_submodule(layer).weight.numel()
            planes = [bits] if bits.dim() == 1 else list(bits)
            assert layers[layer] == [reference.unpack(plane, (n,)).int().tolist() for plane in planes]


def test_coded_and_plain_files_stand_side_by_side(tmp_path):
    model, bank, logits = learnt(1)
    bank.save(tmp_path)
    for t, coded in ((1, True), (2, False), (3, True)):
        bank.begin(scores="init", per_task={"fc": 3})
        learn(model, t)
        logits[f"task {t}"] = model(images()).detach()
        bank.commit(f"task {t}")
        bank.save(tmp_path, coded=coded)
    kinds = ["coded/conv" in load_file(path) for path in sorted(tmp_path.glob("*.safetensors"))]
    assert kinds == [False, True, False, True]
    assert same(outputs(model, sk.MaskBank.load(tmp_path, model)), logits)


def masks_that_overlap(bank, tasks, n):
    """Masks of which each keeps most of the one before it, as WSN's do."""
    chance, opened, masks = generator(3), torch.zeros(n, dtype=torch.bool), []
    for t in range(tasks):
        stays = opened & (torch.rand(n, generator=chance) < 0.7)
        opened = stays | (torch.rand(n, generator=chance) < 0.1)
        masks.append(opened)
        bank.commit(f"task {t}", bits={"": reference.pack(opened)})
    return masks


def test_sizes_are_the_entropy_given_what_the_decoder_knows(tmp_path):
    """The bound of the project's plan: .5 % and 64 bytes; what is known are masks that come earlier in the file's order."""
    n = 300 * 1000
    bank = sk.MaskBank(sk.convert(nn.Linear(1000, 300, bias=False), sk.SubnetConfig(density=0.2, train_weights=True)))
    masks = masks_that_overlap(bank, 5, n)
    bank.pack_file(tmp_path / "zoo", coded=True)
    tensors = load_file(tmp_path / "zoo")
    none = torch.zeros(n, dtype=torch.bool)
    for t, mask in enumerate(masks):
        known = [torch.stack([none, *masks[:t]]).any(0), *[masks[i] if i >= 0 else none for i in (t - 1, t - 2)]]
        floor = codec.entropy(reference.pack(mask), n, [reference.pack(plane) for plane in known]) / 8
        assert floor <= tensors[f"{t:05d}/coded/"].numel() + 16
        assert tensors[f"{t:05d}/coded/"].numel() <= 1.005 * floor + 64
        assert t < 2 or floor < 0.8 * codec.entropy(reference.pack(mask), n) / 8


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_bank_comes_back(data):
    """Any masks, one after another, over weights that learn or not, with signs or not, in any form."""
    inputs, outputs, kind = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 30)), data.draw(st.sampled_from(KINDS))
    n = inputs * outputs
    rule = {"learn": {"train_weights": True}, "fixed": {}, "signed": {"select": "signed"}}[kind]
    bank = sk.MaskBank(sk.convert(nn.Linear(inputs, outputs), sk.SubnetConfig(**rule)))
    for t in range(data.draw(st.integers(1, 5))):
        chance, density = generator(data.draw(st.integers(0, 9))), data.draw(st.sampled_from((0.0, 0.02, 0.3, 0.9, 1.0)))
        values = torch.rand(n, generator=chance)
        planes = [values < density] if kind != "signed" else [values < density / 2, values > 1 - density / 2]
        packed = [reference.pack(plane) for plane in planes]
        bank.commit(f"task {t}", bits={"": packed[0] if kind != "signed" else torch.stack(packed)})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "zoo"
        save(bank, path, data.draw(st.sampled_from(FORMS)))
        other = sk.MaskBank.load(path, bank.model)
        assert all(same(bits, other.bits(name)) for name, bits in bits_of(bank).items())
        assert same(bank.owned(), other.owned())
        found = SavedMasks(path)
        assert all(same({"": bank.bits(name)[""].cpu()}, found.bits(name)) for name in bank.masks)


def test_a_mask_that_does_not_shrink_takes_its_bits(tmp_path):
    bank = sk.MaskBank(sk.convert(nn.Linear(100, 37, bias=False), sk.SubnetConfig()))
    bits = {"": reference.pack(torch.rand(37, 100) < 0.5)}
    bank.commit("half", bits=bits)
    bank.pack_file(tmp_path / "zoo", coded=True)
    assert load_file(tmp_path / "zoo")["00000/coded/"].numel() == 4 + -(-3700 // 8)
    assert same(sk.MaskBank.load(tmp_path / "zoo", bank.model).bits("half"), bits)


# ------------------------------------------------------------------------------------------------------------- when used


@pytest.fixture
def opened(monkeypatch):
    """The names of the files that are opened."""
    names, real = [], manifest.safe_open
    monkeypatch.setattr(manifest, "safe_open", lambda path, kind: (names.append(path.name), real(path, kind))[1])
    return names


def zoo(folder, tasks=6):
    """A saved bank over fixed weights, and its model."""
    torch.manual_seed(0)
    model = sk.convert(nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4)), sk.SubnetConfig(density=0.3))
    bank = sk.MaskBank(model)
    for t in range(tasks):
        bank.begin(scores="init")
        bank.commit(f"task {t}")
    bank.commit("mix", alphas=torch.ones(2) / 2, over=["task 1", "task 3"])
    bank.save(folder)
    return model, bank


def test_opening_reads_the_manifest_alone(tmp_path, opened):
    model, bank = zoo(tmp_path)
    other = sk.MaskBank.load(tmp_path, model)
    assert (len(other), other.masks, other["mix"].over) == (7, bank.masks, ("task 1", "task 3"))
    assert other.active is None
    other.begin(scores="init")
    assert not opened
    other.activate("task 2")
    assert {name[:12] for name in opened} == {"00002-task_2"}
    opened.clear()
    other.superpose(None, over=["task 4", "task 5"])
    assert {name[:12] for name in opened} == {"00004-task_4", "00005-task_5"}
    opened.clear()
    other.activate("mix")
    assert {name[:8] for name in opened} == {"00006-mi", "00001-ta", "00003-ta"}
    opened.clear()
    other.superpose(None)
    assert len(opened) == 6  # the masks, from now on in memory
    opened.clear()
    other.capacity()
    other.activate("task 2")
    with other.rows(["task 2", "task 4"]):
        model(torch.randn(2, 20))
    other.activate(None)
    assert {name[:12] for name in opened} == {"00004-task_4"}  # whose state had not been asked for


def test_all_that_a_stored_bank_gives_is_what_the_bank_gives(tmp_path):
    model, bank = zoo(tmp_path)
    x, ids = torch.randn(6, 20), torch.tensor([0, 5, 2, 2, 1, 3])
    calls = {
        "owned": lambda b: b.owned(),
        "overlap": lambda b: b.overlap(),
        "capacity": lambda b: b.capacity(),
        "superpose": lambda b: (b.superpose(None), model(x))[1],
        "subset": lambda b: (b.superpose(torch.rand(2, generator=generator(1)), over=["task 5", "task 0"]), model(x))[1],
        "export": lambda b: b.export("task 4")(x),
        "row_alpha_grad": lambda b: b.row_alpha_grad(x, lambda y: y.square().sum(1)),
    }
    for name, call in calls.items():
        expected = call(bank)
        bank.activate(None)
        other = sk.MaskBank.load(tmp_path, model)
        found = call(other)
        other.activate(None)
        if isinstance(expected, torch.Tensor):
            assert torch.equal(found, expected), name
        elif name == "capacity":
            assert found == expected
        else:
            assert same(found, expected), name
    other = sk.MaskBank.load(tmp_path, model)
    with bank.rows(ids):
        expected = model(x)
    with other.rows(ids):
        assert torch.equal(model(x), expected)


def test_a_stored_bank_is_changed(tmp_path):
    """A replaced entry keeps what was put there, a removed one is gone, and the rest is what it was."""
    model, bank = zoo(tmp_path / "a")
    kept = bits_of(bank)
    other = sk.MaskBank.load(tmp_path / "a", model)
    other.begin(scores="init")
    with torch.no_grad():
        model[0].bias.fill_(3.0)
    live = other.live_bits()
    other.replace("task 4")
    other.remove("mix")
    other.remove("task 1")
    other.commit("new")
    other.save(tmp_path / "a")
    last = sk.MaskBank.load(tmp_path / "a", model)
    assert last.masks == ["task 0", "task 2", "task 3", "task 4", "task 5", "new"]
    for name in last.masks:
        assert same(last.bits(name), live if name in ("task 4", "new") else kept[name]), name
        assert bool((last[name].state["0.bias"] == 3.0).all()) == (name in ("task 4", "new"))


def test_a_missing_file_is_noticed_at_once_and_a_damaged_one_when_it_is_read(tmp_path):
    model, _ = zoo(tmp_path)
    path = next(tmp_path.glob("00003-*"))
    data = path.read_bytes()
    path.write_bytes(data[:-10])
    bank = sk.MaskBank.load(tmp_path, model)
    bank.activate("task 2")
    bank.activate(None)
    calls = (lambda: bank.activate("task 3"), bank.owned, lambda: bank.remove("task 2"), lambda: bank.commit("new"))
    for call in calls:
        with pytest.raises(ValueError, match=r"00003-task_3-\w+\.safetensors must be a readable safetensors file"):
            call()
        assert bank.names == [*(f"task {t}" for t in range(6)), "mix"]
    path.write_bytes(data)
    assert len(bank.owned()) == 2  # nothing was left half read
    path.unlink()
    with pytest.raises(ValueError, match=r"00003-task_3-\w+\.safetensors must be a readable safetensors file: there is none"):
        sk.MaskBank.load(tmp_path, model)


def test_a_damaged_mask_in_an_earlier_block_is_noticed_before_anything_changes(tmp_path):
    model, _ = zoo(tmp_path, tasks=70)
    path = next(tmp_path.glob("00003-*"))
    data = path.read_bytes()
    path.write_bytes(data[:-10])
    bank = sk.MaskBank.load(tmp_path, model)
    bank.remove("mix")
    state = clone(bank["task 68"].state)
    with torch.no_grad():
        model[0].bias.fill_(5.0)
    for change in (lambda: bank.remove("task 68"), lambda: bank.replace("task 68")):
        with pytest.raises(ValueError, match="00003-task_3"):
            change()
    path.write_bytes(data)
    assert len(bank.masks) == 70
    assert same(bank["task 68"].state, state)
    size = sum(layer.bits.numel() for layer in bank.layers())
    assert bank.capacity()["mask_bytes"] == 70 * size
    bank.remove("task 68")
    assert bank["task 69"].index == 68


# --------------------------------------------------------------------------------------------------------------- spoilt


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def flip(t):
    t["coded/conv"][9] ^= 1


def exchange(folder):
    """The second and third entry in the other order: what is known of a mask is then another."""
    path = folder / "manifest.json"
    found = json.loads(path.read_text())
    found["entries"][1:3] = found["entries"][2:0:-1]
    path.write_text(json.dumps(found))


CODED = {
    "a byte changed": (
        lambda f: rewrite(sorted(f.glob("*.safetensors"))[0], flip),
        r"00000-\S+ must hold a coded mask for layer 'conv'",
    ),
    "cut": (
        lambda f: rewrite(
            sorted(f.glob("*.safetensors"))[1], lambda t: t.update({"coded/hidden": t["coded/hidden"][:-1].clone()})
        ),
        r"00001-\S+ must hold a coded mask for layer 'hidden'",
    ),
    "longer than the mask": (
        lambda f: rewrite(
            sorted(f.glob("*.safetensors"))[1], lambda t: t.update({"coded/hidden": torch.zeros(99, dtype=torch.uint8)})
        ),
        r"a sealed mask of 180 weights must be 4 to 27 bytes, got \(99,\)",
    ),
    "no bytes": (
        lambda f: rewrite(sorted(f.glob("*.safetensors"))[1], lambda t: t.update({"coded/hidden": torch.zeros(9)})),
        r"a sealed mask of 180 weights must be 4 to 27 bytes",
    ),
    "in another order": (exchange, r"0000[12]-\S+ must hold "),
}


@pytest.mark.parametrize("case", CODED)
def test_a_spoilt_coded_mask_is_refused_in_a_sentence(tmp_path, case):
    spoil, message = CODED[case]
    model, bank, _ = learnt()
    bank.save(tmp_path, coded=True)
    spoil(tmp_path)
    state = clone(model.state_dict())
    with pytest.raises(ValueError, match=message) as raised:
        sk.MaskBank.load(tmp_path, model_of(clone(sk.dense_state_dict(model))))
    assert "\n" not in str(raised.value)
    assert same(state, model.state_dict())


def test_a_signed_mask_needs_both_planes(tmp_path):
    model, bank, _ = signed()
    bank.save(tmp_path, coded=True)
    rewrite(sorted(tmp_path.glob("*.safetensors"))[0], lambda t: t.pop("coded/0/minus"))
    with pytest.raises(ValueError, match=r"must hold a coded mask for layer '0': 'coded/0/minus'"):
        sk.MaskBank.load(tmp_path, model).activate("task 0")


def packed(change=lambda found: found, tensors=lambda t: t):
    """Write a packed file again with another manifest, or other tensors."""

    def spoil(path):
        with manifest.safe_open(path, "pt") as file:
            found, held = json.loads(file.metadata()["manifest"]), {key: file.get_tensor(key) for key in file.keys()}
        found = change(found)
        save_file(tensors(held) or held, path, {"manifest": found if isinstance(found, str) else json.dumps(found)})

    return spoil


def first(**fields):
    return packed(lambda m: {**m, "entries": [{**m["entries"][0], **fields}, *m["entries"][1:]]})


PACKED = {
    "empty": (lambda p: p.write_bytes(b""), r"must be a readable packed bank"),
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:-10]), r"must be a readable packed bank"),
    "a huge header": (
        lambda p: p.write_bytes((2**62).to_bytes(8, "little") + p.read_bytes()[8:]),
        r"must be a readable packed bank",
    ),
    "no manifest": (lambda p: save_file({"a": torch.ones(1)}, p), r"must be the manifest of a subnet-kernels bank"),
    "manifest no JSON": (packed(lambda m: "{"), r"must be a readable packed bank"),
    "manifest a list": (packed(lambda m: []), r"must be the manifest of a subnet-kernels bank"),
    "a folder's names": (first(file="00000-a.safetensors"), r"must name its entries' files plainly"),
    "tensors of nobody": (
        packed(tensors=lambda t: {**t, "x/bits/conv": torch.ones(1)}),
        r"entries' tensors alone, got 'x/bits/conv'",
    ),
    "bits missing": (
        packed(tensors=lambda t: t.pop("00000/bits/conv") is None),
        r"entry 00000, must hold 64 bytes of bits for layer",
    ),
    "entry missing": (first(file="00007"), r"must hold its entries' tensors alone"),
    "segments": (packed(lambda m: {**m, "segments": ["../x"]}), r"must name its segments plainly"),
}


@pytest.mark.parametrize("case", PACKED)
def test_a_spoilt_packed_file_is_refused_in_a_sentence(tmp_path, case):
    spoil, message = PACKED[case]
    model, bank, _ = learnt()
    bank.pack_file(tmp_path / "zoo.safetensors")
    spoil(tmp_path / "zoo.safetensors")
    with pytest.raises(ValueError, match=message) as raised:
        sk.MaskBank.load(tmp_path / "zoo.safetensors", model_of(clone(sk.dense_state_dict(model))))
    assert "\n" not in str(raised.value)
    assert "zoo.safetensors" in str(raised.value)


def test_packing_replaces_the_file_or_leaves_it(tmp_path, monkeypatch):
    model, bank, logits = learnt(2)
    path = tmp_path / "zoo.safetensors"
    bank.pack_file(path)
    before = path.read_bytes()
    bank.remove("task 1")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        bank.pack_file(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["zoo.safetensors"]
    shutil.copy(path, tmp_path / "copy")
    assert same(outputs(model, sk.MaskBank.load(tmp_path / "copy", model)), logits)
    with pytest.raises(OSError, match="zoo"):
        bank.save(path)


# ------------------------------------------------------------------------------------------------- disks that do not write


class Full:
    """A file on a disk with room for so many bytes."""

    def __init__(self, path, room):
        self.file, self.room = open(path, "wb"), room

    def write(self, data):
        self.file.write(data[: self.room[0]])
        self.room[0] -= len(data)
        if self.room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("form", FORMS)
def test_a_full_disk_leaves_the_old_bank(tmp_path, monkeypatch, form):
    """At whatever byte it is full: what was there stays, nothing is left over, and with room again all is saved."""
    model, bank, logits = learnt(1)
    path = tmp_path / "zoo"
    save(bank, path, form)
    bank.begin(scores="init", per_task={"fc": 4})
    learn(model, 3)
    bank.commit("second")
    logits["second"] = outputs(model, bank)["second"]
    files = lambda: sorted(p.name for p in tmp_path.rglob("*") if p.is_file())  # noqa: E731
    before, room, saved = files(), 0, False
    while not saved:
        with monkeypatch.context() as patch:
            patch.setattr("subnet_kernels.files.open", lambda p, _, left=[room]: Full(p, left), raising=False)
            with contextlib.suppress(OSError):
                save(bank, path, form)
                saved = True
        found = sk.MaskBank.load(path, model_of(clone(sk.dense_state_dict(model))), restore=True).names
        assert found == (["task 0", "second"] if saved else ["task 0"])
        assert not [name for name in files() if name.endswith(".tmp")]
        room += 997
    assert room >= 997 * 3
    assert {*before} <= {*files()}
    assert same(outputs(model, sk.MaskBank.load(path, model)), logits)


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("form", FORMS)
def test_a_folder_that_cannot_be_written_leaves_the_old_bank(tmp_path, monkeypatch, form, error):
    model, bank, logits = learnt(1)
    save(bank, tmp_path / "zoo", form)
    bank.commit("second")

    def refuse(path, _):
        raise OSError(error, os.strerror(error), str(path))

    with monkeypatch.context() as patch:
        patch.setattr("subnet_kernels.files.open", refuse, raising=False)
        with pytest.raises(OSError) as raised:
            save(bank, tmp_path / "zoo", form)
    assert raised.value.errno == error
    assert same(outputs(model, sk.MaskBank.load(tmp_path / "zoo", model)), logits)
    save(bank, tmp_path / "zoo", form)
    assert sk.MaskBank.load(tmp_path / "zoo", model).names == ["task 0", "second"]


def test_two_writers_at_once(tmp_path):
    """Threads that save one bank, or two different ones, into a folder again and again: it is a whole bank of one of them at any moment."""
    torch.manual_seed(0)
    model = sk.convert(nn.Linear(30, 20), sk.SubnetConfig(density=0.3))
    banks = [sk.MaskBank(model) for _ in range(2)]
    for i, bank in enumerate(banks):
        for t in range(2 + i):
            bank.begin(scores="init")
            bank.commit(f"{i} {t}")
    banks[0].save(tmp_path)
    stop, errors, seen = threading.Event(), [], set()

    def write(bank):
        try:
            while not stop.is_set():
                bank._written = None
                bank.save(tmp_path)
        except BaseException as error:
            errors.append(error)

    running = [threading.Thread(target=write, args=(bank,)) for bank in (*banks, banks[0])]
    for thread in running:
        thread.start()
    try:
        for _ in range(60):
            other = sk.MaskBank.load(tmp_path, model)
            bank = banks[int(other.names[0][0])]
            assert all(same(other.bits(name), bank.bits(name)) for name in other.names)
            assert other.names == bank.names
            seen.add(len(other))
    finally:
        stop.set()
        for thread in running:
            thread.join()
    assert not errors
    assert not list(tmp_path.glob(".*"))
    assert seen == {2, 3}
