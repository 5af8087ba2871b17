"""The bank: what is committed comes back bit for bit, whatever ran in between and whatever happened to its files."""

import copy
import json
import os
import threading

import pytest
import torch
import torch.nn.functional as F
from device import generator
from safetensors.torch import load_file, save_file
from torch import nn

import subnet_kernels as sk
from subnet_kernels import reference, storage


class Net(nn.Module):
    """Convolution, norm, masked and fixed layers, and a head for each task."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.hidden = nn.Linear(6, 30)
        self.fixed = nn.Linear(30, 30).requires_grad_(False)  # dense and shared by all tasks
        self.fc = nn.Linear(30, 4)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.fc(self.fixed(self.hidden(x).relu()))


def net(train_weights=True, seed=0):
    torch.manual_seed(seed)
    only = lambda name, m: name in ("conv", "hidden")  # noqa: E731
    config = sk.SubnetConfig(density={"conv": 0.4, "hidden": 0.2}, train_weights=train_weights, filter=only, per_task=["fc"])
    return sk.convert(Net(), config)


def images(n=5, seed=1):
    return torch.randn(n, 2, 6, 6, generator=generator(seed))


def learn(model, seed, steps=2):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5, momentum=0.9)
    chance = generator(seed)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 2, 6, 6, generator=chance)).square().mean().backward()
        optimizer.step()
    return model.eval()


def learnt(tasks=3, train_weights=True, widths=(4, 7, 2)):
    """A bank of some tasks with heads of different widths, and each task's logits at its commit."""
    model = net(train_weights)
    bank = sk.MaskBank(model)
    logits = {}
    for t in range(tasks):
        bank.begin(scores="init" if t else "keep", per_task={"fc": widths[t % len(widths)]})
        learn(model, t)
        logits[f"task {t}"] = model(images()).detach()
        bank.commit(f"task {t}")
    return model, bank, logits


def outputs(model, bank):
    found = {}
    for name in bank.names:
        bank.activate(name)
        found[name] = model(images()).detach()
    bank.activate(None)
    return found


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def clone(state):
    return {k: v.clone() for k, v in state.items()}


def masks_of(bank, name):
    return {key: reference.unpack(bits, bank.model.get_submodule(key).weight.shape) for key, bits in bank.bits(name).items()}


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


def model_of(state):
    """A new model with the shared weights of a saved one, its own head and its own scores."""
    model = net(seed=5)
    fc = model.fc
    model.fc = nn.Linear(30, state["fc.weight"].shape[0])
    model.load_state_dict(state)
    model.fc = fc
    return model.eval()


# ------------------------------------------------------------------------------------------------------- learn and run


@pytest.mark.parametrize("train_weights", [True, False])
def test_each_task_comes_back(train_weights):
    model, bank, logits = learnt(3, train_weights)
    assert bank.names == ["task 0", "task 1", "task 2"]
    assert len(bank) == 3
    assert "task 1" in bank
    assert same(outputs(model, bank), logits)
    assert logits["task 1"].shape == (5, 7)
    bank.verify()


def test_none_gives_the_live_task_back():
    model, bank, _ = learnt()
    bank.begin(scores="init", per_task={"fc": 3})
    learn(model, 9)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.1)
    state, parameters, buffers = clone(model.state_dict()), dict(model.named_parameters()), dict(model.named_buffers())
    bits, y = bank.live_bits(), model(images()).detach()
    model.train()  # running statistics move while another task is active
    for name in ("task 0", "task 1", "task 2", "task 0"):
        bank.activate(name)
        assert bank.active == name
        model(images())
    bank.activate("task 2", in_place=True)
    bank.superpose(None, head="task 1")
    bank.activate(None)
    model.eval()
    assert bank.active is None
    assert same(state, model.state_dict())
    assert same(bits, bank.live_bits())
    now = dict(model.named_parameters())
    assert all(now[name] is p for name, p in parameters.items())
    assert all(b is buffers[name] for name, b in model.named_buffers())
    assert torch.equal(model(images()), y)
    model(images()).sum().backward()  # the optimizer made before still trains this head
    before = model.fc.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.fc.weight, before)


def test_what_is_stored_is_not_changed_by_running_it():
    """Neither train mode, nor in-place activation, nor writes to the model reach an entry."""
    model, bank, logits = learnt(3, widths=(4,))
    for name in bank.names:
        bank.activate(name)
        model.train()
        model(images())
        with torch.no_grad():
            for p in [*model.fc.parameters(), model.norm.weight, model.hidden.bias]:
                p.add_(1.0)
    for name in reversed(bank.names):
        bank.activate(name, in_place=True)
        with torch.no_grad():
            model.fc.weight.add_(1.0)
    model.eval()
    assert same(outputs(model, bank), logits)


def test_in_place_activation_keeps_addresses():
    model, bank, logits = learnt(3, widths=(4,))
    live = model(images()).detach()
    bank.activate("task 0", in_place=True)

    def addresses():
        used = [*model.parameters(), *model.buffers(), *(layer.effective_weight() for layer in bank.layers())]
        return [t.data_ptr() for t in used]

    first = addresses()
    for name in ("task 1", "task 2", "task 0"):
        bank.activate(name, in_place=True)
        assert addresses() == first
        assert torch.equal(model(images()), logits[name])
    bank.activate(None)
    assert torch.equal(model(images()), live)
    bank.activate("task 1")
    bank.activate("task 2", in_place=True)  # what a graph captured at first still reads the right memory
    assert addresses() == first
    assert torch.equal(model(images()), logits["task 2"])
    bank.activate(None)
    assert torch.equal(model(images()), live)


