"""A bank's folder: what was saved comes back bit for bit, whatever happened to its files."""

import hashlib
import json
import os

import pytest
import torch
from banks import Net, clone, learn, learnt, model_of, net, outputs, same
from safetensors.torch import load_file, save_file
from torch import nn

import subnet_kernels as sk
from subnet_kernels import storage


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a bank of three tasks and a combination; the state dict of its model; and the logits of each."""
    model, bank, logits = learnt()
    bank.activate("task 1")
    bank.commit(
        "mix",
        alphas=torch.tensor([[0.5, 0.25, 0.25], [0.0, 1.0, -1.0]]),
        tensors={"prototype": torch.arange(6.0).view(2, 3)},
        accuracy=91.5,
        labels=["a", "b"],
    )
    bank.activate(None)
    folder = tmp_path_factory.mktemp("saved") / "zoo"
    bank.save(folder)
    logits["mix"] = outputs(model, bank)["mix"]
    return folder, clone(sk.dense_state_dict(model)), logits


@pytest.fixture
def zoo(saved, tmp_path):
    """A copy of that folder, to be spoilt."""
    folder = tmp_path / "zoo"
    folder.mkdir()
    for file in saved[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("restore", [False, True])
def test_round_trip(saved, restore):
    folder, state, logits = saved
    model = model_of(state)
    if restore:  # weights that no mask uses may be anything, and those that one uses are brought back
        with torch.no_grad():
            for layer in (model.conv, model.hidden):
                layer.weight.normal_()
    before = torch.get_rng_state()
    bank = sk.MaskBank.load(folder, model, restore=restore)
    assert torch.equal(before, torch.get_rng_state())  # reading draws no random numbers
    assert bank.names == ["task 0", "task 1", "task 2", "mix"]
    assert same(outputs(model, bank), logits)
    assert bank["mix"].over == ("task 0", "task 1", "task 2")
    assert torch.equal(bank["mix"].tensors["prototype"].cpu(), torch.arange(6.0, device="cpu").view(2, 3))
    assert bank["mix"].facts == {"accuracy": 91.5, "labels": ["a", "b"]}
    bank.verify()
    bank.begin(scores="init", per_task={"fc": 3})
    learn(model, 4)  # what was loaded is frozen
    assert same(outputs(model, bank), logits)


def test_reading_does_not_move_what_a_fresh_task_begins_with(saved):
    """A checkpoint is loaded into a model whose bank is open, and the bank's entries are read after it."""
    folder, state, _ = saved
    model = model_of(state)
    model.norm.reset_running_stats()
    bank = sk.MaskBank(model)
    model.norm.running_mean.fill_(5.0)
    bank.read(folder)
    assert torch.equal(model.norm.running_mean, torch.full((6,), 5.0))
    bank.begin()
    assert torch.equal(model.norm.running_mean, torch.zeros(6))


def test_scores_are_kept_if_asked_for(tmp_path):
    model, bank, _ = learnt(1)
    bank.commit("with", scores=True)
    scores = clone(bank["with"].scores)
    assert same(scores, {key: m.scores.detach() for key, m in zip(bank.layer_names, bank.layers())})
    bank.save(tmp_path)
    other = sk.MaskBank.load(tmp_path, model)
    assert same(other["with"].scores, scores)
    assert other["task 0"].scores == {}


@pytest.mark.parametrize("train_weights", [True, False])
def test_fixed_and_learnt_backbones_round_trip(tmp_path, train_weights):
    model, bank, logits = learnt(2, train_weights)
    bank.save(tmp_path)
    bank = sk.MaskBank.load(tmp_path, model)
    assert same(outputs(model, bank), logits)
    bank.verify()


def facts_of(folder):
    return {f.name: (f.stat().st_mtime_ns, f.stat().st_ino, f.read_bytes()) for f in folder.glob("*.safetensors")}


def test_appending_touches_nothing_else(tmp_path):
    model, bank, _ = learnt(2)
    bank.save(tmp_path)
    before = facts_of(tmp_path)
    assert len(before) == 2
    bank.begin(scores="init")
    learn(model, 5)
    bank.commit("third")
    bank.save(tmp_path)
    after = facts_of(tmp_path)
    assert len(after) == 3
    assert {name: after[name] for name in before} == before
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted([*after, "manifest.json"])  # no temporary file is left
    loaded = sk.MaskBank.load(tmp_path, model)
    bank.save(tmp_path)
    loaded.save(tmp_path)  # what was read is not written again either
    assert facts_of(tmp_path) == after


