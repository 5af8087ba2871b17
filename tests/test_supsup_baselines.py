"""SupSup's baselines: BatchE, PSP, separate heads, and the bounds; what their authors' layers compute, what stays, what is inferred."""

import json
import math

import pytest
import torch
from golden import Golden, assert_near, cases
from image_sets import write_all
from streams import Contrary, Pictures, Shuffled, broken_run
from torch import nn
from torch.func import functional_call, vmap

import subnet_pipelines
from subnet_pipelines import METHODS, Refusal, RunConfig, inference, run
from subnet_pipelines.benchmarks.base import Batch, BenchmarkConfig
from subnet_pipelines.chance import stream
from subnet_pipelines.config import CONFIGS, Settings
from subnet_pipelines.methods.base import Clock
from subnet_pipelines.methods.batche import RankOne
from subnet_pipelines.methods.psp import Rotated, haar_orthogonal
from subnet_pipelines.models import batch_norms

NEW = ("batche", "psp", "separate-heads")


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    monkeypatch.setattr(subnet_pipelines.report, "draw", lambda results, folder: [])


def made(name, stream=Contrary, tasks=3, seed=1, val_fraction=0.0, scenario="GG", **fields):
    cls = METHODS[name]
    benchmark = stream(BenchmarkConfig(tasks=tasks, val_fraction=val_fraction, scenario=scenario), seed)
    given = {"iterations": 150, "batch_size": 24, "model": "mlp", **fields}
    if name == "stl":
        given = {"iterations": 60, "batch_size": 24, "select": "last", **fields}
    return cls(cls.Config(**given), benchmark, seed), benchmark


def pictured(name, tasks=2, **fields):
    """On SupSup's network of Split CIFAR-100: convolutions, and norms with statistics."""
    cls, benchmark = METHODS[name], Pictures((3, 32, 32), BenchmarkConfig(tasks=tasks, val_fraction=0.0))
    return cls(cls.Config(**{"model": "gem-resnet-18", "iterations": 3, "batch_size": 14, **fields}), benchmark, 1), benchmark


def rows_of(benchmark, task):
    return benchmark.test(task).tensors()


# ---- what the authors' layers compute ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", cases("supsup_batche_*"))
def test_the_authors_batche(path):
    gold = Golden(path)
    out, inp, kernel, _ = gold["weight"].shape
    layer = RankOne(nn.Conv2d(inp, out, kernel, gold["stride"], gold["padding"], bias=False))
    assert (layer.s.shape, layer.t.shape) == (gold["s"][0].shape, gold["t"][0].shape)
    task, x = gold["task"], gold.leaf("x")
    with torch.no_grad():
        for mine, theirs in ((layer.layer.weight, gold["weight"]), (layer.s, gold["s"][task]), (layer.t, gold["t"][task])):
            mine.copy_(theirs)
    y = layer(x)
    y.backward(gold["g"])
    found = {"y": y, "grad_x": x.grad, "grad_weight": layer.layer.weight.grad, "grad_s": layer.s.grad, "grad_t": layer.t.grad}
    for name, value in found.items():
        assert_near(value, gold[name], what=name)
    every = vmap(lambda s, t: functional_call(layer, {"s": s, "t": t}, (gold["x"],)))(gold["s"], gold["t"])
    rows = torch.arange(len(x))
    assert_near(every[rows % gold["learned"], rows], gold["y_all"], what="y_all")
    if kernel == 1:  # their fully connected networks are convolutions of 1 x 1
        flat = RankOne(nn.Linear(inp, out, bias=False))
        flat.load_state_dict({name: v.flatten(1) if v.dim() > 1 else v for name, v in layer.state_dict().items()})
        assert_near(flat(gold["x"].flatten(1)), gold["y"].flatten(1), what="y as a linear layer")


@pytest.mark.parametrize("path", cases("supsup_batche_*"))
def test_a_context_starts_with_signs(path):
    gold = Golden(path)
    method, _ = made("batche")
    method.begin(0)
    for vectors in (gold["init_s"], gold["init_t"], torch.cat([v.detach() for v in method.contexts])):
        assert set(vectors.unique().tolist()) == {-1.0, 1.0}
    first = [vector.clone() for vector in method.contexts]
    method.begin(1)
    assert not any(map(torch.equal, first, method.contexts))
    assert abs(torch.cat([v.detach() for v in method.contexts]).mean()) < 0.25


