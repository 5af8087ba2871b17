"""Masked layers: once per optimizer step, live bits are the selection of the scores, and training is that of a naive twin."""

import copy
import io
import pickle

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from device import DEVICE, ON_CPU, cpu_only, generator
from launch import launch
from torch import nn
from torch.utils.checkpoint import checkpoint

import subnet_kernels as sk
from subnet_kernels import layers, reference
from subnet_kernels.layers import SubnetLayer
from subnet_kernels.ops.masked import EagerMaskedLinear


def net(train_weights=True, **config):
    """Two masked layers of different densities, so that a mix-up of their k shows."""
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(8, 33), nn.ReLU(), nn.Linear(33, 4))
    density = config.pop("density", {"0": 0.3, "2": 0.6})
    return sk.convert(model, sk.SubnetConfig(density=density, train_weights=train_weights, **config))


class Naive(nn.Module):
    """The yardstick: it selects at every forward with the reference, and has the straight-through rule by autograd alone.

    Its product is the library's where the layer takes that, or PyTorch's, so that training agrees to the bit.
    """

    compiled = False  # whether the model that this one is compared with is compiled, which has PyTorch's product

    def __init__(self, layer):
        super().__init__()
        self.kind, self.rule, self.k = copy.deepcopy(layer), layer.rule, layer.k
        self.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=layer.weight.requires_grad)
        self.scores = nn.Parameter(layer.scores.detach().clone())
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())

    def mask(self):
        if self.rule.select == "threshold":
            (bits,) = reference.threshold([self.scores], self.rule.value, self.rule.inclusive)
        else:
            (bits,) = reference.select([self.scores], [self.k], self.rule.by, self.rule.ties)
        return reference.unpack(bits, self.weight.shape)

    def forward(self, x):
        key = self.scores.abs() if self.rule.key == "magnitude" else self.scores
        weight = self.weight * (self.mask().to(self.weight.dtype) + (key - key.detach()))
        if isinstance(self.kind, nn.Linear):
            own = not self.compiled and self.kind._plainly(x)
            return EagerMaskedLinear.apply(x, weight, None, self.bias) if own else F.linear(x, weight, self.bias)
        return self.kind._conv_forward(x, weight, self.bias)


def naive(model):
    return nn.Sequential(*(Naive(m) if isinstance(m, SubnetLayer) else copy.deepcopy(m) for m in model))


def masked(model):
    return [m for m in model.modules() if isinstance(m, SubnetLayer)]


def assert_invariant(model):
    """Live bits are the selection of the scores, w_eff the open weights, to the bit, and nothing had to be asked for it."""
    assert masked(model)
    for layer in masked(model):
        rule = layer.rule
        if rule.select == "topk":
            (bits,) = reference.select([layer.scores], [rule.k(layer.weight.numel())], rule.by, rule.ties)
        else:
            (bits,) = reference.threshold([layer.scores], rule.value, rule.inclusive)
        assert torch.equal(layer.bits, bits)
        expected = reference.apply(layer.weight.detach(), bits)
        assert layer.w_eff.dtype == layer.weight.dtype
        assert layer.w_eff.is_contiguous()
        assert torch.equal(layer.w_eff.view(torch.uint8), expected.view(torch.uint8))


def train(model, optimizers, steps=5, accumulate=1, run=None, after=None, shape=(6, 8)):
    run = run or model
    chance = generator(3)
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for _ in range(accumulate):
            x = torch.randn(*shape, generator=chance)
            run(x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            if after:
                after()


def assert_twins(model, twin, tolerance=0.0):
    for (name, mine), theirs in zip(model.named_parameters(), dict(ordered(twin, model)).values()):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")
    for layer, other in zip(masked(model), [m for m in twin.modules() if isinstance(m, Naive)]):
        assert torch.equal(reference.unpack(layer.bits, layer.weight.shape), other.mask())


def ordered(twin, model):
    named = dict(twin.named_parameters())
    return [(name, named[name]) for name, _ in model.named_parameters()]


@pytest.fixture
def calls(monkeypatch):
    """How many layers each refresh_ call served."""
    seen = []
    original = layers.ops.refresh_
    monkeypatch.setattr(layers.ops, "refresh_", lambda scores, *a: (seen.append(len(scores)), original(scores, *a))[1])
    return seen


OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, 1e-2),
    "adam-foreach": lambda p: torch.optim.Adam(p, 1e-2, foreach=True),
    "adam-loop": lambda p: torch.optim.Adam(p, 1e-2, foreach=False),
    "adam-fused": lambda p: torch.optim.Adam(p, 1e-2, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, 1.0, momentum=0.9),
    "sgd-fused": lambda p: torch.optim.SGD(p, 1.0, momentum=0.9, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3),
}


