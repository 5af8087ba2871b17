"""The dense baselines and PackNet: what they learn, what they keep, their formulas against ones worked by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from image_sets import write_all
from streams import Contrary, Pictures, assert_same_run, broken_run

import subnet_kernels as sk
import subnet_pipelines
from subnet_pipelines import METHODS, Interrupted, Refusal, RunConfig, run
from subnet_pipelines.benchmarks.base import Batch, BenchmarkConfig
from subnet_pipelines.capacity import packnet_cap
from subnet_pipelines.chance import stream
from subnet_pipelines.config import CONFIGS, Settings, read_yaml
from subnet_pipelines.methods.base import Clock
from subnet_pipelines.models import MODELS
from subnet_pipelines.report import COLUMNS

DENSE = ("stl", "mtl", "finetune", "ewc", "packnet")
IMAGES = {
    "alexnet": (3, 32, 32),
    "lenet": (3, 32, 32),
    "tinynet": (3, 64, 64),
    "resnet-18": (3, 32, 32),
}  # lenet-large is a lenet


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    monkeypatch.setattr(subnet_pipelines.report, "draw", lambda results, folder: [])


def made(name, stream=Contrary, tasks=3, seed=1, val_fraction=0.25, scenario="GG", **fields):
    cls = METHODS[name]
    benchmark = stream(BenchmarkConfig(tasks=tasks, val_fraction=val_fraction, scenario=scenario), seed)
    return cls(cls.Config(**{"epochs": 6, "lr": 0.01, **fields}), benchmark, seed), benchmark


def rows_of(benchmark, task):
    return benchmark.test(task).tensors()


# ---- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("val_fraction", [0.25, 0.0])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("name", DENSE)
def test_learns(name, optimizer, val_fraction, tmp_path):
    lr = {"adam": 0.01, "sgd": 0.3}[optimizer]
    result = run(*made(name, val_fraction=val_fraction, optimizer=optimizer, lr=lr), RunConfig(), tmp_path)
    assert min(result.final if name == "mtl" else result.diagonal) >= 95


@pytest.mark.parametrize(
    ("model", "norm"), [*((model, "sound") for model in IMAGES), ("alexnet", "batch"), ("resnet-18", "batch")]
)
@pytest.mark.parametrize("name", [*DENSE, "supsup"])
def test_every_network(name, model, norm, tmp_path):
    """Two steps a task through each: the last row of the matrix is measured, and who promises it keeps the first task's logits."""
    cls, benchmark = METHODS[name], Pictures(IMAGES[model])
    fields = {"iterations": 2, "batch_size": 8, "model": model}
    if norm == "batch":
        fields["norm"] = "batch"
    if name == "supsup":
        fields |= {"head": "dense", "outputs": None, "mask": "topk", "optimizer": "adam", "schedule": "cosine"}
    method = cls(cls.Config(**fields), benchmark, 1)
    plan, kept = method.plan, []

    def look_first(task):
        if task.index == 1:
            method.eval()
            with torch.no_grad():
                kept.append(method.predict(rows_of(benchmark, 0)[0], 0).logits)
        return plan(task)

    if not method.joint:
        method.plan = look_first
    result = run(method, benchmark, RunConfig(), tmp_path)
    assert all(0 <= accuracy <= 100 for accuracy in result.final)
    method.eval()
    with torch.no_grad():
        now = method.predict(rows_of(benchmark, 0)[0], 0).logits
        alone = method.predict(rows_of(benchmark, 0)[0][:3], 0).logits
    assert now.isfinite().all()
    if norm == "sound":  # a row's logits are its own
        assert torch.allclose(alone, now[:3], rtol=1e-3, atol=1e-4 * float(now.abs().max()))
    if method.forget_free:
        assert torch.equal(now, kept[0])
        assert result.bwt == 0.0


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("stl", {"lr": 0.0}, "lr must be positive"),
        ("mtl", {"patience": 0}, "patience must be at least 1"),
        ("ewc", {"strength": -1.0}, "strength must not be negative"),
        ("ewc", {"fisher_batch": 0}, "fisher_batch must be at least 1"),
        ("ewc", {"clip_norm": 0.0}, "clip_norm must be positive"),
        ("packnet", {"keep": 0.0}, "keep must be in"),
        ("packnet", {"retrain_epochs": 0}, "retrain_epochs must be at least 1"),
        ("packnet", {"retrain_lr": 0.0}, "retrain_lr must be positive"),
        ("supsup", {"weight_decay": -1.0}, "weight_decay must not be negative"),
        ("supsup", {"head": "dense", "scenario": "GNs"}, "head must be 'masked' in scenario GNs"),
    ],
)
def test_bad_settings(name, fields, words):
    with pytest.raises(Refusal, match=words):
        made(name, **fields)