@pytest.mark.parametrize("path", cases("supsup_psp_*"))
def test_the_authors_psp(path):
    gold = Golden(path)
    out, inp = gold["weight"].shape[:2]
    for contexts in (gold["contexts"], haar_orthogonal(inp, stream(1, "haar"))[None]):
        assert_near(contexts @ contexts.mT, torch.eye(inp).expand_as(contexts))
    for layer in (Rotated(nn.Linear(inp, out, bias=False)), Rotated(nn.Conv2d(inp, out, 1, bias=False))):
        flat = isinstance(layer.layer, nn.Linear)
        with torch.no_grad():
            layer.layer.weight.copy_(gold["weight"].view_as(layer.layer.weight))
        x = gold["x"].flatten(1).requires_grad_() if flat else gold.leaf("x")
        layer.context = gold["contexts"][gold["task"]].clone().requires_grad_()
        y = layer(x)
        y.backward(gold["g"].view_as(y))
        weight = layer.layer.weight.grad
        found = {"y": y, "grad_x": x.grad, "grad_weight": weight, "grad_context": layer.context.grad}
        for name, value in found.items():
            assert_near(value.view_as(gold[name]), gold[name], what=name)
        layer.context = torch.tensordot(gold["alphas"], gold["contexts"], 1)
        assert_near(layer(x).view_as(gold["y_mixed"]), gold["y_mixed"], what="y_mixed")


def test_contexts_are_uniform():
    """Over 600 draws of d = 3: every entry has mean 0 and variance 1/3, and half the determinants are -1. (Without the signs of R the
    first entry would be negative in all.)"""
    draws = torch.stack([haar_orthogonal(3, stream(1, "draw", i)) for i in range(600)])
    assert draws.dtype == torch.float32
    assert draws.mean(0).abs().max() < 4 * math.sqrt(1 / 3 / 600)
    assert (draws.square().mean(0) - 1 / 3).abs().max() < 4 * math.sqrt(4 / 45 / 600)
    assert 0.4 < (torch.linalg.det(draws) < 0).float().mean() < 0.6


# ---- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("batche", {"trunk_lr": 3e-3, "lr": 0.03}),
        ("batche", {"trunk": "random", "lr": 0.1, "schedule": "cosine", "weight_decay": 1e-4}),
        ("batche", {"optimizer": "sgd", "trunk_lr": 0.1, "lr": 0.1}),
        ("psp", {"lr": 1e-3}),
        ("psp", {"lr": 0.1, "optimizer": "sgd", "momentum": 0.5, "weight_init": "default"}),
        ("psp", {"lr": 1e-2, "optimizer": "adam", "val_fraction": 0.25}),
        ("separate-heads", {}),
        ("separate-heads", {"trunk": "random", "schedule": "cosine", "val_fraction": 0.25}),
        ("stl", {"start": "previous", "lr": 0.01}),
        ("finetune", {"lr": 0.01, "head": "per-task"}),
    ],
)
def test_learns(name, fields, tmp_path):
    result = run(*made(name, **fields), RunConfig(), tmp_path)
    assert min(result.diagonal) >= 95
    if METHODS[name].forget_free:
        assert min(result.final) >= 95
        assert result.bwt == 0.0


