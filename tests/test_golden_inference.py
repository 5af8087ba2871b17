"""SupSup's inference without a task id, replayed on the authors' trained masks (RAIVNLab/supsup, adaptors.py).

Decisions and surviving sets exactly. Reals as the golden README says (How to compare): to 1e-5; to 3 times the deviation of the
saved values on the file of 50 fully connected masks, which are off by 8.5e-6 themselves; to 5e-3 on two convolutional files, where
constant image regions cancel exactly and a ReLU passes or blocks a gradient by the rounding of 0.
"""

import pytest
import torch
import torch.nn.functional as F
from golden import Golden, assert_near, cases, tolerance

import subnet_kernels as sk
from subnet_pipelines.inference import entropy, g_objective, infer_binary, one_shot


class Case:
    """A golden file as a network: superposed weights in, logits out."""

    def __init__(self, path):
        self.gold = gold = Golden(path)
        self.conv = "_conv_" in path.stem
        self.tolerance = tolerance(path)
        self.tasks, self.learned = gold["num_tasks"], gold["learned"]
        self.weights, self.banks = [], []
        while f"weight{len(self.weights)}" in gold:
            i = len(self.weights)
            self.weights.append(gold[f"weight{i}"])
            self.banks.append(
                sk.pack_bank(gold.mask(f"masks{i}")[: self.learned])
            )  # what no task has learned does not enter the sum

    def forward(self, x, weights):
        """The program's nets, in plain functional PyTorch."""
        if not self.conv:
            x = x[:, :, None, None]
            for w in weights[:-1]:
                x = F.conv2d(x, w).relu()
            return F.conv2d(x, weights[-1]).flatten(1)
        x = F.avg_pool2d(x.view(-1, 1, 28, 28), 2)
        for w, stride in zip(weights[:-1], (1, 2, 2)):
            x = F.conv2d(x, w, stride=stride, padding=1).relu()
        return F.conv2d(F.adaptive_avg_pool2d(x, 1), weights[-1]).flatten(1)

    def logits(self, alphas, x=None):
        x = self.gold["x"] if x is None else x
        return self.forward(x, [sk.superpose(w, bank, alphas) for w, bank in zip(self.weights, self.banks)])

    def gradient(self, which, alphas):
        """The objective over the rows that decide, and its gradient to all allocated tasks (0 for those not learned)."""
        alphas = alphas[: self.learned].detach().requires_grad_()
        logits = self.logits(alphas, self.gold["x"][: self.gold["rows"]])
        objective = (entropy(logits) if which == "H" else g_objective(logits, self.gold["real_neurons"])).mean()
        (grad,) = torch.autograd.grad(objective, alphas)
        return objective.detach(), torch.cat([grad, grad.new_zeros(self.tasks - self.learned)])

    def near(self, value, name, row=None):
        expected = self.gold[name]
        assert_near(value, expected if row is None else expected[row], self.tolerance, name)


@pytest.fixture(params=cases("supsup_infer_*"), scope="module")
def case(request):
    return Case(request.param)


@pytest.fixture(params=["H", "G"])
def which(request):
    return request.param


def test_uniform_forward(case, which):
    case.near(case.logits(case.gold[f"{which}_alphas"][: case.learned]), f"{which}_uniform_logits")
    case.near(case.logits(None), f"{which}_uniform_logits")


def test_one_shot(case, which):
    objective, grad = case.gradient(which, case.gold[f"{which}_alphas"])
    case.near(objective, f"{which}_objective")
    case.near(grad, f"{which}_grad")
    assert one_shot(grad).item() == case.gold[f"{which}_chosen"]


@pytest.mark.parametrize("path", [*cases("supsup_infer_*_lenet_*"), *cases("supsup_infer_7_*"), *cases("supsup_infer_8_*")])
def test_alpha_grad(path, which):
    """One backward of the summed objective and `alpha_grad` in every layer: the gradient of each row by itself, whose mean is the
    program's gradient."""
    case = Case(path)
    x, inputs, outputs = case.gold["x"], [], []
    for i, (w, bank) in enumerate(zip(case.weights, case.banks)):
        inputs.append(x)
        outputs.append(F.linear(x, sk.superpose(w, bank).flatten(1)).requires_grad_())
        x = outputs[-1].relu() if i + 1 < len(case.weights) else outputs[-1]
    objective = entropy(x) if which == "H" else g_objective(x, case.gold["real_neurons"])
    grads = torch.autograd.grad(objective.sum(), outputs)
    layers = [sk.alpha_grad(x, g, w.flatten(1), bank) for x, g, w, bank in zip(inputs, grads, case.weights, case.banks)]
    rows = torch.stack(layers).sum(0)
    assert rows.shape == (len(case.gold["x"]), case.learned)
    assert_near(rows[: case.gold["rows"]].mean(0), case.gold[f"{which}_grad"][: case.learned], case.tolerance)
    alphas = torch.full((case.learned,), 1 / case.learned, requires_grad=True)
    last = case.logits(alphas, case.gold["x"][-1:])
    alone = entropy(last) if which == "H" else g_objective(last, case.gold["real_neurons"])
    assert_near(rows[-1], torch.autograd.grad(alone.sum(), alphas)[0])


def test_classification_with_chosen_task(case, which):
    """The whole batch through the chosen mask; a mask that nobody has trained opens nothing, and all its logits are 0."""
    chosen = case.gold[f"{which}_chosen"]
    alphas = F.one_hot(torch.tensor(chosen), case.tasks)[: case.learned].float()
    logits = case.logits(alphas)
    if chosen < case.learned:
        case.near(logits, f"{which}_onehot_logits")
    else:
        assert logits.count_nonzero() == 0
        assert case.gold[f"{which}_onehot_logits"].count_nonzero() == 0
    hits = logits.argmax(1) == case.gold["y"]
    assert hits.double().mean().item() == pytest.approx(case.gold[f"{which}_accuracy"], abs=1e-12)


def test_binary(case, which):
    asked = []

    def gradient(alphas):
        objective, grad = case.gradient(which, alphas)
        asked.append((alphas, objective, grad))
        return grad

    alive = torch.arange(case.tasks) < case.learned
    found = infer_binary(gradient, alive, case.gold["log_base"])
    saved = case.gold[f"{which}_binary_alphas"]
    assert found.rounds == len(asked) == len(saved)
    for i, (alphas, objective, grad) in enumerate(asked):
        # In the first round the program hands 1/learned to untrained masks too, which its layers never read.
        assert torch.equal(alphas > 0, (saved[i] > 0) & alive)
        assert_near(alphas, saved[i] * alive, 1e-6, "alphas")
        case.near(objective, f"{which}_binary_objectives", i)
        # The program's gradient to an eliminated task is 0, because it skips masks whose alpha is 0; ours tells what it would be.
        case.near(torch.where(alphas > 0, grad, 0.0), f"{which}_binary_grads", i)
    assert bool(found.finished) == bool(case.gold[f"{which}_binary_finished"])
    if found.finished:
        assert torch.equal(found.alphas, F.one_hot(found.task, case.tasks).float())
        case.near(case.logits(found.alphas[: case.learned]), f"{which}_binary_final_logits")
    else:
        assert found.alphas.count_nonzero() > 1  # identical masks cannot be told apart