# ------------------------------------------------------------------------------------------------ once per optimizer step


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("train_weights", [True, False])
def test_invariant_and_twin(name, train_weights, calls):
    model = net(train_weights)
    twin = naive(model)
    assert_invariant(model)
    start = [layer.bits.clone() for layer in masked(model)]
    mine, theirs = (OPTIMIZERS[name](m.parameters()) for m in (model, twin))
    calls.clear()
    train(model, [mine], 6, after=lambda: assert_invariant(model))
    assert calls == [2] * 6  # one call a step, for both layers
    train(twin, [theirs], 6)
    assert_twins(model, twin)
    assert any(not torch.equal(a, layer.bits) for a, layer in zip(start, masked(model)))  # the masks did learn


def test_gradient_accumulation_refreshes_once(calls):
    model = net()
    twin = naive(model)
    optimizers = [torch.optim.Adam(m.parameters(), 1e-2) for m in (model, twin)]
    calls.clear()
    train(model, optimizers[:1], 4, accumulate=3)
    assert calls == [2] * 4
    train(twin, optimizers[1:], 4, accumulate=3)
    assert_twins(model, twin)


def test_two_optimizers(calls):
    """Scores by Adam, weights and biases by SGD: whichever steps, the layer is current after it."""
    model = net()
    twin = naive(model)

    def pair(m):
        named = dict(m.named_parameters())
        scores = [p for n, p in named.items() if n.endswith("scores")]
        return [
            torch.optim.Adam(scores, 1e-2),
            torch.optim.SGD([p for n, p in named.items() if not n.endswith("scores")], 0.1, momentum=0.9),
        ]

    mine, theirs = pair(model), pair(twin)
    calls.clear()
    train(model, mine, 4, after=lambda: assert_invariant(model))
    assert calls == [2] * 8
    train(twin, theirs, 4)
    assert_twins(model, twin)


def test_parameter_group_added_later():
    model = net()
    optimizer = torch.optim.SGD(model[0].parameters(), 0.5)
    train(model, [optimizer], 1)
    optimizer.add_param_group({"params": list(model[2].parameters())})
    train(model, [optimizer], 2, after=lambda: assert_invariant(model))


def test_two_models_do_not_refresh_each_other(calls):
    a, b = net(), net()
    first, second = (torch.optim.SGD(m.parameters(), 0.1) for m in (a, b))
    calls.clear()
    train(a, [first], 2)
    assert calls == [2, 2]
    train(b, [second], 1)
    assert calls == [2, 2, 2]
    assert_invariant(a)
    assert_invariant(b)


def test_different_rules_are_one_call_each(calls):
    model = nn.Sequential(
        sk.SubnetLinear(8, 33, rule=sk.Rule(0.3)), nn.ReLU(), sk.SubnetLinear(33, 4, rule=sk.Rule(0.6, by="value"))
    )
    calls.clear()
    train(model, [torch.optim.SGD(model.parameters(), 0.1)], 2, after=lambda: assert_invariant(model))
    assert calls == [1, 1] * 2


def test_threshold_rule():
    model = net(select="threshold", value=0.02, inclusive=False, train_weights=True)
    twin = naive(model)
    optimizers = [torch.optim.SGD(m.parameters(), 0.5) for m in (model, twin)]
    train(model, optimizers[:1], after=lambda: assert_invariant(model))
    train(twin, optimizers[1:])
    assert_twins(model, twin)
    with torch.no_grad():  # exactly the value is closed, the next float above it open
        model[0].scores.fill_(0.02)
        model[0].scores[0, 0] = torch.nextafter(torch.tensor(0.02), torch.tensor(1.0))
    model(torch.ones(1, 8))
    assert reference.count(model[0].bits) == 1


@pytest.mark.parametrize(("by", "ties"), [("magnitude", "first"), ("value", "last"), ("value", "all"), ("magnitude", "all")])
def test_rules_train_as_the_twin(by, ties):
    model = net(by=by, ties=ties)
    twin = naive(model)
    optimizers = [torch.optim.Adam(m.parameters(), 1e-2) for m in (model, twin)]
    train(model, optimizers[:1], after=lambda: assert_invariant(model))
    train(twin, optimizers[1:])
    assert_twins(model, twin)


