"""The optimizers against those of torch.optim, and frozen weights and state under them and under `freeze`."""

import copy
import pickle

import pytest
import torch
from device import DEVICE, generator
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import subnet_kernels as sk
from subnet_kernels import optim, reference
from subnet_kernels.layers import SubnetConv2d, SubnetLinear
from subnet_kernels.live import Rule

OPTIONS = [
    ("SGD", dict(lr=0.1)),
    ("SGD", dict(lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.01)),
    ("SGD", dict(lr=0.1, momentum=0.9, nesterov=True, maximize=True)),
    ("RMSprop", dict()),
    ("RMSprop", dict(alpha=0.9, eps=1e-6, weight_decay=0.01, momentum=0.9, centered=True)),
    ("RMSprop", dict(centered=True, maximize=True)),
    ("RMSprop", dict(momentum=0.5)),
    ("Adam", dict()),
    ("Adam", dict(lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.01, amsgrad=True, maximize=True)),
    ("Adam", dict(weight_decay=0.1, decoupled_weight_decay=True)),
    ("AdamW", dict()),
    ("AdamW", dict(lr=0.01, weight_decay=0.1, amsgrad=True)),
]
every_option = pytest.mark.parametrize(("name", "options"), OPTIONS)
WITH_STATE = [OPTIONS[i] for i in (1, 4, 8, 11)]
with_state = pytest.mark.parametrize(("name", "options"), WITH_STATE)


def parameters(dtype=torch.float64):
    chance = generator(1)
    return [nn.Parameter(torch.randn(s, generator=chance).to(dtype)) for s in ((), (5,), (17, 31), (4, 3, 3, 3))]


def pair(name, options, dtype=torch.float64):
    """Our optimizer and torch's over equal parameters."""
    return getattr(optim, name)(parameters(dtype), **options), getattr(torch.optim, name)(parameters(dtype), **options)


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def steps(optimizers, count=20, seed=2, without=()):
    """The same random gradients for all optimizers; parameters in `without` get none."""
    chance = generator(seed)
    for _ in range(count):
        for i, same in enumerate(zip(*(params_of(o) for o in optimizers))):
            grad = torch.randn(same[0].shape, generator=chance).to(same[0].dtype)
            for p in same:
                p.grad = None if i in without else grad.clone()
        for o in optimizers:
            o.step()


def assert_alike(ours, theirs, rtol=1e-12, atol=1e-14):
    for a, b in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
        assert set(ours.state.get(a, {})) == set(theirs.state.get(b, {}))
        for key, value in theirs.state.get(b, {}).items():
            same = dict(check_dtype=key != "step", check_device=key != "step")  # torch keeps its steps on the CPU
            torch.testing.assert_close(ours.state[a][key], value, rtol=rtol, atol=atol, **same)


@every_option
def test_like_torch(name, options):
    ours, theirs = pair(name, options)
    steps([ours, theirs])
    assert_alike(ours, theirs)
    assert set(ours.state_dict()["state"]) == set(theirs.state_dict()["state"])


@every_option
def test_like_torch_in_float32(name, options):
    ours, theirs = pair(name, options, torch.float32)
    steps([ours, theirs])
    assert_alike(ours, theirs, rtol=2e-5, atol=2e-6)


@with_state
@pytest.mark.parametrize("fused", [False, True])
def test_state_dict_goes_both_ways(name, options, fused):
    fused = {"fused": True} if fused and name != "RMSprop" else {}
    ours, theirs = pair(name, options | fused)
    steps([ours, theirs], 3)
    assert ours.state_dict()["param_groups"] == theirs.state_dict()["param_groups"]
    ours2, theirs2 = pair(name, options | fused)
    ours2.load_state_dict(copy.deepcopy(theirs.state_dict()))
    theirs2.load_state_dict(copy.deepcopy(ours.state_dict()))
    for new, old in ((ours2, ours), (theirs2, theirs)):
        for p, q in zip(params_of(new), params_of(old)):
            p.data.copy_(q)
    steps([ours, theirs, ours2, theirs2], 3, seed=3)
    assert_alike(ours2, theirs)
    assert_alike(ours, theirs2)


