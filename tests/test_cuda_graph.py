"""Training steps as CUDA graphs: the bits of eager steps. On the CPU a tape stands in for the graph; with a GPU the graph itself."""

import copy
import functools
import os
import signal
from dataclasses import asdict

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from recording import Tape, TapeRecorder
from streams import Contrary, Pictures

import subnet_kernels as sk
import subnet_pipelines
from subnet_kernels import layers, optim
from subnet_pipelines import (
    METHODS,
    Interrupted,
    Method,
    MethodConfig,
    Phase,
    Prediction,
    Refusal,
    RunConfig,
    cli,
    cosine,
    run,
)
from subnet_pipelines.benchmarks import BENCHMARKS
from subnet_pipelines.benchmarks.base import BenchmarkConfig, batches
from subnet_pipelines.chance import seeded
from subnet_pipelines.graph import EAGER, RECORDERS, CudaRecorder, GraphedSteps
from subnet_pipelines.methods.base import Clock

GPU = torch.cuda.is_available()
gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="records CUDA graphs, and there is no CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """No plots, and on the CPU tapes for graphs."""
    monkeypatch.setattr(subnet_pipelines.report, "draw", lambda results, folder: [])
    monkeypatch.setitem(RECORDERS, "cpu", TapeRecorder)
    for name in ("eager_steps", "recordings", "replays"):
        monkeypatch.setattr(TapeRecorder, name, 0)


class Swinging(Method):
    """What a step may hold beside masks: batch norm with running statistics, dropout, momentum, two rates, and a schedule at every step."""

    name = "swinging"
    scenarios = ("GG", "NNs")
    static_step = True

    def __init__(self, config, benchmark, seed):
        super().__init__(config, benchmark, seed)
        with seeded(seed, "init"):
            net = nn.Sequential(nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 2))
            self.model = sk.convert(net, sk.SubnetConfig(density=0.4, train_weights=True)).to(self.device)

    def plan(self, task):
        return [
            Phase("swing", epochs=2, batch_size=10, optimizer=self.optimizer, schedule=cosine(0.3)),
            Phase("again", steps=13, batch_size=9, optimizer=lambda: optim.AdamW(self.parameters(), 0.01, amsgrad=True)),
        ]

    def optimizer(self):
        groups = [
            {"params": [self.model[0].weight, self.model[0].scores]},
            {"params": [*self.model[1].parameters(), *self.model[4].parameters()], "lr": 0.02},
        ]
        return optim.SGD(groups, 0.1, momentum=0.9, weight_decay=0.01)

    def logits(self, batch, clock):
        return self.model(batch.x)

    def predict(self, x, task):
        return Prediction(self.model(x))


def swinging(device="cpu", scenario="GG"):
    benchmark = Contrary(BenchmarkConfig(tasks=2, val_fraction=0.25, scenario=scenario), 1, device=device)
    return Swinging(MethodConfig(), benchmark, 1), benchmark


def made(name, device="cpu", tasks=2, **fields):
    """A method and its benchmark: batches of 72 rows, so that sizes that do not divide it leave a short one."""
    cls = METHODS[name]
    scenario = "GNu" if name == "supsup" else "GG"
    benchmark = Contrary(BenchmarkConfig(tasks=tasks, val_fraction=0.25, scenario=scenario), 1, device=device)
    return cls(cls.Config(**fields), benchmark, 1), benchmark


def pictured(model, device="cpu", **fields):
    """WSN on a network of 32 x 32 pictures; on the CPU, whose convolutions are slow, one task of nine steps."""
    tasks, steps = (1, 9) if device == "cpu" else (2, 13)
    benchmark = Pictures((3, 32, 32), BenchmarkConfig(tasks=tasks, val_fraction=0.125), 1, device)
    cls = METHODS["wsn"]
    return cls(cls.Config(model=model, iterations=steps, batch_size=6, density=0.3, **fields), benchmark, 1), benchmark


SUPSUP = {"iterations": 21, "batch_size": 20, "lr": 3e-3, "outputs": 20, "model": "mlp"}
CASES = {
    "wsn": functools.partial(made, "wsn", epochs=3, lr=0.01, density=0.3),
    "wsn, code": functools.partial(made, "wsn", iterations=13, density=0.3, stored_mask="last_step", ties="all"),
    "wsn, sgd": functools.partial(made, "wsn", epochs=3, optimizer="sgd", lr=0.3, scores="init", patience=1),
    "wsn, alexnet": functools.partial(pictured, "alexnet", norm="batch", stored_mask="last_step"),
    "wsn, resnet-18": functools.partial(
        pictured, "resnet-18", norm="task", amp="bf16", clip_norm=0.5, optimizer="adamw", weight_decay=0.1
    ),
    "wsn, lenet": functools.partial(pictured, "lenet"),
    "supsup": functools.partial(made, "supsup", **SUPSUP),
    "supsup, top-k": functools.partial(made, "supsup", **SUPSUP, mask="topk", density=0.3, optimizer="adam"),
    "supsup, signed": functools.partial(made, "supsup", **SUPSUP, mask="signed", density=0.3, transfer="scores"),
    "hopsupsup": functools.partial(made, "hopsupsup", iterations=21, batch_size=20, width=24),
    "impresslearn": functools.partial(
        made, "impresslearn", tasks=3, basis=2, model="mlp", epochs=3, basis_epochs=3, batch_size=20, penalty=0.01
    ),
    "lasem": functools.partial(made, "lasem", model="mlp", epochs=3, batch_size=20, lr=0.01),
    "lasem, search": functools.partial(made, "lasem", model="mlp", configuration="search", epochs=3, batch_size=20),
    "lasem, tf": functools.partial(made, "lasem", model="mlp", sharing="tf", prior="counts", epochs=3, batch_size=20),
    "prognn": functools.partial(made, "prognn", model="mlp", epochs=3, batch_size=20, lr=0.01),
    "apd": functools.partial(made, "apd", model="mlp", epochs=3, batch_size=20, lr=0.01),
    "den": functools.partial(made, "den", model="mlp", epochs=3, batch_size=20, lr=0.01, expansion=3, select_share=0.7),
    "finetune": functools.partial(made, "finetune", epochs=3, lr=0.01),
    "stl": functools.partial(made, "stl", epochs=3, lr=0.01),
    "mtl": functools.partial(made, "mtl", epochs=3, lr=0.01),
    "ewc": functools.partial(made, "ewc", epochs=3, optimizer="sgd", lr=0.05, clip_norm=1.0),
    "packnet": functools.partial(made, "packnet", epochs=3, lr=0.01),
    "batche": functools.partial(made, "batche", iterations=21, batch_size=20, model="mlp"),
    "batche, random": functools.partial(
        made, "batche", trunk="random", iterations=21, batch_size=20, model="mlp", schedule="cosine", weight_decay=0.01
    ),
    "psp": functools.partial(made, "psp", iterations=21, batch_size=20, model="mlp", momentum=0.5),
    "separate-heads": functools.partial(made, "separate-heads", iterations=21, batch_size=20, model="mlp"),
    "stl, warm": functools.partial(made, "stl", epochs=3, lr=0.01, start="previous", weight_decay=0.01),
    "swinging": swinging,
    "swinging, one stream": functools.partial(swinging, scenario="NNs"),
}


def outcome(method, result, out):
    fixed = asdict(result)
    fixed.pop("seconds")
    fixed["config"].pop("cuda_graph")
    return {k: v.clone() for k, v in method.state_dict().items()}, fixed, (out / "metrics.jsonl").read_text()


def same(a, b):
    assert a[0].keys() == b[0].keys()
    for name in a[0]:
        assert torch.equal(a[0][name], b[0][name]), name
    assert a[1] == b[1]
    assert a[2] == b[2]


def of_run(make, out, **config):
    method, benchmark = make()
    return method, outcome(method, run(method, benchmark, RunConfig(**config), out), out)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("own_products", [True, False], ids=["ours", "torch's"])
def test_a_run_of_graphs_ends_with_the_bits_of_eager_steps(own_products, device, name, tmp_path, monkeypatch):
    if device == "cuda" and not own_products:
        pytest.skip("the CPU's own products are not in question on a GPU")
    monkeypatch.setattr(layers, "COMPILED", own_products and layers.COMPILED)  # False: the nodes that a GPU has
    make = functools.partial(CASES[name], device)
    eager, first = of_run(make, tmp_path / "eager")
    graphed, second = of_run(make, tmp_path / "graph", cuda_graph=True)
    same(first, second)
    if hasattr(eager, "bank"):
        for task in eager.bank.masks:
            assert all(map(torch.equal, eager.bank.bits(task).values(), graphed.bank.bits(task).values()))
    if device == "cpu":
        assert TapeRecorder.eager_steps == EAGER * TapeRecorder.recordings
        assert TapeRecorder.replays >= 10 * TapeRecorder.recordings / 2 > 0


class Stopped(GraphedSteps):
    """Sends the process SIGTERM at step `at` of the run."""

    at = made = 0

    def __call__(self, *args):
        Stopped.made += 1
        if Stopped.made == Stopped.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__call__(*args)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        *(("cpu", name) for name in ("wsn, code", "supsup", "swinging")),
        *(
            pytest.param("cuda", name, marks=gpu)
            for name in ("wsn, code", "supsup", "swinging", "wsn, alexnet", "wsn, resnet-18", "wsn, lenet")
        ),
    ],
)
def test_resumes_with_and_without_graphs(device, name, tmp_path, monkeypatch):
    make = functools.partial(CASES[name], device)
    _, whole = of_run(make, tmp_path / "whole")
    monkeypatch.setattr(subnet_pipelines.train, "GraphedSteps", Stopped)
    out = tmp_path / "broken"
    for stop_at in (2, 5, 9, 7):  # an eager step, a replay, and again in what is resumed
        monkeypatch.setattr(Stopped, "at", Stopped.made + stop_at)
        with pytest.raises(Interrupted):
            run(*make(), RunConfig(cuda_graph=True), out, resume=stop_at > 2)
    monkeypatch.setattr(Stopped, "at", 0)
    method, benchmark = make()
    result = run(method, benchmark, RunConfig(), out, resume=True)
    same(outcome(method, result, out), whole)


# ------------------------------------------------------------------------------------------------ what the host does beside a replay


def net(device="cpu", **config):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))
    return sk.convert(model, sk.SubnetConfig(density=0.3, train_weights=True, **config)).to(device)


class Captured:
    """A user's loop over a graph, on static tensors; `eagerly` makes the same steps without."""

    def __init__(self, model, optimizer, device="cpu"):
        self.model, self.optimizer = model, optimizer
        self.x, self.y = torch.zeros(8, 16, device=device), torch.zeros(8, dtype=torch.int64, device=device)
        self.recorder = (TapeRecorder if device == "cpu" else CudaRecorder)(self.x.device)
        self.graph = None

    def step(self):
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(self.x), self.y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def feed(self, i):
        generator = torch.Generator().manual_seed(i)
        self.x.copy_(torch.randn(8, 16, generator=generator))
        self.y.copy_(torch.randint(4, (8,), generator=generator))

    def eagerly(self, i):
        self.feed(i)
        return self.step()

    def replay(self, i):
        if self.graph is None:
            self.graph, self.loss = self.recorder.record(self.step)
        self.feed(i)
        optim.replay(self.graph, self.optimizer)
        return self.loss.clone()