def test_density_can_be_set(calls):
    model = net()
    model[0].density = 0.8
    assert model[0].density == 0.8
    assert model[0].k == sk.k_sort(8 * 33, 0.8) == int(reference.count(model[0].bits))
    assert_invariant(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    train(model, [optimizer], 1)
    model[0].density = 0.2  # between the steps of one optimizer
    train(model, [optimizer], 1)
    assert int(reference.count(model[0].bits)) == sk.k_sort(8 * 33, 0.2)
    assert_invariant(model)
    with pytest.raises(ValueError, match="density must be in"):
        model[0].density = 0.0


def test_train_and_eval_do_not_change_bits(calls):
    model = net()
    before = [(layer.bits, layer.bits._version, layer.w_eff._version) for layer in masked(model)]
    calls.clear()
    x = torch.randn(3, 8)
    outputs = [model.train(mode)(x) for mode in (True, False, True)]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert calls == []
    assert before == [(layer.bits, layer.bits._version, layer.w_eff._version) for layer in masked(model)]


# ------------------------------------------------------------------------------------------------------------- gradients


def test_gradients_follow_the_rule():
    """dS = G W sign(S) for open and closed weights; dW = G where open and not frozen; and the gradient of x."""
    model = net()
    layer = model[0]
    x = torch.randn(5, 8, requires_grad=True)
    opened = reference.unpack(layer.bits, layer.weight.shape)
    frozen = opened & (torch.rand(opened.shape) < 0.5)
    layer.frozen, layer.frozen_values = reference.pack(frozen), layer.weight.detach()[frozen]
    grad_y = torch.randn(5, 33)
    layer(x).backward(grad_y)
    g = grad_y.t() @ x.detach()
    torch.testing.assert_close(layer.scores.grad, g * layer.weight.detach() * layer.scores.detach().sign())
    assert (layer.scores.grad[~opened] != 0).all()
    assert (layer.scores.grad[frozen] != 0).all()
    torch.testing.assert_close(layer.weight.grad, torch.where(opened & ~frozen, g, torch.zeros(())))
    assert (layer.weight.grad[frozen] == 0).all()
    torch.testing.assert_close(layer.bias.grad, grad_y.sum(0))
    torch.testing.assert_close(x.grad, grad_y @ torch.where(opened, layer.weight.detach(), torch.zeros(())))


def test_fixed_weights_get_no_gradient():
    model = net(train_weights=False)
    model(torch.randn(5, 8)).sum().backward()
    assert [layer.weight.grad for layer in masked(model)] == [None, None]
    assert all((layer.scores.grad != 0).any() for layer in masked(model))


def test_scores_can_be_fixed():
    model = net()
    for layer in masked(model):
        layer.scores.requires_grad_(False)
    model(torch.randn(5, 8)).sum().backward()
    assert [layer.scores.grad for layer in masked(model)] == [None, None]
    assert all((layer.weight.grad != 0).any() for layer in masked(model))


@pytest.mark.parametrize("train_weights", [True, False])
@pytest.mark.parametrize("how", ["refresh", "step", "forward", "density", "load"])
def test_backward_after_a_refresh_is_an_error(how, train_weights):
    """Between a forward and its backward the mask changed: a gradient would be of another network."""
    model = net(train_weights)
    optimizer = torch.optim.SGD(model.parameters(), 5.0)
    model(torch.randn(4, 8)).sum().backward()
    loss = model(torch.randn(4, 8)).sum()
    if how == "refresh":
        model[0].scores.data.normal_()
        sk.refresh(model)
    elif how == "step":
        optimizer.step()
    elif how == "forward":
        with torch.no_grad():
            model[0].scores.normal_()
        model(torch.randn(4, 8))
    elif how == "density":
        model[0].density = 0.9
    else:
        model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_nan_behind_a_closed_bit_stays_there():
    model = net()
    layer = model[0]
    closed = ~reference.unpack(layer.bits, layer.weight.shape)
    with torch.no_grad():
        layer.weight[closed] = float("nan")
    assert model(torch.randn(3, 8)).isfinite().all()


@pytest.mark.parametrize("train_weights", [True, False])
def test_gradients_of_gradients(monkeypatch, train_weights):
    """A penalty on gradients learns through the layer's own node as through the effective weight and PyTorch's product."""
    x, found = torch.randn(5, 8), []
    for own in (True, False):
        monkeypatch.setattr(layers, "COMPILED", own)
        model, inputs = net(train_weights=train_weights), x.clone().requires_grad_()
        wanted = [p for p in model.parameters() if p.requires_grad]
        first = torch.autograd.grad(model(inputs).tanh().square().sum(), [inputs, *wanted], create_graph=True)
        sum(g.square().sum() for g in first).backward()
        found.append([inputs.grad, *(p.grad for p in wanted)])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_gradients_of_gradients_when_fused():
    """x's second gradient; what a fused layer leaves for its optimizer stays G."""
    (layer, *_) = net()
    sk.optim.SGD(layer.parameters(), fuse_ste=True)
    x = torch.randn(5, 8)
    weight = layer.w_eff.clone().requires_grad_()
    x, twin = x.requires_grad_(), x.detach().clone().requires_grad_()
    for inputs, run in ((x, layer), (twin, lambda t: F.linear(t, weight, layer.bias.detach()))):
        (first,) = torch.autograd.grad(run(inputs).tanh().square().sum(), inputs, create_graph=True)
        first.square().sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)
    torch.testing.assert_close(layer.weight.grad, weight.grad)