@with_state
def test_copies_go_on_alike(name, options):
    ours, _ = pair(name, options)
    steps([ours], 2)
    params, again = copy.deepcopy((params_of(ours), ours))
    assert all(a is b for a, b in zip(params, params_of(again)))
    third = pickle.loads(pickle.dumps(ours))
    steps([ours, again, third], 2)
    assert_alike(again, ours, 0, 0)
    assert_alike(third, ours, 0, 0)


def test_state_that_was_cleared_starts_anew():
    ours, theirs = pair("Adam", {})
    steps([ours, theirs], 2)
    for o in (ours, theirs):
        o.state.clear()
    steps([ours, theirs], 2)
    assert_alike(ours, theirs)


def test_a_default_dtype_of_float64_steps_and_loads():
    torch.set_default_dtype(torch.float64)
    try:
        ours, theirs = pair("Adam", {})
        steps([ours, theirs], 2)
        ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
        steps([ours, theirs], 2)
        assert_alike(ours, theirs)
    finally:
        torch.set_default_dtype(torch.float32)


def test_groups_and_parameters_without_gradient():
    def build(module):
        a, b, c, d = parameters()
        optimizer = module.SGD([{"params": [a, b], "lr": 0.5}, {"params": [c], "momentum": 0.0}], lr=0.1, momentum=0.9)
        optimizer.add_param_group({"params": [d], "weight_decay": 0.1})
        return optimizer

    ours, theirs = build(optim), build(torch.optim)
    steps([ours, theirs], 3, without=(1, 2))  # their momentum starts later than the others'
    steps([ours, theirs], 3, without=(0,))
    steps([ours, theirs], 3)
    assert_alike(ours, theirs)


@with_state
def test_schedules(name, options):
    ours, theirs = pair(name, options)
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, 0.3, total_steps=12) for o in (ours, theirs)]
    for i in range(10):
        steps([ours, theirs], 1, seed=i)
        for schedule in schedules:
            schedule.step()
    assert_alike(ours, theirs)


@with_state
@pytest.mark.parametrize("shape", [(), (1,)])
def test_lr_as_a_tensor(name, options, shape):
    ours, theirs = pair(name, options)
    rate = torch.full(shape, 0.01, dtype=torch.float64)
    ours.param_groups[0]["lr"], theirs.param_groups[0]["lr"] = rate, 0.01
    steps([ours, theirs], 2)
    rate.mul_(0.5)
    theirs.param_groups[0]["lr"] = 0.005
    steps([ours, theirs], 2)
    assert_alike(ours, theirs)


def test_closure():
    ours, theirs = pair("AdamW", {})

    def closure(optimizer):
        def loss():
            optimizer.zero_grad()
            value = sum((p**2).sum() for p in params_of(optimizer))
            value.backward()
            return value

        return loss

    for _ in range(3):
        assert torch.allclose(ours.step(closure(ours)), theirs.step(closure(theirs)), rtol=1e-12)
    assert_alike(ours, theirs)


@pytest.mark.parametrize(("name", "options"), [OPTIONS[1], OPTIONS[8]])
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(name, options, unscale):
    """Overflowed steps change nothing, and others see the unscaled gradient."""
    both = pair(name, options, torch.float32)
    scalers = [torch.amp.GradScaler(DEVICE, init_scale=1024.0, growth_interval=2) for _ in both]
    for i in range(6):
        for o, scaler in zip(both, scalers):
            o.zero_grad()
            loss = sum((p**2).sum() for p in params_of(o))
            if i in (0, 3):
                loss = loss * float("inf")
            scaler.scale(loss).backward()
            if unscale:
                scaler.unscale_(o)
                torch.nn.utils.clip_grad_norm_(params_of(o), 1.0)
            scaler.step(o)
            scaler.update()
    assert scalers[0].get_scale() == scalers[1].get_scale() == 1024.0
    assert_alike(*both, rtol=1e-6, atol=1e-6)


