"""SupSup's masks and fixed weights: densities, inits, what a task takes over from earlier ones, and what the seed says of a run."""

import math

import pytest
import torch
from golden import Golden, cases
from streams import Pictures, assert_same_run, broken_run
from test_supsup import Images, supsup

import subnet_kernels as sk
from subnet_pipelines import METHODS, Refusal, RunConfig, checkpoint, reevaluate, run
from subnet_pipelines.config import Settings
from subnet_pipelines.methods.supsup import scores_of
from subnet_pipelines.tables import read_table

SIZES = {"body.0": 100 * 16, "body.1": 100 * 100, "head": 40 * 100}
FANS = {"body.0": (16, 100), "body.1": (100, 100), "head": (100, 40)}


class Flat(Pictures):
    """Pictures of 784 pixels."""

    def __init__(self, config, seed):
        super().__init__((784,), config, seed)


def layers(method):
    return dict(zip(method.bank.layer_names, method.bank.layers()))


@pytest.mark.parametrize("mask", ["topk", "signed"])
def test_densities_by_the_shape_of_a_layer(mask):
    method, _ = supsup(mask=mask, erdos_renyi=4.0)
    for name, layer in layers(method).items():
        fan_in, fan_out = FANS[name]
        share = min(0.5, 4.0 * (fan_in + fan_out) / (fan_in * fan_out))
        assert sk.count(layer.bits) == sk.k_sort(SIZES[name], share)
    assert layers(method)["body.1"].density == 0.08


NETWORKS = {"LeNet": ("lenet-300-100", 10, Flat), "GEMResNet18": ("gem-resnet-18", 5, Images)}


@pytest.mark.parametrize("path", [*cases("supsup_er_LeNet_out10"), *cases("supsup_er_GEMResNet18_out5")])
def test_the_authors_counts(path):
    gold, (model, outputs, stream) = Golden(path), NETWORKS[path.stem.split("_")[2]]
    for s in gold["s"].tolist():
        method, _ = supsup(stream, "GG", mask="topk", model=model, outputs=outputs, erdos_renyi=s)
        assert [int(sk.count(layer.bits)) for layer in method.bank.layers()] == gold[f"ones_s{s:g}"].tolist()


@pytest.mark.parametrize("path", [*cases("supsup_init_LeNet_fan_in"), *cases("supsup_init_GEMResNet18_fan_in")])
def test_the_authors_constants(path):
    gold, (model, outputs, stream) = Golden(path), NETWORKS[path.stem.split("_")[2]]
    method, _ = supsup(stream, "GG", model=model, outputs=outputs)
    for layer, constant in zip(method.bank.layers(), gold["constant"]):
        torch.testing.assert_close(layer.weight.abs().unique(), constant[None], rtol=2 * torch.finfo(torch.float32).eps, atol=0)


@pytest.mark.parametrize("fan", ["fan_in", "fan_out"])
@pytest.mark.parametrize("scale_fan", [False, True])
@pytest.mark.parametrize("init", ["signed_constant", "kaiming_normal"])
def test_fixed_weights(init, fan, scale_fan):
    method, _ = supsup(mask="topk", density=0.2, weight_init=init, fan=fan, scale_fan=scale_fan)
    for name, layer in layers(method).items():
        expected = math.sqrt(2 / (FANS[name][fan == "fan_out"] * (0.2 if scale_fan else 1)))
        assert not layer.weight.requires_grad
        if init == "signed_constant":
            assert layer.weight.unique().tolist() == pytest.approx([-expected, expected], rel=1e-6)
        else:
            assert layer.weight.std().item() == pytest.approx(expected, rel=0.06)