SETS = {  # what the tables are of, and a picture's shape
    "permuted-mnist": (784,),
    "five-datasets": (3, 32, 32),
    "omniglot-rotation": (1, 32, 32),
    "cifar100-split": (3, 32, 32),
    "cifar100-superclass": (3, 32, 32),
    "tiny-imagenet": (3, 64, 64),
}


@pytest.fixture(scope="module")
def tiny_sets(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("sets"))


@pytest.mark.parametrize("fidelity", ["sound", "code"])
@pytest.mark.parametrize("which", SETS)
@pytest.mark.parametrize("name", [*DENSE, "supsup"])
def test_recipes_fit(name, which, fidelity):
    """Every table has its recipe, whose fields exist, whose network reads the set's pictures, and whose expected numbers are columns."""
    recipe = CONFIGS / name / f"{which}.yaml"
    assert set(read_yaml(recipe).get("expected", {})) <= set(COLUMNS)
    settings = Settings(name, which).resolve(None, {}, fidelity)
    config = settings.build()[0]
    with torch.device("meta"):
        MODELS[config.model](10, *SETS[which])
    assert config.iterations is None or which == "permuted-mnist"


@pytest.mark.parametrize(
    "which", [name if name == "cifar100-superclass" else pytest.param(name, marks=pytest.mark.long) for name in SETS]
)
@pytest.mark.parametrize("name", [*DENSE, "supsup"])
def test_recipes_run(name, which, tiny_sets, tmp_path):
    """Two tasks, two steps each, as a table's cell runs."""
    settings = Settings(name, which).resolve(None, {"tasks": 2, "iterations": 2}, "code")
    method_config, benchmark_config, run_config = settings.build()
    made = settings.benchmark(benchmark_config, 1, tiny_sets)
    result = run(settings.method(method_config, made, 1), made, run_config, tmp_path)
    assert len(result.final) == 2
    assert result.acc is not None


# ---- a network for each task ----------------------------------------------------------------------------------------


def test_single_tasks_share_nothing(tmp_path):
    method, benchmark = made("stl")
    starts, begin = [], method.begin

    def begin_and_look(task):
        begin(task)
        starts.append(method.model.head.weight.clone())

    method.begin = begin_and_look
    result = run(method, benchmark, RunConfig(), tmp_path / "three")
    assert len({tuple(start.flatten().tolist()) for start in starts}) == 3
    assert result.bwt == 0.0
    assert result.capacity["paper_cap"] == result.capacity["measured_cap"] == 300.0
    alone, benchmark = made("stl", tasks=1)
    run(alone, benchmark, RunConfig(), tmp_path / "one")
    for name, tensor in alone.learnt[0].items():  # what comes after a task changes nothing for it
        assert torch.equal(tensor, method.learnt[0][name]), name


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"torn"), lambda path: path.unlink()], ids=["torn", "gone"])
def test_a_lost_network_is_named(damage, tmp_path):
    method, benchmark = made("stl")
    step = method.step

    def stop_in_the_third_task(batch, opt, clock):
        if clock.task == 2:
            raise Interrupted(15, "here")
        return step(batch, opt, clock)

    method.step = stop_in_the_third_task
    with pytest.raises(Interrupted):
        run(method, benchmark, RunConfig(), tmp_path, save_every=0)
    damage(tmp_path / "nets" / "task-1.safetensors")
    with pytest.raises(Refusal, match=r"task-1.safetensors: holds no network of task 1"):
        run(*made("stl"), RunConfig(), tmp_path, resume=True)


# ---- all tasks at once ----------------------------------------------------------------------------------------------


