"""HopSupSup: masks over gains, stored in Hopfield networks and recovered from unlabelled test rows."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from streams import Contrary, Shuffled, assert_same_run, broken_run
from torch import nn

import subnet_kernels as sk
from subnet_pipelines import BENCHMARKS, METHODS, Refusal, RunConfig, run
from subnet_pipelines.benchmarks.base import BenchmarkConfig
from subnet_pipelines.errors import NotLearnt
from subnet_pipelines.methods import hopsupsup as hop
from subnet_pipelines.methods.hopsupsup import energy, fold, signs, store, unfold
from subnet_pipelines.models import Gain, GainNet
from subnet_pipelines.reevaluate import evaluate_run


def hopsupsup(stream=Shuffled, scenario="GNs", tasks=3, seed=1, **fields):
    cls = METHODS["hopsupsup"]
    benchmark = stream(BenchmarkConfig(tasks=tasks, val_fraction=0.0, scenario=scenario), seed)
    return cls(
        cls.Config(**{"iterations": 20, "batch_size": 16, "width": 48, "recovery_batch": 8, **fields}), benchmark, seed
    ), benchmark


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Two tasks of two digits each, really learnt: narrower, more steps and more weight on the energy, as there are fifteen times
    fewer images."""
    stream, cls = BENCHMARKS["split-mnist-mini"], METHODS["hopsupsup"]
    benchmark = stream(stream.Config(tasks=2, scenario="GNu", labels="global", val_fraction=0.0), 1)
    method = cls(cls.Config(width=500, epochs=4, batch_size=64, recovery_batch=16, gamma=5e-3), benchmark, 1)
    out = tmp_path_factory.mktemp("digits")
    return method, benchmark, run(method, benchmark, RunConfig(eval_batch=16), out), out


# ---- the layer ------------------------------------------------------------------------------------------------------


def masked_net(width=70, outputs=3):
    torch.manual_seed(0)
    net = GainNet([9, width, width], outputs)
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.requires_grad_(False)
    return sk.convert(net, sk.SubnetConfig(select="threshold", filter=lambda _, m: isinstance(m, Gain)))


def test_a_masked_gain_by_hand():
    net = masked_net()
    gain, x = net.body[2], torch.randn(12, 70, requires_grad=True)
    open_ = gain.scores.detach() >= 0
    assert 0 < open_.sum() < 70
    y = gain(x)
    z = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(y, z * open_, atol=1e-5, rtol=1e-5)
    assert not y[:, ~open_].any()
    grad = torch.randn(12, 70)
    y.backward(grad)
    torch.testing.assert_close(gain.scores.grad, (grad * z).sum(0), atol=1e-4, rtol=1e-4)  # straight through, closed ones too
    assert gain.weight.grad is None
    gain.eval()
    assert torch.equal(gain(x), y)  # there are no running statistics


def test_the_bank_keeps_masks_over_gains(tmp_path):
    net, x = masked_net(), torch.randn(10, 9)
    bank, logits = sk.MaskBank(net), {}
    for name in ("one", "two"):
        bank.begin(scores="init")
        bank.commit(name)
    assert not list(bank["one"].state)  # a task is its mask, and nothing else
    for name in bank.names:
        bank.activate(name)
        logits[name] = net(x).detach()
        torch.testing.assert_close(bank.export(name)(x), logits[name])
    assert not torch.equal(logits["one"], logits["two"])
    assert bank.capacity()["mask_bytes"] == 2 * 2 * 64
    bank.activate(None)
    bank.save(tmp_path / "bank")
    again = sk.MaskBank.load(tmp_path / "bank", masked_net())
    for name in bank.names:
        again.activate(name)
        assert torch.equal(again.model(x), logits[name])


def test_one_row_is_refused():
    with pytest.raises(Refusal, match="of which one row has none"):
        masked_net()(torch.randn(1, 9))


# ---- the Hopfield network -------------------------------------------------------------------------------------------