def test_a_width_of_its_own():
    whole, half = (supsup(Images, model="gem-resnet-18", width=width)[0] for width in (1.0, 0.5))
    assert sum(layer.weight.numel() for layer in whole.bank.layers()) == 1_090_940 - 800 + 160 * 40  # a head of 40 for one of 5
    assert [layer.weight.shape[0] for layer in half.bank.layers()[:2]] == [10, 10]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"erdos_renyi": 4.0}, "erdos_renyi needs a kept share, which mask topk or signed has and mask threshold has not"),
        ({"scale_fan": True}, "scale_fan needs a kept share"),
        ({"mask": "topk", "erdos_renyi": 0.0}, "erdos_renyi must be positive, got 0.0"),
        ({"width": 0.5}, "width must be 1 for model mlp, which has one width, got 0.5"),
        ({"width": -1.0}, "width must be positive"),
        ({"transfer": "masks", "parallel_tasks": 2}, "transfer must be none where 2 tasks are trained at once"),
        ({"scenario": "GG", "outsiders": "noise"}, "outsiders asks how sure a task is inferred, scenario GG gives it at test"),
        ({"outsiders": "fashion-mnist"}, "outsiders fashion-mnist has pictures of 784 pixels, shuffled has 16; take noise"),
    ],
)
def test_bad_settings(fields, words):
    with pytest.raises(Refusal, match=words):
        supsup(**fields)


def test_signed_masks_learn_and_are_told_apart(tmp_path):
    fields = {"mask": "signed", "density": 0.4, "lr": 1e-2, "optimizer": "adam"}
    method, benchmark = supsup(**fields)
    result = run(method, benchmark, RunConfig(), tmp_path / "whole")
    assert result.task_inference["accuracy"] >= 90
    assert result.acc >= 88
    assert result.capacity["bits_per_weight"] >= 2
    assert result.capacity["huffman"]["code_bits"] > 0
    assert_same_run((method, result), broken_run(lambda: supsup(**fields), tmp_path / "broken", [31, 170]))


# ---- transfer -------------------------------------------------------------------------------------------------------


def starts(method, tasks=3):
    """What each task's scores start from, and what they end as and open, where training is a push to fresh places."""
    started, ended, opened = [], [], []
    for i in range(tasks):
        method.begin(i)
        started.append([layer.scores.detach().clone() for layer in method.bank.layers()])
        with torch.no_grad():
            for layer in method.bank.layers():
                layer.scores += 0.05 * torch.randn(layer.scores.shape)
        task = method.benchmark.task(i)
        method.commit(task)
        ended.append([layer.scores.detach().clone() for layer in method.bank.layers()])
        opened.append([sk.unpack(layer.bits, layer.scores.shape) for layer in method.bank.layers()])
    return started, ended, opened


@pytest.mark.parametrize("mask", ["threshold", "topk", "signed"])
def test_scores_start_from_the_mean_of_earlier_scores(mask):
    started, ended, _ = starts(supsup(mask=mask, transfer="scores")[0])
    fresh, _, _ = starts(supsup(mask=mask)[0])
    for i in range(3):
        assert torch.equal(started[0][i], fresh[0][i])
        assert torch.equal(started[1][i], ended[0][i])
        torch.testing.assert_close(started[2][i], (ended[0][i] + ended[1][i]) / 2)
        assert not torch.equal(started[2][i], fresh[2][i])


@pytest.mark.parametrize("mask", ["threshold", "topk"])
def test_scores_start_from_the_mean_of_earlier_masks(mask):
    """What all earlier masks open is open, or first in size; what none opens is last; and what ties is settled by the fresh draw."""
    method = supsup(mask=mask, transfer="masks")[0]
    started, _, opened = starts(method)
    fresh, _, _ = starts(supsup(mask=mask)[0])
    for i, layer in enumerate(method.bank.layers()):
        second, third, bound = started[1][i], started[2][i], layer.scores.shape[1] ** -0.5
        count = opened[0][i].int() + opened[1][i].int()
        key = third if mask == "threshold" else third.abs()
        assert key[count == 0].max() <= key[count == 1].min() <= key[count == 1].max() <= key[count == 2].min()
        assert key.abs().max() <= 1.5 * bound
        again = second >= 0 if mask == "threshold" else sk.unpack(sk.select(second, layer.k), second.shape)
        assert torch.equal(again, opened[0][i])  # of one earlier task the mask itself
        order = fresh[2][i] if mask == "threshold" else fresh[2][i].abs()
        tied = count == 1
        assert torch.equal(key[tied].argsort(), order[tied].argsort())
        assert (third != 0).all()  # through |score| a 0 would pass no gradient


