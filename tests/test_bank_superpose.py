"""Many of a bank's masks at once: the forward, the gradient to the coefficients, of the batch and of every row."""

import copy

import pytest
import torch
import torch.nn.functional as F
from banks import images, learnt, masks_of, same
from torch import nn

import subnet_kernels as sk
from subnet_kernels import reference


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


def test_some_layers_run_live():
    model, bank, _ = learnt()
    model.zero_grad()
    first, second = bank.layer_names
    alphas = torch.rand(3, requires_grad=True)
    live = bank.layers()[1].w_eff.clone()
    bank.superpose(alphas, live=[second])
    assert not bank.is_live
    y = model(images())
    y.square().sum().backward()
    assert bank.layers()[0].scores.grad is None
    assert bank.layers()[1].scores.grad.abs().sum() > 0
    assert alphas.grad.abs().min() > 0
    masks = torch.stack([masks_of(bank, name)[first] for name in bank.masks]).float()
    bank.substitute({first: bank.layers()[0].weight * torch.tensordot(alphas, masks, 1), second: live})
    torch.testing.assert_close(model(images()), y, rtol=1e-5, atol=1e-5)
    bank.superpose(alphas, live=[first])
    assert not bank.is_live  # though the first layer is
    with pytest.raises(ValueError, match="superpose: live must name layers of"):
        bank.superpose(alphas, live=["nowhere"])


def test_other_weights_in_their_graph():
    model, bank, _ = learnt()
    model.zero_grad()
    active = bank.active
    with bank.as_task("task 1"):
        given = model(images())
        baked = dict(bank.export("task 1").named_parameters())
    weights = {key: baked[f"{key}.weight"].detach().clone().requires_grad_() for key in bank.layer_names}
    with bank.as_task("task 1"):
        bank.substitute(weights)
        assert bank.active == "task 1"
        y = model(images())
        torch.testing.assert_close(y, given, rtol=1e-5, atol=1e-5)
        y.square().sum().backward()
    assert bank.active == active
    assert all(weight.grad.abs().sum() > 0 for weight in weights.values())
    assert all(layer.scores.grad is None for layer in bank.layers())
    with pytest.raises(ValueError, match="must have a weight of shape"):
        bank.substitute({})
    bank.activate(None)
    assert bank.is_live


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


def test_given_alphas_are_read_after_equal_ones_over_the_same_masks():
    """What is kept of a subset for equal alphas, its counts, must not serve others."""
    model, bank, _ = learnt()
    some, x = ["task 2", "task 0"], images()
    bank.superpose(None, over=some, head="task 1")
    equal = model(x).detach()
    bank.superpose(torch.tensor([1.0, 0.0]), over=some, head="task 1")
    assert not torch.allclose(model(x), equal)
    for layer, bits in zip(bank.layers(), bank.bits("task 2").values()):
        bank.superpose(torch.tensor([1.0, 0.0]), over=some)
        torch.testing.assert_close(layer.effective_weight(), sk.apply(layer.weight.detach(), bits))


def test_the_mean_of_the_candidates_states():
    """With mean_state norms have the mean statistics of the masks in `over`, until another task is activated; modules are the live ones."""
    torch.manual_seed(0)
    model = sk.convert(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)), sk.SubnetConfig(per_task=["2"]))
    bank = sk.MaskBank(model)
    states = []
    for t in range(3):
        bank.begin(scores="init")
        with torch.no_grad():
            for i, tensor in enumerate((model[0].bias, model[1].weight, model[1].running_mean, model[1].running_var)):
                tensor.copy_(torch.rand(6) + i + t)
            model[1].num_batches_tracked.fill_(10 + t)
        bank.commit(str(t))
        states.append({key: value.clone() for key, value in bank[str(t)].state.items()})
    bank.begin()
    live, head = {key: value.clone() for key, value in model.state_dict().items()}, model[2]

    def is_mean(of):
        now = model.state_dict()
        for key, first in states[of[0]].items():
            mean = torch.stack([states[t][key] for t in of]).double().mean(0) if first.is_floating_point() else first
            torch.testing.assert_close(now[key].double(), mean.double())

    bank.superpose(None, mean_state=True)
    is_mean([0, 1, 2])
    assert model[2] is head
    with bank.as_task("1"):
        assert torch.equal(model[1].running_mean, states[1]["1.running_mean"])
    is_mean([0, 1, 2])  # as it did before
    bank.superpose(None, over=["2", "0"], mean_state=True)
    is_mean([2, 0])
    with pytest.raises(ValueError, match=r"the live task must be active, got None; call activate\(None\) first"):
        bank.commit("mean")
    bank.superpose(None)
    assert all(torch.equal(value, live[key]) for key, value in model.state_dict().items())
    bank.superpose(None, mean_state=True)
    bank.activate("2")
    assert torch.equal(model[1].running_var, states[2]["1.running_var"])
    bank.activate(None)
    assert all(torch.equal(value, live[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(value, bank[str(t)].state[key]) for t in range(3) for key, value in states[t].items())