def pair(make, device="cpu", warm=3, **config):
    """Two loops over equal models after some eager steps: the first is to go on eagerly, the second by replays."""
    loops = []
    for _ in range(2):
        model = net(device, **config)
        loops.append(Captured(model, make(model), device))
        for i in range(warm):
            loops[-1].recorder.eager(functools.partial(loops[-1].eagerly, i))
    return loops


def assert_same_models(a, b):
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name]), name
    for mine, other in zip(a.modules(), b.modules()):
        if isinstance(mine, layers.SubnetLayer):
            assert torch.equal(mine.bits, other.bits)
            assert torch.equal(mine.w_eff, other.w_eff)


MAKERS = {
    "sgd": lambda model: optim.SGD(model.parameters(), 0.1),
    "sgd, momentum": lambda model: optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True),
    "rmsprop, centered": lambda model: optim.RMSprop(model.parameters(), 0.01, centered=True, momentum=0.5),
    "adam, fused": lambda model: optim.Adam(model.parameters(), 0.01, fuse_ste=True),
    "adamw, rate a tensor": lambda model: optim.AdamW(model.parameters(), torch.tensor(0.01, device=model[0].weight.device)),
    "adam, rate on the host": lambda model: optim.Adam(model.parameters(), torch.tensor(0.01)),
}


