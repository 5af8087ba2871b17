"""LASEM: the EM by hand, what the end of a task keeps, fixed configurations, search, resume."""

import json

import pytest
import torch
import torch.nn.functional as F
from streams import Contrary, Shuffled, broken_run

import subnet_pipelines
from subnet_pipelines import METHODS, NotLearnt, Refusal, RunConfig, run
from subnet_pipelines.benchmarks.base import Batch, BenchmarkConfig
from subnet_pipelines.methods.base import Clock
from subnet_pipelines.methods.selective import SHARING, named


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    monkeypatch.setattr(subnet_pipelines.report, "draw", lambda results, folder: [])


def made(stream=Contrary, tasks=3, val_fraction=0.25, seed=1, **fields):
    """A method on a small stream of flat rows, and the stream."""
    benchmark = stream(BenchmarkConfig(tasks=tasks, val_fraction=val_fraction), seed)
    cls = METHODS["lasem"]
    config = {"model": "mlp", "epochs": 4, "batch_size": 7, "lr": 1e-2, **fields}
    return cls(cls.Config(**config), benchmark, seed), benchmark


# ---- the EM --------------------------------------------------------------------------------------------------------


def logits_of(probabilities):
    """Logits (ways, B, 2) whose first class has these probabilities (B, ways)."""
    p = torch.tensor(probabilities).T
    return torch.stack([p, 1 - p], 2).log()


def test_posteriors_by_hand():
    """Two rows, four configurations, the prior .4 .3 .2 .1; the labels' probabilities are .5 and .3, .5 and .5, .9 and .1, .2 and .2."""
    logits, y = logits_of([[0.5, 0.5, 0.9, 0.2], [0.3, 0.5, 0.1, 0.2]]), torch.tensor([0, 0])
    for likelihood, expected in (
        ("mean", [0.16 / 0.43, 0.15 / 0.43, 0.1 / 0.43, 0.02 / 0.43]),
        ("product", [0.06 / 0.157, 0.075 / 0.157, 0.018 / 0.157, 0.004 / 0.157]),
    ):
        method = made(likelihood=likelihood)[0]
        method.prior.copy_(torch.tensor([0.4, 0.3, 0.2, 0.1]))
        assert method.posterior(logits, y).tolist() == pytest.approx(expected, rel=1e-5)


def test_priors_by_hand():
    """Three batches: the running prior is the mean of their posteriors, the counted one (leads + 1) / (batches + ways)."""
    posteriors = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.2, 0.5, 0.2, 0.1], [0.6, 0.3, 0.0, 0.1]])
    running, counts = made(prior="running")[0], made(prior="counts")[0]
    for seen, (mean, leads) in enumerate(
        [([0.7, 0.1, 0.1, 0.1], [2, 1, 1, 1]), ([0.45, 0.3, 0.15, 0.1], [2, 2, 1, 1]), ([0.5, 0.3, 0.1, 0.1], [3, 2, 1, 1])]
    ):
        for method in (running, counts):
            method.take(posteriors[seen])
        assert running.prior.tolist() == pytest.approx(mean, abs=1e-6)
        assert counts.prior.tolist() == pytest.approx([n / (seen + 5) for n in leads], abs=1e-6)
    counts.forget_posteriors()
    assert counts.prior.tolist() == [0.25] * 4
    counts.take(posteriors[1])
    assert counts.prior.tolist() == pytest.approx([0.2, 0.4, 0.2, 0.2])


