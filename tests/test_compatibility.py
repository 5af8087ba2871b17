"""Every feature on every model of the zoo, against the dense model with the same effective weights. docs/compatibility.md is made of it.

A cell is a function of a case: it returns None where the feature works, or the sentence with which the library refuses.
"""

import copy
import dataclasses
import functools
import io
import json
import pickle
from pathlib import Path

import pytest
import ranks
import torch
import torch._dynamo.testing
from device import DEVICE, ON_CPU
from launch import ROOT, launch
from recording import Tape
from torch import nn
from torch.utils.checkpoint import checkpoint
from zoo import CASES, Case, output, resnet

import subnet_kernels as sk
from subnet_kernels import reference
from subnet_kernels.layers import SubnetLayer
from subnet_kernels.optim import replay

pytestmark = pytest.mark.skipif(not ON_CPU, reason=f"the page is of the CPU, and this run is on {DEVICE}")
PROCESSES = ("DDP", "FSDP2")
DENSITY = 0.4
ROWS = 6


def convert(case: Case, seed: int = 0, **options) -> nn.Module:
    config = {"density": DENSITY, "train_weights": True, "per_task": case.heads, **options}
    return sk.convert(case.model(seed), sk.SubnetConfig(**config))


def masked(model: nn.Module) -> dict[str, SubnetLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, SubnetLayer)}


def dense_of(case: Case, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """The yardstick: the model as its authors made it, with a converted one's parameters and the weights that its masks open."""
    dense = case.model()
    dense.to(next(model.parameters()).dtype).load_state_dict(sk.dense_state_dict(model))
    with torch.no_grad():
        for name, layer in masked(model).items():
            (bits,) = reference.select([layer.scores], [layer.k], "magnitude", "last")
            dense.get_submodule(name).weight.copy_(reference.apply(layer.weight.detach(), bits))
    return dense.to(dtype).train(model.training)


def run(model: nn.Module, inputs: dict) -> torch.Tensor:
    kind = next(model.parameters()).dtype
    return output(model(**{key: x.to(kind) if x.is_floating_point() else x for key, x in inputs.items()}))


def loss_of(y: torch.Tensor) -> torch.Tensor:
    """A loss that every element of the output moves differently."""
    slope = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return (y.square() + slope * y).mean()


def backward(model: nn.Module, inputs: dict) -> torch.Tensor:
    model.zero_grad()
    y = run(model, inputs)
    loss_of(y.float() if y.dtype in (torch.bfloat16, torch.float16) else y).backward()
    return y.detach()


def assert_near(mine: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, what: str) -> None:
    """The error against float64 is at most twice that of PyTorch's own in the same dtype, or a rounding of the whole."""
    mine, eager = (((t.detach().double() - exact).norm()).item() for t in (mine, eager))
    room = 2 * eager + torch.finfo(torch.float32).eps * exact.norm().item()
    assert mine <= room, f"{what}: error {mine:.3g}, eager's {eager:.3g}"


def assert_gradients(model: nn.Module, eager: nn.Module, exact: nn.Module) -> None:
    """Straight through: dW = G where open, dS = G W sign(S), and what is not masked has its dense gradient."""
    layers = masked(model)
    eager, exact = dict(eager.named_parameters()), dict(exact.named_parameters())
    for name, p in model.named_parameters():
        layer, _, key = name.rpartition(".")
        if layer not in layers or key == "bias":
            assert (p.grad is None) == (eager[name].grad is None), name
            if p.grad is not None:
                assert_near(p.grad, eager[name].grad, exact[name].grad, name)
            continue
        weight, scores = layers[layer].weight.detach(), layers[layer].scores.detach()
        dense = [side[f"{layer}.weight"].grad for side in (eager, exact)]
        if key == "weight":
            open_ = reference.unpack(layers[layer].bits, weight.shape)
            assert_near(p.grad, *(g.where(open_, torch.zeros_like(g)) for g in dense), name)
            assert not p.grad[~open_].any()
        else:
            assert_near(p.grad, dense[0] * weight * scores.sign(), dense[1] * (weight * scores.sign()).double(), name)
            assert p.grad.any(), name


def assert_same(a: nn.Module, b: nn.Module) -> None:
    """State and masks agree to the bit."""
    for key, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[key]), key
    for (name, mine), other in zip(masked(a).items(), masked(b).values(), strict=True):
        assert torch.equal(mine.bits, other.bits), name
        assert torch.equal(mine.w_eff, other.w_eff), name