def test_joint_training_mixes_the_tasks(tmp_path):
    method, benchmark = made("mtl", epochs=2, batch_size=24)
    step, seen = method.step, []

    def look(batch, opt, clock):
        seen.append(batch.t.clone())
        return step(batch, opt, clock)

    method.step = look
    result = run(method, benchmark, RunConfig(), tmp_path)
    assert len(seen) == 2 * 9  # 72 rows of each of three tasks, an epoch goes once through all of them
    assert all(len(t.unique()) > 1 for t in seen)
    assert torch.bincount(torch.cat(seen)).tolist() == [144, 144, 144]
    assert result.accuracy_matrix[:2] == [[None] * 3] * 2
    assert result.accuracy_matrix[2] == result.final
    assert result.acc == sum(result.final) / 3
    assert result.bwt is result.forgetting is None
    assert result.diagonal[:2] == [None, None]


def test_the_union_has_every_tasks_rows():
    benchmark = Contrary(BenchmarkConfig(tasks=3, val_fraction=0.25))
    union = benchmark.union()
    for half in ("train", "val"):
        x, y, t = getattr(union, half).marked(2)
        for i in range(3):
            own_x, own_y = getattr(benchmark.task(i), half).tensors()
            assert torch.equal(x[t == i], own_x)
            assert torch.equal(y[t == i], own_y)
        assert len(getattr(union, half)) == len(y)
    assert union.train.marked(None)[2] is None
    assert Contrary(BenchmarkConfig(tasks=3, val_fraction=0.0)).union().val is None


def test_a_row_goes_through_its_own_head():
    method, benchmark = made("mtl")
    x, y = rows_of(benchmark, 0)
    t = torch.arange(len(y)) % 3
    mixed = method.logits(Batch(x, y, t), Clock(task=2))
    method.learnt = True
    for i in range(3):
        assert torch.allclose(mixed[t == i], method.predict(x, i).logits[t == i], atol=1e-6)


def test_what_was_learnt_at_once_does_not_grow(tmp_path):
    run(*made("mtl", tasks=2), RunConfig(), tmp_path)
    with pytest.raises(Refusal, match="2 tasks were learnt at once, which cannot be made 3"):
        run(*made("mtl", tasks=3), RunConfig(), tmp_path, resume=True)


# ---- finetuning: statistics of norms --------------------------------------------------------------------------------


def resnet(name="finetune", tasks=2, **fields):
    cls, benchmark = METHODS[name], Pictures((3, 32, 32), BenchmarkConfig(tasks=tasks, val_fraction=0.125))
    return cls(cls.Config(**{"model": "resnet-18", "epochs": 1, "batch_size": 14, **fields}), benchmark, 1), benchmark


def statistics(method):
    return {name: buffer.clone() for name, buffer in method.model.named_buffers()}


def test_a_task_keeps_the_statistics_of_its_norms(tmp_path):
    method, benchmark = resnet()
    end, ends = method.end, []
    method.end = lambda task: (end(task), ends.append(statistics(method)))
    run(method, benchmark, RunConfig(), tmp_path)
    method.eval()
    x = benchmark.test(0).tensors()[0]
    with torch.no_grad():
        first = method.predict(x, 0).logits
        for name, buffer in method.model.named_buffers():
            assert torch.equal(buffer, ends[1][name])
            assert name.endswith("num_batches_tracked") or not torch.equal(buffer, ends[0][name])
            buffer.copy_(ends[0][name])
        assert torch.equal(method.head(0)(method.model.features(x)), first)


@pytest.mark.parametrize("name", [*DENSE, "supsup"])
def test_gathered_statistics_are_of_use(name, tmp_path):
    """After a few steps, when averages over training would still be mostly the initial ones, a network with norms is right at test."""
    fields = (
        {"mask": "topk", "head": "dense", "outputs": None, "optimizer": "adam", "iterations": None} if name == "supsup" else {}
    )
    method, benchmark = resnet(name, tasks=1, epochs=4, lr=3e-3, **fields)
    assert run(method, benchmark, RunConfig(), tmp_path).acc >= 90


def test_statistics_resume(tmp_path):
    method, benchmark = resnet()
    result = run(method, benchmark, RunConfig(), tmp_path / "whole")
    broken, again = broken_run(resnet, tmp_path / "broken", (2, 3))
    assert len(method.statistics) == len(broken.statistics) == 2
    for kept, found in zip(method.statistics, broken.statistics):
        assert all(torch.equal(kept[name], found[name]) for name in kept)
    assert again.accuracy_matrix == result.accuracy_matrix