@pytest.mark.parametrize("fields", [{}, {"likelihood": "product", "prior": "counts"}, {"prior_since": "epoch"}], ids=str)
def test_a_step_of_em(fields, monkeypatch):
    """Posteriors and priors sum to one; the step's posterior is of the weights before it; each batch moves the prior once."""
    method, benchmark = made(tasks=1, **fields)
    task = benchmark.task(0)
    (phase,) = method.plan(task)
    phase.first()
    opt, (x, y, t) = phase.optimizer(), task.train.marked(0)
    posteriors, take = [], method.take
    monkeypatch.setattr(method, "take", lambda posterior: (posteriors.append(posterior), take(posterior)))
    for step in range(8):
        rows = slice(7 * step, 7 * step + 7)
        batch, clock = Batch(x[rows], y[rows], t[rows]), Clock(0, batch=step % 4, step=step, steps=8)
        start = step % 4 == 0 and method.config.prior_since == "epoch"
        prior = torch.full((4,), 0.25) if start else method.prior.clone()
        with torch.no_grad():
            logits = torch.stack([method.scores(flat(method, way, batch.x)) for way in method.ways])
        right = logits.softmax(2)[:, torch.arange(7), batch.y]
        joint = prior * (right.mean(1) if method.config.likelihood == "mean" else right.prod(1))
        loss = method.step(batch, opt, clock)["loss"]
        assert loss > 0
        torch.testing.assert_close(posteriors[-1], joint / joint.sum(), rtol=1e-4, atol=1e-6)
        assert float(posteriors[-1].sum()) == pytest.approx(1, abs=1e-5)
        assert float(method.prior.sum()) == pytest.approx(1, abs=1e-5)
    assert len(posteriors) == 8
    kept = posteriors[4:] if method.config.prior_since == "epoch" else posteriors
    if method.config.prior == "running":
        torch.testing.assert_close(method.prior, torch.stack(kept).mean(0), rtol=1e-4, atol=1e-6)
    assert float(method.led.sum()) == len(kept) + 4
    assert len(method.path()) == 8  # one of the points at 0, 12, 25, ... of 100
    assert method.history[87].tolist() == pytest.approx((method.prior @ method.shares).tolist())


def flat(method, way, x):
    """Features of the two linear layers of the network for flat rows."""
    for i, share in enumerate(way):
        layer = (method.shared if share else method.own)[i]
        x = F.linear(x, layer["weight"].flatten(1), layer["bias"]).relu()
    return x


@pytest.mark.parametrize("dropout", [0.0, 0.5, 0.3])
def test_dropout(dropout):
    """The share of zeros to five deviations, row by row; what stays is scaled up, and gradients pass it alike; in no step the same."""
    method, n = made(dropout=dropout)[0], 100_001
    x = torch.ones(2, n, dtype=torch.float64, requires_grad=True)
    y = method.dropped(x)
    y.sum().backward()
    assert torch.equal(x.grad, y)
    kept = y[y != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - dropout)), rtol=2**-15, atol=0)
    for zeros in (y == 0).sum(1).tolist():
        assert abs(zeros - n * dropout) <= 5 * (n * dropout * (1 - dropout)) ** 0.5 + n * 2**-17
    both = ((y[0] == 0) & (y[1] == 0)).sum()
    assert abs(int(both) - n * dropout**2) <= 5 * (n * dropout**2) ** 0.5 + n * 2**-16
    assert torch.equal(method.dropped(x), y) == (dropout == 0)


# ---- what a task keeps ---------------------------------------------------------------------------------------------


def copies(method):
    return [{n: p.detach().clone() for n, p in layer.items()} for layer in method.shared]


@pytest.mark.parametrize("sharing", SHARING)
def test_layers_of_its_own_leave_the_shared_ones_as_they_were(sharing, tmp_path, monkeypatch):
    """The first task shares both layers, the second the upper, the third none: bits of what was not shared do not move."""
    method, benchmark = made(sharing=sharing, stream=Shuffled)
    chosen = iter([(True, True), (False, True), (False, False)])
    seen, logits, settle = [], [], method.settle
    x = benchmark.test(0).tensors()[0]

    def choose():
        with torch.no_grad():
            way = next(chosen)
            monkeypatch.setattr(method, "best", lambda: way)
            moved = copies(method)
            settle()
            seen.append((moved, copies(method)))
            logits.append(method.predict(x, 0).logits)

    monkeypatch.setattr(method, "settle", choose)
    monkeypatch.setattr(method, "validate", lambda batch, clock: torch.zeros(()))
    monkeypatch.setattr(method, "measure", lambda: [None, None])
    run(method, benchmark, RunConfig(), tmp_path / "run")
    first, second, third = (after for _, after in seen)
    for i, lower in enumerate((True, False)):
        for name, tensor in first[i].items():
            assert torch.equal(second[i][name], tensor) == lower
            assert torch.equal(third[i][name], second[i][name])
            assert not torch.equal(seen[2][0][i][name], tensor)  # it had moved in training
    assert not torch.equal(logits[0], logits[1])  # what the second task shares is the first's too: it forgets
    assert torch.equal(logits[1], logits[2])
    assert method.chosen == [[True, True], [False, True], [False, False]]
    assert {n for n in method.learnt[2] if n[0].isdigit()} == {"0.weight", "0.bias", "1.weight", "1.bias"}
    added = {f"{i}.{n}" for i in range(2) for n in method.added[i]}
    assert {n for n in method.learnt[0] if n[0].isdigit()} == added  # nothing where the kernel itself is shared