def learn(model: nn.Module, case: Case, optimizer: torch.optim.Optimizer, steps: int = 2, first: int = 0) -> None:
    model.train()
    for step in range(steps):
        backward(model, case.inputs(ROWS, first + ROWS * step))
        optimizer.step()
    model.eval()


def learnt(case: Case, tasks: int = 3) -> tuple[nn.Module, sk.MaskBank, dict[str, torch.Tensor], dict]:
    """A bank of tasks, each one's output at its commit, and the input of that."""
    model, x = convert(case), case.inputs(ROWS, 500)
    bank, before = sk.MaskBank(model), {}
    for t in range(tasks):
        bank.begin(scores="init" if t else "keep")
        learn(model, case, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), first=100 * t)
        bank.commit(f"task {t}")
        with torch.no_grad():
            before[f"task {t}"] = run(model, x)
    return model, bank, before, x


# ------------------------------------------------------------------------------------------------------------- the model itself


def checkpoints(case):
    dense = case.model(1)
    state = dense.state_dict()
    model = convert(case)
    kept = sk.dense_state_dict(model)
    assert [(key, value.shape) for key, value in kept.items()] == [(key, value.shape) for key, value in state.items()]
    assert model.load_state_dict(state) == ([], [])
    assert all(torch.equal(value, state[key]) for key, value in sk.dense_state_dict(model).items())
    other = case.model(2)
    assert other.load_state_dict(sk.dense_state_dict(model)) == ([], [])
    x = case.inputs(ROWS, 0)
    assert torch.equal(run(other.eval(), x), run(dense.eval(), x))
    kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.Embedding)
    assert len(masked(model)) == sum(type(m) in kinds for m in dense.modules()) - len(case.heads)


def forward_backward(case):
    model, x = convert(case), case.inputs(ROWS, 0)
    for name, layer in masked(model).items():
        layer.density = 0.3 if name.endswith("0") else 0.6  # each has its own
    eager, exact = dense_of(case, model), dense_of(case, model, torch.float64)
    y, *others = (backward(m, x) for m in (model, eager, exact))
    assert_near(y, *others, "output")
    assert_gradients(model, eager, exact)


def unconverting(case):
    model, x = case.model().eval(), case.inputs(ROWS, 0)
    before, kinds = run(model, x), [type(m) for m in model.modules()]
    sk.convert(model, sk.SubnetConfig(density=DENSITY, per_task=case.heads))
    assert not torch.equal(run(model, x), before)
    dense = dense_of(case, model)
    assert torch.equal(run(sk.unconvert(copy.deepcopy(model), merge=True), x), run(dense, x))
    sk.unconvert(model)
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(run(model, x), before)


def copies(case):
    model, x = convert(case), case.inputs(ROWS, 0)
    learn(model, case, torch.optim.SGD(model.parameters(), 0.1))
    y, file = run(model, x), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = convert(case, 1).eval()
    loaded.load_state_dict(torch.load(file))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert_same(model, other)
        assert torch.equal(run(other, x), y)
        learn(other, case, torch.optim.SGD(other.parameters(), 0.1))
        assert not torch.equal(run(other, x), y)
    assert torch.equal(run(model, x), y)


def half_precision(case):
    for dtype in (torch.bfloat16, torch.float16):
        model = convert(case).to(dtype)
        eager, exact = dense_of(case, model), dense_of(case, model, torch.float64)
        x = {key: v.to(dtype) if v.is_floating_point() else v for key, v in case.inputs(ROWS, 0).items()}
        y, *others = (backward(m, x) for m in (model, eager, exact))
        assert y.dtype == dtype
        assert_near(y, *others, "output")
        for layer in masked(model).values():
            assert layer.scores.dtype == layer.scores.grad.dtype == layer.w_eff.dtype == dtype
    model.float()
    for layer in masked(model).values():
        assert torch.equal(layer.bits, reference.select([layer.scores], [layer.k], "magnitude", "last")[0])