def set_rate(optimizer, rate):
    for group in optimizer.param_groups:
        subnet_pipelines.schedules.set_lr(group, rate)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_users_loop_with_rates_that_change(device, name):
    eager, graphed = pair(MAKERS[name], device)
    for i in range(3, 20):
        for loop in (eager, graphed):
            if i % 4 == 0:
                set_rate(loop.optimizer, 0.05 / i)
        assert torch.equal(eager.eagerly(i), graphed.replay(i)), i
    assert_same_models(eager.model, graphed.model)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="torch.optim's capturable=True needs a CUDA device")
@pytest.mark.parametrize("kind", ["Adam", "AdamW", "RMSprop"])
def test_torchs_optimizers_capturable(kind):
    def make(model):
        return getattr(torch.optim, kind)(model.parameters(), torch.tensor(0.01, device="cuda"), capturable=True)

    eager, graphed = pair(make, "cuda")
    for i in range(3, 12):
        for loop in (eager, graphed):
            set_rate(loop.optimizer, 0.05 / i)
        assert torch.equal(eager.eagerly(i), graphed.replay(i)), i
    assert_same_models(eager.model, graphed.model)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fused", [True, False])
def test_frozen_weights_stay_in_replays(device, fused):
    """After a commit: ours, which leave frozen weights alone, and others, whose layers put them back, here ours under that hook."""
    loops = []
    for _ in range(2):
        model = net(device)
        bank = sk.MaskBank(model)
        bank.commit("first")
        bank.begin()
        optimizer = optim.Adam(model.parameters(), 0.05, fuse_ste=fused)
        optimizer.leaves_frozen = fused  # False: the layers restore what the step has moved
        loops.append(Captured(model, optimizer, device))
        for i in range(3):
            loops[-1].eagerly(i)
    eager, graphed = loops
    for i in range(3, 9):
        assert torch.equal(eager.eagerly(i), graphed.replay(i))
    assert_same_models(eager.model, graphed.model)
    bank.verify()