def test_a_layer_that_nobody_shares_starts_anew(tmp_path):
    """In the code a first task with layers of its own leaves no shared weight, and the next draws one."""
    method, benchmark = made(configuration="01", tasks=2)
    run(method, benchmark, RunConfig(), tmp_path / "run")
    assert method.known == [False, True]
    for task in (5, 6):
        before = copies(method)
        method.begin(task)
        assert not torch.equal(before[0]["weight"], method.shared[0]["weight"])
        assert torch.equal(before[1]["weight"], method.shared[1]["weight"])
    assert method.report()["configurations"] == ["01", "01"]


@pytest.mark.parametrize("configuration", ["shared", "specific", "bottom-1", "alternating"])
def test_fixed_configurations(configuration, tmp_path):
    """Only what a configuration uses learns; all of its own forgets nothing."""
    method, benchmark = made(configuration=configuration, stream=Shuffled)
    way = named(configuration, 2)
    learning = {id(p) for p in method.learning(way)}
    for i, share in enumerate(way):
        assert (id(method.shared[i]["weight"]) in learning) == share
        assert (id(method.own[i]["weight"]) in learning) != share
    result = run(method, benchmark, RunConfig(), tmp_path / "run")
    assert min(result.diagonal) >= 90
    assert result.method_report["configurations"] == ["".join("01"[share] for share in way)] * 3
    if configuration == "specific":
        assert result.final == result.diagonal
        assert result.capacity["measured_cap"] == 300
    if configuration == "shared":
        assert result.capacity["measured_cap"] == 100
    assert "curves" not in result.method_report


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"likelihood": "product", "prior": "counts"},
        {"sharing": "tf"},
        {"sharing": "df-cnn"},
        {"configuration": "darts"},
        {"configuration": "darts", "darts_order": "second"},
        {"amp": "bf16"},
        {"amp": "bf16", "sharing": "tf"},
        {"amp": "bf16", "configuration": "darts", "darts_order": "second"},
    ],
    ids=str,
)
def test_it_learns(fields, tmp_path):
    method, benchmark = made(stream=Shuffled, epochs=8, tasks=2, **fields)
    result = run(method, benchmark, RunConfig(), tmp_path / "run")
    assert min(result.diagonal) >= 90
    assert min(result.method_report["peak"]) >= 90
    lines = result.method_report["curves"]["shared while a task trains"]["lines"]
    assert list(lines) == ["layer 0", "layer 1"]
    assert all(0 <= y <= 1 for points in lines.values() for _, y in points)
    json.dumps(result.method_report)
    with pytest.raises(NotLearnt, match="task 2 has not been learnt"):
        method.predict(benchmark.test(0).tensors()[0], 2)


# ---- epochs, rates, search -----------------------------------------------------------------------------------------