# -------------------------------------------------------------------------------------------- what people do with a model


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_fullgraph_compile_trains_as_the_twin(backend):
    torch._dynamo.reset()
    model = net()
    twin = naive(model)
    for layer in twin:
        layer.compiled = True
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    optimizers = [torch.optim.Adam(m.parameters(), 1e-2) for m in (model, twin)]
    train(model, optimizers[:1], run=compiled, after=lambda: assert_invariant(model))
    if ON_CPU or backend != "inductor":  # whose sums are those of PyTorch's own kernels on the CPU alone
        train(twin, optimizers[1:])
        assert_twins(model, twin)
    assert counter.frame_count == 1
    x = torch.randn(6, 8)
    assert_close = torch.testing.assert_close
    assert_close(compiled(x), model(x))


def test_compiled_backward_after_a_refresh_is_an_error():
    torch._dynamo.reset()
    model = net()
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(torch.randn(4, 8)).sum()
    model[0].scores.data.normal_()
    sk.refresh(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_compiled_optimizer_step_keeps_the_invariant():
    torch._dynamo.reset()
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    step = torch.compile(lambda: optimizer.step(), backend="aot_eager")
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().sum().backward()
        step()
        assert_invariant(model)


def test_export():
    model = net().eval()
    x = torch.randn(3, 8)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))


def test_checkpointing():
    model = net()
    twin = naive(model)
    optimizers = [torch.optim.Adam(m.parameters(), 1e-2) for m in (model, twin)]
    train(model, optimizers[:1], run=lambda x: checkpoint(model, x, use_reentrant=False))
    train(twin, optimizers[1:])
    assert_twins(model, twin)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_train_alone(how):
    model = net()
    train(model, [torch.optim.Adam(model.parameters(), 1e-2)], 2)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert_invariant(other)
    twin = naive(other)
    optimizers = [torch.optim.Adam(m.parameters(), 1e-2) for m in (other, twin)]
    train(other, optimizers[:1], after=lambda: assert_invariant(other))
    train(twin, optimizers[1:])
    assert_twins(other, twin)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert_invariant(model)


def test_moving_average():
    average = [torch.zeros(2)]
    torch._foreach_lerp_(average, [torch.ones(2)], 0.5)
    if average[0]._version == 0:
        pytest.skip(f"torch {torch.__version__} writes an average without counting its version: sk.refresh is for that")
    model = net()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    train(
        model,
        [torch.optim.SGD(model.parameters(), 0.5)],
        after=lambda: (average.update_parameters(model), average(torch.randn(2, 8)), assert_invariant(average)),
    )
    assert not torch.equal(average.module[0].bits, model[0].bits)
    assert_invariant(model)


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_refreshes_at_once(assign):
    model, other = net(), net()
    with torch.no_grad():
        for p in other.parameters():
            p.copy_(torch.randn_like(p))
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    assert_invariant(model)
    twin = naive(model)
    x = torch.randn(3, 8)
    torch.testing.assert_close(model(x), twin(x))
    optimizers = [torch.optim.SGD(m.parameters(), 0.5) for m in (model, twin)]
    train(model, optimizers[:1], after=lambda: assert_invariant(model))
    train(twin, optimizers[1:])
    assert_twins(model, twin)