REFUSED = {
    "SGD: differentiable=True is not supported": lambda: optim.SGD(parameters(), differentiable=True),
    "Adam: differentiable=True is not supported": lambda: optim.Adam([{"params": parameters(), "differentiable": True}]),
    "RMSprop: parameters must be real floating-point tensors, got one of torch.complex64": lambda: optim.RMSprop(
        [torch.zeros(3, dtype=torch.complex64, requires_grad=True)]
    ),
    "SGD: weight_decay must be numbers, got a tensor": lambda: optim.SGD(parameters(), weight_decay=torch.tensor(0.1)),
    "AdamW: betas must be numbers, got a tensor": lambda: optim.AdamW(
        parameters(), betas=(torch.tensor(0.9), torch.tensor(0.99))
    ),
    "Tensor lr must be 1-element": lambda: optim.Adam(parameters(), lr=torch.zeros(2)),
    "Invalid learning rate: -1": lambda: optim.SGD(parameters(), lr=-1),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_refused_options_get_a_sentence(sentence):
    with pytest.raises(ValueError, match=sentence):
        REFUSED[sentence]()


@pytest.mark.parametrize("name", ["SGD", "RMSprop", "Adam", "AdamW"])
def test_sparse_gradients_are_refused(name):
    p = nn.Parameter(torch.zeros(3, 2))
    optimizer = getattr(optim, name)([p])
    p.grad = torch.eye(3, 2).to_sparse()
    with pytest.raises(ValueError, match=f"{name}: gradients must be dense, got one of layout torch.sparse_coo"):
        optimizer.step()


def test_a_refused_group_is_not_added():
    optimizer = optim.SGD(parameters())
    with pytest.raises(ValueError, match="SGD: differentiable"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "differentiable": True})
    assert len(optimizer.param_groups) == 1


# ------------------------------------------------------------------------------------------------------------ frozen weights


class Bank:
    """As much of a bank as `freeze` asks for."""

    def __init__(self, *layers):
        self.found = layers

    def layers(self):
        return iter(self.found)


def network(frozen=0.4):
    layers = [SubnetLinear(20, 30, rule=Rule(0.5)), SubnetConv2d(3, 8, 3, rule=Rule(0.5)), SubnetLinear(30, 5, rule=Rule(0.5))]
    layers[1].weight.data = layers[1].weight.data.contiguous(memory_format=torch.channels_last)
    for layer in layers[:2]:
        set_frozen(layer, torch.rand(layer.weight.shape) < frozen)
    return layers


def set_frozen(layer, mask):
    layer.frozen = reference.pack(mask)
    layer.frozen_values = layer.weight.detach()[mask].clone()


def mask_of(layer):
    shape = layer.weight.shape
    return torch.zeros(shape, dtype=torch.bool) if layer.frozen is None else reference.unpack(layer.frozen, shape)


def step_with_noise(optimizer, layers, poison=True):
    """One step with random gradients, NaN and inf at frozen weights; weight and state before it, for each layer."""
    before = []
    for layer in layers:
        for p in (layer.weight, layer.scores, layer.bias):
            p.grad = torch.randn_like(p)
        if poison:
            layer.weight.grad[mask_of(layer)] = float("nan")
        state = optimizer.state.get(layer.weight, {})
        before.append([layer.weight.detach().clone(), {k: v.clone() for k, v in state.items() if torch.is_tensor(v)}])
    optimizer.step()
    return before


def assert_frozen_stayed(optimizer, layers, before):
    for layer, (weight, state) in zip(layers, before):
        mask = mask_of(layer)
        assert torch.equal(layer.weight.detach()[mask].view(torch.int32), weight[mask].view(torch.int32))
        assert (layer.weight.detach() != weight)[~mask].float().mean() > 0.3  # Rprop leaves out where the sign changed
        for key, now in optimizer.state.get(layer.weight, {}).items():
            if torch.is_tensor(now) and now.shape == weight.shape:
                assert torch.equal(now[mask], state[key][mask] if key in state else torch.zeros_like(now[mask]))


@every_option
def test_frozen_weights_and_state_stay(name, options):
    layers = network()
    optimizer = getattr(optim, name)([p for layer in layers for p in layer.parameters()], **options)
    for _ in range(3):
        assert_frozen_stayed(optimizer, layers, step_with_noise(optimizer, layers))