def channels_last(case):
    model, x = convert(case), case.inputs(ROWS, 0)
    bits = {name: layer.bits.clone() for name, layer in masked(model).items()}
    model.to(memory_format=torch.channels_last)
    x = {key: v.contiguous(memory_format=torch.channels_last) if v.dim() == 4 else v for key, v in x.items()}
    assert all(torch.equal(bits[name], layer.bits) for name, layer in masked(model).items())
    eager, exact = (dense_of(case, model, d).to(memory_format=torch.channels_last) for d in (None, torch.float64))
    y, *others = (backward(m, x) for m in (model, eager, exact))
    assert_near(y, *others, "output")
    assert_gradients(model, eager, exact)


def meta_device(case):
    dense = case.model(1).eval()
    for assign in (False, True):
        with torch.device("meta"):
            model = convert(case).eval()
        if not assign:
            model.to_empty(device="cpu")
        model.load_state_dict(dense.state_dict(), assign=assign)
        for name, buffer in dense.named_buffers():  # what no checkpoint holds, its model's author makes again
            if name not in dense.state_dict():
                owner, _, key = name.rpartition(".")
                model.get_submodule(owner)._buffers[key] = buffer.clone()
        x = case.inputs(ROWS, 0)
        torch.testing.assert_close(run(model, x), run(dense_of(case, model), x))
        sk.MaskBank(model).commit("a")


# --------------------------------------------------------------------------------------------------------- PyTorch's features


def autocast(case):
    for dtype in (torch.bfloat16, torch.float16):
        model, x = convert(case), case.inputs(ROWS, 0)
        eager, exact = dense_of(case, model), dense_of(case, model, torch.float64)
        bits = {name: layer.bits.clone() for name, layer in masked(model).items()}
        with torch.autocast("cpu", dtype):
            assert_near(*(run(m, x) for m in (model, eager)), run(exact, x), "output")
        for name, layer in masked(model).items():
            assert layer.scores.dtype == layer.w_eff.dtype == torch.float32
            assert torch.equal(layer.bits, bits[name])
        start = {name: layer.scores.detach().clone() for name, layer in masked(model).items()}
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, enabled=dtype == torch.float16)
        for _ in range(6):  # the first ones may find the scale too large, and be left out
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype):
                loss = loss_of(run(model, x).float())
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        for name, layer in masked(model).items():
            assert layer.scores.grad.dtype == torch.float32
            assert layer.scores.grad.isfinite().all()
            assert not torch.equal(layer.scores, start[name])
            assert torch.equal(layer.bits, reference.select([layer.scores], [layer.k], "magnitude", "last")[0])


def compiled(case):
    torch._dynamo.reset()
    model, bank, _, x = learnt(case)
    twin = copy.deepcopy(model)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fast = torch.compile(model, fullgraph=True, backend=counter)  # inductor's own has test_layers.py
    for name in (None, "task 0", "task 2", "task 1"):
        bank.activate(name)
        with torch.no_grad():
            torch.testing.assert_close(output(fast(**x)), run(model, x), rtol=1e-4, atol=1e-5)
        if name == "task 0":
            frames = counter.frame_count
    assert counter.frame_count == frames, "a switch to another task compiles nothing"
    bank.activate(None)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, twin)]
    for step in range(2):
        for m, optimizer in zip((fast, twin), optimizers):
            m.train()
            m.zero_grad()
            loss_of(output(m(**case.inputs(ROWS, 50 * step)))).backward()
            optimizer.step()
    for (name, mine), other in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def exported(case):
    _, bank, before, x = learnt(case)
    dense = bank.export("task 1").eval()
    program = torch.export.export(dense, (), kwargs=x)
    torch.testing.assert_close(output(program.module()(**x)), before["task 1"], rtol=1e-4, atol=1e-5)
    live = torch.export.export(bank.model, (), kwargs=x)  # a masked model exports too, with its live masks
    torch.testing.assert_close(output(live.module()(**x)), run(bank.model, x), rtol=1e-4, atol=1e-5)


