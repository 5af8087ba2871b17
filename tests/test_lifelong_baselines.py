"""What LASEM's paper compares with: ProgNN's columns; their own rules, by hand; resume, forgetting, refusals."""

import pytest
import torch
import torch.nn.functional as F
from streams import Pictures, Shuffled, broken_run

import subnet_pipelines
from subnet_pipelines import METHODS, NotLearnt, Refusal, RunConfig, run
from subnet_pipelines.benchmarks.base import BenchmarkConfig
from subnet_pipelines.methods.selective import NETS, Layer, Net

SMALL = Net((Layer(5, 3, 2), Layer(5, 3), Layer(5, 3, skip=True), Layer(6, 3, 2)), (7,))


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    monkeypatch.setattr(subnet_pipelines.report, "draw", lambda results, folder: [])


def made(name, stream=Shuffled, tasks=3, val_fraction=0.25, **fields):
    """A method on a small stream of flat rows, and the stream."""
    benchmark = stream(BenchmarkConfig(tasks=tasks, val_fraction=val_fraction), 1)
    cls = METHODS[name]
    return cls(cls.Config(**{"model": "mlp", "epochs": 6, "batch_size": 7, "lr": 1e-2, **fields}), benchmark, 1), benchmark


def pictured(name, monkeypatch, tasks=3, **fields):
    """A method with a small network of convolutions and a shortcut, on small pictures, and the stream."""
    monkeypatch.setitem(NETS, "lasem-cifar", SMALL)
    benchmark = Pictures((3, 9, 10), BenchmarkConfig(tasks=tasks, val_fraction=0.125))
    cls = METHODS[name]
    return cls(cls.Config(**{"epochs": 2, "batch_size": 14, "lr": 1e-3, **fields}), benchmark, 1), benchmark


def watched(method, benchmark, out):
    """Run, and keep the logits and kept tensors of every task as they were when it ended: (result, logits, tensors)."""
    settle, logits, kept = method.settle, [], []

    def settled(peak):
        settle(peak)
        task = len(method.learnt) - 1
        method.eval()
        with torch.no_grad():
            logits.append(method.predict(benchmark.test(task).tensors()[0], task).logits)
        kept.append({name: t.clone() for name, t in method.learnt[task].items()})

    method.settle = settled
    return run(method, benchmark, RunConfig(), out), logits, kept


LASEMS_APD = METHODS["apd"].FIDELITY["code"]
CASES = {
    "prognn": ("prognn", {}),
    "prognn, half": ("prognn", {"reduction": 2.0, "keep": "best"}),
    "apd": ("apd", {"lambda1": 1e-3, "lambda2": 1.0}),
    "apd, LASEM's": ("apd", LASEMS_APD),
}


@pytest.mark.parametrize("case", CASES)
def test_it_learns(case, tmp_path):
    name, fields = CASES[case]
    method, benchmark = made(name, **fields)
    result = run(method, benchmark, RunConfig(), tmp_path / "run")
    assert min(result.diagonal) >= 90
    assert min(result.method_report["peak"]) >= 90
    assert len(result.method_report["parameters_per_task"]) == 3
    with pytest.raises(NotLearnt, match="task 3 has not been learnt yet"):
        method.predict(benchmark.test(0).tensors()[0], 3)