def test_frozen_bits_may_change_between_steps():
    """In place, by another tensor, and by a layer's None: what counts is what is frozen at the step."""
    layers = network()
    optimizer = optim.Adam([p for layer in layers for p in layer.parameters()], lr=0.1)
    before = step_with_noise(optimizer, layers)
    assert_frozen_stayed(optimizer, layers, before)
    set_frozen(layers[2], torch.rand(layers[2].weight.shape) < 0.5)
    assert_frozen_stayed(optimizer, layers, step_with_noise(optimizer, layers))
    more = reference.pack(torch.rand(layers[0].weight.shape) < 0.5)
    layers[0].frozen.bitwise_or_(more)
    assert_frozen_stayed(optimizer, layers, step_with_noise(optimizer, layers))
    layers[1].frozen = None
    assert_frozen_stayed(optimizer, layers, step_with_noise(optimizer, layers))


def test_versions_move():
    layers = network()
    optimizer = optim.SGD([p for layer in layers for p in layer.parameters()], lr=0.1)
    versions = [layer.weight._version for layer in layers]
    step_with_noise(optimizer, layers)
    assert [layer.weight._version for layer in layers] == [v + 1 for v in versions]


OTHERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
    "AdamW-fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.0),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
}


@pytest.mark.parametrize("name", OTHERS)
def test_freeze(name):
    layers = network()
    optimizer = OTHERS[name]([p for layer in layers for p in layer.parameters()])
    handle = optim.freeze(optimizer, Bank(*layers))
    for _ in range(3):
        assert_frozen_stayed(optimizer, layers, step_with_noise(optimizer, layers))
    handle.remove()
    before = step_with_noise(optimizer, layers, poison=False)
    mask = mask_of(layers[0])
    state = optimizer.state[layers[0].weight]
    assert any((state[key] != then)[mask].any() for key, then in before[0][1].items() if then.shape == mask.shape)


def test_freeze_of_layers_that_another_optimizer_owns():
    layers = network()
    optimizer = torch.optim.SGD(layers[0].parameters(), lr=0.1, momentum=0.9)
    optim.freeze(optimizer, Bank(*layers))
    assert_frozen_stayed(optimizer, layers[:1], step_with_noise(optimizer, layers[:1]))


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="Dynamo before torch 2.13 cannot trace id() of a parameter group: there the step is a graph break",
)
def test_step_compiles_without_a_graph_break():
    ours, theirs = pair("AdamW", {})
    steps([ours, theirs], 1)
    step = torch.compile(lambda: ours.step(), backend="eager", fullgraph=True)
    for p, q in zip(params_of(ours), params_of(theirs)):
        p.grad = q.grad
    step()
    theirs.step()
    assert_alike(ours, theirs)


# -------------------------------------------------------------------------------------------------------------- fuse_ste


class Small(nn.Module):
    """A convolution and a linear layer with masks, and a dense head."""

    def __init__(self, rule, train_weights, frozen):
        super().__init__()
        self.conv = SubnetConv2d(2, 5, 3, rule=rule)
        self.hidden = SubnetLinear(5 * 6 * 6, 13, rule=rule)
        self.head = nn.Linear(13, 4)
        for layer in self.layers():
            layer.weight.requires_grad_(train_weights)
            if frozen:
                set_frozen(layer, torch.rand(layer.weight.shape) < 0.4)

    def layers(self):
        return [self.conv, self.hidden]

    def forward(self, x):
        return self.head(self.hidden(self.conv(x).relu().flatten(1)).relu())


def twins(
    name, options, rule=None, train_weights=True, frozen=True, change=lambda net: None, groups=lambda net: net.parameters()
):
    """Two equal networks, the second with fuse_ste, and their optimizers."""
    net = Small(rule or Rule(0.3), train_weights, frozen)
    change(net)
    nets = net, copy.deepcopy(net)
    return nets, [getattr(optim, name)(groups(n), **options, fuse_ste=fuse) for n, fuse in zip(nets, (False, True))]


def train(net, optimizer, count=10, scaler=None, forward=None):
    chance = generator(5)
    for i in range(count):
        x, y = torch.randn(7, 2, 8, 8, generator=chance), torch.randint(0, 4, (7,), generator=chance)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy((net if forward is None else forward)(x), y)
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss * float("inf") if i in (2, 5) else loss).backward()
            scaler.step(optimizer)
            scaler.update()