def test_load_assigns_another_dtype():
    model = net()
    model.load_state_dict({k: v.double() for k, v in model.state_dict().items()}, assign=True)
    assert_invariant(model)
    assert model(torch.randn(3, 8, dtype=torch.float64)).dtype == torch.float64


def test_writes_through_data_need_refresh():
    model = net()
    model[0].scores.data.normal_()
    model[2].weight.data.normal_()
    sk.refresh(model)
    assert_invariant(model)


def test_writes_in_place_are_seen_by_the_next_forward():
    model = net()
    with torch.no_grad():
        model[0].scores.normal_()
        model[2].weight.normal_()
    model(torch.ones(1, 8))
    assert_invariant(model)


def test_a_new_parameter_is_seen():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    train(model, [optimizer], 1)
    model[0].scores = nn.Parameter(torch.randn(33, 8))
    model(torch.ones(1, 8))
    assert_invariant(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    train(model, [optimizer], 2, after=lambda: assert_invariant(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_to_dtype(dtype):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.to(dtype)
    assert_invariant(model)
    assert model[0].w_eff.dtype == dtype
    model(torch.randn(4, 8, dtype=dtype)).float().square().sum().backward()
    optimizer.step()  # made before .to, which keeps Parameter objects
    assert_invariant(model)
    model.float()
    assert_invariant(model)


def test_to_empty_and_back_from_meta():
    with torch.device("meta"):
        model = net()
    assert model[0].bits.is_meta
    assert model[0].scores.is_meta
    model(torch.empty(2, 8, device="meta"))
    model.to_empty(device=DEVICE)
    source = net()
    model.load_state_dict(source.state_dict())
    assert_invariant(model)
    assert torch.equal(model(torch.ones(1, 8)), source(torch.ones(1, 8)))
    with torch.device("meta"):
        model = net()
    model.load_state_dict(source.state_dict(), assign=True)
    assert_invariant(model)
    assert torch.equal(model(torch.ones(1, 8)), source(torch.ones(1, 8)))


def test_autocast():
    model = net()
    twin = naive(model)
    optimizers = [torch.optim.Adam(m.parameters(), 1e-2) for m in (model, twin)]

    def under(m):
        def run(x):
            with torch.autocast(DEVICE, torch.bfloat16):
                y = m(x)
            assert y.dtype == torch.bfloat16
            return y.float()

        return run

    train(model, optimizers[:1], run=under(model), after=lambda: assert_invariant(model))
    train(twin, optimizers[1:], run=under(twin))
    assert_twins(model, twin)


def test_func_transforms_of_the_input_alone():
    """The parameters are the layer's own, so the live weight is used, under a transform."""
    model = net()
    x = torch.randn(3, 8)
    rows = torch.func.vmap(torch.func.grad(lambda row: model(row).square().sum()))(x)
    given = x.clone().requires_grad_()
    model(given).square().sum().backward()
    torch.testing.assert_close(rows, given.grad)


def test_inference_mode():
    model = net()
    x = torch.randn(3, 8)
    with torch.inference_mode():
        y = model(x)
    assert torch.equal(y, model(x).detach())
    with torch.no_grad():
        model[0].scores.normal_()
    with torch.inference_mode():
        model(x)
    assert_invariant(model)
    train(model, [torch.optim.SGD(model.parameters(), 0.1)], 2, after=lambda: assert_invariant(model))


def test_repr_tells_the_rule():
    assert "density=0.3" in repr(net())
    assert "score > 0.02" in repr(net(select="threshold", value=0.02, inclusive=False))


# ------------------------------------------------------------------------------------------------------ stateless calls


def live_versions(model):
    return [(t, t._version) for layer in masked(model) for t in (layer.bits, layer.w_eff)]


@pytest.mark.parametrize("parameters", [False, True])
def test_functional_call_touches_nothing(parameters, calls):
    model, other = net(), net()
    with torch.no_grad():
        for p in other.parameters():
            p.copy_(torch.randn_like(p))
    given = {n: nn.Parameter(p.detach().clone()) if parameters else p.detach().clone() for n, p in other.named_parameters()}
    x = torch.randn(3, 8)
    before, y, expected = live_versions(model), model(x), other(x)
    calls.clear()
    assert torch.equal(torch.func.functional_call(model, given, (x,)), expected)
    assert calls == []
    assert all(a is b and v == w for (a, v), (b, w) in zip(before, live_versions(model)))
    assert torch.equal(model(x), y)
    assert_invariant(model)


@pytest.mark.parametrize("select", ["topk", "threshold"])
def test_func_grad_is_autograd(select):
    model = net(select=select)
    x = torch.randn(3, 8)
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    before = live_versions(model)
    grads = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().sum())(parameters)
    assert all(a is b and v == w for (a, v), (b, w) in zip(before, live_versions(model)))
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad)


def test_vmap_over_rows_gives_gradients_of_each():
    model = net()
    x = torch.randn(4, 8)
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    loss = lambda p, row: torch.func.functional_call(model, p, (row[None],)).square().sum()  # noqa: E731
    rows = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(4):
        model.zero_grad()
        model(x[i : i + 1]).square().sum().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(rows[name][i], p.grad)


def test_vmap_over_an_ensemble():
    models = [net(), net()]
    with torch.no_grad():
        for p in models[1].parameters():
            p.copy_(torch.randn_like(p))
    stacked, _ = torch.func.stack_module_state(models)
    x = torch.randn(4, 8)
    y = torch.func.vmap(lambda p: torch.func.functional_call(models[0], p, (x,)))(stacked)
    for i, model in enumerate(models):
        torch.testing.assert_close(y[i], model(x))


# -------------------------------------------------------------------------------------------------------- convolutions

CONVOLUTIONS = {
    "1d": (nn.Conv1d, (4, 6, 3), {"padding": 1}, (2, 4, 9)),
    "1d-circular": (nn.Conv1d, (4, 6, 3), {"padding": 2, "padding_mode": "circular"}, (2, 4, 9)),
    "2d": (nn.Conv2d, (4, 6, 3), {"stride": 2, "padding": 1, "bias": False}, (2, 4, 9, 8)),
    "2d-groups": (nn.Conv2d, (4, 6, 3), {"groups": 2, "dilation": 2}, (2, 4, 9, 8)),
    "2d-depthwise": (nn.Conv2d, (4, 8, (3, 1)), {"groups": 4, "padding": "same"}, (2, 4, 9, 8)),
    "2d-reflect": (nn.Conv2d, (4, 6, 3), {"padding": (1, 2), "padding_mode": "reflect"}, (2, 4, 9, 8)),
    "3d": (nn.Conv3d, (2, 3, 2), {"padding": 1}, (2, 2, 4, 5, 3)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_train_as_the_twin(name):
    kind, arguments, options, shape = CONVOLUTIONS[name]
    torch.manual_seed(5)
    model = sk.convert(nn.Sequential(kind(*arguments, **options)), sk.SubnetConfig(density=0.3, train_weights=True))
    assert isinstance(model[0], kind)
    twin = naive(model)
    assert torch.equal(model(torch.ones(shape)), twin(torch.ones(shape)))
    optimizers = [torch.optim.Adam(m.parameters(), 1e-2) for m in (model, twin)]
    train(model, optimizers[:1], 3, after=lambda: assert_invariant(model), shape=shape)
    train(twin, optimizers[1:], 3, shape=shape)
    assert_twins(model, twin)


def test_channels_last():
    """Bits are in logical order whatever the strides of weight and scores."""
    torch.manual_seed(5)
    model = sk.convert(nn.Sequential(nn.Conv2d(4, 6, 3)), sk.SubnetConfig(density=0.3, train_weights=True))
    bits, x = model[0].bits.clone(), torch.randn(2, 4, 8, 8)
    y = model(x)
    model.to(memory_format=torch.channels_last)
    assert not model[0].weight.is_contiguous()
    assert torch.equal(model[0].bits, bits)
    assert_invariant(model)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), y)
    twin = naive(model)
    optimizers = [torch.optim.Adam(m.parameters(), 1e-2) for m in (model, twin)]
    train(model, optimizers[:1], 3, after=lambda: assert_invariant(model), shape=(2, 4, 8, 8))
    train(twin, optimizers[1:], 3, shape=(2, 4, 8, 8))
    assert_twins(model, twin, 0.0 if ON_CPU else 1e-6)  # cuDNN's gradients go by the strides


def test_layers_by_their_own_constructors():
    layer = sk.SubnetLinear(8, 4, bias=False, rule=sk.Rule(0.25))
    assert_invariant(layer)  # at once: a compiled forward would not look
    layer(torch.ones(1, 8))
    assert int(reference.count(layer.bits)) == 8
    assert sk.SubnetConv2d(3, 4, 3, rule=sk.Rule(0.5))(torch.ones(1, 3, 5, 5)).shape == (1, 4, 3, 3)
    assert sk.SubnetConv1d(3, 4, 3)(torch.ones(1, 3, 5)).shape == (1, 4, 3)
    assert sk.SubnetConv3d(3, 4, 2)(torch.ones(1, 3, 3, 3, 3)).shape == (1, 4, 2, 2, 2)
    for field, bad in {"density": 1.5, "by": "size", "ties": "some", "select": "best", "k_rule": "half"}.items():
        with pytest.raises(ValueError, match=f"Rule: {field} must be"):
            sk.Rule(**{field: bad})


# ------------------------------------------------------------------------------------------------- switching and compile


def test_switching_tasks_does_not_recompile():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 33), nn.BatchNorm1d(33), nn.ReLU(), nn.Linear(33, 16), nn.Linear(16, 4))
    model = sk.convert(model, sk.SubnetConfig(density=0.3, train_weights=True, per_task=["4"])).eval()
    bank = sk.MaskBank(model)
    for i in range(4):
        with torch.no_grad():
            for layer in bank.layers():
                layer.scores.normal_()
        bank.commit(f"task {i}")
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(5, 8)
    for name in (None, "task 0", "task 1", None, "task 2", "task 3", None, "task 0"):
        bank.activate(name)
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count <= 2
    outputs = []
    for name in bank.names:
        bank.activate(name, in_place=True)
        outputs.append(compiled(x).detach())
    assert counter.frame_count <= 2
    assert not torch.equal(outputs[0], outputs[1])