def test_the_mean_of_signed_masks_keeps_their_signs():
    mean, fresh = torch.tensor([[1.0, -1.0, 0.5, 0.0]]), torch.tensor([[-0.4, 0.1, 0.2, -0.3]])
    start = scores_of(mean, fresh, 2, "signed")
    torch.testing.assert_close(start, torch.tensor([[0.5 + 0.2, -(0.5 + 0.05), 0.25 + 0.1, -0.15]]))


@pytest.mark.parametrize("transfer", ["scores", "masks"])
def test_what_is_taken_over_survives_a_kill(transfer, tmp_path):
    fields = {"tasks": 3, "iterations": 12, "transfer": transfer, "mask": "topk"}
    method, benchmark = supsup(**fields)
    whole = method, run(method, benchmark, RunConfig(), tmp_path / "whole")
    assert_same_run(whole, broken_run(lambda: supsup(**fields), tmp_path / "broken", [5, 9, 13]))
    other = supsup(**{**fields, "transfer": "none"})
    run(*other, RunConfig(), tmp_path / "none")
    assert not torch.equal(other[0].bank.layers()[0].scores, method.bank.layers()[0].scores)


# ---- the seed says the weights --------------------------------------------------------------------------------------


def test_neither_bank_nor_checkpoint_holds_the_weights(tmp_path):
    method, benchmark = supsup(tasks=2, iterations=5)
    run(method, benchmark, RunConfig(), tmp_path)
    saved = checkpoint.load(tmp_path / "checkpoint", print)["method"]
    assert not [name for name in saved["tensors"] if name.endswith("weight")]
    fresh, _ = supsup(tasks=2, iterations=5)
    fresh.out = tmp_path
    fresh.load(saved)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(fresh.bank.layers(), method.bank.layers()))
    fresh.bank.verify()
    size = sum(layer.weight.numel() for layer in method.bank.layers())
    stored = sum(path.stat().st_size for path in (tmp_path / "bank").iterdir())
    assert stored < 2 * size / 8 + 8000  # two masks, and what files say of themselves

    other, _ = supsup(tasks=2, iterations=5, seed=2)
    other.out = tmp_path
    with pytest.raises(ValueError, match="the model's weights must have hash"):
        other.load(saved)


def test_the_notebook_is_a_table():
    """784-300-300-100, five permutations, RMSprop 1e-4, one epoch; its rows train one bank."""
    cells = {cell.name: cell for cell in read_table("supsup-notebook").cells}
    assert list(cells) == [f"permuted-mnist/{row}" for row in ("gg", "gns", "gns-row")]
    trained = []
    for cell in cells.values():
        values = Settings(cell.method, cell.benchmark).resolve(None, cell.settings, cell.fidelity).values
        free = (*METHODS["supsup"].evaluation, *reevaluate.STREAM)
        trained.append({name: value for name, value in values.items() if name not in free})
        assert (values["optimizer"], values["lr"], values["epochs"], values["iterations"]) == ("rmsprop", 1e-4, 1, None)
        assert (values["mask"], values["weight_init"], values["batch_size"]) == ("threshold", "signed_constant", 128)
    assert trained[0] == trained[1] == trained[2]
    assert list(supsup(Flat, "GG", model="fc-300-300", outputs=100)[0].bank.model.head.weight.shape) == [100, 300]


def test_what_the_papers_storage_takes():
    """Two bytes an open weight, four a number of the norms; signed masks have no more open weights than others."""
    for mask in ("topk", "signed"):
        method, benchmark = supsup(Images, "GG", mask=mask, model="gem-resnet-18", outputs=None, width=0.25, iterations=1)
        for task in (benchmark.task(0), benchmark.task(1)):
            method.begin(task.index)
            method.commit(task)
        opened = sum(layer.k for layer in method.bank.layers())
        norms = sum(norm.running_mean.numel() + norm.running_var.numel() for norm in method.norms)
        assert method.final_report()["capacity"]["csc_bytes"] == 2 * (2 * opened + 4 * norms)