def onnx(case):
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason=f"{name} cannot be imported")
    from onnx.reference import ReferenceEvaluator

    _, bank, before, x = learnt(case, 1)
    dense = bank.export("task 0").eval()
    file = torch.onnx.export(dense, (), kwargs=x, dynamo=True, verbose=False).model_proto
    feeds = {v.name: t.numpy() for v, t in zip(file.graph.input, x.values(), strict=True)}
    (y, *_) = ReferenceEvaluator(file).run(None, feeds)
    torch.testing.assert_close(torch.from_numpy(y), before["task 0"], rtol=1e-3, atol=1e-4)


def cuda_graph(case):
    """Without a device a tape stands for the graph: it records a step's ops, refuses one that would wait, and runs them again."""
    loops = []
    for _ in range(2):
        model = convert(case)
        optimizer, x = sk.optim.Adam(model.parameters(), 0.01), {key: v.clone() for key, v in case.inputs(ROWS, 0).items()}

        def step(model=model, optimizer=optimizer, x=x):
            optimizer.zero_grad()
            loss = loss_of(run(model, x))
            loss.backward()
            optimizer.step()
            return loss.detach()

        for _ in range(2):
            step()
        loops.append((model, optimizer, x, step))
    (eager, _, mine, step), (graphed, optimizer, theirs, recorded) = loops
    tape = Tape()
    with tape:
        loss = recorded()
    for i in range(3):
        for x in (mine, theirs):
            for key, v in case.inputs(ROWS, 10 * i).items():
                x[key].copy_(v)
        expected = step()
        replay(tape, optimizer)
        assert torch.equal(loss, expected)
    assert_same(eager, graphed)


def checkpointing(case):
    model, x = convert(case), case.inputs(ROWS, 0)
    other = copy.deepcopy(model)
    y = backward(model, x)
    mine = checkpoint(lambda: run(other, x), use_reentrant=False, preserve_rng_state=False)
    loss_of(mine).backward()
    assert torch.equal(mine, y)
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad), name


def accumulation(case):
    model, parts = convert(case).eval(), [case.inputs(3, 0), case.inputs(3, 3)]
    sides = [model, dense_of(case, model), dense_of(case, model, torch.float64)]
    for side in sides:
        for x in parts:
            loss_of(run(side, x)).backward()
    assert_gradients(*sides)


def func(case):
    models = [convert(case).eval(), convert(case, 1).eval()]
    model, x = models[0], case.inputs(ROWS, 0)
    y = backward(model, x)
    given = {name: p.detach() for name, p in model.named_parameters()}
    call = lambda p: output(torch.func.functional_call(model, p, (), x))  # noqa: E731
    assert torch.equal(call({name: p.clone() for name, p in given.items()}), y)
    gradients = torch.func.grad(lambda p: loss_of(call(p)))(given)
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-3, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    stacked = {name: torch.stack([dict(m.named_parameters())[name].detach() for m in models]) for name in given}
    both = torch.func.vmap(call)(stacked)
    for mine, other in zip(both, models):
        torch.testing.assert_close(mine, run(other, x).detach(), rtol=1e-4, atol=1e-5)


def deterministic(case):
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        models = [convert(case) for _ in range(2)]
        for model in models:
            learn(model, case, torch.optim.Adam(model.parameters(), 0.01), 3)
        assert_same(*models)
    finally:
        torch.use_deterministic_algorithms(before)


# ------------------------------------------------------------------------------------------------------------------- tasks


def tasks(case):
    model, bank, before, x = learnt(case)
    for name, y in before.items():
        bank.activate(name)
        with torch.no_grad():
            assert torch.equal(run(model, x), y), name
            torch.testing.assert_close(run(bank.view(name), x), y, rtol=1e-4, atol=1e-5)
    bank.activate(None)
    bank.rename("task 1", "birds")
    bank.remove("task 0")
    assert bank.names == ["birds", "task 2"]
    live = run(model, x)
    with bank.as_task("birds"), torch.no_grad():
        assert torch.equal(run(model, x), before["task 1"])
    assert torch.equal(run(model, x), live)
    bank.verify()