def test_without_ids_norms_are_shared():
    cls, config = METHODS["finetune"], BenchmarkConfig(tasks=2, val_fraction=0.125, scenario="GNs")
    with pytest.raises(Refusal, match="norm must not be 'task' in scenario GNs"):
        cls(cls.Config(model="resnet-18", head="shared"), Pictures((3, 32, 32), config), 1)
    assert cls(cls.Config(model="resnet-18", head="shared", norm="gathered"), Pictures((3, 32, 32), config), 1).norms


# ---- EWC ------------------------------------------------------------------------------------------------------------


def test_the_penalty_keeps_what_finetuning_forgets(tmp_path):
    """Two permutations of the shipped digits through one head: the same network and steps, with and without the penalty."""
    found = {}
    for name in ("finetune", "ewc"):
        settings = Settings(name, "permuted-mnist-mini")
        settings.resolve(None, {"tasks": 2, "head": "shared", "select": "last", "iterations": 1000, "batch_size": 10})
        method_config, benchmark_config, run_config = settings.build()
        benchmark = settings.benchmark(benchmark_config, 1)
        found[name] = run(settings.method(method_config, benchmark, 1), benchmark, run_config, tmp_path / name)
    assert found["ewc"].diagonal[0] == found["finetune"].diagonal[0]
    assert found["ewc"].final[1] >= 85
    assert found["ewc"].final[0] >= found["finetune"].final[0] + 1.5


@pytest.mark.parametrize("head", ["shared", "per-task"])
def test_the_penalty_is_the_formula(head):
    method, _ = made("ewc", head=head, strength=7.0)
    method.add_head()
    shared = method.shared()
    assert method.fisher.numel() == sum(p.numel() for p in shared) == 16 * 100 + 100 * 100 + (200 if head == "shared" else 0)
    assert method.penalty() == 0
    chance = stream(3, "fisher")
    method.fisher.copy_(torch.rand(len(method.fisher), generator=chance))
    method.anchor.copy_(torch.randn(len(method.fisher), generator=chance))
    penalty = method.penalty()
    penalty.backward()
    value, at = 0.0, 0
    for p in shared:
        part = slice(at, at := at + p.numel())
        f, star = (v[part].double().view_as(p) for v in (method.fisher, method.anchor))
        moved = p.detach().double() - star
        value += 3.5 * (f * moved**2).sum()
        assert torch.allclose(p.grad.double(), 7.0 * f * moved, rtol=1e-5, atol=1e-8)
    assert float(penalty.detach()) == pytest.approx(float(value), rel=1e-5)


def by_hand(weights, x, y, rows):
    """Squared gradients in float64 of 16-h-h-2 with ReLU by the chain rule: of the mean loss of every `rows` rows, times their number,
    summed and divided by all rows."""
    first, second, head = (w.detach().double().numpy() for w in weights)
    x, y = x.double().numpy(), y.numpy()
    total = [np.zeros_like(w) for w in (first, second, head)]
    for start in range(0, len(x), rows):
        inp, label = x[start : start + rows], y[start : start + rows]
        a = inp @ first.T
        b = np.maximum(a, 0) @ second.T
        z = np.maximum(b, 0) @ head.T
        p = np.exp(z - z.max(1, keepdims=True))
        dz = (p / p.sum(1, keepdims=True) - np.eye(2)[label]) / len(inp)
        db = (dz @ head) * (b > 0)
        da = (db @ second) * (a > 0)
        for of, (grad, into) in zip(total, ((da, inp), (db, np.maximum(a, 0)), (dz, np.maximum(b, 0)))):
            of += len(inp) * (grad.T @ into) ** 2
    return [of / len(x) for of in total]