# ----------------------------------------------------------------------------------------------------- many processes

DDP = """
import sys, torch, torch.distributed as dist, subnet_kernels as sk
from torch import nn
from torch.nn.parallel import DistributedDataParallel

def main():
    out = sys.argv[1]
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    torch.manual_seed(rank)  # different at first: DDP sends the first process's parameters to the others
    model = nn.Sequential(nn.Linear(8, 33), nn.BatchNorm1d(33), nn.Linear(33, 4))
    model = sk.convert(model, sk.SubnetConfig(density=0.3, train_weights=True))
    ddp = DistributedDataParallel(model)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.SGD(ddp.parameters(), 0.5)
    generator = torch.Generator().manual_seed(1)
    model[1].eval()  # batch statistics would be of half a batch each
    for _ in range(4):
        x = torch.randn(8, 8, generator=generator)
        optimizer.zero_grad()
        ddp(x[rank::world]).square().mean().backward()
        optimizer.step()
    bits = {n: m.bits for n, m in model.named_modules() if isinstance(m, sk.SubnetLayer)}
    w_eff = {n: m.w_eff for n, m in model.named_modules() if isinstance(m, sk.SubnetLayer)}
    torch.save({"start": start, "end": model.state_dict(), "bits": bits, "w_eff": w_eff}, f"{out}/{rank}.pt")
    dist.barrier()  # whoever leaves first takes its connections along
    dist.destroy_process_group()

if __name__ == "__main__":
    main()
"""


@cpu_only
def test_data_parallel_has_the_bits_of_one_process(tmp_path):
    script = tmp_path / "ddp.py"
    script.write_text(DDP)
    launch(script, str(tmp_path), log=tmp_path / "log")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for key in ("start", "end", "bits", "w_eff"):
        assert all(torch.equal(v, ranks[1][key][k]) for k, v in ranks[0][key].items()), key

    model = nn.Sequential(nn.Linear(8, 33), nn.BatchNorm1d(33), nn.Linear(33, 4))
    model = sk.convert(model, sk.SubnetConfig(density=0.3, train_weights=True))
    model.load_state_dict(ranks[0]["start"])
    model[1].eval()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        x = torch.randn(8, 8, generator=generator)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    for name, bits in ranks[0]["bits"].items():
        assert torch.equal(model.get_submodule(name).bits, bits)
    for key, value in ranks[0]["end"].items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-5, atol=1e-6)
