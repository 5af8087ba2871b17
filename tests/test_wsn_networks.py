"""WSN on every network of the paper's tables: learnt through `run`, nothing forgotten by a bit, killed and resumed to the same result."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from image_sets import write_all
from streams import Pictures, assert_same_run, broken_run

import subnet_kernels as sk
import subnet_pipelines
from subnet_kernels.storage import raw
from subnet_pipelines import METHODS, Refusal, RunConfig, run
from subnet_pipelines.benchmarks.base import BenchmarkConfig, batches
from subnet_pipelines.config import Settings
from subnet_pipelines.evaluate import evaluate
from subnet_pipelines.methods.masked import entry_name

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {
    "mlp": (784,),
    "alexnet": (3, 32, 32),
    "resnet-18": (3, 32, 32),
    "lenet": (3, 32, 32),
    "lenet-large": (1, 32, 32),
    "tinynet": (3, 64, 64),
}
HARD = {"optimizer": "adamw", "weight_decay": 0.1, "clip_norm": 0.5, "amp": "bf16", "norm": "task"}
FUSED = {**HARD, "clip_norm": None}  # the step makes the gradients of weights and scores
PLAIN = {"norm": "batch", "ties": "all", "stored_mask": "last_step"}
EVAL = 4  # rows of a test batch, which norms by the batch depend on


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    monkeypatch.setattr(subnet_pipelines.report, "draw", lambda results, folder: [])


def wsn(model, tasks=2, val_fraction=0.125, **fields):
    benchmark = Pictures(SHAPES[model], BenchmarkConfig(tasks=tasks, val_fraction=val_fraction))
    cls = METHODS["wsn"]
    return cls(cls.Config(**{"model": model, "batch_size": 20, "density": 0.2, **fields}), benchmark, 1), benchmark


def of_task(method, benchmark, task):
    """The bytes of all that a task's answers hang on: logits in batches, frozen weights that it uses, its norms' state, its head."""
    x, y = benchmark.test(task).tensors()
    method.eval()
    with torch.no_grad():
        logits = torch.cat([method.predict(batch.x, task).logits for batch in batches(x, y, None, None, EVAL)])
    method.bank.activate(None)
    entry = method.bank[entry_name(task)]
    masks = method.bank.bits(entry_name(task))
    used = [layer.weight.detach()[sk.unpack(masks[name], layer.weight.shape)] for name, layer in named_layers(method)]
    heads = [value for module in entry.modules.values() for value in module.state_dict().values()]
    return [raw(t.reshape(-1)).clone() for t in (logits, *used, *entry.state.values(), *heads)]


def named_layers(method):
    return list(zip(method.bank.layer_names, method.bank.layers()))


def watched_run(method, benchmark, out):
    """Run, and after every commit compare what each earlier task is with what it was at its own commit."""
    kept, commit = {}, method.commit

    def commit_and_compare(of):
        commit(of)
        task = of.index
        kept[task] = of_task(method, benchmark, task)
        for earlier, before in kept.items():
            assert all(map(torch.equal, before, of_task(method, benchmark, earlier))), f"task {earlier} after task {task}"
        method.bank.verify()

    method.commit = commit_and_compare
    result = run(method, benchmark, RunConfig(eval_batch=EVAL), out)
    assert sorted(kept) == list(range(len(benchmark)))
    for task, before in kept.items():
        assert all(map(torch.equal, before, of_task(method, benchmark, task))), f"task {task} at the end"
    return result


FORGET_FREE = [
    *((model, "hard") for model in SHAPES),
    *((model, "plain") for model in SHAPES if model != "lenet-large"),  # which takes seconds, and has lenet's layers
    *((model, "fused") for model in ("mlp", "resnet-18")),
]


@pytest.mark.parametrize(("model", "how"), FORGET_FREE)
def test_nothing_is_forgotten(model, how, tmp_path):
    fields = {"hard": HARD, "fused": FUSED, "plain": PLAIN}[how]
    length = {"iterations": 1} if model == "lenet-large" else {"epochs": 1}
    method, benchmark = wsn(model, **length, **fields)
    start = {name: layer.weight.detach().clone() for name, layer in named_layers(method)}
    result = watched_run(method, benchmark, tmp_path)
    assert result.bwt == 0.0
    assert result.accuracy_matrix[1][0] == result.diagonal[0]
    for name, layer in named_layers(method):
        free = ~sk.unpack(method.bank.owned()[name], layer.weight.shape)
        assert not torch.equal(layer.weight, start[name])
        if "weight_decay" in fields:  # decay reaches what no task uses, so that what is frozen was under the same pressure
            assert (layer.weight[free] != start[name][free]).float().mean() > 0.9
    norms = [m for m in method.model.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    state = [method.bank[entry_name(task)].state for task in range(2)]
    if fields["norm"] == "task" and norms:
        assert len(state[0]) == 3 * len(norms)
        assert all(not torch.equal(value, state[1][key]) for key, value in state[0].items() if "running" in key)
        assert {int(v) for of in state for key, v in of.items() if "num_batches" in key} == {
            2
        }  # gathered anew by each: 42 rows of 20
    else:
        assert state == [{}, {}]


def test_learns(tmp_path):
    """Three classes; the second task has the first one's pictures under other labels."""
    method, benchmark = wsn("lenet", epochs=4, batch_size=7, lr=2e-3, density=0.3)
    assert min(run(method, benchmark, RunConfig(), tmp_path).final) >= 90


