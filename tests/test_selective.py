"""All configurations of a network as one tree, and DARTS's mixture, against one network after another; configurations and networks."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from streams import Contrary, Pictures

from subnet_pipelines import METHODS, Refusal
from subnet_pipelines.benchmarks.base import Batch
from subnet_pipelines.chance import seeded
from subnet_pipelines.methods.base import Clock
from subnet_pipelines.methods.selective import NETS, SHARING, Layer, Net, configurations, named, widths


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


def stacked(method, batch, masks, dtype):
    """All networks in plain PyTorch with sums as long as the tree's: a layer is two convolutions over its nodes' rows, in that dtype."""
    x, ways = batch.x.to(dtype), len(method.ways)
    for i, layer in enumerate(method.net.layers):
        kernels = [[t.to(dtype) for t in kernel_by_hand(method, i, share)] for share in (True, False)]
        both = [F.conv2d(x, *kernel, padding=layer.kernel // 2).relu() for kernel in kernels]
        x = torch.cat([F.max_pool2d(half, layer.pool) if layer.pool > 1 else half for half in both])
    logits = method.scores(x.flatten(1).to(batch.x.dtype).view(ways, len(batch.y), -1) * masks)
    posterior = one_by_one(method, batch, masks)[0]
    losses = [F.cross_entropy(logits[c], batch.y) for c in range(ways)]
    method.zero_grad()
    (torch.stack(losses) @ posterior).backward()
    return {n: p.grad.clone() for n, p in method.named_parameters()}


@pytest.mark.parametrize(("amp", "dtype"), [("none", torch.float32), ("bf16", torch.bfloat16)])
def test_the_tree_rounds_no_worse_than_eager(amp, dtype, monkeypatch):
    """Against networks one by one in float64: the error is at most twice that of plain PyTorch in that dtype over as many rows."""
    exact, batch = pictured((3, 12, 12))
    masks = masks_for(exact, batch)
    _, _, truth = one_by_one(exact, batch, masks)
    method = pictured((3, 12, 12), dtype=torch.float32, amp=amp)[0]
    method.load_state_dict(exact.state_dict())
    small = Batch(batch.x.float(), batch.y, batch.t)
    theirs = stacked(method, small, masks.float(), dtype)
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
        METHODS["lasem"](METHODS["lasem"].Config(), Contrary(), 1)


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


@pytest.mark.parametrize("sharing", ["hps", "df-cnn"])
def test_darts_of_the_second_order(sharing, monkeypatch):
    """The logits' gradient against central differences, in float64, of the loss after a step of the weights, worked out from outside."""
    monkeypatch.setitem(NETS, "lasem-cifar", Net((Layer(3, 3, 2), Layer(3, 3), Layer(3, 3, 2, skip=True)), (4,)))
    method, batch = pictured(sharing=sharing, configuration="darts", darts_order="second", dropout=0.0, lr=0.3)
    logits = method.logits_of_layers
    weights = [p for p in method.learning(None) if p is not logits]
    with torch.no_grad():
        logits.copy_(torch.randn_like(logits))
        start = logits.clone(), [p.clone() for p in weights]

    def after_a_step(alpha):
        with torch.no_grad():
            logits.copy_(alpha)
        slopes = torch.autograd.grad(method.mixture_loss(batch), weights)
        with torch.no_grad():
            for p, slope in zip(weights, slopes):
                p -= 0.3 * slope
            loss = method.mixture_loss(batch)
            for p, value in zip((logits, *weights), (start[0], *start[1])):
                p.copy_(value)
        return loss

    expected = torch.empty_like(logits).flatten()
    for i in range(len(expected)):
        step = torch.zeros_like(expected)
        step[i] = 1e-5
        ahead, behind = (after_a_step(start[0] + sign * step.view_as(start[0])) for sign in (1, -1))
        expected[i] = (ahead - behind) / 2e-5
    (first,) = torch.autograd.grad(method.mixture_loss(batch), [logits])
    opt = method.optimizer(method.learning(None))
    found = []
    monkeypatch.setattr(opt, "step", lambda: found.append(logits.grad))
    method.step(batch, opt, Clock(0))
    torch.testing.assert_close(found[0].flatten(), expected, rtol=1e-6, atol=1e-9)
    assert (found[0] - first).norm() > 1e-3 * first.norm()  # which the first order is not
    assert found[1] is None  # the weights' step leaves the logits alone
