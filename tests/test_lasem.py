"""LASEM: the tree against one network after another, the EM by hand, what the end of a task keeps, search, resume."""

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from streams import Contrary, Pictures, Shuffled, broken_run

import subnet_pipelines
from subnet_pipelines import METHODS, NotLearnt, Refusal, RunConfig, run
from subnet_pipelines.benchmarks.base import Batch, BenchmarkConfig
from subnet_pipelines.chance import seeded
from subnet_pipelines.methods.base import Clock
from subnet_pipelines.methods.selective import NETS, SHARING, Layer, Net, configurations, named, widths


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    monkeypatch.setattr(subnet_pipelines.report, "draw", lambda results, folder: [])


def made(stream=Contrary, tasks=3, val_fraction=0.25, seed=1, **fields):
    """A method on a small stream of flat rows, and the stream."""
    benchmark = stream(BenchmarkConfig(tasks=tasks, val_fraction=val_fraction), seed)
    cls = METHODS["lasem"]
    config = {"model": "mlp", "epochs": 4, "batch_size": 7, "lr": 1e-2, **fields}
    return cls(cls.Config(**config), benchmark, seed), benchmark


def pictured(shape=(3, 9, 10), dtype=torch.float64, **fields):
    """A method with the CIFAR-100 network for small pictures, and a batch of them."""
    cls, benchmark = METHODS["lasem"], Pictures(shape)
    method = cls(cls.Config(**fields), benchmark, 1).to(dtype)
    x, y, t = benchmark.task(0).train.marked(0)
    return method, Batch(x[:5].to(dtype), y[:5], t[:5])


# ---- the tree ------------------------------------------------------------------------------------------------------


def kernel_by_hand(method, i, share):
    """Layer i's kernel, from the formulas."""
    shared, own, added = method.shared[i], method.own[i], method.added[i]
    if not share:
        return own["weight"], own["bias"]
    if method.config.sharing == "hps":
        return shared["weight"], shared["bias"]
    if method.config.sharing == "tf":
        factors = (added[f"factor_{n}"] for n in ("out", "in", "rows", "columns"))
        return torch.einsum("oihw,ao,bi,ch,dw->abcd", shared["core"], *factors), added["bias"]
    side = method.net.layers[i].kernel
    up = torch.zeros(added["mix"].shape[0], side, side, dtype=added["mix"].dtype)
    half = shared["base"].shape[-1]
    for a, b, m, n in itertools.product(range(half), range(half), range(3), range(3)):
        row, column = 2 * a + m - 1, 2 * b + n - 1
        if 0 <= row < side and 0 <= column < side:
            put = torch.zeros_like(up)
            put[:, row, column] = shared["base"][0, :, a, b] @ added["up"][:, :, m, n]
            up = up + put
    return torch.einsum("tab,tio->oiab", up + added["up_bias"][:, None, None], added["mix"]), added["bias"]


def by_hand(method, way, x):
    """Features of one configuration, layer after layer."""
    before = None
    for i, layer in enumerate(method.net.layers):
        weight, bias = kernel_by_hand(method, i, way[i])
        read, x = x, F.conv2d(x, weight, bias, padding=layer.kernel // 2).relu()
        x, before = x + before if layer.skip else x, read
        x = F.max_pool2d(x, layer.pool, ceil_mode=True) if layer.pool > 1 else x
    return x.flatten(1)


def one_by_one(method, batch, masks):
    """Posterior, losses and gradients as the authors' program makes them: every network by itself, twice."""
    with torch.no_grad():
        logits = torch.stack([method.scores(by_hand(method, way, batch.x)) for way in method.ways])
        right = logits.softmax(2)[:, torch.arange(len(batch.y)), batch.y]
        likelihood = right.mean(1) if method.config.likelihood == "mean" else right.prod(1)
        posterior = method.prior * likelihood / (method.prior * likelihood).sum()
    names, total = [n for n, _ in method.named_parameters()], {}
    losses = []
    for c, way in enumerate(method.ways):
        loss = F.cross_entropy(method.scores(by_hand(method, way, batch.x) * masks[c]), batch.y)
        losses.append(loss.detach())
        for i in range(len(way)) if method.config.sharing == "tf" else ():
            factors = [u for n, u in method.added[i].items() if n != "bias"]
            norms = [torch.linalg.norm(u.T @ u - torch.eye(len(u), dtype=u.dtype)) for u in factors]
            loss = loss + (method.config.orthogonality * sum(norms) if way[i] else 0)
        for n, g in zip(names, torch.autograd.grad(loss, list(method.parameters()), allow_unused=True)):
            if g is not None:
                total[n] = total.get(n, 0) + posterior[c] * g
    return posterior, torch.stack(losses), total


def at_once(method, batch, masks, monkeypatch):
    monkeypatch.setattr(method, "dropped", lambda made: made * masks)
    method.zero_grad()
    loss, posterior = method.expected(batch)
    loss.backward()
    return posterior, loss.detach(), {n: p.grad for n, p in method.named_parameters()}


def masks_for(method, batch):
    shape = (len(method.ways), len(batch.y), method.width)
    with seeded(1, "masks"):
        return 2.0 * (torch.rand(shape) < 0.5).to(batch.x.dtype)


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("groups", [None, [2, 2], [1, 3], [4]], ids=str)
def test_the_tree_is_all_networks_one_by_one(sharing, groups, monkeypatch):
    """Posterior, loss and every gradient, with dropout masks of each network's own; in float64 to its rounding."""
    method, batch = pictured(sharing=sharing, groups=groups, likelihood="mean" if groups is None else "product")
    method.prior.copy_(torch.rand_like(method.prior))
    method.prior /= method.prior.sum()
    masks = masks_for(method, batch)
    posterior, losses, gradients = one_by_one(method, batch, masks)
    found, loss, ours = at_once(method, batch, masks, monkeypatch)
    torch.testing.assert_close(found, posterior, rtol=1e-12, atol=1e-15)
    assert set(gradients) == {n for n, g in ours.items() if g is not None}
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-10, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}")
    if sharing != "tf":
        torch.testing.assert_close(loss, losses @ posterior, rtol=1e-12, atol=0)