@pytest.mark.parametrize("device", DEVICES)
def test_replays_count_versions_and_refresh_nothing_needlessly(device, monkeypatch):
    _, loop = pair(MAKERS["adam, fused"], device)
    loop.replay(3)
    weight, scores = loop.model[0].weight, loop.model[0].scores
    before = weight._version, scores._version, loop.model[0].w_eff._version
    loss = F.cross_entropy(loop.model(loop.x), loop.y)
    loop.replay(4)
    assert all(now > then for now, then in zip((weight._version, scores._version, loop.model[0].w_eff._version), before))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    calls = []
    monkeypatch.setattr(layers, "_run", lambda plan: calls.extend(plan))
    with torch.no_grad():
        loop.model(loop.x)
    assert not calls


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("when", ["before the recording", "between replays"])
def test_writes_by_hand_are_seen(device, when):
    eager, graphed = pair(MAKERS["adam, fused"], device)
    for i in range(3, 8):
        for loop in (eager, graphed):
            if i == (3 if when == "before the recording" else 5):
                with torch.no_grad():
                    loop.model[0].scores.neg_().add_(0.01)
                    loop.model[2].weight.mul_(1.5)
                if loop is graphed and i == 3:
                    optim.prepare_replay(loop.optimizer)
        assert torch.equal(eager.eagerly(i), graphed.replay(i)), i
        if i == 6:  # an eager step between replays, as the short batch of an epoch is
            assert torch.equal(eager.eagerly(100), graphed.eagerly(100))
    assert_same_models(eager.model, graphed.model)