def test_storkeys_rule_by_hand():
    matrix = torch.zeros(3, 3)
    store(matrix, torch.tensor([1.0, 1.0, -1.0]))
    assert torch.equal(matrix * 3, torch.tensor([[0.0, 1, -1], [1, 0, -1], [-1, -1, 0]]))
    store(matrix, torch.tensor([1.0, -1.0, -1.0]))  # h = (0, 2/3, 0): 3 W gains z z^T - I - z h^T - h z^T
    expected = torch.tensor([[0.0, 1 - 1 - 2 / 3, -1 - 1], [1 - 1 - 2 / 3, 4 / 3, -1 + 1 + 2 / 3], [-2, 2 / 3, 0]])
    torch.testing.assert_close(matrix * 3, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_stored_patterns_are_minima(dtype):
    d, count = 200, 8
    patterns = signs(torch.randn(count, d, generator=torch.Generator().manual_seed(0)))
    triangle = torch.zeros(d * (d + 1) // 2, dtype=dtype)
    for z in patterns:
        triangle.copy_(fold(store(unfold(triangle, d), z)))
    matrix = unfold(triangle, d)
    assert torch.equal(matrix, matrix.T)
    for z in patterns:
        flipped = z.repeat(d, 1)
        flipped.diagonal().neg_()
        assert all(energy(matrix, other) > energy(matrix, z) for other in flipped)
        torch.testing.assert_close(energy(matrix, z), energy(matrix, -z))


# ---- the method -----------------------------------------------------------------------------------------------------


def test_given_the_task(tmp_path):
    method, benchmark = hopsupsup(Contrary, "GG", iterations=60)
    result = run(method, benchmark, RunConfig(), tmp_path)
    assert min(result.final) >= 95
    assert result.bwt == 0.0
    assert result.task_inference is None
    assert "recovery" not in result.method_report


def test_masks_are_recovered(digits):
    _, benchmark, result, out = digits
    recovery = result.method_report["recovery"]
    assert recovery["nearest"] == [0, 1]
    assert result.task_inference["accuracy"] == 100
    assert min(recovery["own_mask"]) >= 90
    assert recovery["recovered_mask"] == pytest.approx(recovery["own_mask"], abs=4)
    assert recovery["recovered_mask"] == result.final  # the very recoveries that were measured, in the same batches
    assert recovery["recovered_mask_mean"] == pytest.approx(result.acc)
    rows = [len(benchmark.test(j)) for j in range(2)]
    for ways in recovery["distance"].values():
        assert [len(way) for way in ways] == [-(-n // 16) + 1 for n in rows]
    for j, end in enumerate(recovery["ends"]):
        assert end[j] == sum(ways[j][-1] for ways in recovery["distance"].values()) == min(end)
        assert end[j] <= 40 < 100 < sum(ways[j][0] for ways in recovery["distance"].values())
    assert recovery["gains"] == 1000
    assert recovery["matrix_bytes"] == 500 * 501 * 4
    assert recovery["mask_bytes"] == 2 * 2 * 64
    assert recovery["tasks_whose_masks_are_as_large"] == 7829  # 500 * 501 * 4 / 128, rounded up
    assert (out / "recovery.png").is_file()
    assert json.loads((out / "result.json").read_text())["method_report"]["recovery"] == recovery


def test_matrices_are_those_of_the_masks(digits):
    method, *_ = digits
    for name, matrix in method.matrices().items():
        expected = torch.zeros_like(matrix)
        for entry in method.bank.masks:
            bits = method.bank.bits(entry)[name]
            store(expected, 2 * sk.unpack(bits, (500,)).float() - 1)
        assert torch.equal(matrix, expected)


def test_half_precision_recovers_the_same_masks(digits):
    """Matrices rounded to float16 lead to masks as near to the tasks' own."""
    method, _, result, _ = digits
    other = copy.deepcopy(method)
    for i in range(2):
        whole = other.get_buffer(f"hopfield_{i}")
        half = whole.half()
        assert not torch.equal(half.float(), whole)
        other.register_buffer(f"hopfield_{i}", half)
    found, whole = other.recoveries(), result.method_report["recovery"]
    assert found["matrix_bytes"] == whole["matrix_bytes"] // 2
    assert found["nearest"] == whole["nearest"]
    for j in range(2):
        assert found["ends"][j][j] <= whole["ends"][j][j] + 5


def test_a_recovery_is_repeatable_and_needs_no_labels(digits):
    method, benchmark, *_ = digits
    x, _ = benchmark.test(1).tensors()
    order = torch.arange(len(x))
    method.eval()
    with torch.no_grad():
        method.prepare(x, order)
        first = method.found
        seen = method.predict(x[:50], None)
        method.prepare(x, order)
    assert (seen.task == 1).all()
    assert first.nearest == method.found.nearest == 1
    assert all(map(torch.equal, first.bits.values(), method.found.bits.values()))


def test_of_several_tries_the_surest_counts(digits, monkeypatch):
    method, benchmark, *_ = digits
    other = copy.deepcopy(method)
    other.config = replace(method.config, recovery_tries=3)
    x, _ = benchmark.test(0).tensors()
    order, seen, whole = torch.arange(len(x)), [], hop.recover

    def spoilt(model, matrices, starts, batches, *rest):
        """The second try is as it should be; the others end at a random mask."""
        scores = whole(model, matrices, starts, batches, *rest)
        seen.append((torch.cat(batches), scores))
        return scores if len(seen) == 2 else {name: torch.randn_like(s) for name, s in scores.items()}

    monkeypatch.setattr(hop, "recover", spoilt)
    other.eval()
    with torch.no_grad():
        found = other.find(x, order)
    assert len(seen) == 3
    assert torch.equal(seen[0][0], x)
    assert not torch.equal(seen[1][0], seen[2][0])  # each in an order of its own, of the same rows
    assert all(torch.equal(rows.sort(0).values, x.sort(0).values) for rows, _ in seen)
    assert all(torch.equal(found.bits[name], sk.threshold(s, 0.0)) for name, s in seen[1][1].items())
    assert found.nearest == 0


def test_a_finished_run_is_recovered_again_with_more_tries(digits):
    *_, result, out = digits
    again = evaluate_run(out, {"recovery_tries": 2}, None, torch.device("cpu"))
    found, before = again["method_report"]["recovery"], result.method_report["recovery"]
    assert found["own_mask"] == before["own_mask"]
    assert all(a <= b for a, b in zip(found["entropy"], before["entropy"]))  # the first try is the one that was made before
    assert again["final"] == found["recovered_mask"]
    with pytest.raises(Refusal, match="width belongs to the training of"):
        evaluate_run(out, {"width": 40}, None, torch.device("cpu"))


def test_nothing_is_known_before_the_first_task():
    method, benchmark = hopsupsup()
    x, _ = benchmark.test(0).tensors()
    method.prepare(x, torch.arange(len(x)))
    with pytest.raises(NotLearnt, match="no task has been learnt"):
        method.predict(x, None)


def test_training_does_not_feel_a_recovery(tmp_path):
    """The same masks whether tasks are measured without ids after every task or with ids."""
    masks = []
    for scenario in ("GG", "GNs"):
        method, benchmark = hopsupsup(scenario=scenario)
        run(method, benchmark, RunConfig(eval_batch=32), tmp_path / scenario)
        masks.append([method.bank.bits(name) for name in method.bank.names])
    for first, second in zip(*masks):
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_weights_never_move(digits):
    method, benchmark, *_ = digits
    method.bank.verify()
    fresh = METHODS["hopsupsup"](method.config, benchmark, 1)
    for a, b in zip(method.model.modules(), fresh.model.modules()):
        if isinstance(a, nn.Linear):
            assert torch.equal(a.weight, b.weight)


@pytest.mark.parametrize("matrix_dtype", ["float32", "float16"])
def test_resumes_to_the_same_bits(matrix_dtype, tmp_path):
    make = lambda: hopsupsup(tasks=2, matrix_dtype=matrix_dtype)  # noqa: E731
    method, benchmark = make()
    whole = method, run(method, benchmark, RunConfig(), tmp_path / "whole")
    assert_same_run(whole, broken_run(make, tmp_path / "broken", [7, 23, 1]))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"width": 1}, "width must be at least 2, got 1"),
        ({"recovery_batch": 1}, "recovery_batch must be at least 2"),
        ({"recovery_tries": 0}, "recovery_tries must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"recovery_lr": -1.0}, "recovery_lr must be positive"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ({"recovery_momentum": -0.1}, "recovery_momentum"),
        ({"weight_decay": -1e-4}, "weight_decay must not be negative"),
        ({"gamma": -1.0}, "gamma must not be negative"),
        ({"scenario": "NNs"}, "hopsupsup serves scenario GG and GNs and GNu, not NNs of shuffled"),
    ],
)
def test_bad_settings(fields, words):
    with pytest.raises(Refusal, match=words):
        hopsupsup(**fields)