def test_in_place_activation_refuses_another_width():
    model, bank, logits = learnt(2)
    bank.activate("task 0", in_place=True)
    with pytest.raises(ValueError, match=r"in place, module 'fc' of 'task 1' must have the sizes"):
        bank.activate("task 1", in_place=True)
    bank.activate("task 1")
    assert torch.equal(model(images()), logits["task 1"])


def test_heads_follow_the_mode_of_the_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 3)))
    bank = sk.MaskBank(sk.convert(model, sk.SubnetConfig(per_task=["1"])))
    bank.commit("a")  # in train mode
    model.eval()
    bank.activate("a")
    assert not any(m.training for m in model.modules())
    bank.activate(None)
    assert not any(m.training for m in model.modules())
    bank.activate("a")
    model.train()
    bank.activate(None)
    assert all(m.training for m in model.modules())


def test_gradients_while_a_task_is_active():
    """Weights and scores get none; x does, through the open weights of that task."""
    model, bank, _ = learnt()
    model.zero_grad()
    bank.activate("task 1")
    x = images().requires_grad_()
    model(x).sum().backward()
    for layer in bank.layers():
        assert layer.weight.grad is None
        assert layer.scores.grad is None
    dense = bank.export("task 1")
    other = images().requires_grad_()
    dense(other).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)  # by PyTorch's own product
    assert (x.grad != 0).any()


def test_activate_given_bits():
    model, bank, _ = learnt()
    bits = bank.live_bits()
    live = model(images()).detach()
    other = {key: reference.pack(torch.rand(m.weight.shape) < 0.5) for key, m in zip(bank.layer_names, bank.layers())}
    bank.activate(None, bits=other)
    assert bank.active is None
    assert not bank.is_live
    assert not torch.equal(model(images()), live)
    bank.activate(None, bits=bits)
    assert torch.equal(model(images()), live)
    with pytest.raises(ValueError, match="expected a name or bits, got both"):
        bank.activate("task 0", bits=bits)
    with pytest.raises(ValueError, match=r"activate: bits must have the layers conv, hidden, got conv"):
        bank.activate(None, bits={"conv": bits["conv"]})
    bank.activate(None)
    assert bank.is_live


def test_as_task_gives_back_what_ran_before():
    model, bank, logits = learnt()
    live = model(images()).detach()
    for prepare in (
        lambda: bank.activate(None),
        lambda: bank.activate("task 1"),
        lambda: bank.superpose(None),
        lambda: bank.superpose(torch.rand(3), head="task 2"),
        lambda: bank.activate(None, bits=bank.bits("task 0")),
    ):
        prepare()
        before, active = model(images()).detach(), bank.active
        with bank.as_task("task 0"):
            assert torch.equal(model(images()), logits["task 0"])
        with pytest.raises(KeyError, match="interrupted"), bank.as_task("task 2"):
            raise KeyError("interrupted")
        assert bank.active == active
        assert torch.equal(model(images()), before)
    bank.activate(None)
    assert torch.equal(model(images()), live)


# -------------------------------------------------------------------------------------------------------------- commit


def test_commit_owns_and_freezes():
    _, bank, _ = learnt(2)
    union = {key: torch.zeros(m.weight.shape, dtype=torch.bool) for key, m in zip(bank.layer_names, bank.layers())}
    for name in bank.names:
        for key, mask in masks_of(bank, name).items():
            union[key] |= mask
    for key, layer in zip(bank.layer_names, bank.layers()):
        assert torch.equal(reference.unpack(bank.owned()[key], layer.weight.shape), union[key])
        assert torch.equal(layer.frozen, bank.owned()[key])
        assert torch.equal(layer.frozen_values, layer.weight.detach()[union[key]])


def test_fixed_weights_are_owned_but_never_frozen():
    _, bank, _ = learnt(2, train_weights=False)
    assert all(layer.frozen is None for layer in bank.layers())
    assert all(int(reference.count(bits)) for bits in bank.owned().values())


def test_begin_makes_a_fresh_task_state():
    model = net()
    bank = sk.MaskBank(model)
    initial = {k: v.clone() for k, v in model.state_dict().items() if k.startswith(("norm.", "conv.bias", "hidden.bias"))}
    learn(model, 0)
    bank.commit("a")
    scores, head = model.conv.scores.detach().clone(), model.fc
    assert not torch.equal(model.norm.running_mean, initial["norm.running_mean"])
    bank.begin(per_task={"fc": 12})
    assert all(torch.equal(model.state_dict()[k], v) for k, v in initial.items())
    assert torch.equal(model.conv.scores, scores)
    assert model.fc is not head
    assert model.fc.out_features == 12
    bank.begin(scores="init")
    assert not torch.equal(model.conv.scores, scores)
    assert torch.equal(model.conv.bits, reference.select([model.conv.scores], [model.conv.k])[0])
    assert model.fc.out_features == 12
    state = clone(model.state_dict())
    for bad, message in (
        ({"scores": "new"}, "begin: scores must be 'keep' or 'init', got 'new'"),
        ({"per_task": {"head": 3}}, "begin: per_task must name modules of fc, got head"),
    ):
        with pytest.raises(ValueError, match=message):
            bank.begin(**bad)
    assert same(state, model.state_dict())