@pytest.mark.parametrize("head", ["shared", "per-task"])
@pytest.mark.parametrize(("fisher", "rows"), [("row", 1), ("batch", 20)])
def test_fisher_against_float64(fisher, rows, head, monkeypatch):
    monkeypatch.setattr(subnet_pipelines.methods.ewc, "CHUNK", 30 * 11_600)  # several chunks, the last one short
    method, benchmark = made("ewc", head=head, fisher=fisher)
    method.add_head()
    method.add_head()
    expected = 0
    for t in range(2):
        task = benchmark.task(t)
        weights = [*method.model.parameters(), method.head(t).weight]
        x, y = task.train.tensors()
        order = torch.randperm(len(y), generator=stream(method.seed, "fisher", t))  # of the rows in their batches
        found = by_hand(weights, x[order], y[order], rows)
        parts = found if head == "shared" else found[:2]
        expected = (np.concatenate([p.ravel() for p in parts]) + t * expected) / (t + 1)
        method.consolidate(task)
        assert np.allclose(method.fisher.numpy(), expected, rtol=1e-4, atol=1e-4 * expected.max())
        assert torch.equal(method.anchor, torch.cat([p.detach().flatten() for p in method.shared()]))
        with torch.no_grad():
            for p in method.parameters():
                p.mul_(1.1)


def test_rows_and_batches_of_one_row_are_the_same_fisher():
    """On a network with convolutions and norms of running statistics."""
    found = []
    for fields in ({"fisher": "row"}, {"fisher": "batch", "fisher_batch": 1}):
        method, benchmark = resnet("ewc", **fields)
        method.add_head()
        method.consolidate(benchmark.task(0))
        found.append(method.fisher)
    assert found[0].max() > 0
    assert torch.allclose(*found, rtol=1e-3, atol=1e-5 * float(found[0].max()))


def test_rows_that_a_norm_mixes_have_no_gradients_of_their_own():
    with pytest.raises(Refusal, match="fisher must be 'batch' for resnet-18 with norm 'batch'"):
        resnet("ewc", norm="batch", fisher="row")


def test_clipping(tmp_path):
    method, benchmark = made("ewc", tasks=1, clip_norm=1e-3, iterations=3)
    norms, gradients = [], method.gradients

    def clip_and_look(clock):
        gradients(clock)
        norms.append(torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None]).norm())

    method.gradients = clip_and_look
    run(method, benchmark, RunConfig(), tmp_path)
    assert 0 < max(norms) <= 1.001e-3


# ---- PackNet --------------------------------------------------------------------------------------------------------


def test_caps_of_the_papers_tables():
    """WSN's tables 1 and 2, row PackNet: 5, 10, 20, 40 tasks keep 1/N of what is free, Omniglot's 100 keep .02."""
    printed = {5: 82.86, 10: 96.38, 20: 126.65, 40: 188.67}
    for tasks, cap in printed.items():
        assert packnet_cap(tasks) == pytest.approx(cap, abs=0.01)  # of the printed digits; 188.677 is printed as 188.67
    assert packnet_cap(100, 0.02) == pytest.approx(399.2, abs=0.05)


@pytest.mark.parametrize("keep", [None, 0.2])
def test_tasks_share_out_the_weights(keep, tmp_path):
    """Before and after each prune and at each commit: who owns what, to the bit, and what became of the weights."""
    method, benchmark = made("packnet", keep=keep)
    share, layers = keep or 1 / 3, method.bank.layers()
    prune, commit, owners = method.prune, method.commit, [torch.zeros_like(m.weight, dtype=torch.int64) for m in layers]
    frozen, task = [], 0

    def watched_prune():
        before = [m.weight.detach().clone() for m in layers]
        prune()
        for m, w, owner in zip(layers, before, owners):
            free = owner == 0
            n = int(free.sum())
            count = n - round((1 - share) * n)
            largest = torch.where(free, w.abs(), -1.0).flatten().sort(stable=True).indices[-count:]
            kept = torch.zeros(w.numel(), dtype=torch.bool)
            kept[largest] = True
            kept = kept.view_as(w)
            assert torch.equal(m.weight[kept], w[kept])
            assert torch.equal(m.weight[~free], w[~free])
            assert (m.weight[free & ~kept] == 0).all()
            owner[kept] = task + 1

    def watched_commit(learnt):
        nonlocal task
        commit(learnt)
        index = learnt.index
        for name, m, owner in zip(method.bank.layer_names, layers, owners):
            assert torch.equal(sk.unpack(method.bank.bits(f"task {index}")[name], m.weight.shape), owner > 0)
            assert (m.weight[owner == 0] == 0).all()  # pruned weights stayed 0 while the others were trained again
        for kept, at in frozen:
            assert all(torch.equal(m.weight[mask], w) for m, w, mask in zip(layers, kept, at))
        frozen.append(([m.weight[o > 0].clone() for m, o in zip(layers, owners)], [o > 0 for o in owners]))
        task += 1

    method.prune, method.commit = watched_prune, watched_commit
    result = run(method, benchmark, RunConfig(), tmp_path)
    assert task == 3
    assert min(result.final) >= 95
    assert result.bwt == 0.0
    method.bank.verify()
    used = sum(int((o > 0).sum()) for o in owners) / sum(o.numel() for o in owners)
    assert result.capacity["used_fraction"] == used == pytest.approx(1 - (1 - share) ** 3, abs=2e-3)
    assert result.capacity["paper_cap"] == packnet_cap(3, share)
    assert result.capacity["measured_cap"] == pytest.approx(result.capacity["paper_cap"], abs=1)  # but for padding