def test_saving_the_same_tasks_gives_the_same_files(tmp_path):
    for folder in ("a", "b"):
        learnt(2)[1].save(tmp_path / folder)
    first, second = ({f.name: f.read_bytes() for f in (tmp_path / folder).iterdir()} for folder in ("a", "b"))
    assert first == second


def test_saving_elsewhere_copies_everything(tmp_path):
    model, bank, logits = learnt(2)
    bank.save(tmp_path / "a")
    bank.save(tmp_path / "b")
    for folder in ("a", "b"):
        assert same(outputs(model, sk.MaskBank.load(tmp_path / folder, model)), logits)


@pytest.mark.parametrize("moment", ["entry written", "manifest half written"])
def test_a_crash_while_saving_leaves_the_old_bank(tmp_path, monkeypatch, moment):
    model, bank, logits = learnt(2)
    bank.save(tmp_path)
    bank.remove("task 1")  # the worst case: another task of that name and number
    bank.begin(scores="init", per_task={"fc": 7})
    learn(model, 6)
    bank.commit("task 1")
    original, replace = storage.write_atomic, os.replace

    def crash(path, data):
        if path.name == "manifest.json":
            if moment == "manifest half written":
                monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
                original(path, data)
            raise KeyboardInterrupt
        original(path, data)

    monkeypatch.setattr(storage, "write_atomic", crash)
    with pytest.raises(KeyboardInterrupt):
        bank.save(tmp_path)
    monkeypatch.setattr(storage, "write_atomic", original)
    monkeypatch.setattr(os, "replace", replace)
    old = net()
    old.load_state_dict(model.state_dict() | {"fc.weight": old.fc.weight, "fc.bias": old.fc.bias})
    found = outputs(old.eval(), sk.MaskBank.load(tmp_path, old, restore=True))
    assert same(found, logits)
    bank.save(tmp_path)
    assert sk.MaskBank.load(tmp_path, model).names == ["task 0", "task 1"]


def test_names_are_free(tmp_path):
    names = ["../../etc/passwd", "a/b", "a_b", "ähnlich ✓", "x" * 300, "con.", "\n"]
    model = sk.convert(nn.Linear(8, 8), sk.SubnetConfig())
    bank = sk.MaskBank(model)
    for name in names:
        bank.commit(name)
    bank.save(tmp_path / "zoo")
    assert [f.name for f in tmp_path.iterdir()] == ["zoo"]
    assert len(list((tmp_path / "zoo").iterdir())) == len(names) + 1
    assert sk.MaskBank.load(tmp_path / "zoo", model).names == names


def edit(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def rewrite(folder, number, change):
    """Change the tensors of an entry's file."""
    path = sorted(folder.glob("*.safetensors"))[number]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def entry(number, **fields):
    return lambda folder: edit(folder, lambda m: m["entries"][number].update(fields))


def manifest(**fields):
    return lambda folder: edit(folder, lambda m: m.update(fields))


def tensors(number, change):
    return lambda folder: rewrite(folder, number, change)


def segment(text, named=None):
    """A segment with this text, under the name of another one if that is given."""

    def spoil(folder):
        name = f"segment-00000-{hashlib.sha256((named or text).encode()).hexdigest()[:12]}.json"
        (folder / name).write_text(text)
        edit(folder, lambda m: m.update(segments=[name]))

    return spoil


def truncate(folder):
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-10])


def grow_header(folder):
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])


def set_padding(t):
    t["bits/conv"][-1] = 1