def assert_equal_twins(nets, optimizers):
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(a, b)
    states = [o.state_dict()["state"] for o in optimizers]
    assert states[0].keys() == states[1].keys()
    for key, state in states[0].items():
        assert state.keys() == states[1][key].keys()
        assert all(torch.equal(value, states[1][key][name]) for name, value in state.items() if value is not None)
    for a, b in zip(nets[0].layers(), nets[1].layers()):
        assert torch.equal(a.bits, b.bits)
        assert torch.equal(a.w_eff, b.w_eff)


FUSED = [
    ("Adam", dict(lr=0.01)),
    ("Adam", dict(lr=0.01, weight_decay=0.02, amsgrad=True, maximize=True)),
    ("AdamW", dict(lr=0.01, weight_decay=0.1)),
    ("SGD", dict(lr=0.1)),
    ("SGD", dict(lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True)),
    ("RMSprop", dict(lr=0.001, weight_decay=0.01, momentum=0.5, centered=True)),
]
every_fused = pytest.mark.parametrize(("name", "options"), FUSED)
RULES = {"magnitude": Rule(0.3), "value": Rule(0.3, by="value"), "threshold": Rule(select="threshold")}


@every_fused
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("train_weights", [True, False])
def test_fused_is_unfused_bit_for_bit(cpu_isa, name, options, rule, train_weights):
    nets, optimizers = twins(name, options, RULES[rule], train_weights)
    start = copy.deepcopy(nets[0])
    for net, optimizer in zip(nets, optimizers):
        train(net, optimizer)
    assert_equal_twins(nets, optimizers)
    assert not torch.equal(nets[1].hidden.scores, start.hidden.scores)
    assert torch.equal(nets[1].hidden.weight, start.hidden.weight) is not train_weights
    for layer in nets[1].layers():
        assert (layer.scores if train_weights else layer.weight).grad is None


@every_fused
def test_fused_under_a_grad_scaler(name, options):
    nets, optimizers = twins(name, options)
    for net, optimizer in zip(nets, optimizers):
        train(net, optimizer, scaler=torch.amp.GradScaler(DEVICE, init_scale=1024.0))
    assert_equal_twins(nets, optimizers)


def channels_last(net):
    net.conv.weight.data = net.conv.weight.data.contiguous(memory_format=torch.channels_last)


def two_groups(net):
    scores = [layer.scores for layer in net.layers()]
    return [{"params": [p for p in net.parameters() if all(p is not s for s in scores)]}, {"params": scores, "lr": 0.02}]


@every_fused
@pytest.mark.parametrize("how", ["channels_last", "two_groups"])
def test_fused_where_the_kernels_take_no_pair(name, options, how):
    changes = {"change": channels_last} if how == "channels_last" else {"groups": two_groups}
    nets, optimizers = twins(name, options, **changes)
    for net, optimizer in zip(nets, optimizers):
        train(net, optimizer)
    assert_equal_twins(nets, optimizers)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_fused_compiled_forward(backend):
    torch._dynamo.reset()
    nets, optimizers = twins("Adam", dict(lr=0.01))
    for net, optimizer in zip(nets, optimizers):
        train(net, optimizer, 3, forward=torch.compile(net, backend=backend, fullgraph=True))
    torch.testing.assert_close(nets[0].state_dict(), nets[1].state_dict())
    assert nets[1].hidden.scores.grad is None


def test_fused_layer_without_a_gradient_is_left_out():
    nets, optimizers = twins("SGD", dict(lr=0.1, momentum=0.9))
    x = torch.randn(7, 5 * 6 * 6)
    for net, optimizer in zip(nets, optimizers):
        for _ in range(2):  # the convolution has no gradient, and later no momentum where the linear layer has
            optimizer.zero_grad()
            net.head(net.hidden(x)).square().sum().backward()
            optimizer.step()
        train(net, optimizer, 3)
    assert_equal_twins(nets, optimizers)


def test_the_optimizer_made_last_decides():
    nets, optimizers = twins("Adam", dict(lr=0.01))
    for net, optimizer in zip(nets, optimizers):
        train(net, optimizer, 2)
    optimizers = [optim.SGD(net.parameters(), lr=0.1) for net in nets]
    for net, optimizer in zip(nets, optimizers):
        train(net, optimizer, 2)
    assert nets[1].hidden.scores.grad is not None
    assert_equal_twins(nets, optimizers)


