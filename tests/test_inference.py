"""The arithmetic of task inference: formulas against PyTorch's, decisions on hand-made gradients."""

import math

import pytest
import torch

from subnet_pipelines.inference import (
    binary_survivors,
    collapse,
    entropy,
    g_objective,
    infer_binary,
    information,
    one_shot,
    weigh_combinations,
    whose_batch,
)

NAN = math.nan


def test_entropy():
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(entropy(logits), expected)
    assert entropy(torch.zeros(1, 8)).item() == pytest.approx(math.log(8))
    assert torch.autograd.gradcheck(entropy, logits)


def test_information():
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    p = logits.detach().softmax(1)
    mutual = (p * (p / p.mean(0)).log()).sum(1).mean()  # sum over the joint distribution of row and class
    assert information(logits).item() == pytest.approx(-mutual.item())
    assert torch.autograd.gradcheck(information, logits)
    assert information(50 * torch.eye(4)).item() == pytest.approx(-math.log(4))
    assert information(50 * torch.eye(4)[[2, 2, 2]]).item() == pytest.approx(0, abs=1e-5)  # all the same class


def test_g_objective_counts_all_and_learns_from_the_superfluous():
    logits = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    value = g_objective(logits, 6)
    torch.testing.assert_close(value, logits.logsumexp(-1))
    value.sum().backward()
    expected = logits.detach().softmax(-1)
    expected[:, :6] = 0
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("real", [-1, 10])
def test_g_objective_wants_real_among_the_logits(real):
    with pytest.raises(ValueError, match=f"real must be between 0 and the 9 logits of a row, got {real}"):
        g_objective(torch.zeros(4, 9), real)


def test_one_shot():
    grad = torch.tensor([[3.0, -1.0, 2.0], [1.0, 0.0, 0.0], [NAN, 5.0, 4.0], [0.5, NAN, NAN]])
    assert one_shot(grad).tolist() == [1, 1, 2, 0]
    assert one_shot(grad[0]).item() == 1


@pytest.mark.parametrize(
    ("grad", "alive", "log_base", "survivors"),
    [
        ([4, 1, 3, 2], [1, 1, 1, 1], 2, [0, 1, 0, 1]),
        ([5, 1, 3, 2, 4], [1, 1, 1, 1, 1], 2, [0, 1, 1, 1, 0]),  # the median itself survives
        ([-9, 1, 3, 2], [0, 1, 1, 1], 2, [0, 1, 0, 1]),  # who is out stays out and does not move the median
        ([7, 7, 7], [1, 1, 1], 2, [1, 1, 1]),
        ([7, 7, 8, 9], [1, 1, 1, 1], 4, [1, 1, 0, 0]),
        ([8, 7, 6, 5, 4, 3, 2, 1], [1] * 8, 3, [0, 0, 0, 0, 0, 1, 1, 1]),
        ([NAN, 1, NAN, 2], [1, 1, 1, 1], 2, [0, 1, 0, 1]),
        ([NAN, NAN, 1], [1, 1, 0], 2, [1, 1, 0]),
        ([1, 2], [0, 1], 2, [0, 1]),
    ],
)
def test_binary_survivors(grad, alive, log_base, survivors):
    grad, alive = torch.tensor(grad, dtype=torch.float32), torch.tensor(alive).bool()
    assert binary_survivors(grad, alive, log_base).int().tolist() == survivors
    rows = binary_survivors(torch.stack([grad, -grad]), torch.stack([alive, alive]), log_base)  # each row for itself
    assert rows[0].int().tolist() == survivors


@pytest.mark.parametrize(
    ("alive", "log_base", "message"),
    [
        (torch.ones(3, dtype=torch.bool), 2, r"alive must be bool of grad's shape \(4,\), got torch.bool of \(3,\)"),
        (torch.ones(4), 2, r"alive must be bool of grad's shape \(4,\), got torch.float32 of \(4,\)"),
        (torch.ones(4, dtype=torch.bool), 1, "log_base must be at least 2, got 1"),
        (torch.zeros(4, dtype=torch.bool), 2, "every row must have a candidate alive, got one without"),
    ],
)
def test_binary_survivors_refuses(alive, log_base, message):
    with pytest.raises(ValueError, match=message):
        binary_survivors(torch.zeros(4), alive, log_base)


@pytest.mark.parametrize("tasks", [1, 2, 3, 8, 50, 100])
def test_infer_binary_finds_the_least(tasks):
    grad = torch.randperm(tasks).float()
    found = infer_binary(lambda alphas: grad, torch.ones(tasks, dtype=torch.bool))
    assert found.finished
    assert found.task == grad.argmin()
    assert found.rounds == max(1, math.ceil(math.log2(tasks)))
    assert found.alphas[found.task] == 1
    assert found.alphas.sum() == 1


def test_infer_binary_row_by_row():
    """Rows decide for themselves, and one that is done stays as it is while others go on."""
    grad = torch.stack([torch.randperm(9).float() for _ in range(6)])
    alive = torch.ones(6, 9, dtype=torch.bool)
    alive[0, 1:] = False
    found = infer_binary(lambda alphas: grad, alive)
    assert found.finished.all()
    assert found.task.tolist() == [0, *grad[1:].argmin(1).tolist()]


def test_infer_binary_stops():
    """Equal gradients eliminate nobody: the limit on rounds ends it, and the first candidate is named."""
    found = infer_binary(torch.zeros_like, torch.tensor([False, True, True, True]))
    assert not found.finished
    assert found.rounds == 3
    assert found.task == 1
    torch.testing.assert_close(found.alphas, torch.tensor([0, 1 / 3, 1 / 3, 1 / 3]))
    assert infer_binary(torch.zeros_like, torch.ones(4, dtype=torch.bool), max_rounds=5).rounds == 5