def test_a_rate_keeps_its_tensor():
    model = net()
    optimizer = optim.SGD([{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.2}], 0.1)
    Captured(model, optimizer).eagerly(0)
    tensors = [optimizer._rate(group, model[0].weight.device) for group in optimizer.param_groups]
    assert [float(t) for t in tensors] == [0.1, 0.2]
    for group, rate in zip(optimizer.param_groups, (0.3, 0.4)):
        group["lr"] = rate
    optimizer.write_rates()
    assert [float(t) for t in tensors] == [0.3, 0.4]
    again = [optimizer._rate(group, model[0].weight.device) for group in optimizer.param_groups]
    assert all(a is b for a, b in zip(tensors, again))
    assert "_rates" not in copy.deepcopy(optimizer).__dict__


# ------------------------------------------------------------------------------------------------------------------ GraphedSteps alone


def steps_of(method, task, place=0):
    """A phase of a task, begun: (optimizer, clock, rows of a batch)."""
    phase = method.plan(task)[place]
    if phase.first is not None:
        phase.first()
    clock = Clock(task=task.index, phase=phase.name)
    method.train()
    return phase.optimizer(), clock, phase.batch_size


def test_short_batches_are_eager_and_losses_are_copies():
    method, benchmark = CASES["wsn"]()
    task = benchmark.task(0)
    opt, clock, size = steps_of(method, task)
    train = task.train.marked(0)
    order = torch.randperm(len(train[1])).repeat(2)
    step = GraphedSteps(method, opt, size)
    feed = list(batches(*train, order[:68], size))  # six full ones and one of eight rows
    losses = [step(batch, opt, clock)["loss"] for batch in (*feed, *feed)]
    assert (TapeRecorder.eager_steps, TapeRecorder.recordings, TapeRecorder.replays) == (EAGER, 1, 12 - EAGER)
    assert len({loss.data_ptr() for loss in losses}) == len(losses)
    other, _ = CASES["wsn"]()
    opt, clock, _ = steps_of(other, task)
    assert torch.equal(torch.stack(losses), torch.stack([other.step(b, opt, clock)["loss"] for b in (*feed, *feed)]))


def test_a_tape_writes_nothing_and_refuses_to_wait():
    a, b = torch.zeros(3), torch.arange(3.0)
    with Tape() as tape:
        c = a.add_(b) * 2
    assert a.tolist() == [0, 0, 0]
    versions = a._version
    tape.replay()
    assert (a.tolist(), c.tolist(), a._version) == ([0, 1, 2], [0, 2, 4], versions)
    tape.replay()
    assert c.tolist() == [0, 4, 8]
    for wait in (lambda: a.sum().item(), a.nonzero, lambda: a[a > 0], lambda: torch.tensor([1.0]), lambda: bool(a[0])):
        with pytest.raises(AssertionError, match="must not wait"), Tape():
            wait()