@pytest.mark.parametrize("make", [made, pictured], ids=["mlp", "gem-resnet-18"])
@pytest.mark.parametrize("trunk", ["trained", "random"])
@pytest.mark.parametrize("name", ["batche", "separate-heads"])
def test_what_tasks_share_stays_to_the_bit(name, trunk, make, tmp_path):
    method, benchmark = make(name, tasks=3, trunk=trunk, iterations=3, weight_decay=0.1)
    shared = lambda: {k: p.detach().clone() for k, p in method.model.named_parameters() if k.endswith("weight")}  # noqa: E731
    steps, step, plan, states, logits = [], method.step, method.plan, [], []

    def look(task):
        method.eval()
        states.append(shared())
        with torch.no_grad():
            logits.append([method.predict(rows_of(benchmark, 0)[0], j).logits for j in range(task.index)])
        return plan(task)

    def count(batch, opt, clock):
        steps.append({id(p) for group in opt.param_groups for p in group["params"]})
        made = step(batch, opt, clock)
        for p in method.model.parameters():
            assert id(p) in steps[-1] or clock.task == 0 or not p.requires_grad
        return made

    method.plan, method.step = look, count
    result = run(method, benchmark, RunConfig(), tmp_path)
    states.append(shared())
    assert len(steps) == 9
    for before, after, task in zip(states, states[1:], range(3)):
        moved = [key for key in before if not torch.equal(before[key], after[key])]
        assert moved == (list(before) if task == 0 and trunk == "trained" else []), task
    method.eval()
    with torch.no_grad():
        for j in range(2):
            now = method.predict(rows_of(benchmark, 0)[0], j).logits
            assert torch.equal(now, logits[2][j])
        assert torch.equal(logits[1][0], logits[2][0])
        alone = method.predict(rows_of(benchmark, 0)[0][:3], 1).logits
    assert torch.allclose(alone, now[:3], rtol=1e-3, atol=1e-4 * float(now.abs().max()))  # a row's logits are its own
    assert result.bwt == 0.0
    assert (result.capacity["seed_only_cap"] is not None) == (trunk == "random")


RESUMED = {
    "batche": lambda: made("batche", Shuffled, scenario="GNu", iterations=20),
    "batche, norms": lambda: pictured("batche", inference="one-shot"),
    "psp": lambda: made("psp", iterations=20, momentum=0.5),
    "separate-heads": lambda: pictured("separate-heads"),
    "stl, previous": lambda: made("stl", iterations=20, start="previous"),
}


@pytest.mark.parametrize("name", RESUMED)
def test_resumes_to_the_same_bits(name, tmp_path):
    method, benchmark = RESUMED[name]()
    result = run(method, benchmark, RunConfig(), tmp_path / "whole")
    stops = (2, 3) if benchmark.name == "pictures" else (7, 20, 1, 19)  # the last of a task's steps among them
    broken, again = broken_run(RESUMED[name], tmp_path / "broken", stops)
    for key, tensor in method.state_dict().items():
        assert torch.equal(tensor, broken.state_dict()[key]), key
    for kind in ("kept", "statistics", "learnt"):
        for mine, theirs in zip(getattr(method, kind, []), getattr(broken, kind, []), strict=True):
            assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert again.accuracy_matrix == result.accuracy_matrix
    assert again.capacity == result.capacity
    method.eval(), broken.eval()
    with torch.no_grad():
        for j in range(len(benchmark)):
            x = rows_of(benchmark, j)[0]
            assert torch.equal(method.predict(x, j).logits, broken.predict(x, j).logits)


@pytest.mark.parametrize("name", ["batche", "separate-heads"])
def test_statistics_are_of_use(name, tmp_path):
    method, benchmark = pictured(name, tasks=1, iterations=14, trunk_lr=3e-3)
    assert run(method, benchmark, RunConfig(), tmp_path).acc >= 90


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("batche", {"trunk_lr": 0.0}, "trunk_lr must be positive"),
        ("batche", {"unit_rows": 0}, "unit_rows must be at least 1"),
        ("batche", {"deciding_rows": 0}, "deciding_rows must be at least 1"),
        ("batche", {"weight_decay": -0.1}, "weight_decay must not be negative"),
        ("batche", {"scenario": "NNs"}, "batche serves scenario GG and GNs and GNu, not NNs"),
        ("psp", {"momentum": -1.0}, "momentum must not be negative"),
        ("psp", {"momentum": 0.5, "optimizer": "adam"}, "momentum must be 0 for optimizer adam"),
        ("psp", {"scenario": "GNu"}, "psp serves scenario GG, not GNu"),
        ("separate-heads", {"trunk_lr": -1.0}, "trunk_lr must be positive"),
        ("separate-heads", {"scenario": "GNs"}, "separate-heads serves scenario GG, not GNs"),
        ("stl", {"weight_decay": -1.0}, "weight_decay must not be negative"),
    ],
)
def test_bad_settings(name, fields, words):
    with pytest.raises(Refusal, match=words):
        made(name, **fields)