def mixed_rows(case):
    model, bank, _, x = learnt(case)
    ids = torch.tensor([2, 0, 1, 1, 0, 2])
    with bank.rows(ids), torch.no_grad():
        y = run(model, x)
    for t in range(3):
        eager, exact = bank.export(f"task {t}").eval(), bank.export(f"task {t}").double().eval()
        for row in (ids == t).nonzero()[:, 0].tolist():
            one = {key: v[row : row + 1] for key, v in x.items()}
            assert_near(y[row], run(eager, one)[0], run(exact, one)[0], f"row {row}")


OPTIMIZERS = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
    "Adam": {"lr": 0.01},
    "AdamW": {"lr": 0.01, "weight_decay": 0.1},
    "NAdam": {"lr": 0.01, "weight_decay": 0.1},
    "RAdam": {"lr": 0.01},
    "Adamax": {"lr": 0.01},
    "Adagrad": {"lr": 0.01},
    "Adadelta": {"lr": 1.0},
    "Adafactor": {"lr": 0.01, "weight_decay": 0.1},
    "ASGD": {"lr": 0.1},
    "RMSprop": {"lr": 0.01, "momentum": 0.9},
    "Rprop": {"lr": 0.01},
}


def optimizers(case):
    model, bank, before, x = learnt(case, 2)
    for kind, options in OPTIMIZERS.items():
        bank.begin(scores="init")
        learn(model, case, getattr(torch.optim, kind)(model.parameters(), **options), 2, first=300)
        bank.verify()  # to the bit
        for name, y in before.items():
            with bank.as_task(name), torch.no_grad():
                assert torch.equal(run(model, x), y), f"{kind}: {name}"


def fine_tuning(case):
    """A moving average, a schedule, weight decay and clipping, with a task frozen."""
    model, bank, before, x = learnt(case, 1)
    bank.begin()
    optimizer = torch.optim.AdamW(model.parameters(), 0.05, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=4)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    model.train()
    for step in range(3):
        backward(model, case.inputs(ROWS, 50 * step))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        assert norm.isfinite()
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
    bank.verify()
    with bank.as_task("task 0"), torch.no_grad():
        model.eval()
        assert torch.equal(run(model, x), before["task 0"])
    average.eval()
    run(average.module, x)  # eager forwards see what moved
    for name, layer in masked(average).items():
        (bits,) = reference.select([layer.scores], [layer.k], "magnitude", "last")
        assert torch.equal(layer.bits, bits), name
        assert not torch.equal(layer.scores, model.get_submodule(name.removeprefix("module.")).scores)