# ------------------------------------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_recorded_is_refused(tmp_path, monkeypatch):
    class Plain(Swinging):
        def optimizer(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    benchmark = swinging()[1]
    with pytest.raises(Refusal, match=r"cuda_graph needs an optimizer of subnet_kernels.optim.*swinging has SGD without"):
        run(Plain(MethodConfig(), benchmark, 1), benchmark, RunConfig(cuda_graph=True), tmp_path / "plain")
    monkeypatch.setattr(Swinging, "static_step", False)
    with pytest.raises(Refusal, match="steps do the same work every time, and swinging does not say so"):
        run(*swinging(), RunConfig(cuda_graph=True), tmp_path / "dynamic")
    monkeypatch.delitem(RECORDERS, "cpu")
    monkeypatch.setattr(Swinging, "static_step", True)
    with pytest.raises(
        Refusal, match="cuda_graph needs a CUDA device, and this run is on cpu; leave it out, or use --device cuda"
    ):
        run(*swinging(), RunConfig(cuda_graph=True), tmp_path / "cpu")
    assert not (tmp_path / "cpu").exists()


def test_the_flag(tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(RECORDERS, "cpu")
    argv = ["train", "wsn", "--benchmark", "permuted-mnist-mini", "--device", "cpu", "--out", str(tmp_path / "run")]
    for flag in (["--cuda-graph"], ["--cuda-graph", "true"], ["--cuda-graph=true"]):
        assert cli.main([*argv, *flag]) == 2
        assert capsys.readouterr().err.startswith("subnet-kernels: cuda_graph needs a CUDA device")
    assert cli.main([*argv, "--cuda-graph", "perhaps"]) == 2
    assert "cuda_graph must be true or false, got 'perhaps'" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------------- with a GPU only


class NoSync:
    """Within its block a wait for the device is an error."""

    def __enter__(self):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="asks CUDA whether a step waits for it")
@pytest.mark.parametrize("graphed", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize(("name", "place"), [*((name, 0) for name in CASES), ("impresslearn", -1), ("swinging", -1)])
def test_no_step_waits_for_the_gpu(name, place, graphed):
    method, benchmark = CASES[name]("cuda")
    task = benchmark.task(0)
    if name == "impresslearn" and place == -1:  # coefficients over two masks
        for number in range(2):
            method.bank.commit(f"task {number}")
        task = benchmark.task(2)
    opt, clock, size = steps_of(method, task, place)
    train = task.train.marked(task.index)
    order = torch.randperm(len(train[1])).to("cuda")
    step = GraphedSteps(method, opt, size) if graphed else method.step
    losses = []
    for number, batch in enumerate(batches(*train, order.repeat(3), size)):
        if number <= EAGER:  # the recording itself waits, once
            losses.append(step(batch, opt, clock)["loss"])
            continue
        with NoSync():
            set_rate(opt, 0.01 / number)
            losses.append(step(batch, opt, clock)["loss"])
    assert torch.stack(losses).isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="compares a GPU's run with the CPU's")
@pytest.mark.parametrize(("name", "fields"), [("wsn", {"epochs": 2}), ("supsup", {"iterations": 150})])
def test_the_mini_benchmark_learns_what_the_cpu_learns(name, fields, tmp_path):
    results = {}
    for device in ("cuda", "cpu"):
        benchmark = BENCHMARKS["permuted-mnist-mini"](
            BENCHMARKS["permuted-mnist-mini"].Config(tasks=2, scenario="GNu" if name == "supsup" else "GG"), 1, device=device
        )
        cls = METHODS[name]
        method = cls(cls.Config(batch_size=50, **fields), benchmark, 1)
        results[device] = run(method, benchmark, RunConfig(cuda_graph=device == "cuda"), tmp_path / device)
    cuda, cpu = results["cuda"], results["cpu"]
    assert cuda.environment["gpu"]
    assert cuda.bwt == 0.0 or name == "supsup"  # which infers the task, of one more candidate each time
    assert cuda.acc == pytest.approx(cpu.acc, abs=3)
    if name == "wsn":
        assert cuda.capacity["used_fraction"] == pytest.approx(cpu.capacity["used_fraction"], abs=0.01)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="runs the command line on a CUDA device")