def test_a_network_that_keeps_statistics_norms_by_batches_where_asked():
    method = pictured("separate-heads", norm="batch")[0]
    assert method.norms == []
    assert not any(norm.track_running_stats for norm in batch_norms(method.model))


def test_settings_reach_the_optimizer():
    for name, fields, rates in (
        ("batche", {"weight_decay": 0.1}, [1e-4, 1e-2]),
        ("batche", {"weight_decay": 0.1, "trunk": "random", "lr": 0.1}, [0.1, 0.1]),
        ("separate-heads", {"weight_decay": 0.1}, [1e-3, 1e-2]),
        ("stl", {"weight_decay": 0.1, "start": "previous"}, [1e-3, 1e-3]),
    ):
        method, benchmark = made(name, schedule="cosine", **fields)
        for task, rate in enumerate(rates):
            [phase] = method.plan(benchmark.task(task))
            phase.first()
            group = phase.optimizer().param_groups[0]
            assert (group["lr"], group["weight_decay"]) == (rate, 0.1)
            assert phase.schedule(0.5) == pytest.approx(0.5)
    method, benchmark = made("psp", momentum=0.5)
    [phase] = method.plan(benchmark.task(0))
    phase.first()
    group = phase.optimizer().param_groups[0]
    assert (group["momentum"], group["lr"], phase.schedule) == (0.5, 1e-4, None)
    assert len(group["params"]) == 3


# ---- BatchE: whose task is it? ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def contexts(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subnet_pipelines.report, "draw", lambda results, folder: [])
        method, benchmark = made("batche", Shuffled, scenario="GNu", trunk_lr=3e-3, lr=0.03, iterations=300)
        return method, benchmark, run(method, benchmark, RunConfig(), tmp_path_factory.mktemp("batche"))


def under(learnt, **fields):
    """A learnt BatchE under other settings of inference."""
    other = object.__new__(type(learnt))
    other.__dict__ = {**learnt.__dict__, "config": type(learnt.config)(**{**vars(learnt.config), **fields})}
    return other


def test_a_row_finds_its_context(contexts):
    _, _, result = contexts
    assert result.task_inference["unit"] == "row"
    assert result.task_inference["accuracy"] >= 60  # chance is a third
    assert result.acc >= 55


@pytest.mark.parametrize("objective", ["H", "M"])
@pytest.mark.parametrize("how", ["replicated", "one-shot"])
def test_rows_decide_together(contexts, how, objective):
    method, benchmark, _ = contexts
    batch = under(method, inference=how, objective=objective, inference_unit="batch")
    right = 0
    for j in range(3):
        x = rows_of(benchmark, j)[0][:24]
        found = batch.infer(x).unique().tolist()
        assert found == [int(batch.evidence(x).sum(0).argmin())]
        right += found == [j]
    assert right >= (2 if how == "replicated" else 1)  # one-shot over contexts is as weak here as on digits


def test_replicated_contexts_are_the_tasks_one_by_one(contexts):
    method, benchmark, _ = contexts
    x = rows_of(benchmark, 1)[0]
    alone = torch.stack([method.predict(x, j).logits for j in range(3)], 1)  # (B, K, C)
    torch.testing.assert_close(under(method, objective="H").evidence(x), inference.entropy(alone))
    torch.testing.assert_close(under(method, objective="M").evidence(x), -alone.softmax(-1).max(-1).values)
    logits, tasks = under(method, objective="M").predict(x, None)
    assert torch.equal(tasks, alone.softmax(-1).max(-1).values.argmax(1))
    torch.testing.assert_close(logits, alone[torch.arange(len(x)), tasks])


def test_units_and_who_decides(contexts):
    method, benchmark, _ = contexts
    x = rows_of(benchmark, 2)[0]
    rows = method.infer(x)
    first = under(method, inference_unit="batch", deciding_rows=1).infer(x)
    assert torch.equal(first, rows[::24].repeat_interleave(24)[: len(x)])
    assert torch.equal(under(method, inference_unit="n", unit_rows=1).infer(x), rows)
    pairs = under(method, inference_unit="n", unit_rows=2).infer(x)
    assert torch.equal(pairs, method.evidence(x).view(-1, 2, 3).mean(1).argmin(1).repeat_interleave(2))