def test_learning_may_change_between_steps():
    nets, optimizers = twins("Adam", dict(lr=0.01))
    for net, optimizer in zip(nets, optimizers):
        for learns in (True, False, True):
            for layer in net.layers():
                layer.weight.requires_grad_(learns)
            train(net, optimizer, 2)
    assert_equal_twins(nets, optimizers)


def test_copies_of_a_fused_layer_are_not_fused():
    nets, optimizers = twins("Adam", dict(lr=0.01))
    train(nets[1], optimizers[1], 2)
    for again, optimizer in (copy.deepcopy((nets[1], optimizers[1])), pickle.loads(pickle.dumps((nets[1], optimizers[1])))):
        nets_now, optimizers_now = (nets[0], again), (optimizers[0], optimizer)
        assert not any(layer._fused for layer in again.layers())
        twin, of_twin = copy.deepcopy((nets[1], optimizers[1]))
        train(again, optimizer, 2)
        train(twin, of_twin, 2)
        assert_equal_twins((twin, nets_now[1]), (of_twin, optimizers_now[1]))
    assert all(layer._fused for layer in nets[1].layers())


def test_fused_state_dict_loads_into_torch():
    nets, optimizers = twins("Adam", dict(lr=0.01))
    train(nets[1], optimizers[1], 2)
    assert "fuse_ste" not in optimizers[1].state_dict()["param_groups"][0]
    torch.optim.Adam(nets[0].parameters()).load_state_dict(optimizers[1].state_dict())


def one_layer():
    layer = SubnetLinear(6, 5)
    return layer, lambda: layer(torch.randn(3, 6)).square().sum().backward()


@pytest.mark.parametrize("which", ["weight", "scores"])
def test_fused_needs_weight_and_scores(which):
    layer, backward = one_layer()
    optimizer = optim.Adam([getattr(layer, which)], fuse_ste=True)
    backward()
    with pytest.raises(ValueError, match="Adam: fuse_ste needs a layer's weight and scores in one optimizer"):
        optimizer.step()


def test_fused_refuses_a_second_gradient():
    layer, backward = one_layer()
    backward()
    optimizer = optim.SGD(layer.parameters(), fuse_ste=True)
    with pytest.raises(RuntimeError, match="SGD: under fuse_ste a layer has one gradient"):
        optimizer.step()


@pytest.mark.parametrize("theirs", [torch.optim.SGD, optim.SGD])
def test_another_optimizer_does_not_take_the_fused_gradient(theirs):
    layer, backward = one_layer()
    other = theirs(layer.parameters(), lr=0.1)
    optim.SGD(layer.parameters(), fuse_ste=True)
    backward()
    before = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match="made for an optimizer with fuse_ste"):
        other.step()
    assert torch.equal(layer.weight, before)
    other.zero_grad()
    backward()
    other.step()
    assert layer.scores.grad is not None


def test_fused_refuses_computed_weights():
    layer, _ = one_layer()
    optim.SGD(layer.parameters(), fuse_ste=True)
    with pytest.raises(RuntimeError, match="cannot learn under an optimizer with fuse_ste"):
        torch.func.functional_call(layer, {"weight": layer.weight * 2}, torch.randn(3, 6))


def test_fuse_ste_must_be_a_bool():
    with pytest.raises(ValueError, match="SGD: fuse_ste must be True or False, got 1"):
        optim.SGD(parameters(), fuse_ste=1)


def test_hooks_and_the_profiler_see_a_step():
    layer, backward = one_layer()
    optimizer, seen = optim.SGD(layer.parameters()), []
    handles = [
        optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append("before")),
        optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append("after")),
        register_optimizer_step_post_hook(lambda o, args, kwargs: seen.append("after any")),
    ]
    backward()
    optimizer.step()
    assert seen == ["before", "after", "after any"]
    for handle in handles:
        handle.remove()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    assert seen == ["before", "after", "after any"]
    assert "Optimizer.step#SGD.step" in [event.key for event in profile.key_averages()]
    assert torch.equal(layer.bits, sk.select(layer.scores.detach(), layer.k))