def test_the_rate_falls_epoch_by_epoch():
    method, benchmark = made(tasks=3, epochs=5, lr_decay=0.5)
    rows = -(-len(benchmark.task(0).train) // 7)
    for lr_epochs, first in (("stream", 10), ("task", 0)):
        method.config.__dict__["lr_epochs"] = lr_epochs
        (phase,) = method.plan(benchmark.task(2))
        for step in range(5 * rows):
            assert phase.schedule(step / (5 * rows)) == 1 / (1 + 0.5 * (first + step // rows))
    assert phase.batch_size == 7


def test_squares_that_start_at_one():
    """TensorFlow's RMSprop: the first step is lr g / sqrt(.9 + .1 g^2)."""
    for squares, start in (("one", 0.9), ("zero", 0.0)):
        method = made(squares=squares, lr=0.1)[0]
        opt = method.optimizer(method.learning(None))
        p = method.own[0]["bias"]
        before = p.detach().clone()
        p.grad = torch.linspace(-1, 1, len(p))
        opt.step()
        expected = before - 0.1 * p.grad / ((start + 0.1 * p.grad**2).sqrt() + method.config.eps)
        torch.testing.assert_close(p.detach(), expected)


def test_the_best_epoch(tmp_path, monkeypatch):
    """The peak is the test accuracy of the epoch with the best validation value, beside that on validation rows; what stays is its copy,
    or the last epoch."""
    kept = {}
    for keep in ("last", "best"):
        method, benchmark = made(tasks=1, keep=keep, epochs=5)
        errors = iter([0.5, 0.1, 0.3, 0.1, 0.2])
        heads = []

        def value(batch, clock, errors=errors, heads=heads, method=method):
            heads.append(method.head[0]["weight"].detach().clone())
            return torch.tensor(next(errors))

        monkeypatch.setattr(method, "validate", value)
        result = run(method, benchmark, RunConfig(), tmp_path / keep)
        stays = method.learnt[0]["head.0.weight"]
        assert torch.equal(stays, heads[1 if keep == "best" else 4])
        kept[keep] = result.method_report
        if keep == "best":
            x, y = benchmark.task(0).val.tensors()
            right = method.predict(x, 0).logits.argmax(1) == y
            assert kept[keep]["validation"] == [pytest.approx(100 * float(right.float().mean()))]
            assert kept[keep]["peak"] == result.final
    assert all(kept["best"][name] == kept["last"][name] for name in ("validation", "peak"))


def test_a_checkpoint_of_before_validation_was_reported():
    """It goes on: of its tasks nothing is known."""
    method = made()[0]
    facts = {name: value for name, value in method.facts().items() if name != "validated"} | {"peaks": [50.0, None]}
    method.build(facts)
    assert method.validated == [None, None]


def test_without_validation_rows(tmp_path):
    method, benchmark = made(tasks=2, val_fraction=0.0)
    assert run(method, benchmark, RunConfig(), tmp_path / "run").method_report["peak"] == [None, None]
    with pytest.raises(Refusal, match="search compares accuracies on validation rows, but val_fraction of contrary is 0"):
        made(configuration="search", val_fraction=0.0)


def test_search_keeps_the_best_configuration(tmp_path, monkeypatch):
    """Every configuration starts from the same tensors; the best on validation rows is what stays, of equals the first."""
    method, benchmark = made(configuration="search", tasks=2, stream=Shuffled)
    scores = iter([50.0, 70.0, 70.0, 60.0, 10.0, 20.0, 30.0, 40.0])
    starts, ends = [], []

    def measure():
        ends.append({n: t.clone() for n, t in method.state_dict().items()})
        return [next(scores), 1.0 * len(ends)]

    begin = method.begin

    def begun(task):
        begin(task)
        starts.append({n: t.clone() for n, t in method.state_dict().items()})

    monkeypatch.setattr(method, "measure", measure)
    monkeypatch.setattr(method, "begin", begun)
    result = run(method, benchmark, RunConfig(), tmp_path / "run")
    assert len(starts) == len(ends) == 8
    for task in range(2):
        first, *others = starts[4 * task : 4 * task + 4]
        assert all(torch.equal(first[n], other[n]) for other in others for n in first)
    assert result.method_report["configurations"] == ["01", "00"]
    assert result.method_report["validation"] == [70.0, 40.0]
    assert result.method_report["peak"] == [2.0, 8.0]
    assert torch.equal(method.learnt[0]["head.0.weight"], ends[1]["head.0.weight"])
    assert torch.equal(starts[4]["shared.1.weight"], ends[1]["shared.1.weight"])


@pytest.mark.parametrize(
    "fields",
    [
        {"configuration": "search"},
        {"keep": "best"},
        {"sharing": "tf"},
        {"configuration": "darts"},
        {"configuration": "darts", "darts_order": "second"},
    ],
    ids=str,
)
def test_resumes_to_the_same_bits(fields, tmp_path):
    def make():
        return made(tasks=2, epochs=2, batch_size=24, **fields)

    expected, benchmark = make()
    whole = run(expected, benchmark, RunConfig(), tmp_path / "a")
    method, result = broken_run(make, tmp_path / "b", (3, 4, 2))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, method.state_dict()[name]), name
    for one, two in zip(expected.learnt, method.learnt, strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert (whole.method_report, whole.accuracy_matrix) == (result.method_report, result.accuracy_matrix)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"configuration": "bottom-2"}, r"configuration must be .* N from 1 to 1, .* got 'bottom-2'"),
        ({"groups": [1, 2]}, r"groups must be sizes that sum to the 2 layers of mlp, got \[1, 2\]"),
        ({"groups": [2, 0]}, "groups must be sizes that sum to the 2 layers"),
        ({"model": "lasem-resnet-18"}, "groups must leave at most 10 choices, whose configurations are 1024; got 17"),
        ({"model": "lasem-resnet-18", "groups": [5, 4, 4, 4], "sharing": "tf"}, "sharing must be hps for lasem-resnet-18"),
        ({"configuration": "darts", "sharing": "tf"}, "sharing must be hps or df-cnn for configuration darts"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"lr_decay": -1.0}, "lr_decay must not be negative, got -1.0"),
    ],
)
def test_refusals(fields, sentence):
    with pytest.raises(Refusal, match=sentence):
        made(**fields)