def test_the_one_shot_gradient_is_autograds(contexts):
    """Superposed by hand: s = sum alpha_k s_k, t likewise, and the gradient of a row's entropy, in float64."""
    method, benchmark, _ = contexts
    x = rows_of(benchmark, 0)[0][:5].double()
    weights = [weight.detach().double() for weight in method.weights]
    names = method.vector_names
    assert [name.rpartition(".")[2] for name in names] == ["s", "t"] * 3
    want = []
    for row in x:
        alphas = torch.full((3,), 1 / 3, dtype=torch.float64, requires_grad=True)
        h = row
        for layer, w in enumerate(weights):
            s, t = (sum(a * kept[name].double() for a, kept in zip(alphas, method.kept)) for name in names[2 * layer :][:2])
            h = s * (w @ (h * t))
            h = h.relu() if layer < 2 else h
        want.append(torch.autograd.grad(inference.entropy(h[None]).sum(), alphas)[0])
    found = under(method, inference="one-shot").evidence(x.float())
    assert found.shape == (5, 3)
    torch.testing.assert_close(found.double(), torch.stack(want), rtol=1e-4, atol=1e-5)


def test_contexts_with_norms(tmp_path):
    """Each candidate norms by its own statistics; superposed, by their mean, so that no row influences another."""
    method, benchmark = pictured("batche")
    run(method, benchmark, RunConfig(), tmp_path)
    method.eval()
    x = rows_of(benchmark, 0)[0]
    with torch.no_grad():
        alone = torch.stack([inference.entropy(method.predict(x, j).logits) for j in range(2)], 1)
        torch.testing.assert_close(method.evidence(x), alone, rtol=1e-3, atol=1e-3)
        norm = next(key for key in method.own if key.endswith("running_mean"))
        assert not torch.equal(method.kept[0][norm], method.kept[1][norm])
        superposed = under(method, inference="one-shot")
        torch.testing.assert_close(superposed.evidence(x)[:2], superposed.evidence(x[:2]), rtol=1e-3, atol=1e-3)
    numbers = sum(t.numel() for key, t in method.kept[0].items() if not key.endswith("num_batches_tracked"))
    assert method.report()["parameters_per_task"] == numbers


def test_what_a_context_costs(contexts):
    _, _, result = contexts
    own, weights = (16 + 100) + (100 + 100) + (100 + 2), 16 * 100 + 100 * 100 + 100 * 2
    assert result.method_report["parameters_per_task"] == own
    assert result.capacity["measured_cap"] == pytest.approx(100 * (1 + 3 * own / weights))
    assert result.capacity["seed_only_cap"] is None


# ---- PSP --------------------------------------------------------------------------------------------------------------