BLOCKS = Net((Layer(4, 3, 2), Layer(4, 3), Layer(4, 3, skip=True), Layer(4, 3), Layer(4, 3, 2, skip=True), Layer(6, 3, 2)), (5,))


@pytest.mark.parametrize("groups", [[6], [3, 3], [4, 2], [2, 1, 3], [1, 1, 2, 2], [1, 3, 1, 1], None], ids=str)
def test_the_tree_of_a_network_with_shortcuts(groups, monkeypatch):
    """A shortcut begins in the same group, in the one before, or where a group before that ended."""
    monkeypatch.setitem(NETS, "lasem-cifar", BLOCKS)
    method, batch = pictured(groups=groups)
    masks = masks_for(method, batch)
    posterior, _, gradients = one_by_one(method, batch, masks)
    found, _, ours = at_once(method, batch, masks, monkeypatch)
    torch.testing.assert_close(found, posterior, rtol=1e-12, atol=1e-15)
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-10, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}")


def stacked(method, batch, masks):
    """All networks in plain PyTorch with sums as long as the tree's: a layer is two convolutions over its nodes' rows."""
    x, ways = batch.x, len(method.ways)
    for i, layer in enumerate(method.net.layers):
        both = [F.conv2d(x, *kernel_by_hand(method, i, share), padding=layer.kernel // 2).relu() for share in (True, False)]
        x = torch.cat([F.max_pool2d(half, layer.pool) if layer.pool > 1 else half for half in both])
    logits = method.scores(x.flatten(1).view(ways, len(batch.y), -1) * masks)
    posterior = one_by_one(method, batch, masks)[0]
    losses = [F.cross_entropy(logits[c], batch.y) for c in range(ways)]
    method.zero_grad()
    (torch.stack(losses) @ posterior).backward()
    return {n: p.grad.clone() for n, p in method.named_parameters()}


def test_the_tree_rounds_no_worse_than_eager(monkeypatch):
    """In float32, against networks one by one in float64: the error is at most twice that of plain PyTorch over as many rows."""
    exact, batch = pictured((3, 12, 12))
    masks = masks_for(exact, batch)
    _, _, truth = one_by_one(exact, batch, masks)
    method = pictured((3, 12, 12), dtype=torch.float32)[0]
    method.load_state_dict(exact.state_dict())
    small = Batch(batch.x.float(), batch.y, batch.t)
    theirs = stacked(method, small, masks.float())
    _, _, ours = at_once(method, small, masks.float(), monkeypatch)
    for part in ("shared", "own", "head"):
        error, allowed = (
            sum(float((g[n].double() - true).norm() / true.norm()) for n, true in truth.items() if n.startswith(part))
            for g in (ours, theirs)
        )
        assert error <= 2 * allowed, f"{part}: {error:.2e} against {allowed:.2e}"


def test_configurations():
    assert configurations([1, 1]) == [(True, True), (False, True), (True, False), (False, False)]
    assert configurations([1, 2]) == [(True, True, True), (False, True, True), (True, False, False), (False, False, False)]
    assert named("shared", 4) == (True,) * 4
    assert named("specific", 2) == (False, False)
    assert named("bottom-1", 4) == (True, False, False, False)
    assert named("top-3", 4) == (False, True, True, True)
    assert named("alternating", 4) == (False, True, False, True)
    assert named("1001", 4) == (True, False, False, True)
    for wrong in ("bottom-4", "top-0", "some", "10", "bottom-x", "12", "bottom"):
        with pytest.raises(Refusal, match="configuration must be em, darts, search, shared"):
            named(wrong, 4)


def test_networks():
    """Sizes of the papers' networks, by hand: 32 x 32 pictures, pooled twice by 2; 128 x 128 by 3, 3, 2, 2; 96 x 96 by 3, 3, 3."""
    assert widths(NETS["lasem-cifar"], (3, 32, 32)) == ([3, 32, 32, 64], 8 * 8 * 64)
    assert widths(NETS["lasem-office-home"], (3, 128, 128))[1] == 4 * 4 * 256
    assert widths(NETS["lasem-stl"], (3, 96, 96))[1] == 4 * 4 * 128
    resnet = NETS["lasem-resnet-18"]
    assert widths(resnet, (3, 32, 32))[1] == 2 * 2 * 512
    assert [sum(c.channels == n for c in resnet.layers) for n in (64, 128, 256, 512)] == [5, 4, 4, 4]
    inputs = widths(resnet, (3, 32, 32))[0]
    assert [i for i, layer in enumerate(resnet.layers) if layer.skip] == [2, 4, 8, 12, 16]
    for i in (2, 4, 8, 12, 16):  # a shortcut has the shape of what it is added to
        assert (inputs[i - 1], resnet.layers[i - 1].pool, resnet.layers[i].pool) == (resnet.layers[i].channels, 1, 1)
    method = pictured((3, 32, 32))[0]
    weights = 3 * 32 * 9 + 32 * 32 * 9 + 32 * 64 * 9 + 64 * 64 * 9
    assert sum(p.numel() for p in method.shared.parameters()) == weights + 32 + 32 + 64 + 64
    assert sum(p.numel() for p in method.head.parameters()) == 4096 * 64 + 64 + 64 * 3 + 3
    weight = method.own[3]["weight"]
    assert weight.abs().max() <= 0.1
    assert 0.04 < weight.std() < 0.05  # a normal distribution of .05, cut at .1
    assert (method.own[3]["bias"].float() == 0.2).all()
    with pytest.raises(Refusal, match=r"reads pictures of channels x height x width, got inputs of 16"):
        made(model="lasem-cifar")


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


# ---- DARTS ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", ["hps", "df-cnn"])
def test_a_step_of_darts(sharing, monkeypatch):
    """The logits' step, by the loss before it, and then the weights', by the loss with the new logits; a layer is the softmax's mixture."""
    monkeypatch.setitem(NETS, "lasem-cifar", BLOCKS)
    method, batch = pictured(sharing=sharing, configuration="darts", dropout=0.0, lr=0.1)
    with torch.no_grad():
        method.logits_of_layers.copy_(torch.randn_like(method.logits_of_layers))

    def loss(logits):
        x, before = batch.x, None
        for i, (layer, p) in enumerate(zip(method.net.layers, logits.softmax(1)[:, 1])):
            parts = []
            for share in (True, False):
                y = F.conv2d(x, *kernel_by_hand(method, i, share), padding=layer.kernel // 2).relu()
                y = y + before if layer.skip else y
                parts.append(F.max_pool2d(y, layer.pool, ceil_mode=True) if layer.pool > 1 else y)
            before, x = x, p * parts[0] + (1 - p) * parts[1]
        return F.cross_entropy(method.scores(x.flatten(1)), batch.y)

    learning = [p for p in method.learning(None) if p is not method.logits_of_layers]
    assert len(learning) == len(method.learning(None)) - 1
    opt, start = method.optimizer(method.learning(None)), method.logits_of_layers.detach().clone()
    (slope,) = torch.autograd.grad(loss(method.logits_of_layers), [method.logits_of_layers])
    after = start - 0.1 * slope / ((0.1 * slope**2).sqrt() + method.config.eps)
    expected = loss(after)
    gradients = torch.autograd.grad(expected, learning)
    found = method.step(batch, opt, Clock(0))["loss"]
    torch.testing.assert_close(method.logits_of_layers.detach(), after, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=0)
    for p, gradient in zip(learning, gradients):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-8, atol=1e-12)
    assert method.best() == tuple((after[:, 1] > after[:, 0]).tolist())


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

    def choose(peak):
        with torch.no_grad():
            way = next(chosen)
            monkeypatch.setattr(method, "best", lambda: way)
            moved = copies(method)
            settle(peak)
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
    [{}, {"likelihood": "product", "prior": "counts"}, {"sharing": "tf"}, {"sharing": "df-cnn"}, {"configuration": "darts"}],
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
    with pytest.raises(NotLearnt, match="task 2 has not chosen"):
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
    """The peak is the test accuracy of the epoch with the best validation value; what stays is its copy, or the last epoch."""
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
        kept[keep] = result
    assert kept["best"].method_report["peak"] == kept["best"].final
    assert kept["best"].method_report["peak"] == kept["last"].method_report["peak"]


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
    assert result.method_report["peak"] == [2.0, 8.0]
    assert torch.equal(method.learnt[0]["head.0.weight"], ends[1]["head.0.weight"])
    assert torch.equal(starts[4]["shared.1.weight"], ends[1]["shared.1.weight"])


@pytest.mark.parametrize(
    "fields", [{"configuration": "search"}, {"keep": "best"}, {"sharing": "tf"}, {"configuration": "darts"}], ids=str
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
        ({"dropout": 1.0}, r"dropout and smoothing must be in \[0, 1\), got 1.0 and 0.9"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"lr_decay": -1.0}, "lr_decay must not be negative, got -1.0"),
    ],
)
def test_refusals(fields, sentence):
    with pytest.raises(Refusal, match=sentence):
        made(**fields)