def test_infer_binary_gives_equal_alphas():
    seen = []

    def gradient(alphas):
        seen.append(alphas)
        return torch.tensor([3.0, 1.0, 2.0, 4.0], dtype=torch.float64)

    infer_binary(gradient, torch.tensor([True, True, True, True]), dtype=torch.float64)
    assert [a.tolist() for a in seen] == [[0.25] * 4, [0, 0.5, 0.5, 0]]
    assert seen[0].dtype == torch.float64


def test_whose_batch():
    grad = torch.tensor([0.3, -0.4, 0.3, 0.3])
    p = (-grad).softmax(0).max().item()
    assert whose_batch(grad, 2, 4 * p - 1e-3) == (False, 1, p)
    assert whose_batch(grad, 2, 4 * p + 1e-3) == (True, 2, p)
    assert whose_batch(grad.roll(2), 2, 1.125) == (False, 3, p)  # an untrained candidate may be the one that stands out
    assert whose_batch(torch.zeros(7), 7) == (True, 7, pytest.approx(1 / 7))
    assert whose_batch(torch.zeros(1), 1).new  # a mask alone stands out from none


@pytest.mark.parametrize(("shape", "allocated"), [((4,), 5), ((4,), 0), ((2, 4), 2)])
def test_whose_batch_refuses(shape, allocated):
    with pytest.raises(ValueError, match=f"at least the {allocated} masks allocated"):
        whose_batch(torch.zeros(shape), allocated)


# ---- combinations of masks ------------------------------------------------------------------------------------------


def combined_network(j=5, k=4, dtype=torch.float64):
    """A float64 network 6-5-3 of j combinations of k masks, each weighed by beta: (weights, masks, candidates (j, 2, k), rows (20, 6))."""
    chance = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(shape, generator=chance, dtype=dtype)  # noqa: E731
    weights = [draw(5, 6), draw(3, 5)]
    masks = [(draw(k, *w.shape) > 0).to(dtype) for w in weights]
    return weights, masks, draw(j, 2, k), draw(20, 6)


def entropy_through(weights, x):
    return entropy((x @ weights[0].T).relu() @ weights[1].T).mean()


def test_collapsed_combinations_are_the_network_of_all_of_them():
    weights, masks, candidates, x = combined_network()
    beta = torch.linspace(0.1, 0.4, 5, dtype=torch.float64, requires_grad=True)
    whole = [
        sum(b * w * torch.tensordot(c[i], m, 1) for b, c in zip(beta, candidates)) for i, (w, m) in enumerate(zip(weights, masks))
    ]
    rows = collapse(beta, candidates)
    assert rows.shape == (2, 4)
    collapsed = [w * torch.tensordot(row, m, 1) for w, row, m in zip(weights, rows, masks)]
    for one, other in zip(whole, collapsed):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)
    (expected,) = torch.autograd.grad(entropy_through(whole, x), beta)
    torch.testing.assert_close(torch.autograd.grad(entropy_through(collapsed, x), beta)[0], expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("step", "lr"), [("simplex", 0.7), ("free", 0.05)])
def test_combinations_are_weighed_as_by_the_uncollapsed_network(step, lr):
    weights, masks, candidates, x = combined_network()
    passes, asked = [x.split(7), x.flip(0).split(10)], []

    def gradient(alphas, rows):
        asked.append(alphas.shape)
        alphas = alphas.detach().requires_grad_()
        made = [w * torch.tensordot(row, m, 1) for w, row, m in zip(weights, alphas, masks)]
        return torch.autograd.grad(entropy_through(made, rows), alphas)[0]

    found = weigh_combinations(gradient, candidates, passes, lr, step)
    beta, total, after, first = torch.full((5,), 0.2, dtype=torch.float64), torch.zeros(5, dtype=torch.float64), [], None
    for rows in (rows for batches in passes for rows in [*batches, None]):
        if rows is None:
            after.append(beta)
            continue
        leaf = beta.clone().requires_grad_()
        made = [
            sum(b * w * torch.tensordot(c[i], m, 1) for b, c in zip(leaf, candidates))
            for i, (w, m) in enumerate(zip(weights, masks))
        ]
        (grad,) = torch.autograd.grad(entropy_through(made, rows), leaf)
        first = grad if first is None else first
        total = total + (grad - grad.mean()) / grad.std(correction=0)
        beta = (-lr * total).softmax(0) if step == "simplex" else beta - lr * grad
    torch.testing.assert_close(found.first, first, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(found.beta, torch.stack(after), rtol=1e-8, atol=1e-11)
    assert asked == [(2, 4)] * 5  # one gradient a batch, to the masks' coefficients, however many combinations there are


def test_simplex_steps_know_no_scale():
    candidates = torch.randn(6, 2, 3, dtype=torch.float64)
    slope = torch.randn(2, 3, dtype=torch.float64)
    weigh = lambda scale: weigh_combinations(lambda alphas, rows: scale * slope, candidates, [[None] * 4], 0.5).beta  # noqa: E731
    torch.testing.assert_close(weigh(1.0), weigh(1e4))
    assert weigh(1.0).sum().item() == pytest.approx(1)
    assert weigh(1.0).argmax() == torch.einsum("lk,jlk->j", slope, candidates).argmin()
    assert torch.equal(weigh(0.0), torch.full((1, 6), 1 / 6, dtype=torch.float64))  # nothing to tell them apart by


def test_another_step_is_refused():
    with pytest.raises(ValueError, match="step must be simplex or free, got 'adam'"):
        weigh_combinations(lambda alphas, rows: alphas, torch.ones(2, 1, 1), [[None]], 1.0, "adam")