def test_contexts_are_drawn_again_and_not_stored(tmp_path):
    method, benchmark = made("psp")
    turn, end, kept = method.turn, method.end, []

    def end_and_look(task):
        end(task)
        kept.append([layer.context.clone() for layer in method.rotated()])

    method.end = end_and_look
    result = run(method, benchmark, RunConfig(), tmp_path)
    assert [len(c) for c in kept[0]] == [16, 100, 100]
    for a, b in ((kept[0], kept[1]), (kept[0][1:2], kept[0][2:])):  # of other tasks, of other layers
        assert not any(map(torch.equal, a, b))
    for task in (2, 0, 1):
        turn(task)
        assert all(map(torch.equal, kept[task], [layer.context for layer in method.rotated()]))
        h = x = rows_of(benchmark, task)[0]
        for number, layer in enumerate(method.rotated()):
            h = h @ kept[task][number].T @ layer.layer.weight.T
            h = h.relu() if number < 2 else h
        torch.testing.assert_close(method.predict(x, task).logits, h, rtol=1e-4, atol=1e-5)
    header = next((tmp_path / "checkpoint").rglob("*.safetensors")).read_bytes()
    shapes = [tensor["shape"] for name, tensor in json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")]).items()]
    assert shapes.count([100, 100]) == 1  # the one layer of 100 x 100
    assert [16, 16] not in shapes
    other, _ = made("psp", seed=2)
    other.add_head()
    other.turn(0)
    assert not torch.equal(other.rotated()[0].context, kept[0][0])
    assert result.method_report["context_bytes_per_task"] == {"stored": 0, "drawn again": 4 * (16**2 + 2 * 100**2)}


def test_rotations_keep_what_finetuning_forgets(tmp_path):
    """The same pictures under the other labels, through one network and head."""
    psp = run(*made("psp", lr=1e-3), RunConfig(), tmp_path / "psp")
    plain = run(*made("finetune", head="shared", select="last"), RunConfig(), tmp_path / "finetune")
    assert min(psp.final) >= 95
    assert plain.final[1] <= 5


def test_nothing_of_a_rotation_is_learnt():
    method, benchmark = made("psp")
    method.begin(benchmark.task(0))
    method.loss(Batch(*rows_of(benchmark, 0), None), Clock(task=0)).backward()
    assert all(layer.context.grad is None for layer in method.rotated())
    assert len(list(method.parameters())) == 3


# ---- bounds -----------------------------------------------------------------------------------------------------------


def test_a_warm_start_goes_on_where_the_task_before_ended(tmp_path):
    starts = {}
    for start in ("fresh", "previous"):
        method, benchmark = made("stl", start=start)
        begin, seen = method.begin, starts.setdefault(start, [])

        def begin_and_look(task, method=method, begin=begin, seen=seen):
            begin(task)
            seen.append(method.model.head.weight.clone())

        method.begin = begin_and_look
        result = run(method, benchmark, RunConfig(), tmp_path / start)
        assert result.bwt == 0.0
        if start == "previous":
            for task in range(2):
                assert torch.equal(method.learnt[task]["head.weight"], seen[task + 1])
            assert not torch.equal(method.learnt[0]["head.weight"], method.learnt[2]["head.weight"])
        else:
            assert not torch.equal(method.learnt[0]["head.weight"], seen[1])
    assert torch.equal(starts["fresh"][0], starts["previous"][0])


def test_no_preset_warms_up_the_upper_bound():
    """WSN's tables run stl in its authors' mode, with a network of its own for each task."""
    for benchmark in ("permuted-mnist", "rotated-mnist", "cifar100-split"):
        for fidelity in ("sound", "code", "paper"):
            assert Settings("stl", benchmark).resolve(None, {}, fidelity).values["start"] == "fresh"


# ---- recipes ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_sets(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("sets"))


RECIPES = sorted((path.parent.name, path.stem) for name in NEW for path in (CONFIGS / name).glob("*.yaml"))
RECIPES += [("stl", "rotated-mnist"), ("finetune", "rotated-mnist")]


def test_every_recipe_is_looked_at():
    assert {name for name, _ in RECIPES} == {*NEW, "stl", "finetune"}
    assert len(RECIPES) == 5 + 3 + 5 + 2


@pytest.mark.parametrize("fidelity", ["sound", "code", "paper"])
@pytest.mark.parametrize(("name", "which"), RECIPES)
def test_recipes_run(name, which, fidelity, tiny_sets, tmp_path):
    """Every mode fits; two tasks of two steps in the authors'."""
    if fidelity != "code":
        Settings(name, which).resolve(None, {}, fidelity)
        return
    few = {"order": "numeric"} if which == "cifar100-split-20" else {}  # classes, which the small files have the first of
    settings = Settings(name, which).resolve(None, {"tasks": 2, "iterations": 2, "batch_size": 16, **few}, fidelity)
    config, benchmark_config, run_config = settings.build()
    benchmark = settings.benchmark(benchmark_config, 1, tiny_sets)
    result = run(settings.method(config, benchmark, 1), benchmark, run_config, tmp_path)
    assert len(result.final) == 2
    assert all(0 <= accuracy <= 100 for accuracy in result.final)


def test_the_authors_modes():
    batche = {fidelity: Settings("batche", "permuted-mnist").resolve(None, {}, fidelity).values for fidelity in ("code", "paper")}
    assert (batche["code"]["inference_unit"], batche["code"]["deciding_rows"]) == ("batch", 1)
    assert batche["code"]["inference"] == batche["paper"]["inference"] == "replicated"
    assert (batche["code"]["weight_decay"], batche["paper"]["weight_decay"]) == (1e-4, 0.0)
