"""What LASEM's paper compares with, ProgNN, APD and DEN: their own rules, by hand; that they learn, and resume; refusals."""

import json
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from streams import Pictures, Shuffled, broken_run

import subnet_pipelines
from subnet_pipelines import METHODS, NotLearnt, Refusal, RunConfig, run
from subnet_pipelines.benchmarks.base import Batch, BenchmarkConfig
from subnet_pipelines.methods.base import Clock
from subnet_pipelines.methods.selective import NETS, Layer, Net

PLAIN = Net((Layer(5, 3, 2), Layer(6, 3), Layer(4, 3, 2)), (7,))
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
    monkeypatch.setitem(NETS, "lasem-cifar", PLAIN if name == "den" else SMALL)
    benchmark = Pictures((3, 9, 10), BenchmarkConfig(tasks=tasks, val_fraction=0.125))
    cls = METHODS[name]
    return cls(cls.Config(**{"epochs": 2, "batch_size": 14, "lr": 1e-3, **fields}), benchmark, 1), benchmark


def watched(method, benchmark, out):
    """Run, and keep the logits and kept tensors of every task as they were when it ended: (result, logits, tensors)."""
    settle, logits, kept = method.settle, [], []

    def settled():
        settle()
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
    "den": ("den", {"expansion": 3}),
    "den, best": ("den", {"expansion": 3, "keep": "best", "hold": 0.0, "l2": 0.0, "l1": 1e-4}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_learns(case, tmp_path):
    name, fields = CASES[case]
    method, benchmark = made(name, **fields)
    result = run(method, benchmark, RunConfig(), tmp_path / "run")
    assert min(result.diagonal) >= 90
    assert min(result.method_report["peak"]) >= 90
    assert len(result.method_report["parameters_per_task"]) == 3
    json.dumps(result.method_report)
    with pytest.raises(NotLearnt, match="task 3 has not been learnt yet"):
        method.predict(benchmark.test(0).tensors()[0], 3)


@pytest.mark.parametrize("name", ["prognn", "apd", "den", "lasem"])
def test_layers_in_bfloat16(name, tmp_path, monkeypatch):
    """Logits and what a task keeps are float32, and are near those that float32 makes of the same tensors, but not them."""
    method, benchmark = pictured(name, monkeypatch, amp="bf16")
    run(method, benchmark, RunConfig(), tmp_path / "run")
    x = benchmark.test(2).tensors()[0]
    with torch.no_grad():
        low = method.eval().predict(x, 2).logits
        method.net = method.net._replace(dtype=None)
        logits = method.predict(x, 2).logits
    assert low.dtype == torch.float32
    assert all(t.dtype == torch.float32 for t in method.learnt[2].values() if t.is_floating_point())
    assert 0 < (low - logits).norm() < 0.03 * logits.norm()


@pytest.mark.parametrize("name", ["prognn", "apd", "den"])
def test_without_validation_rows(name, tmp_path):
    method, benchmark = made(name, tasks=2, val_fraction=0.0, iterations=8, epochs=1)
    result = run(method, benchmark, RunConfig(), tmp_path / "run")
    assert result.method_report["peak"] == [None, None]
    assert len(result.final) == 2


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
        ("den", {"expansion": 0}, "expansion must be at least 1, got 0"),
        ("den", {"select_share": 1.0}, r"select_share must be in \(0, 1\), got 1.0"),
        ("den", {"model": "lasem-resnet-18"}, "model must have no shortcuts for den, .*, got lasem-resnet-18"),
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
    method.settle()
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

        def settled(method=method, settle=settle, seen=seen):
            settle()
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


# ---- DEN -----------------------------------------------------------------------------------------------------------


def expanding(monkeypatch, **fields):
    """DEN in its second task, at whose begin the network stands as it was drawn; and the task's phases by name."""
    method, benchmark = pictured("den", monkeypatch, expansion=2, dropout=0.0, **fields)
    method.begin(0, "layers.")
    method.settle()
    task = benchmark.task(1)
    phases = {phase.name: phase for phase in method.plan(task)}
    phases["select"].first()
    return method, benchmark, task, phases


def steps(method, task, phase, count=4):
    """So many steps of a phase."""
    x, y, t = task.train.marked(1)
    opt = phase.optimizer()
    method.train()
    for step in range(count):
        rows = slice(10 * step, 10 * step + 10)
        method.step(Batch(x[rows], y[rows], t[rows]), opt, Clock(1))


def copies(method):
    return {name: p.detach().clone() for name, p in method.named_parameters()}


def test_retraining_touches_what_is_selected(monkeypatch):
    """Units from which no path of weights that are not zero leads to the head do not learn, nor what lies between them and others."""
    method, _, task, phases = expanding(monkeypatch, lr=1e-2)
    start = copies(method)
    steps(method, task, phases["select"])
    for name, p in method.named_parameters():
        assert torch.equal(p, start[name]) == name.startswith("layers"), name
    with torch.no_grad():
        method.head[0]["weight"].unflatten(1, (4, -1))[:, [1, 2]] = 0  # the head reads channels 0 and 3 of the last layer,
        method.layers[2]["weight"][[0, 3], 1:4] = 0  # these channels 0, 4 and 5 of the layer before,
        method.layers[1]["weight"][[0, 4, 5], 2:] = 0  # and these channels 0 and 1 of the first
    phases["select"].then()
    start = copies(method)
    units = {0: [0, 1], 1: [0, 4, 5], 2: [0, 3]}
    steps(method, task, phases["retrain"])
    for i, mine in units.items():
        below = units.get(i - 1, [0, 1, 2])
        inside = torch.zeros_like(method.layers[i]["weight"], dtype=torch.bool)
        inside[torch.tensor(mine)[:, None], below] = True
        moved = method.layers[i]["weight"] != start[f"layers.{i}.weight"]
        assert not moved[~inside].any()
        assert moved[inside].float().mean() > 0.9
        assert (method.layers[i]["bias"] != start[f"layers.{i}.bias"]).nonzero().flatten().tolist() == mine
    read = method.head[0]["weight"].unflatten(1, (4, -1))
    assert read[:, [1, 2]].count_nonzero() == 0
    assert read[:, [0, 3]].count_nonzero() > 0


def test_an_expansion(monkeypatch):
    """New units alone learn, so that the first task's logits stay; those whose weights are zero are gone at the end."""
    method, benchmark, task, phases = expanding(monkeypatch, lr=1e-2, group=1e-3)
    phases["select"].then()
    monkeypatch.setattr(method, "training_loss", lambda: 0.02)
    phases["retrain"].then()
    assert phases["expand"].needed()
    x, start = benchmark.test(0).tensors()[0], copies(method)
    with torch.no_grad():
        logits = method.predict(x, 0).logits
        phases["expand"].first()
    assert method.units == [7, 8, 6]
    assert [layer["weight"].shape for layer in method.layers] == [(7, 3, 3, 3), (8, 7, 3, 3), (6, 8, 3, 3)]
    grown = copies(method)
    steps(method, task, phases["expand"])
    for i, (out, inp) in enumerate(((5, 3), (6, 5), (4, 6))):
        weight = method.layers[i]["weight"]
        assert torch.equal(weight[:out, :inp], start[f"layers.{i}.weight"])
        assert torch.equal(method.layers[i]["bias"][:out], start[f"layers.{i}.bias"])
        assert (weight[out:] != grown[f"layers.{i}.weight"][out:]).float().mean() > 0.9
        assert i == 0 or (weight[:out, inp:] != grown[f"layers.{i}.weight"][:out, inp:]).float().mean() > 0.9
    with torch.no_grad():
        assert torch.equal(method.predict(x, 0).logits, logits)
        method.layers[1]["weight"][6] = 0
        method.layers[2]["weight"][[1, 5]] = 0  # of which 1 is old
        kept = copies(method)
    monkeypatch.setattr(method, "drifted", lambda: [[], [], []])
    phases["expand"].then()
    assert method.units == [7, 7, 5]
    assert torch.equal(method.layers[1]["weight"], kept["layers.1.weight"][[0, 1, 2, 3, 4, 5, 7]])
    assert torch.equal(method.layers[2]["weight"], kept["layers.2.weight"][:5, [0, 1, 2, 3, 4, 5, 7]])
    head = kept["head.0.weight"].unflatten(1, (6, -1))
    assert torch.equal(method.head[0]["weight"].unflatten(1, (5, -1)), head[:, :5])
    assert not phases["split"].needed()


def test_group_lasso_makes_units_zero(monkeypatch):
    """A step takes `group` off the norm of a new unit's weights, down to zero, and `l1` off every open weight."""
    method, _, _, phases = expanding(monkeypatch, group=0.3, l1=0.0)
    method.expanding = True
    phases["expand"].first()
    with torch.no_grad():
        method.layers[0]["weight"][5:] = torch.full((2, 3, 3, 3), 0.1)
        method.layers[0]["weight"][6] /= 10
    method.shrink()
    norm = 0.1 * 27**0.5
    torch.testing.assert_close(method.layers[0]["weight"][5], torch.full((3, 3, 3), 0.1 * (norm - 0.3) / norm))
    assert method.layers[0]["weight"][6].count_nonzero() == 0
    assert method.dead()[0] == [6]
    method, _, _, _ = expanding(monkeypatch, l1=0.01)
    before = method.head[0]["weight"].detach().clone()
    method.shrink()
    torch.testing.assert_close(method.head[0]["weight"].detach(), before.sign() * (before.abs() - 0.01).clamp_min(0))


def test_a_split(monkeypatch):
    """A unit that has moved too far is as it was, and its copy, which the head reads in its place, as it has become."""
    method, benchmark, task, phases = expanding(monkeypatch, drift_threshold=0.5, loss_threshold=1e9, lr=1e-2)
    x = benchmark.test(0).tensors()[0]
    with torch.no_grad():
        logits = method.predict(x, 0).logits
    start = copies(method)
    phases["select"].then()
    assert phases["retrain"].then() is None
    assert not phases["expand"].needed()
    with torch.no_grad():
        method.layers[0]["weight"][1] += 0.3
        for unit, way in ((0, 0.1), (2, 0.2), (4, 0.15), (5, 0.02)):
            method.layers[1]["weight"][unit] += way
        method.layers[2]["weight"][3] += 0.2
    phases["expand"].first()
    phases["expand"].then()
    assert method.splits == [[1], [2, 4], [3]]  # of the three in the second layer that moved by more than .5, the furthest two
    assert phases["split"].needed()
    now = copies(method)
    phases["split"].first()
    assert method.units == [6, 8, 5]
    for i, (split, inp) in enumerate((([1], 3), ([2, 4], 5), ([3], 6))):
        weight, count = method.layers[i]["weight"], len(start[f"layers.{i}.bias"])
        assert torch.equal(weight[split, :inp], start[f"layers.{i}.weight"][split])
        assert weight[split, inp:].count_nonzero() == 0
        assert torch.equal(weight[count:, :inp], now[f"layers.{i}.weight"][split])
        if i:  # what read a unit reads its copy too
            assert torch.equal(weight[count:, inp:], now[f"layers.{i}.weight"][split][:, [[1], [2, 4]][i - 1]])
        others = [unit for unit in range(count) if unit not in split]
        assert torch.equal(weight[others, :inp], now[f"layers.{i}.weight"][others])
    head = method.head[0]["weight"].unflatten(1, (5, -1))
    assert head[:, 3].count_nonzero() == 0
    assert torch.equal(head[:, 4], now["head.0.weight"].unflatten(1, (4, -1))[:, 3])
    with torch.no_grad():
        assert not torch.equal(method.predict(x, 0).logits, logits)  # unit 0 of the second layer has moved, if not far
        method.layers[1]["weight"][[0, 5], :5] = start["layers.1.weight"][[0, 5]]
        torch.testing.assert_close(method.predict(x, 0).logits, logits)
    start = copies(method)
    steps(method, task, phases["split"])
    assert all((p != start[name]).any() for name, p in method.named_parameters())


def test_what_holds_the_network(monkeypatch):
    """l2 / 2 of the squares of what learns, and hold / 2 of those of what has moved of the old network."""
    method, _, _, phases = expanding(monkeypatch, l2=0.2, hold=3.0)
    torch.testing.assert_close(method.penalty(), 0.1 * sum(p.square().sum() for p in method.head.parameters()))
    method.expanding = True
    phases["expand"].first()
    start = copies(method)
    with torch.no_grad():
        for p in method.layers.parameters():
            p += 0.01
    moved = 1e-4 * (5 * 3 * 9 + 5 + 6 * 5 * 9 + 6 + 4 * 6 * 9 + 4)
    squares = sum(p.square().sum() for p in method.parameters())
    torch.testing.assert_close(method.penalty(), 0.1 * squares + 1.5 * moved, rtol=1e-4, atol=0)
    assert start.keys() == copies(method).keys()


def test_a_task_has_the_units_of_its_time(tmp_path):
    """Widths at each task's end; later units change nothing for who does not read them."""
    method, benchmark = made("den", expansion=3, loss_threshold=0.0)
    result = run(method, benchmark, RunConfig(), tmp_path / "run")
    units = result.method_report["units"]
    assert units[0] == [100, 100]
    assert all(b > a for one, two in pairwise(units) for a, b in zip(one, two))
    assert method.learnt[2]["head.0.weight"].shape == (2, units[2][-1])
    x = benchmark.test(0).tensors()[0]
    with torch.no_grad():
        logits = method.predict(x, 0).logits
        for i in range(2):
            method.layers[i]["weight"][100:] += 1
            method.layers[i]["bias"][100:] += 1
        method.layers[1]["weight"][:, 100:] += 1
        assert torch.equal(method.predict(x, 0).logits, logits)
    sizes = [units[2][0] * 17, units[2][1] * (units[2][0] + 1)]
    assert result.capacity["measured_cap"] == pytest.approx(100 * sum(sizes) / (100 * 17 + 100 * 101))


def test_a_task_that_is_learnt_does_not_expand(tmp_path):
    method, benchmark = made("den", loss_threshold=1e9, drift_threshold=1e9)
    result = run(method, benchmark, RunConfig(), tmp_path / "run")
    assert result.method_report["units"] == [[100, 100]] * 3
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {line["phase"] for line in lines if line["kind"] == "epoch"} == {"train", "select", "retrain"}