def set_last_bits(t):
    t["bits/conv"][108 // 8] |= 1 << (108 % 8)


def move_value(t):
    t["values/conv"][0] += 1


SPOILT = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), r"manifest\.json must be a readable bank manifest"),
    "manifest no JSON": (lambda f: (f / "manifest.json").write_text("{"), r"manifest\.json must be a readable bank manifest"),
    "manifest no text": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe\x00"), r"must be a readable bank manifest"),
    "manifest too deep": (lambda f: (f / "manifest.json").write_text("[" * 200_000), r"must be a readable bank manifest"),
    "manifest a list": (lambda f: (f / "manifest.json").write_text("[]"), r"must be the manifest of a subnet-kernels bank"),
    "other format": (manifest(format="other"), r"must be the manifest of a subnet-kernels bank"),
    "other version": (manifest(version=4), r"manifest\.json must be of a format version up to 3, got 4"),
    "no version": (manifest(version=None), r"must be of a format version up to 3, got None"),
    "no segments": (lambda f: edit(f, lambda m: m.pop("segments")), r"must have a proper 'segments'"),
    "segment a number": (manifest(segments=[7]), r"manifest\.json must name its segments plainly and without folders, got 7"),
    "segment up": (manifest(segments=[f"../segment-00000-{'0' * 12}.json"]), r"name its segments plainly .* got '\.\./segment"),
    "segment missing": (
        manifest(segments=[f"segment-00000-{'0' * 12}.json"]),
        r"segment-00000-0{12}\.json must be a readable segment",
    ),
    "segment no JSON": (segment("{"), r"segment-00000-\w+\.json must be a readable segment of a bank's manifest"),
    "segment a number inside": (segment("7"), r"segment-00000-\w+\.json must hold the rows that its name has the hash of"),
    "segment of numbers": (segment("[7]"), r"must have a proper 'name'"),
    "segment changed": (segment("[ ]", named="[]"), r"must hold the rows that its name has the hash of, its content is another"),
    "layers a list": (manifest(layers=[]), r"must have a proper 'layers'"),
    "layer without shape": (manifest(layers={"conv": {}}), r"must have a proper 'shape'"),
    "entries a number": (manifest(entries=7), r"must have a proper 'entries'"),
    "entry a number": (manifest(entries=[7]), r"must have a proper 'name'"),
    "state of numbers": (manifest(state=[1]), r"must list the names of its state"),
    "state of nobody": (manifest(state=["nobody"]), r"the model must have 'nobody', a part of the task state"),
    "hash a number": (manifest(backbone_sha256=7), r"must have a proper 'backbone_sha256'"),
    "facts a list": (entry(0, facts=[]), r"must have a proper 'facts'"),
    "kind unknown": (entry(0, kind="image"), r"must hold masks and combinations of different names, got 'image'"),
    "two of one name": (entry(1, name="task 0"), r"of different names, got 'mask' 'task 0'"),
    "combines nobody": (entry(3, over=["nobody"]), r"must combine masks that come earlier in it, 'mix' does not"),
    "combines nothing": (entry(3, over=[]), r"must combine masks that come earlier in it, 'mix' does not"),
    "path up": (entry(0, file="../x.safetensors"), r"plainly and without folders, got '\.\./x\.safetensors'"),
    "path absolute": (entry(0, file="/etc/passwd"), r"without folders, got '/etc/passwd'"),
    "path dots": (entry(0, file=".."), r"without folders, got '\.\.'"),
    "path empty": (entry(0, file=""), r"without folders, got ''"),
    "path with NUL": (entry(0, file="a\0.safetensors"), r"without folders"),
    "file missing": (entry(0, file="gone.safetensors"), r"gone\.safetensors must be a readable safetensors file"),
    "file truncated": (truncate, r"00001-task_1-\w+\.safetensors must be a readable safetensors file"),
    "file's header too large": (grow_header, r"00000-task_0-\w+\.safetensors must be a readable safetensors file"),
    "bits missing": (tensors(0, lambda t: t.pop("bits/conv")), r"00000.* must hold 64 bytes of bits for layer 'conv'"),
    "bits too short": (tensors(0, lambda t: t.update({"bits/conv": torch.zeros(63, dtype=torch.uint8)})), r"must hold 64 bytes"),
    "bits not bytes": (tensors(0, lambda t: t.update({"bits/conv": torch.zeros(64)})), r"must hold 64 bytes of bits"),
    "padding set": (tensors(0, set_padding), r"00000.* must have zero padding after the 108 bits of layer 'conv'"),
    "padding set in a byte": (tensors(0, set_last_bits), r"00000.* must have zero padding after the 108 bits of layer 'conv'"),
    "value moved": (tensors(0, move_value), r"weights in layer 'conv' must be those that .*00000.* was learnt on, they differ"),
    "values missing": (tensors(1, lambda t: t.pop("values/conv")), r"00001.* must hold the \d+ torch\.float32 values"),
    "values of another dtype": (
        tensors(0, lambda t: t.update({"values/conv": t["values/conv"].double()})),
        r"00000.* must hold the \d+ torch\.float32 values that layer 'conv' owns by it",
    ),
    "state missing": (tensors(2, lambda t: t.pop("state/norm.weight")), r"00002.* as task state 'norm\.weight', got nothing"),
    "state too much": (tensors(2, lambda t: t.update({"state/x": torch.ones(1)})), r"must hold nothing as task state 'x'"),
    "state of another shape": (
        tensors(2, lambda t: t.update({"state/norm.weight": torch.ones(7)})),
        r"00002.* must hold float32 \(6,\) as task state 'norm\.weight', got float32 \(7,\)",
    ),
    "head missing": (
        tensors(1, lambda t: t.pop("per_task/fc/bias")),
        r"00001.* must hold weight, bias of module 'fc', got weight",
    ),
    "head of other inputs": (
        tensors(1, lambda t: t.update({"per_task/fc/weight": torch.ones(7, 31)})),
        r"00001.* must hold float32 \(7, 30\) as 'weight' of module 'fc', got float32 \(7, 31\)",
    ),
    "head's bias of another width": (
        tensors(1, lambda t: t.update({"per_task/fc/bias": torch.ones(8)})),
        r"must hold float32 \(7,\) as 'bias' of module 'fc', got float32 \(8,\)",
    ),
    "alphas missing": (tensors(3, lambda t: t.pop("alphas")), r"00003.* must hold alphas of 3 masks.*got nothing"),
    "alphas of another shape": (
        tensors(3, lambda t: t.update({"alphas": torch.ones(2, 4)})),
        r"00003.* must hold alphas of 3 masks, for all layers or for each, got float32 \(2, 4\)",
    ),
    "shared weights of another model": (
        manifest(backbone_sha256="0" * 64),
        r"the model's weights must have hash 000000000000 as in .*zoo",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
@pytest.mark.parametrize("restore", [False, True])
def test_a_spoilt_bank_is_refused_in_a_sentence(zoo, saved, case, restore):
    spoil, message = SPOILT[case]
    model = model_of(saved[1])
    spoil(zoo)
    state = clone(model.state_dict())
    if restore and case == "value moved":
        message = None  # then the file is what is believed
        sk.MaskBank.load(zoo, model, restore=True)
    else:
        with pytest.raises(ValueError, match=message) as raised:
            sk.MaskBank.load(zoo, model, restore=restore)
        assert "\n" not in str(raised.value)
        assert str(zoo) in str(raised.value)
        assert same(state, model.state_dict())
        assert all(layer.frozen is None for layer in (model.conv, model.hidden))


def test_version_1_had_no_segments(zoo, saved):
    edit(zoo, lambda m: (m.update(version=1), m.pop("segments")))
    model = model_of(saved[1])
    assert same(outputs(model, sk.MaskBank.load(zoo, model)), saved[2])


def test_a_model_that_does_not_fit_is_refused(saved):
    folder, state, _ = saved
    cases = []
    other = sk.convert(Net(), sk.SubnetConfig(train_weights=True, per_task=["fc"]))
    cases.append((other, r"layer 'fixed' must have shape None as in .*zoo"))
    cases.append((net(train_weights=False), r"layer 'conv' must be converted with train_weights=True as in"))
    model = model_of(state)
    with torch.no_grad():
        model.fixed.weight[0, 0] += 1
    cases.append((model, r"the model's weights must have hash \w+ as in .*zoo, got \w+"))
    model = model_of(state)
    with torch.no_grad():
        model.hidden.weight.add_(1)
    cases.append((model, r"weights in layer 'hidden' must be those that .*zoo/00000.* was learnt on, they differ"))
    cases.append(
        (sk.convert(Net(), sk.SubnetConfig(filter=lambda n, m: n in ("conv", "hidden"), train_weights=True)), r"per_task")
    )
    for model, message in cases:
        with pytest.raises(ValueError, match=message) as raised:
            sk.MaskBank.load(folder, model)
        assert "\n" not in str(raised.value)


def test_read_takes_the_first_entries(saved):
    folder, state, logits = saved
    model = model_of(state)
    bank = sk.MaskBank(model)
    bank.read(folder, ["task 0", "task 1"])
    assert same(outputs(model, bank), {name: logits[name] for name in ("task 0", "task 1")})
    with pytest.raises(ValueError, match="the bank must be empty, it has 2 entries"):
        bank.read(folder)
    with pytest.raises(ValueError, match=r"must begin with the entries task 1, got task 0"):
        sk.MaskBank(model_of(state)).read(folder, ["task 1"])