def test_the_command_line_on_a_gpu(tmp_path, capsys):
    argv = [
        "train",
        "wsn",
        "--benchmark",
        "permuted-mnist-mini",
        "--tasks",
        "2",
        "--epochs",
        "1",
        "--device",
        "cuda",
        "--cuda-graph",
    ]
    assert cli.main([*argv, "--out", str(tmp_path)]) == 0, capsys.readouterr().err
    result = subnet_pipelines.report.read_result(tmp_path / "seed-1" / "result.json")
    assert result.bwt == 0.0
    assert result.acc == pytest.approx(85.6, abs=4)  # the CPU's
    assert result.config["cuda_graph"] is True


def learnt(device, train_weights, out):
    """A bank of two tasks with heads of their own, made and saved on a device: (its bits, logits by task, folder)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))
    model = sk.convert(model, sk.SubnetConfig(density=0.3, train_weights=train_weights, per_task=["2"])).to(device)
    bank = sk.MaskBank(model)
    for name in ("one", "two"):
        bank.begin(scores="init")
        loop = Captured(model, optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01), device)
        for i in range(3):
            loop.eagerly(i)
        bank.commit(name)
    bank.save(out)
    return model, bank


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="carries a bank between the CPU and a CUDA device")
@pytest.mark.parametrize("train_weights", [True, False])
@pytest.mark.parametrize(("there", "here"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_bank_goes_from_one_device_to_the_other(there, here, train_weights, tmp_path):
    model, bank = learnt(there, train_weights, tmp_path)
    other = copy.deepcopy(model).to(here)
    loaded = sk.MaskBank.load(tmp_path, other, restore=train_weights)
    assert loaded.names == bank.names
    for name in bank.names:
        for layer, bits in bank.bits(name).items():
            assert torch.equal(bits.cpu(), loaded.bits(name)[layer].cpu())
    if train_weights:
        for mine, theirs in zip(bank.layers(), loaded.layers()):
            assert torch.equal(mine.frozen_values.cpu(), theirs.frozen_values.cpu())
    x = torch.randn(5, 16)
    for name in bank.names:
        bank.activate(name)
        loaded.activate(name)
        torch.testing.assert_close(model(x.to(there)).cpu(), other(x.to(here)).cpu())
        torch.testing.assert_close(loaded.view(name)(x.to(here)).cpu(), other(x.to(here)).cpu())
    loaded.verify()
    loaded.activate(None)
    with loaded.rows(["one", "two", "one", "two", "two"]):
        other.eval()
        assert other(x.to(here)).device.type == here


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="infers tasks on a CUDA device")
@pytest.mark.parametrize(
    "fields", [{}, {"inference_unit": "batch"}, {"inference_unit": "n", "inference": "binary"}, {"objective": "H"}]
)
def test_tasks_are_inferred_on_a_gpu(fields, tmp_path):
    method, benchmark = made("supsup", "cuda", tasks=3, **{**SUPSUP, **fields})
    result = run(method, benchmark, RunConfig(cuda_graph=True), tmp_path)
    assert len(result.final) == 3
    x, _ = benchmark.test(0).tensors()
    assert method.predict(x, None).task.device.type == "cuda"


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="compares what is drawn for a CUDA device with what is drawn for the CPU")
def test_what_is_drawn_does_not_depend_on_the_device():
    drawn = []
    for device in ("cpu", "cuda"):
        model = net(device, per_task=["2"])
        bank = sk.MaskBank(model)
        state = torch.cuda.get_rng_state()
        with seeded(3, "begin"):
            bank.begin(scores="init", per_task={"2": 7})
        assert torch.equal(state, torch.cuda.get_rng_state())
        drawn.append([model[0].scores.cpu(), *(p.cpu() for p in model[2].parameters())])
    assert all(map(torch.equal, *drawn))
