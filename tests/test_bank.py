"""The bank: what is committed comes back bit for bit, whatever ran in between."""

import copy
import importlib.util
import os
import threading

import pytest
import torch
from banks import Net, clone, images, learn, learnt, masks_of, net, outputs, same
from torch import nn

import subnet_kernels as sk
from subnet_kernels import reference

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


def test_cached_weights_move_pointers(monkeypatch):
    model, bank, logits = learnt(4, widths=(4,))
    made = []
    original = bank._effective
    monkeypatch.setattr(bank, "_effective", lambda entry, bits: (made.append(entry), original(entry, bits))[1])

    def visit(*names):
        """The effective weight of a layer as each of these tasks, and how many had to be made."""
        made.clear()
        found = []
        for name in names:
            bank.activate(name)
            found.append(model.hidden._active)
            assert torch.equal(model(images()).detach(), logits[name])
        bank.activate(None)
        return found, len(made)

    assert visit("task 0", "task 0")[1] == 2  # nothing is kept unless asked for
    bank.cached = 2
    (a, _, again, _), count = visit("task 0", "task 1", "task 0", "task 1")
    assert count == 2
    assert again is a
    assert visit("task 2", "task 1", "task 0")[1] == 2  # task 0 was used longest ago and went
    before = model.hidden._active
    bank.activate("task 0", in_place=True)
    slot = model.hidden._active
    bank.activate("task 1", in_place=True)
    assert model.hidden._active is slot
    assert torch.equal(model(images()).detach(), logits["task 1"])
    bank.activate(None)
    assert before is model.hidden._active is None
    assert visit("task 0", "task 1")[1] == 0  # and in place nothing was written into what is kept
    for change in (
        lambda: learn(model, 5),
        lambda: model.double().float(),
        lambda: bank.rename("task 3", "other"),
        lambda: bank.remove("other"),
        lambda: model.hidden.load_state_dict(model.hidden.state_dict()),
    ):
        change()
        assert visit("task 0", "task 1")[1] == 2
    bank.view("task 0")
    assert visit("task 0", "task 1")[1] == 0


def test_rename(tmp_path):
    model, bank, logits = learnt()
    bank.commit("mix", alphas=torch.tensor([0.5, 0.25, 0.25]))
    bank.save(tmp_path)
    bank.activate("task 1")
    bank.rename("task 1", "birds")
    assert bank.names == ["task 0", "birds", "task 2", "mix"]
    assert bank.masks == ["task 0", "birds", "task 2"]
    assert bank["mix"].over == ("task 0", "birds", "task 2")
    assert bank.active == "birds"
    with bank.as_task("task 0"):
        pass
    assert bank.active == "birds"
    assert torch.equal(model(images()), logits["task 1"])
    bank.rename("mix", "both")
    bank.activate("both")
    both = model(images()).detach()
    bank.activate(None)
    files = set(tmp_path.glob("*.safetensors"))
    bank.save(tmp_path)
    assert set(tmp_path.glob("*.safetensors")) == files  # names are the manifest's
    other = sk.MaskBank.load(tmp_path, model)
    assert other.names == ["task 0", "birds", "task 2", "both"]
    other.activate("both")
    assert torch.equal(model(images()), both)
    for old, new, error, message in [
        ("absent", "a", KeyError, "absent"),
        ("birds", "task 2", ValueError, r"rename: 'task 2' must be a new name"),
        ("birds", "birds", ValueError, r"rename: 'birds' must be a new name"),
        ("birds", "", ValueError, r"rename: name must be a non-empty string"),
    ]:
        with pytest.raises(error, match=message):
            bank.rename(old, new)


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
            before, nn.functional.linear(x, model[0].weight * torch.stack(masks).float().mean(0)), rtol=1e-5, atol=1e-5
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


def signed_tasks():
    torch.manual_seed(0)
    model = sk.convert(
        nn.Sequential(nn.Linear(9, 20), nn.ReLU(), nn.Linear(20, 3)), sk.SubnetConfig(select="signed", density=0.4)
    )
    bank = sk.MaskBank(model)
    for name in "ab":
        bank.begin(scores="init")
        bank.commit(name)
    return bank, torch.randn(4, 9)


def bare_tasks():
    bank = sk.MaskBank(sk.convert(nn.Linear(13, 5), sk.SubnetConfig(select="threshold")))
    for name in "abc":
        bank.begin(scores="init")
        bank.commit(name)
    return bank, torch.randn(4, 13)


@pytest.mark.parametrize("made", [lambda: (learnt()[1], images()), lambda: (learnt(1)[1], images()), signed_tasks, bare_tasks])
def test_every_task_in_one_graph(made):
    """The module, its `torch.export`, and its ONNX graph, whose ops are ONNX's own, give each task's logits; narrower heads end in -inf."""
    bank, x = made()
    whole = bank.export_all()
    assert whole.names == tuple(bank.masks)
    program = torch.export.export(whole, (torch.tensor([0]), x))
    feeds = None
    if all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript")):
        from onnx.reference import ReferenceEvaluator

        file = torch.onnx.export(whole, (torch.tensor([0]), x), dynamo=True, verbose=False).model_proto
        assert {node.domain for node in file.graph.node} <= {""}
        feeds = [v.name for v in file.graph.input]
    for place, name in enumerate(bank.masks):
        expected = bank.export(name).eval()(x)
        task = torch.tensor([place])
        y = whole(task, x)
        width = expected.shape[1]
        torch.testing.assert_close(y[:, :width], expected)
        assert bool((y[:, width:] == -torch.inf).all())
        assert torch.equal(whole(task[0], x), y)
        torch.testing.assert_close(program.module()(task, x), y)
        if feeds:
            (found, *_) = ReferenceEvaluator(file).run(None, dict(zip(feeds, (task.numpy(), x.numpy()), strict=True)))
            torch.testing.assert_close(torch.from_numpy(found), y, rtol=1e-4, atol=1e-5)
    shared = {t.data_ptr() for t in bank.model.state_dict().values()}
    assert not shared & {t.data_ptr() for t in whole.state_dict().values()}
    with pytest.raises(IndexError):
        whole(torch.tensor([len(bank)]), x)


def test_what_one_graph_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="export_all: expected at least one mask, the bank has none"):
        sk.MaskBank(net()).export_all()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4)))
    bank = sk.MaskBank(sk.convert(model, sk.SubnetConfig(per_task=["1"])))
    bank.commit("a")
    model[1][0] = nn.Linear(4, 5)
    bank.commit("b")
    with pytest.raises(ValueError, match="export_all: modules '1' must be of one shape, or Linears that differ in their outputs"):
        bank.export_all()


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