def piggyback(case):
    """A frozen pretrained backbone and a threshold mask a task, binary and, by magnitude with a sign, ternary."""
    for options in ({"select": "threshold", "value": 0.0}, {"select": "signed"}):
        model, x = convert(case, train_weights=False, **options), case.inputs(ROWS, 500)
        start = {name: layer.weight.detach().clone() for name, layer in masked(model).items()}
        bank = sk.MaskBank(model)
        before = {}
        for t in range(2):
            bank.begin(scores="init")
            learn(model, case, torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01), first=100 * t)
            bank.commit(f"task {t}")
            before[f"task {t}"] = run(model, x).detach()
        for name, y in before.items():
            with bank.as_task(name):
                assert torch.equal(run(model, x), y)
        assert all(torch.equal(layer.weight, start[name]) for name, layer in masked(model).items())
        bank.verify()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What two processes end with, {model: {how: state of each rank}}; all models in one run, because starting it is what takes long."""
    folder = tmp_path_factory.mktemp("ranks")
    names = [name for name, case in CASES.items() if case.missing() is None]
    launch(Path(ranks.__file__), str(folder), *names, log=folder / "log")
    both = {name: [torch.load(folder / f"{name}.{rank}.pt") for rank in range(2)] for name in names}
    return {name: {how: [found[how] for found in each] for how in each[0]} for name, each in both.items()}


FEATURES = {
    "checkpoints both ways": checkpoints,
    "forward and backward": forward_backward,
    "`unconvert`": unconverting,
    "`deepcopy`, `pickle`, `torch.save`": copies,
    "`bfloat16`, `half`": half_precision,
    "`channels_last`": channels_last,
    "`meta` device": meta_device,
    "autocast, `GradScaler`": autocast,
    "`torch.compile`": compiled,
    "`torch.export`": exported,
    "ONNX": onnx,
    "CUDA graph, on a tape": cuda_graph,
    "activation checkpointing": checkpointing,
    "gradient accumulation": accumulation,
    "`torch.func`": func,
    "deterministic algorithms": deterministic,
    "tasks": tasks,
    "mixed-task batch": mixed_rows,
    "every optimizer of `torch.optim`": optimizers,
    "EMA, schedule, clipping": fine_tuning,
    "Piggyback": piggyback,
}


SLOW = {"`torch.compile`", "`torch.export`", "ONNX"}
CELLS = [
    pytest.param(model, feature, marks=[pytest.mark.long] if feature in SLOW and model != "nn.Sequential" else [])
    for model in CASES
    for feature in FEATURES
]


@pytest.mark.parametrize(("model", "feature"), CELLS)
def test_cell(model, feature, record_property):
    record_property("cell", [model, feature])
    if (refusal := FEATURES[feature](CASES[model])) is not None:
        record_property("refusal", refusal)


@pytest.mark.long
@pytest.mark.parametrize("how", PROCESSES)
@pytest.mark.parametrize("model", CASES)
def test_cell_of_two_processes(model, how, processes, record_property):
    """Masks and state to the bit as of one process that takes the halves of every batch in turn."""
    record_property("cell", [model, how])
    case = CASES[model]
    if (why := case.missing()) is not None:
        pytest.skip(why)
    one = ranks.start(case)
    ranks.learn(one, case, None)
    for found in processes[model][how]:
        assert not isinstance(found, str), found
        for key, value in ranks.whole(one).items():
            assert torch.equal(found[key], value), key


@pytest.mark.long
def test_a_mixed_batch_through_all_of_resnet18():
    """64 rows of 16 tasks through the ResNet-18 of transformers: each row's logits are those of the dense model of its task."""
    whole = functools.partial(resnet, (64, 128, 256, 512), (2, 2, 2, 2))
    case = dataclasses.replace(CASES["ResNet (transformers)"], make=whole)
    model = convert(case, train_weights=False)
    assert sum(p.numel() for p in case.model().parameters()) == 11_181_642
    bank = sk.MaskBank(model)
    for t in range(16):
        bank.begin(scores="init")
        with torch.no_grad():
            run(model.train(), case.inputs(8, 8 * t))  # norms of its own
        bank.commit(f"task {t}")
    model.eval()
    ids, x = torch.randperm(16).repeat(4), case.inputs(64, 1000)
    with bank.rows(ids), torch.no_grad():
        y = run(model, x)
    for t in range(16):
        eager, rows = bank.export(f"task {t}").eval(), (ids == t).nonzero()[:, 0]
        alone = [{key: v[row : row + 1] for key, v in x.items()} for row in rows]
        single = torch.cat([run(eager, one) for one in alone])
        exact = torch.cat([run(eager.double(), one) for one in alone])
        assert_near(y[rows], single, exact, f"task {t}")


def test_the_page_has_every_cell():
    """docs/compatibility.json is of these models and features, and no cell of it is blank."""
    kept = json.loads((ROOT / "docs" / "compatibility.json").read_text())["cells"]
    assert list(kept) == list(CASES)
    for model, row in kept.items():
        assert list(row) == [*FEATURES, *PROCESSES], model
        for feature, cell in row.items():
            assert cell["result"] in ("works", "refused", "not run"), (model, feature)
            assert (cell["result"] == "works") != bool(cell.get("sentence")), (model, feature)