GATHERERS = {
    "wsn": {},
    "wsn, last step": {"stored_mask": "last_step"},
    "supsup": {"iterations": None, "outputs": None, "head": "dense", "mask": "topk"},
    **{name: {} for name in ("packnet", "stl", "mtl", "finetune", "ewc")},
    **{name: {"iterations": None} for name in ("batche", "separate-heads")},
}


@pytest.mark.parametrize("name", GATHERERS)
def test_statistics_of_a_task_are_those_of_its_rows(name, tmp_path):
    """Of the kept weights and mask, without dropout: those of the first norm's input, in each batch of training rows."""
    cls = METHODS[name.split(",")[0]]
    benchmark = Pictures(SHAPES["alexnet"], BenchmarkConfig(tasks=1, val_fraction=0.125))
    method = cls(cls.Config(**{"model": "alexnet", "epochs": 1, "batch_size": 21, **GATHERERS[name]}), benchmark, 1)
    run(method, benchmark, RunConfig(eval_batch=6), tmp_path)
    seen, norm = [], next(m for m in method.model.modules() if isinstance(m, nn.BatchNorm2d))
    norm.register_forward_pre_hook(lambda m, args: seen.append((m.running_mean.clone(), m.running_var.clone(), args[0])))
    method.eval()
    with torch.no_grad():
        method.predict(benchmark.task(0).train.tensors()[0], 0)
    mean, var, inputs = seen[-1]
    torch.testing.assert_close(mean, inputs.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(var, inputs.var((0, 2, 3)), rtol=0.03, atol=1e-4)


def test_learns_with_statistics_of_the_task(tmp_path):
    """Answers row by row, after four steps with dropout; averages over the batches of training would give a third."""
    method, benchmark = wsn("alexnet", tasks=1, epochs=2, batch_size=21, lr=2e-3, density=0.3, norm="task")
    run(method, benchmark, RunConfig(eval_batch=6), tmp_path)
    assert evaluate(method, benchmark, 0, 1)["right"] >= 60


def test_files_may_hold_class_after_class(tmp_path):
    """Norms by the batch need mixed batches where they measure, as they have in training."""

    class Sorted(Pictures):
        def draw(self, count, purpose):
            x, y = super().draw(count, purpose)
            order = y.argsort(stable=True)
            return x[order], y[order]

    cls = METHODS["wsn"]
    benchmark = Sorted(SHAPES["mlp"], BenchmarkConfig(tasks=1, val_fraction=0.25))
    method = cls(cls.Config(epochs=1, batch_size=20), benchmark, 1)
    validated, tested, validate, predict = [], [], method.validate, method.predict
    method.validate = lambda batch, clock: (validated.append(batch.y), validate(batch, clock))[1]
    method.predict = lambda x, task: (tested.append(x), predict(x, task))[1]
    run(method, benchmark, RunConfig(eval_batch=4), tmp_path)
    x, y = benchmark.test(0).tensors()
    places = [torch.cdist(rows, x).argmin(1) for rows in tested]
    assert sorted(torch.cat(places).tolist()) == list(range(len(y)))  # each row once
    assert sorted(torch.cat(validated).tolist()) == benchmark.task(0).val.tensors()[1].sort().values.tolist()
    for labels in (*validated, *(y[p] for p in places)):
        assert len(labels.unique()) > 1


def test_a_masked_head(tmp_path):
    """One head for all tasks, masked, counted and frozen as any layer."""
    method, benchmark = wsn("mlp", head="masked", epochs=4, lr=0.01)
    assert "head" in method.bank.layer_names
    result = watched_run(method, benchmark, tmp_path)
    assert min(result.final) >= 60
    owned = method.bank.owned()
    total = sum(layer.weight.numel() for layer in method.bank.layers())
    assert total == 784 * 100 + 100 * 100 + 3 * 100
    assert result.capacity["used_fraction"] == sum(int(sk.count(bits)) for bits in owned.values()) / total
    assert method.bank[entry_name(0)].modules == {}


def test_density_by_layer():
    method, _ = wsn("lenet", density={"body.0": 1.0, "body.[37]": 0.5, "*": 0.05})
    ones = {name: int(sk.count(layer.bits)) for name, layer in named_layers(method)}
    n = {name: layer.weight.numel() for name, layer in named_layers(method)}
    shares = {"body.0": 1.0, "body.3": 0.5, "body.7": 0.5, "body.9": 0.05}
    assert ones == {name: sk.k_kth(n[name], share) for name, share in shares.items()}


def test_density_as_a_flag_and_in_a_file(tmp_path):
    by_layer = {"body.0": 0.5, "*": 0.1}
    file = tmp_path / "mine.yaml"
    file.write_text('density: {body.0: 0.5, "*": 0.1}\n')
    for given in ((None, {"density": "body.0=.5,*=.1"}), (file, {})):
        settings = Settings("wsn", "cifar100-superclass").resolve(*given)
        assert settings.values["density"] == settings.build()[0].density == by_layer
    assert Settings("wsn", "cifar100-superclass").resolve(file, {"density": ".2"}).values["density"] == 0.2
    number, pairs = "a number", "names and values, as in a=1,b=2"
    for bad, words in (("body.0=x", number), ("body.0=.5,*", number), ("=.5", pairs), ("null", number)):
        with pytest.raises(Refusal, match=f"density must be {words}, got '{re.escape(bad)}'"):
            Settings("wsn", "cifar100-superclass").resolve(None, {"density": bad})
    with pytest.raises(Refusal, match="lr must be a number, got 'a=1'"):
        Settings("wsn", "cifar100-superclass").resolve(None, {"lr": "a=1"})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"density": {"body.0": 0.5}}, r"density must have a share for layer 'body.3' of lenet; \* stands for all others"),
        (
            {"density": {"conv": 0.5, "*": 0.1}},
            "density names 'conv', which fits no layer of lenet: body.0, body.3, body.7, body.9$",
        ),
        ({"density": {"*": 0.0}}, r"density must be in \(0, 1\], got 0.0"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative, got -0.1"),
        ({"clip_norm": 0.0}, "clip_norm must be positive, got 0.0"),
    ],
)
def test_bad_settings(fields, words):
    with pytest.raises(Refusal, match=words):
        wsn("lenet", **fields)