def test_begin_refuses_a_width_for_what_is_no_linear():
    model = sk.convert(nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 3))), sk.SubnetConfig(per_task=["1"]))
    bank = sk.MaskBank(model)
    state = clone(model.state_dict())
    with pytest.raises(ValueError, match="module '1' must be a Linear to be given a width, got Sequential"):
        bank.begin(scores="init", per_task={"1": 5})
    assert same(state, model.state_dict())


def test_commit_given_bits():
    model, bank, _ = learnt(1)
    bits = {key: reference.pack(torch.rand(m.weight.shape) < 0.5) for key, m in zip(bank.layer_names, bank.layers())}
    kept = clone(bits)
    bank.commit("given", bits=bits)
    bits["conv"].zero_()  # the caller's to reuse
    assert same(bank.bits("given"), kept)
    bank.bits("given")["conv"].zero_()  # and so is what the bank hands out
    bank.owned()["conv"].zero_()
    bank.live_bits()["conv"].zero_()
    assert same(bank.bits("given"), kept)
    assert int(reference.count(bank.owned()["conv"]))
    assert torch.equal(model.conv.bits, reference.select([model.conv.scores], [model.conv.k])[0])


def test_commit_refuses_in_a_sentence_and_stores_nothing():
    _, bank, _ = learnt(2)
    bits = bank.live_bits()
    padded = {**bits, "conv": bits["conv"].clone()}
    padded["conv"][-1] = 128
    owned = bank.owned()
    cases = [
        (("",), {}, "name must be a non-empty string"),
        (("task 0",), {}, "'task 0' must be a new name, the bank has it already"),
        (("new",), {"bits": {"conv": bits["conv"]}}, "bits must have the layers conv, hidden, got conv"),
        (("new",), {"bits": {**bits, "conv": bits["conv"][:-1]}}, r"bits of layer 'conv' must be uint8 of \(64,\)"),
        (("new",), {"bits": {**bits, "conv": bits["conv"].int()}}, "must be uint8"),
        (("new",), {"bits": padded}, "bits of layer 'conv' must have zero padding after its 108 weights"),
        (("new",), {"bits": bits, "alphas": torch.ones(2)}, "expected bits or alphas, got both"),
        (("new",), {"alphas": torch.ones(3)}, r"alphas must have shape \(2,\) or \(2, 2\), masked layers by masks, got \(3,\)"),
        (("new",), {"over": ["task 0"]}, "over must come with alphas"),
        (("new",), {"accuracy": torch.ones(1)}, "facts must be values that JSON has"),
        (("new",), {"tensors": {"a": 1.0}}, "tensors must be named tensors, got float for 'a'"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(ValueError, match=message) as raised:
            bank.commit(*arguments, **options)
        assert "\n" not in str(raised.value)
    bank.activate("task 0")
    with pytest.raises(ValueError, match="the live task must be active, got 'task 0'"):
        bank.commit("new")
    bank.activate(None)
    assert bank.names == ["task 0", "task 1"]
    assert same(owned, bank.owned())
    with pytest.raises(KeyError, match="'nobody' must be one of its 2 entries"):
        bank.activate("nobody")


def test_a_weight_moved_by_force_is_put_back_at_the_next_commit():
    model, bank, logits = learnt(1)
    model.conv.weight.data.add_(1.0)
    with pytest.raises(RuntimeError, match=r"layer 'conv' must keep its \d+ frozen weights, \d+ of them moved"):
        bank.verify()
    bank.commit("next")
    bank.verify()
    bank.activate("task 0")
    assert torch.equal(model(images()), logits["task 0"])


@pytest.mark.parametrize("what", ["weight", "shared"])
def test_verify_hashes_a_backbone_that_does_not_learn(what):
    model, bank, _ = learnt(1, train_weights=False)
    bank.verify()
    with torch.no_grad():
        (model.conv if what == "weight" else model.fixed).weight[0, 0] += 1e-6
    with pytest.raises(RuntimeError, match=r"the backbone must have hash [0-9a-f]{12}, got [0-9a-f]{12}"):
        bank.verify()


def test_verify_tells_bits_apart_not_values():
    """-0.0 is not 0.0, and NaN is itself."""
    model = net()
    with torch.no_grad():
        model.hidden.weight[0].fill_(float("nan"))
        model.hidden.weight[1].fill_(0.0)
        model.hidden.scores[:2].fill_(9.0)
    bank = sk.MaskBank(model)
    bank.commit("a")
    bank.verify()
    with torch.no_grad():
        model.hidden.weight[1].neg_()
    with pytest.raises(RuntimeError, match="layer 'hidden' must keep its 36 frozen weights, 6 of them moved"):
        bank.verify()


def test_what_is_a_tasks_state_does_not_change_with_requires_grad():
    model, bank, logits = learnt(2)
    model.requires_grad_(False)  # for serving
    assert same(outputs(model, bank), logits)


def test_remove():
    model, bank, logits = learnt(3)
    bits = bank.bits("task 2")
    bank.commit("mix", alphas=torch.tensor([0.5, 0.5]), over=["task 0", "task 2"])
    with pytest.raises(ValueError, match="'task 0' must not be part of a combination, 'mix' uses it"):
        bank.remove("task 0")
    bank.remove("mix")
    bank.remove("task 1")
    assert bank.names == ["task 0", "task 2"]
    assert same(bank.bits("task 2"), bits)
    for key in bank.layer_names:
        union = bank.bits("task 0")[key] | bits[key]
        assert torch.equal(bank.owned()[key], union)
        assert torch.equal(model.get_submodule(key).frozen, union)
    del logits["task 1"]
    assert same(outputs(model, bank), logits)
    for name in bank.names:
        bank.remove(name)
    assert all(layer.frozen is None and layer.frozen_values is None for layer in bank.layers())
    assert all(not bits.any() for bits in bank.owned().values())
    assert bank.capacity()["used_fraction"] == 0


def test_replace():
    model, bank, logits = learnt(3, train_weights=False)
    owned, files = bank.owned(), [entry.saved for entry in bank._entries.values()]
    bank.begin(scores="init", per_task={"fc": 5})
    learn(model, 9)
    logits["task 1"] = model(images()).detach()
    live, old = bank.live_bits(), bank.bits("task 1")
    facts = bank["task 1"].facts
    bank.replace("task 1")
    assert bank.names == ["task 0", "task 1", "task 2"]
    assert same(bank.bits("task 1"), live)
    assert not same(live, old)
    assert bank["task 1"].facts is facts
    for key in bank.layer_names:
        union = bank.bits("task 0")[key] | live[key] | bank.bits("task 2")[key]
        assert torch.equal(bank.owned()[key], union)
        assert not torch.equal(union, owned[key])  # what the old mask alone had opened is owned no more
    assert same(outputs(model, bank), logits)
    assert files == [None] * 3
    bank.verify()


def test_replace_in_a_full_block_and_after_it():
    """K = 130; a superposition that is under way keeps the masks that it began with, and equal alphas are counted anew."""
    torch.manual_seed(0)
    model = sk.convert(nn.Sequential(nn.Linear(20, 30, bias=False)), sk.SubnetConfig(density=0.3, train_weights=False))
    bank = sk.MaskBank(model)
    masks = [torch.rand(30, 20) < 0.3 for _ in range(130)]
    for i, mask in enumerate(masks):
        bank.commit(str(i), bits={"0": reference.pack(mask)})
    x = torch.randn(4, 20)
    bank.superpose(None)
    before = model(x)
    for i in (5, 63, 64, 128):
        bank.activate(None)
        with torch.no_grad():
            model[0].scores.uniform_(-1, 1)
        bank.superpose(None)
        bank.replace(str(i))
        torch.testing.assert_close(model(x), before, rtol=0, atol=0)
        masks[i] = reference.unpack(model[0].bits, (30, 20))
        bank.superpose(None)
        before = model(x)
        torch.testing.assert_close(
            before, F.linear(x, model[0].weight * torch.stack(masks).float().mean(0)), rtol=1e-5, atol=1e-5
        )
    assert torch.equal(reference.unpack(bank.owned()["0"], (30, 20)), torch.stack(masks).any(0))
    assert all(torch.equal(masks_of(bank, str(i))["0"], mask) for i, mask in enumerate(masks))


def test_a_replaced_mask_is_saved_beside_the_old_file(tmp_path):
    model, bank, _ = learnt(2, train_weights=False)
    bank.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    with torch.no_grad():
        model.conv.scores.neg_().mul_(torch.rand_like(model.conv.scores))
    bank.replace("task 0")
    bank.save(tmp_path)
    after = {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    assert len(after) == 3
    assert before.items() <= after.items()
    again = sk.MaskBank.load(tmp_path, net(False))
    assert all(same(again.bits(name), bank.bits(name)) for name in bank.names)


def test_replace_refuses_in_a_sentence():
    model, bank, _ = learnt(2)
    with pytest.raises(ValueError, match="replace: weights must not learn, 'task 0' owns"):
        bank.replace("task 0")
    model, bank, logits = learnt(2, train_weights=False)
    with pytest.raises(KeyError, match="'task 7' must be one of its 2 entries"):
        bank.replace("task 7")
    bank.commit("mix", alphas=torch.tensor([0.5]), over=["task 0"])
    with pytest.raises(ValueError, match="replace: 'mix' must be a mask, it is a combination"):
        bank.replace("mix")
    with pytest.raises(ValueError, match="replace: 'task 0' must not be part of a combination, 'mix' uses it"):
        bank.replace("task 0")
    bank.activate("task 0")
    with pytest.raises(ValueError, match="replace: the live task must be active, got 'task 0'"):
        bank.replace("task 1")
    bank.activate(None)
    bank.remove("mix")
    assert same(outputs(model, bank), logits)


def test_many_masks_are_kept_in_blocks():
    """K = 130: blocks of 64, 64 and 2; earlier ones never move; each mask comes back."""
    torch.manual_seed(0)
    model = sk.convert(nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 3)), sk.SubnetConfig(density=0.3))
    bank = sk.MaskBank(model)
    masks = [{key: torch.rand(m.weight.shape) < 0.3 for key, m in zip(bank.layer_names, bank.layers())} for _ in range(130)]
    pointers = None
    for i, mask in enumerate(masks):
        bank.commit(str(i), bits={key: reference.pack(m) for key, m in mask.items()})
        if i == 127:
            pointers = [block.data_ptr() for block in bank._masks.blocks["0"]]
    assert [tuple(block.shape) for block in bank._masks.blocks["0"]] == [(2, 64, 64), (2, 64, 64), (2, 2, 64)]
    assert [block.data_ptr() for block in bank._masks.blocks["0"]][:2] == pointers
    for i in (0, 63, 64, 127, 128, 129):
        assert all(torch.equal(m, masks[i][key]) for key, m in masks_of(bank, str(i)).items())
    packed = reference.pack_bank(torch.stack([m["0"] for m in masks]))
    assert all(torch.equal(a, b) for a, b in zip(packed, bank._masks.blocks["0"]))
    alphas = torch.rand(130)
    bank.superpose(alphas)
    x = torch.randn(4, 20)
    first, last = (torch.tensordot(alphas, torch.stack([m[key] for m in masks]).float(), 1) for key in ("0", "1"))
    expected = F.linear(F.linear(x, model[0].weight * first, model[0].bias), model[1].weight * last, model[1].bias)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- superposition


def mixed(model, bank, alphas, head, x):
    """The network with W * sum_k alpha_k M_k written out, for autograd to differentiate."""
    module = bank.export(head)
    weights = {}
    for i, (key, layer) in enumerate(zip(bank.layer_names, bank.layers())):
        masks = torch.stack([masks_of(bank, name)[key] for name in bank.masks]).to(layer.weight.dtype)
        row = alphas if alphas.dim() == 1 else alphas[i]
        weights[f"{key}.weight"] = layer.weight.detach() * torch.tensordot(row, masks, 1)
    return torch.func.functional_call(module, weights, (x,))


@pytest.mark.parametrize("per_layer", [False, True])
def test_superposition_and_its_gradient(per_layer):
    model, bank, _ = learnt()
    model.double().zero_grad()
    alphas = torch.rand((2, 3) if per_layer else 3, dtype=torch.float64, requires_grad=True)
    assert bank.superpose(alphas, head="task 1") is alphas
    assert bank.active is None
    x = images().double().requires_grad_()
    model(x).square().sum().backward()
    mine, mine_x = alphas.grad.clone(), x.grad.clone()
    alphas.grad = x.grad = None
    for layer in bank.layers():
        assert layer.weight.grad is None
        assert layer.scores.grad is None
    mixed(model, bank, alphas, "task 1", x).square().sum().backward()
    torch.testing.assert_close(mine, alphas.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(mine_x, x.grad, rtol=1e-9, atol=1e-12)


def test_equal_superposition():
    model, bank, _ = learnt()
    alphas = bank.superpose(None, head="task 0")
    assert alphas.is_leaf
    assert alphas.requires_grad
    assert torch.equal(alphas, torch.full((3,), 1 / 3))
    y = model(images())
    torch.testing.assert_close(y, mixed(model, bank, alphas, "task 0", images()), rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    mine, alphas.grad = alphas.grad, None
    mixed(model, bank, alphas, "task 0", images()).square().sum().backward()
    torch.testing.assert_close(mine, alphas.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", ["equal", "shared", "per layer"])
def test_alphas_can_be_learnt(given):
    """The alphas handed out are those that forward reads, at every step, the equal ones too once they have moved."""
    model, bank, _ = learnt()
    alphas = {"equal": None, "shared": torch.full((3,), 1 / 3), "per layer": torch.full((2, 3), 1 / 3)}[given]
    alphas = bank.superpose(alphas if alphas is None else alphas.requires_grad_(), head="task 2")
    optimizer = torch.optim.SGD([alphas], 2.0)
    for _ in range(3):
        optimizer.zero_grad()
        model(images()).square().mean().backward()
        optimizer.step()
        torch.testing.assert_close(model(images()), mixed(model, bank, alphas, "task 2", images()), rtol=1e-4, atol=1e-5)
    assert (alphas - 1 / 3).abs().max() > 1e-5


def test_superposition_over_some_and_of_the_live_head():
    model, bank, _ = learnt(3, widths=(4,))
    bank.activate("task 1")
    bank.superpose(torch.tensor([0.0, 1.0]), over=["task 0", "task 2"])  # the mask of task 2, the state of the live task
    y = model(images()).detach()
    bank.activate(None, bits=bank.bits("task 2"))
    torch.testing.assert_close(model(images()), y, rtol=1e-6, atol=1e-6)
    for over, error, message in (
        ([], ValueError, "expected at least one mask"),
        (["nobody"], KeyError, "'nobody' must be one of"),
    ):
        with pytest.raises(error, match=message):
            bank.superpose(None, over=over)
    with pytest.raises(ValueError, match=r"alphas must have shape \(3,\) or \(2, 3\)"):
        bank.superpose(torch.ones(4))
    with pytest.raises(KeyError, match="'nobody' must be one of"):
        bank.superpose(None, head="nobody")
    assert torch.equal(model(images()), model(images()))
    assert bank.active is None


def test_a_commit_during_a_superposition_leaves_it_as_it_was():
    model, bank, _ = learnt(2, widths=(4,))
    bank.superpose(torch.tensor([0.3, 0.7]))
    y = model(images()).detach()
    bank.commit("third")
    assert torch.equal(model(images()), y)


def test_a_superposed_model_can_be_copied():
    model, bank, _ = learnt(2, widths=(4,))
    logits = torch.zeros(2, requires_grad=True)
    bank.superpose(logits.softmax(0))
    assert torch.equal(copy.deepcopy(model)(images()), model(images()))


class Rows(nn.Module):
    """Nothing that makes rows depend on each other, activations in place, a layer used twice, and one that goes nowhere."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3, stride=2, padding=1, padding_mode="circular")
        self.same = nn.Conv2d(5, 5, (3, 1), padding="same", dilation=2)
        self.twice = nn.Linear(5, 5)
        self.lost = nn.Linear(5, 2)
        self.out = nn.Linear(5, 3)

    def forward(self, x):
        x = F.relu(self.conv(x), inplace=True)
        x = self.same(x).relu_().flatten(2).mean(2)
        self.lost(x)
        return self.out(torch.tanh(self.twice(torch.relu_(self.twice(x)))))


@pytest.mark.parametrize("tasks", [3, 66])
def test_row_gradients_are_autograds_row_by_row(tasks):
    torch.manual_seed(0)
    model = sk.convert(Rows(), sk.SubnetConfig(density=0.5)).double()
    bank = sk.MaskBank(model)
    for k in range(tasks):
        bank.commit(str(k), bits={n: reference.pack(torch.rand(m.weight.shape) < 0.5) for n, m in model.named_children()})
    x = torch.randn(4, 2, 7, 6, dtype=torch.float64)
    objective = lambda y: -(y.softmax(1) * y.log_softmax(1)).sum(1)  # noqa: E731
    live = model(x).detach()
    chosen = range(4) if tasks < 60 else range(1)
    rows = bank.row_alpha_grad(x, objective)
    assert rows.shape == (4, tasks)
    assert bank.is_live  # and the model runs as it did
    assert torch.equal(model(x), live)
    for b in chosen:
        alphas = bank.superpose(torch.full((tasks,), 1 / tasks, dtype=torch.float64, requires_grad=True))
        (expected,) = torch.autograd.grad(objective(model(x[b : b + 1])).sum(), alphas)
        torch.testing.assert_close(rows[b], expected, rtol=1e-9, atol=1e-12)
    some = [str(k) for k in (2, 0)]
    torch.testing.assert_close(
        bank.row_alpha_grad(x, objective, over=some),
        torch.stack([_one_row(bank, model, x[b : b + 1], objective, some) for b in range(4)]),
        rtol=1e-9,
        atol=1e-12,
    )


def _one_row(bank, model, x, objective, over):
    alphas = bank.superpose(torch.full((len(over),), 1 / len(over), dtype=x.dtype, requires_grad=True), over=over)
    return torch.autograd.grad(objective(model(x)).sum(), alphas)[0]


def test_row_gradients_are_refused_where_there_are_none():
    model = sk.convert(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), sk.SubnetConfig())
    bank = sk.MaskBank(model)
    bank.commit("a")
    with pytest.raises(ValueError, match="layer '0' must be linear or an ungrouped Conv2d, got SubnetConv2d"):
        bank.row_alpha_grad(torch.ones(1, 4, 5, 5), lambda y: y.flatten(1).sum(1))


def test_a_combination_is_an_entry():
    model, bank, _ = learnt(3, widths=(4,))
    alphas = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, -0.5]])
    bank.superpose(alphas)
    y = model(images()).detach()
    owned = bank.owned()
    bank.activate(None)
    bank.commit("mix", alphas=alphas)
    alphas.zero_()
    bank.activate("mix")
    torch.testing.assert_close(model(images()), y, rtol=1e-6, atol=1e-6)
    assert same(owned, bank.owned())
    assert bank.masks == ["task 0", "task 1", "task 2"]
    bank.activate(None)
    bank.commit("later")
    assert bank["later"].index == 3  # a combination takes no place among the masks
    bank.activate("mix")
    torch.testing.assert_close(model(images()), y, rtol=1e-6, atol=1e-6)
    for call in (lambda: bank.bits("mix"), lambda: bank.superpose(None, over=["mix"])):
        with pytest.raises(ValueError, match="'mix' must be a mask, it is a combination"):
            call()


# ------------------------------------------------------------------------------------------------------ views, exports


def test_export_is_a_plain_module():
    model, bank, logits = learnt()
    bank.activate("task 0")
    state = clone(model.state_dict())
    versions = [(p, p._version) for p in model.parameters()]
    for name in bank.names:
        dense = bank.export(name)
        assert type(dense.conv) is nn.Conv2d
        assert type(dense.hidden) is nn.Linear
        assert list(dense.state_dict()) == list(Net().state_dict())
        assert not any(hasattr(m, "scores") or hasattr(m, "bits") for m in dense.modules())
        torch.testing.assert_close(dense(images()), logits[name])  # by PyTorch's own product
        shared = {t.data_ptr() for t in [*model.state_dict().values()]}
        assert not shared & {t.data_ptr() for t in dense.state_dict().values()}
    assert bank.active == "task 0"
    assert same(state, model.state_dict())
    assert all(p._version == v for p, v in versions)  # exporting writes nothing, not even back
    bank.activate(None)
    before = dense(images())
    learn(model, 7)  # an export alive does not disturb training
    assert torch.equal(dense(images()), before)
    bank.verify()
    torch.save(dense.state_dict(), os.devnull)
    program = torch.export.export(dense.eval(), (images(),))
    torch.testing.assert_close(program.module()(images()), logits["task 2"])


def test_export_of_a_bare_layer():
    layer = sk.convert(nn.Linear(6, 3), sk.SubnetConfig(density=0.5))
    bank = sk.MaskBank(layer)
    bank.commit("a")
    dense = bank.export("a")
    assert type(dense) is nn.Linear
    torch.testing.assert_close(dense(torch.ones(1, 6)), layer(torch.ones(1, 6)))


def test_a_view_is_a_snapshot():
    model, bank, logits = learnt()
    view = bank.view("task 1")
    assert not view.training
    assert not any(p.requires_grad for p in view.parameters())
    for change in (
        view.train,
        lambda: view.load_state_dict(view.state_dict()),
        view.half,
        lambda: view.to("meta"),
        view.requires_grad_,
        lambda: setattr(view, "module", nn.Identity()),
    ):
        with pytest.raises((RuntimeError, AttributeError), match="snapshot"):
            change()
    assert view.eval() is view
    before = view(images())
    torch.testing.assert_close(before, logits["task 1"])
    bank.begin(scores="init")
    learn(model, 8, 3)
    bank.remove("task 1")
    assert torch.equal(view(images()), before)
    assert torch.equal(copy.deepcopy(view)(images()), before)


def test_views_serve_from_many_threads():
    model, bank, _ = learnt()
    views = {name: bank.view(name) for name in bank.names}
    logits = {name: view(images()) for name, view in views.items()}
    wrong, barrier, x = [], threading.Barrier(4), images()  # made here: a default device is the thread's own

    def serve(name):
        barrier.wait()
        for _ in range(30):
            if not torch.equal(views[name](x), logits[name]):
                wrong.append(name)

    threads = [threading.Thread(target=serve, args=(name,)) for name in ("task 0", "task 0", "task 1")]
    for thread in threads:
        thread.start()
    barrier.wait()
    bank.begin(scores="init")
    learn(model, 11, 10)  # the backbone goes on learning meanwhile
    for name in bank.names:
        bank.activate(name)
    for thread in threads:
        thread.join()
    assert wrong == []


# ------------------------------------------------------------------------------------------------------------ capacity


def test_capacity_by_hand():
    """Two layers of 100 and 600 weights are padded to 64 and 128 bytes."""
    model = sk.convert(nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 60)), sk.SubnetConfig(density=0.1, train_weights=True))
    bank = sk.MaskBank(model)
    empty = bank.capacity()
    assert empty["used_fraction"] == 0
    assert empty["measured_cap"] == 0
    first, second = torch.zeros(10, 10, dtype=torch.bool), torch.zeros(60, 10, dtype=torch.bool)
    first[0], second[:6] = True, True
    other = first.roll(5)  # 5 of its 10 weights are new
    bank.commit("a", bits={"0": reference.pack(first), "1": reference.pack(second)})
    bank.commit("b", bits={"0": reference.pack(other), "1": reference.pack(second)})
    got = bank.capacity()
    used, dense = 10 + 5 + 60, 4 * 700
    assert got["used_fraction"] == pytest.approx(used / 700)
    assert got["mask_bytes"] == 2 * (64 + 128)
    assert got["bits_per_weight"] == pytest.approx(8 * 192 / 700)
    assert got["measured_cap"] == pytest.approx(100 * (4 * used + 384) / dense)
    assert got["seed_only_cap"] is None
    bank.commit("mix", alphas=torch.ones(2, 2))
    assert bank.capacity()["measured_cap"] == pytest.approx(100 * (4 * used + 384 + 16) / dense)


def test_capacity_of_a_fixed_backbone():
    model = sk.convert(nn.Linear(10, 70), sk.SubnetConfig(density=0.1))
    bank = sk.MaskBank(model)
    bank.commit("a")
    got = bank.capacity()
    assert got["used_fraction"] == pytest.approx(0.1)
    assert got["measured_cap"] == pytest.approx(100 + 100 * 128 / 2800)
    assert got["seed_only_cap"] == pytest.approx(100 * 128 / 2800)


def test_overlap():
    _, bank, _ = learnt()
    none = sk.MaskBank(net()).overlap()
    assert {key: (m.shape, m.dtype) for key, m in none.items()} == {key: ((0, 0), torch.int64) for key in ("conv", "hidden")}
    for key, found in bank.overlap().items():
        masks = [sk.unpack(bank.bits(name)[key], (bank._layers[key].weight.numel(),)).long() for name in bank.masks]
        assert found.tolist() == [[(a * b).sum().item() for b in masks] for a in masks]


# ------------------------------------------------------------------------------------------------------------- on disk


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
    "other version": (manifest(version=2), r"manifest\.json must be of format version 1, got 2"),
    "no version": (manifest(version=None), r"must be of format version 1, got None"),
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="moves a model to a CUDA device, and there is none")
def test_the_bank_follows_the_model_to_another_device(tmp_path):
    model, bank, logits = learnt(3)
    model.cuda()
    for name in bank.names:
        bank.activate(name)
        torch.testing.assert_close(model(images().cuda()).cpu(), logits[name].cpu(), rtol=1e-3, atol=1e-3)
    bank.superpose(None, head="task 1")
    model(images().cuda())
    bank.activate(None)
    bank.commit("on the GPU")
    bank.save(tmp_path)
    bank.verify()
    assert sk.MaskBank.load(tmp_path, model).names == bank.names


def test_two_banks_over_one_model():
    model, bank, _ = learnt(1)
    bank.activate("task 0")
    with pytest.raises(ValueError, match=r"activate\(None\) there first"):
        sk.MaskBank(model)
    bank.activate(None)
    sk.MaskBank(model)
    with pytest.raises(RuntimeError, match="another bank took over the model"):
        bank.verify()


def test_a_dense_model_is_refused():
    with pytest.raises(ValueError, match="expected a converted model, got Linear without a masked layer"):
        sk.MaskBank(nn.Linear(3, 3))


# ------------------------------------------------------------------------------------------------- rows of different tasks


class Plain(nn.Module):
    """Masked layers of each kind, whose biases are the task state."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.hidden = nn.Linear(36, 30)
        self.fc = nn.Linear(30, 4)

    def forward(self, x):
        x = self.conv(x).relu()
        return self.fc(self.hidden(x.flatten(2)).mean(1).relu())  # a linear layer on several vectors a row


def plain(tasks=3, widths=(4,), biases=True):
    torch.manual_seed(0)
    config = sk.SubnetConfig(density=0.3, per_task=["fc"])
    model = sk.convert(Plain(), config).eval()
    if not biases:
        for layer in (model.conv, model.hidden):
            layer.bias.requires_grad_(False)
    bank = sk.MaskBank(model)
    for t in range(tasks):
        bank.begin(scores="init", per_task={"fc": widths[t % len(widths)]})
        learn(model, t)
        bank.commit(f"task {t}")
    return model.eval(), bank


def row_by_row(model, bank, x, names):
    """What each row gives with its own task active, padded with -inf."""
    results = []
    for row, name in zip(x, names):
        with bank.as_task(name):
            results.append(model(row[None])[0])
    widest = max(len(y) for y in results)
    return torch.stack([F.pad(y, (0, widest - len(y)), value=-torch.inf) for y in results])


@pytest.mark.parametrize("kind", ["biases", "no biases", "widths", "norm"])
def test_rows_of_different_tasks(kind):
    """The same as activating each row's task: with norms the whole model runs a task at a time, without all at once."""
    if kind == "norm":
        model, bank, _ = learnt(widths=(4, 7, 2))
    else:
        model, bank = plain(widths=(4, 7, 2) if kind == "widths" else (4,), biases=kind != "no biases")
    x, ids = images(9), torch.tensor([2, 0, 0, 1, 2, 1, 0, 2, 2])
    names = [f"task {t}" for t in ids.tolist()]
    live, expected = model(x).detach(), row_by_row(model, bank, x, names)
    state, modules = clone(model.state_dict()), dict(model.named_modules())
    for given in (ids, names, tuple(names)):
        with bank.rows(given):
            y = model(x)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(y.argmax(1), expected.argmax(1))
    with bank.rows(torch.tensor([1] * 9)):  # one task: that of activate
        one = model(x)
    bank.activate("task 1")
    assert torch.equal(one, model(x))
    bank.activate(None)
    assert torch.equal(model(x), live)
    assert same(state, model.state_dict())
    assert all(m is modules[name] for name, m in model.named_modules())


def test_rows_of_more_tasks_than_a_block():
    model = sk.convert(nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5)), sk.SubnetConfig(density=0.3)).eval()
    bank = sk.MaskBank(model)
    for t in range(67):
        bank.commit(str(t), bits={key: reference.pack(torch.rand(m.weight.shape) < 0.3) for key, m in zip("02", bank.layers())})
    ids, x = torch.randint(0, 67, (100,)), torch.randn(100, 20)
    with bank.rows(ids):
        y = model(x)
    torch.testing.assert_close(y, row_by_row(model, bank, x, [str(t) for t in ids.tolist()]), rtol=1e-5, atol=1e-6)


def test_rows_inside_an_active_task_and_after_an_error():
    model, bank = plain()
    x = images(3)
    bank.activate("task 1")
    y = model(x).detach()
    with pytest.raises(ValueError, match="must have 3 rows first"), bank.rows(torch.tensor([0, 1, 2])):
        model(images(4))
    assert bank.active == "task 1"
    assert torch.equal(model(x), y)


def test_rows_give_gradients_to_x():
    model, bank = plain()
    x, ids = images(4).requires_grad_(), torch.tensor([2, 0, 1, 0])
    with bank.rows(ids):
        model(x).square().sum().backward()
    other = images(4).requires_grad_()
    row_by_row(model, bank, other, [f"task {t}" for t in ids.tolist()]).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-6)
    assert all(layer.weight.grad is None or not layer.weight.grad.any() for layer in bank.layers())


def test_rows_of_combinations():
    model, bank = plain()
    bank.commit("mix", alphas=torch.tensor([0.5, 0.25, 0.25]))
    names = ["mix", "task 0", "mix", "task 2"]
    x = images(4)
    with bank.rows(names):
        y = model(x)
    torch.testing.assert_close(y, row_by_row(model, bank, x, names), rtol=1e-5, atol=1e-6)


def test_bad_rows_get_a_sentence():
    model, bank = plain()
    for given, message in [
        (torch.tensor([0, 3]), "task_ids must be between 0 and 2, the masks of the bank, got 3"),
        (torch.tensor([0, -1]), "task_ids must be between 0 and 2, the masks of the bank, got -1"),
        (torch.tensor([0.0]), r"task_ids must be int64 \(B,\) or names"),
        (torch.tensor([], dtype=torch.int64), "with B >= 1"),
        ([], "with B >= 1, got none"),
    ]:
        with pytest.raises(ValueError, match=message), bank.rows(given):
            pass
    with pytest.raises(KeyError, match="absent"), bank.rows(["task 0", "absent"]):
        pass
    with pytest.raises(ValueError, match="input must have 2 rows first, got"), bank.rows(torch.tensor([0, 1])):
        model(images(3))
    assert bank.is_live