def test_the_prune_is_followed_by_training(tmp_path):
    method, _ = made("packnet", epochs=5)
    first, second = method.plan(method.benchmark.task(0))
    assert (first.name, first.epochs, second.name, second.epochs) == ("train", 5, "retrain", 3)
    assert [phase.optimizer().param_groups[0]["lr"] for phase in (first, second)] == [0.01, pytest.approx(0.001)]
    method, _ = made("packnet", iterations=7, retrain_lr=0.5)
    first, second = method.plan(method.benchmark.task(0))
    assert (first.steps, second.steps) == (7, 4)
    assert second.optimizer().param_groups[0]["lr"] == 0.5
    assert all(layer.scores is not p for layer in method.bank.layers() for p in second.optimizer().param_groups[0]["params"])


def test_packnet_resumes_to_the_same_bits(tmp_path):
    method, benchmark = made("packnet", epochs=3)
    whole = method, run(method, benchmark, RunConfig(), tmp_path / "whole")
    broken = broken_run(lambda: made("packnet", epochs=3), tmp_path / "broken", (1, 30, 17, 9))
    assert_same_run(whole, broken)
    assert broken[0].free == method.free


def test_a_share_of_the_stream_does_not_grow(tmp_path):
    run(*made("packnet", tasks=2), RunConfig(), tmp_path / "a")
    with pytest.raises(Refusal, match=r"keep was 0.5 and is 0.333333.*give --keep"):
        run(*made("packnet", tasks=3), RunConfig(), tmp_path / "a", resume=True)
    run(*made("packnet", tasks=2, keep=0.3), RunConfig(), tmp_path / "b")
    method, benchmark = made("packnet", tasks=3, keep=0.3)
    grown = run(method, benchmark, RunConfig(), tmp_path / "b", resume=True)
    whole, benchmark = made("packnet", tasks=3, keep=0.3)
    assert run(whole, benchmark, RunConfig(), tmp_path / "c").accuracy_matrix == grown.accuracy_matrix


# ---- SupSup at the nets of WSN's comparison -------------------------------------------------------------------------


def test_supsup_with_heads_of_tasks(tmp_path):
    fields = {"model": "mlp", "head": "dense", "outputs": None, "mask": "topk", "optimizer": "adam", "schedule": "cosine"}
    method, benchmark = made("supsup", iterations=None, epochs=8, batch_size=16, weight_decay=1e-4, **fields)
    weights = [layer.weight.clone() for layer in method.bank.layers()]
    result = run(method, benchmark, RunConfig(), tmp_path)
    assert all(torch.equal(layer.weight, w) for layer, w in zip(method.bank.layers(), weights))
    assert len(weights) == 2
    assert min(result.final) >= 95
    assert result.bwt == 0.0
    masks = 100 * result.capacity["mask_bytes"] / (4 * (16 * 100 + 100 * 100))
    assert result.capacity["measured_cap"] == pytest.approx(100 + masks)
    heads = [method.bank[name].modules["head"].weight for name in method.bank.names]
    assert not torch.equal(heads[0], heads[1])
    for name in method.bank.masks:
        for layer, bits in zip(method.bank.layers(), method.bank.bits(name).values()):
            assert int(sk.count(bits)) == sk.k_sort(layer.weight.numel(), 0.5)
    x, y = rows_of(benchmark, 1)
    assert F.cross_entropy(method.predict(x, 1).logits, y) < 0.3