def test_clipping_bounds_the_gradients_of_weights_scores_and_head():
    method, benchmark = wsn("mlp", clip_norm=1e-3)
    task = benchmark.task(0)
    (phase,) = method.plan(task)
    phase.first()
    opt, seen, step = phase.optimizer(), [], None
    step = opt.step

    def look():
        grads = [p.grad for p in method.model.parameters()]
        assert all(g is not None for g in grads)
        seen.append(torch.stack([g.norm() for g in grads]).norm().item())
        step()

    opt.step = look
    x, y, _ = task.train.marked(0)
    method.train()
    method.step(next(batches(x, y, None, None, 20)), opt, subnet_pipelines.Clock(task=0))
    assert seen == [pytest.approx(1e-3, rel=1e-3)]


def test_bfloat16_computes_in_bfloat16():
    method, benchmark = wsn("lenet", amp="bf16")
    plain, _ = wsn("lenet")
    x = benchmark.test(0).tensors()[0]
    kinds = []
    method.model.body[9].register_forward_hook(lambda *args: kinds.append(args[-1].dtype))
    with torch.no_grad():
        a, b = method.network(x), plain.network(x)
    assert (kinds, a.dtype) == ([torch.bfloat16], torch.float32)
    assert not torch.equal(a, b)
    torch.testing.assert_close(a, b, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("stored", ["last_step", "restored"])
def test_which_mask_is_kept_with_the_best_copy(stored, tmp_path, monkeypatch):
    """`restored` keeps the mask of the copy that is put back, `last_step` that of the last step, as WSN's code does."""
    method, benchmark = wsn("mlp", tasks=1, epochs=4, lr=0.02, stored_mask=stored)
    losses, validate = iter([0.5, 1.0, 1.1, 1.2]), subnet_pipelines.train.validate
    monkeypatch.setattr(subnet_pipelines.train, "validate", lambda *args: (validate(*args), next(losses))[1])
    restore, put_back = method.restore, []
    method.restore = lambda snapshot: (restore(snapshot), put_back.append(method.bank.live_bits()))[0]
    run(method, benchmark, RunConfig(), tmp_path / stored)
    kept = method.bank.bits(entry_name(0))
    assert all(torch.equal(bits, put_back[0][name]) for name, bits in kept.items()) == (stored == "restored")


# ---------------------------------------------------------------------------------------------------------------------------- recipes

# WSN's launchers: weights that are masked, lr_min, epochs, rows of a training and of a test batch, outputs of a head in their code
RECIPES = {
    "permuted-mnist": (88_400, 1e-6, 5, 10, 500, 10),  # without norms, so that 500 rows give what their 10 do
    "five-datasets": (1_090_140, 1e-5, 100, 64, 64, 10),
    "omniglot-rotation": (24_436_400, 1e-6, 100, 64, 64, 12),
    "cifar100-split": (6_499_328, 1e-6, 200, 64, 64, 100),
    "cifar100-superclass": (2_986_500, 1e-5, 50, 64, 256, 100),
    "tiny-imagenet": (2_743_520, 1e-6, 10, 10, 64, 15),  # 200, but for the test's set of 15 classes
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("sets"))


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_run(name, data, tmp_path):
    """The authors' mode of each, three tasks of two steps, on tiny sets in the official formats."""
    weights, lr_min, epochs, batch, eval_batch, outputs = RECIPES[name]
    settings = Settings("wsn", name)
    values = settings.values
    assert (values["lr"], values["lr_min"], values["patience"], values["density"]) == (1e-3, lr_min, 6, 0.1)
    assert (values["epochs"], values["batch_size"], values["eval_batch"]) == (epochs, batch, eval_batch)
    assert values["tasks"] == {"five-datasets": 5, "omniglot-rotation": 100, "cifar100-superclass": 20, "tiny-imagenet": 40}.get(
        name, 10
    )
    assert values["val_fraction"] == (0.1 if name in ("permuted-mnist", "tiny-imagenet") else 0.05)
    flags = {"tasks": 3, "iterations": 2, "eval_images": 12}
    if name == "omniglot-rotation":
        flags |= {"iterations": 1, "val_split": "balanced"}  # the training rows again take its large network many seconds
    settings.resolve(None, flags, "code")
    assert (values["ties"], values["stored_mask"], values["norm"]) == ("all", "last_step", "batch")
    method_config, benchmark_config, run_config = settings.build()
    benchmark = settings.benchmark(benchmark_config, 1, data)
    method = settings.method(method_config, benchmark, 1)
    assert sum(layer.weight.numel() for layer in method.bank.layers()) == weights
    assert method.model.head.out_features == outputs
    result = run(method, benchmark, run_config, tmp_path)
    assert result.bwt == 0.0
    assert len(result.final) == 3
    assert 0.1 <= result.capacity["used_fraction"] <= 0.3
    method.bank.verify()


# ------------------------------------------------------------------------------------------------------------------ stopped and killed


@pytest.mark.parametrize("stops", [[1, 4], [5]])
def test_resumes_to_the_same_bits(stops, tmp_path):
    """With dropout, running statistics, clipping, decay and bfloat16."""
    make = lambda: wsn("resnet-18", epochs=1, batch_size=14, **HARD)  # noqa: E731
    method, benchmark = make()
    whole = method, run(method, benchmark, RunConfig(), tmp_path / "whole")
    assert_same_run(whole, broken_run(make, tmp_path / "broken", stops))


def small():
    """Two tasks of six steps with all that a checkpoint must hold."""
    return wsn("resnet-18", epochs=2, batch_size=14, **HARD, stored_mask="last_step")


def program(out: Path) -> None:
    """What the processes of the next test run: a checkpoint at every step."""
    subnet_pipelines.report.draw = lambda results, folder: []
    torch.set_num_threads(1)
    method, benchmark = small()
    run(method, benchmark, RunConfig(), out, resume=True, save_every=0.0)


def started(out: Path) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "python_api"), str(ROOT / "tests")))}
    return subprocess.Popen([sys.executable, __file__, str(out)], env=env, cwd=ROOT)


def test_killed_at_a_random_batch(tmp_path):
    """SIGKILL asks nobody. The run that goes on ends with the result.json of the run that was let be, but for its seconds."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    method, benchmark = small()
    run(method, benchmark, RunConfig(), whole)
    process, last = started(broken), random.randint(1, 9)
    while newest(broken) < last and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run was over before it could be killed"
    assert not (broken / "result.json").exists()
    assert started(broken).wait(300) == 0
    results = [json.loads((folder / "result.json").read_text()) for folder in (whole, broken)]
    for result in results:
        assert result.pop("seconds")["total"] > 0
    assert results[0] == results[1]
    assert (whole / "metrics.jsonl").read_text() == (broken / "metrics.jsonl").read_text()
    for path in sorted((whole / "bank").glob("*.safetensors")):
        assert (broken / "bank" / path.name).read_bytes() == path.read_bytes()


def newest(folder: Path) -> int:
    """The number of the last checkpoint."""
    return max((int(p.name) for p in (folder / "checkpoint").glob("[0-9]*")), default=0)


if __name__ == "__main__":
    program(Path(sys.argv[1]))