@pytest.mark.parametrize("case", CASES)
def test_resumes_to_the_same_bits(case, tmp_path, monkeypatch):
    name, fields = CASES[case]

    def make():
        return pictured(name, monkeypatch, **fields)

    expected, benchmark = make()
    whole = run(expected, benchmark, RunConfig(), tmp_path / "a")
    method, result = broken_run(make, tmp_path / "b", (2, 7, 3))
    for key, tensor in expected.state_dict().items():
        assert torch.equal(tensor, method.state_dict()[key]), key
    for one, two in zip(expected.learnt, method.learnt, strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert (whole.method_report, whole.accuracy_matrix) == (result.method_report, result.accuracy_matrix)


@pytest.mark.parametrize(
    ("name", "fields", "sentence"),
    [
        ("prognn", {"reduction": 0.0}, "reduction must be positive, got 0.0"),
        ("apd", {"lambda1": -1.0}, "lambda1 must not be negative, got -1.0"),
        ("apd", {"lambda2": -1.0}, "lambda2 must not be negative, got -1.0"),
    ],
)
def test_refusals(name, fields, sentence):
    with pytest.raises(Refusal, match=sentence):
        made(name, **fields)


# ---- ProgNN --------------------------------------------------------------------------------------------------------


def test_columns_before_do_not_move(tmp_path, monkeypatch):
    method, benchmark = pictured("prognn", monkeypatch)
    result, logits, kept = watched(method, benchmark, tmp_path / "run")
    for task in range(3):
        assert all(torch.equal(kept[task][name], tensor) for name, tensor in method.learnt[task].items())
        with torch.no_grad():
            assert torch.equal(method.predict(benchmark.test(task).tensors()[0], task).logits, logits[task])
    assert result.final == result.diagonal
    assert not torch.equal(kept[0]["0.weight"], kept[1]["0.weight"])


def test_a_column_reads_those_before(tmp_path, monkeypatch):
    """Task 2's logits from the formula, convolution by convolution; and only its own tensors get a gradient."""
    method, benchmark = pictured("prognn", monkeypatch)
    run(method, benchmark, RunConfig(), tmp_path / "run")
    x, y = benchmark.test(2).tensors()
    done = []
    for number in range(3):
        t, reads = method.learnt[number], [x]
        for i, layer in enumerate(SMALL.layers):
            total = F.conv2d(reads[i], t[f"{i}.weight"], t[f"{i}.bias"], padding=1)
            for other in range(number if i else 0):
                few = F.conv2d(
                    t[f"{i}.scale_{other}"] * done[other][i], t[f"{i}.down_{other}"], t[f"{i}.down_bias_{other}"]
                ).relu()
                total = total + F.conv2d(few, t[f"{i}.up_{other}"], padding=1)
            total = total.relu() + reads[i - 1] if layer.skip else total.relu()
            reads.append(F.max_pool2d(total, layer.pool, ceil_mode=True) if layer.pool > 1 else total)
        done.append(reads)
    t, features = method.learnt[2], done[2][-1].flatten(1)
    expected = F.linear(F.linear(features, t["head.0.weight"], t["head.0.bias"]).relu(), t["head.1.weight"], t["head.1.bias"])
    with torch.no_grad():
        torch.testing.assert_close(method.predict(x, 2).logits, expected, rtol=1e-4, atol=1e-5)
    assert (t["1.down_0"].shape, t["3.down_1"].shape, t["3.up_1"].shape) == ((1, 5, 1, 1), (1, 5, 1, 1), (6, 1, 3, 3))
    assert not any("down" in name or "up" in name for name in (*method.learnt[0], *(n for n in t if n.startswith("0."))))
    method.make(2)  # a fresh column over the columns of tasks 0 and 1
    F.cross_entropy(method.run(x), y).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in method.named_parameters() if "scale" in n or "up" in n)
    own = method.report()["parameters_per_task"]
    assert own[0] == sum(c * (i * 9 + 1) for c, i in ((5, 3), (5, 5), (5, 5), (6, 5)))
    assert method.report()["capacity"]["measured_cap"] == pytest.approx(100 * sum(own) / own[0])


def test_reductions():
    """c / (reduction columns) channels, at least one: of 100, with two columns 50 or 25."""
    for reduction, few in ((1.0, 50), (2.0, 25), (1000.0, 1)):
        method = made("prognn", reduction=reduction)[0]
        method.make(1)
        assert method.column[1]["down_0"].shape == (few, 100, 1, 1)


