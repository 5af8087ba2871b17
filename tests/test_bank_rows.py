"""Batches whose rows are of different tasks."""

import pytest
import torch
import torch.nn.functional as F
from banks import clone, images, learn, learnt, same
from torch import nn

import subnet_kernels as sk
from subnet_kernels import reference


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


class Structured(nn.Module):
    """A model whose output is a mapping of tensors, of a tuple and of nothing, and whose norm is of a task."""

    def __init__(self):
        super().__init__()
        self.norm, self.body, self.fc = nn.BatchNorm1d(4), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x, scale=None):
        hidden = self.body(self.norm(x)).relu()
        hidden = hidden if scale is None else hidden * scale
        return {"logits": self.fc(hidden), "states": (hidden, hidden[:, :2]), "loss": None}


def test_rows_of_structured_outputs():
    model = sk.convert(Structured(), sk.SubnetConfig(density=0.4, train_weights=True, per_task=["fc"]))
    bank = sk.MaskBank(model)
    for t in range(3):
        bank.begin(scores="init", per_task={"fc": 3 + t})
        model.train()(torch.randn(8, 4) + t)
        bank.commit(f"task {t}")
    model.eval()
    x, scale, ids = torch.randn(5, 4), torch.randn(5, 1), [2, 0, 0, 1, 2]
    with bank.rows(torch.tensor(ids)):
        y = model(x, scale=scale)
    assert y["loss"] is None
    assert y["logits"].shape == (5, 5)
    for row, t in enumerate(ids):
        with bank.as_task(f"task {t}"):
            alone = model(x[row : row + 1], scale=scale[row : row + 1])
        torch.testing.assert_close(y["logits"][row, : 3 + t], alone["logits"][0])
        assert (y["logits"][row, 3 + t :] == -torch.inf).all()
        for mine, theirs in zip(y["states"], alone["states"]):
            torch.testing.assert_close(mine[row], theirs[0])
    model.forward = lambda x: "text"
    with bank.rows(torch.tensor(ids)), pytest.raises(ValueError, match=r"must give tensors.*got \['str', 'str', 'str'\]"):
        model(x)


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