# ---- APD -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, LASEMS_APD], ids=["paper", "LASEM's code"])
def test_penalties_by_hand(fields, monkeypatch):
    """In the second task: of adaptive parts, and of what has moved of the first task's kernels or of what is shared."""
    method = pictured("apd", monkeypatch, **fields)[0]
    method.begin(0)
    assert method.held == []
    method.settle(None)
    before = [method.weight(i, method.own[i]).detach() if fields else kernel_of(method, 0, i) for i in range(4)]
    was = [p.detach().clone() for p in method.shared.parameters()]
    method.begin(1)
    with torch.no_grad():
        for p in method.parameters():
            p += 0.01 * torch.randn_like(p)
    own = [layer["adaptive"] for layer in method.own]
    if fields:
        l1 = sum(t.abs().mean() for t in own) / 4
        pairs = list(zip(method.shared.parameters(), was))
        l2 = sum((now - then).square().mean() / 2 for now, then in pairs) / len(pairs)
    else:
        along = [layer["adaptive"] for layer in method.earlier[0]]
        l1 = sum(t.abs().sum() for t in (*own, *along))
        masks = [method.learnt[0][f"{i}.mask"] for i in range(4)]
        now = [layer["weight"] / (1 + (-mask).exp()) + tau for layer, mask, tau in zip(method.shared, masks, along)]
        l2 = sum((one - two).square().sum() for one, two in zip(now, before))
    torch.testing.assert_close(method.penalty(), 4e-4 * l1 + 100 * l2, rtol=1e-4, atol=1e-6)


def kernel_of(method, task, i):
    """Layer i's weight of a task that has been learnt, from the formula."""
    kept = method.learnt[task]
    return (method.shared[i]["weight"] * torch.sigmoid(kept[f"{i}.mask"]) + kept[f"{i}.adaptive"]).detach()


@pytest.mark.parametrize("hold", ["tasks", "shared"])
def test_what_apd_holds(hold, tmp_path):
    """The greater lambda2 the less the first task's kernels move; under `tasks` its adaptive part follows what is shared."""
    moves = {}
    for lambda2 in (0.0, 100.0):
        method, benchmark = made("apd", hold=hold, lambda2=lambda2, lambda1=1e-3, tasks=2)
        settle, seen = method.settle, []

        def settled(peak, method=method, settle=settle, seen=seen):
            settle(peak)
            seen.append(([kernel_of(method, 0, i) for i in range(2)], dict(method.learnt[0])))

        method.settle = settled
        result = run(method, benchmark, RunConfig(), tmp_path / str(lambda2))
        (first, kept), (second, later) = seen
        moves[lambda2] = sum(float((one - two).square().sum()) for one, two in zip(first, second))
        for name, tensor in kept.items():
            assert torch.equal(tensor, later[name]) == (hold == "shared" or "adaptive" not in name), name
    assert 0 < moves[100.0] < 0.1 * moves[0.0]
    assert result.final[0] >= result.diagonal[0] - 10


def test_small_entries_do_not_count(tmp_path):
    """What a task keeps of its adaptive part is greater than lambda1, and it alone is counted."""
    method, benchmark = made("apd", lambda1=2e-3, tasks=2, epochs=6, lr=2e-3)
    result = run(method, benchmark, RunConfig(), tmp_path / "run")
    for kept, share, count in zip(
        method.learnt, result.method_report["adaptive_share"], result.method_report["parameters_per_task"]
    ):
        entries = torch.cat([kept[f"{i}.adaptive"].flatten() for i in range(2)])
        assert float(entries[entries != 0].abs().min()) > 2e-3
        assert 0 < share < 0.9
        assert count == int((entries != 0).sum()) + 100 + 100 + 200  # masks and biases
    shared = 16 * 100 + 100 * 100
    plain = shared + 200
    own = sum(result.method_report["parameters_per_task"])
    assert result.capacity["measured_cap"] == pytest.approx(100 * (shared + own) / plain)
