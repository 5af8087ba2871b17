"""ImpressLearn: a basis of masks, and later tasks as coefficients over them."""

import itertools
from dataclasses import asdict

import pytest
import torch
from streams import Contrary, Pictures, Shuffled, assert_same_run, broken_run

import subnet_kernels as sk
import subnet_pipelines
from subnet_pipelines import METHODS, Refusal, RunConfig, run
from subnet_pipelines.benchmarks.base import BenchmarkConfig


@pytest.fixture(scope="module", autouse=True)
def _no_plots():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subnet_pipelines.report, "draw", lambda results, folder: [])
        yield


class Images(Pictures):
    """Pictures of three colours."""

    def __init__(self, config, seed):
        super().__init__((3, 32, 32), config, seed)


def impresslearn(tasks=4, seed=1, stream=Contrary, **fields):
    cls = METHODS["impresslearn"]
    benchmark = stream(BenchmarkConfig(tasks=tasks, val_fraction=0.25), seed)
    fields = {
        "basis": 2,
        "basis_epochs": 30,
        "basis_lr": 0.01,
        "epochs": 30,
        "lr": 0.03,
        "batch_size": 24,
        "model": "mlp",
        **fields,
    }
    return cls(cls.Config(**{"density": 0.3, **fields}), benchmark, seed), benchmark


def short(**fields):
    return impresslearn(**{"tasks": 3, "basis_epochs": 2, "epochs": 3, **fields})


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    method, benchmark = impresslearn()
    return method, benchmark, run(method, benchmark, RunConfig(), tmp_path_factory.mktemp("impresslearn"))


def test_learns_new_tasks_by_coefficients(learnt):
    method, _, result = learnt
    assert min(result.final) >= 90
    assert result.bwt == 0.0
    assert method.bank.masks == ["task 0", "task 1"]
    assert method.bank["task 2"].alphas.shape == (3, 2)  # three layers, two masks: all that a new task stores
    assert result.method_report["alphas_per_task"] == 6


def test_controls(learnt):
    _, _, result = learnt
    report = result.method_report
    assert set(report["own_mask"]) == {"task 2", "task 3"}
    assert report["own_mask_mean"] >= 90
    assert report["nearest_mask_mean"] >= 90  # every new task is one of the two basis tasks again
    assert report["wrong_mask_mean"] == pytest.approx(50, abs=12)  # one basis mask is right, the other exactly wrong
    assert report["wrong_mask_std_mean"] >= 40
    assert report["each_mask"]["task 2"]["task 0"] >= 90 > 10 >= report["each_mask"]["task 2"]["task 1"]
    assert report["equal_mean"] < report["combination_mean"]  # two masks that contradict each other
    assert [report["combination"][f"task {i}"] for i in (2, 3)] == result.final[2:]


def test_what_a_new_task_takes(learnt):
    """Of a task beyond the basis the bank keeps four bytes a coefficient and no weight, mask or score."""
    method, _, result = learnt
    bank = method.bank
    assert result.capacity["mask_bytes"] == 2 * sum(layer.bits.numel() for layer in bank.layers())
    total = sum(layer.weight.numel() for layer in bank.layers())
    assert result.capacity["measured_cap"] == pytest.approx(100 + 100 * (result.capacity["mask_bytes"] + 2 * 6 * 4) / (4 * total))
    entry = bank["task 3"]
    assert (entry.state, entry.modules, entry.scores) == ({}, {}, {})
    assert {key: value.shape for key, value in entry.tensors.items()} == {"information": ()}  # how sure it is of its own rows


def watch_alphas(method, seen):
    """Look at a method's steps: before each of those of alpha, see(method); after it nothing else may have moved or have a gradient."""
    step = method.step

    def look(batch, opt, clock):
        if clock.phase != "alpha":
            return step(batch, opt, clock)
        if clock.step == 0:
            seen.append(method.coefficients().detach().clone())
            opt.zero_grad()
            assert opt.param_groups[0]["params"] == [method.alphas]
            for layer in method.bank.layers():
                layer.scores.grad = None
        fixed = {name: p for name, p in method.named_parameters() if p is not method.alphas}
        learning = {p for group in opt.param_groups for p in group["params"]}
        before = {name: p.detach().clone() for name, p in fixed.items()}
        out = step(batch, opt, clock)
        for name, p in fixed.items():
            if p not in learning:
                assert p.grad is None, name
                assert torch.equal(p, before[name]), name
        assert method.alphas.grad is not None
        return out

    method.step = look


@pytest.mark.parametrize("mask", ["topk", "signed", "real"])
def test_alphas_start_equal_and_only_they_learn(mask, tmp_path):
    method, benchmark = impresslearn(controls=False, epochs=1, mask=mask)
    seen = []
    watch_alphas(method, seen)
    run(method, benchmark, RunConfig(), tmp_path)
    assert all(torch.equal(a, torch.full((3, 2), 0.5)) for a in seen)
    assert len(seen) == 2
    assert not any(layer.weight.requires_grad for layer in method.bank.layers())


@pytest.mark.parametrize("scaled", [False, True])
def test_alphas_start_at_the_nearest_mask(scaled, tmp_path):
    method, benchmark = impresslearn(alpha_init="optimal", epochs=1, scale_basis=scaled, own_mask=False)
    seen = []
    watch_alphas(method, seen)
    result = run(method, benchmark, RunConfig(), tmp_path)
    for k, start in enumerate(seen):
        assert torch.equal(start, torch.nn.functional.one_hot(torch.tensor(k), 2).float().expand(3, 2))
    assert result.method_report["combination_mean"] >= 90  # at once
    assert "own_mask" not in result.method_report


def test_scaled_coefficients(tmp_path):
    """alpha / K from 1 each: the same start, steps K times as small, and what is stored is what the masks are weighed by."""
    method, benchmark = impresslearn(scale_basis=True, controls=False, epochs=20, lr=0.06, penalty=0.01)
    seen = []
    watch_alphas(method, seen)
    result = run(method, benchmark, RunConfig(), tmp_path)
    assert all(torch.equal(a, torch.full((3, 2), 0.5)) for a in seen)
    assert min(result.final) >= 90
    plain, other = impresslearn(controls=False, epochs=20, lr=0.03, penalty=0.01)
    run(plain, other, RunConfig(), tmp_path / "plain")
    for name in ("task 2", "task 3"):  # RMSprop's steps have the size of the rate, whatever the gradient's
        assert torch.allclose(method.bank[name].alphas, plain.bank[name].alphas, atol=1e-3)


def test_decay_and_cosine_of_alpha(tmp_path):
    """L2 draws alpha in; the rate ends near 0."""
    size, rates = {}, []
    for decay in (0.0, 3.0):
        method, benchmark = impresslearn(controls=False, optimizer="adam", alpha_weight_decay=decay, schedule="cosine")
        step = method.step

        def look(batch, opt, clock, step=step):
            if clock.phase == "alpha":
                rates.append(float(opt.param_groups[0]["lr"]))
            return step(batch, opt, clock)

        method.step = look
        run(method, benchmark, RunConfig(), tmp_path / str(decay))
        size[decay] = method.bank["task 3"].alphas.norm()
    assert size[3.0] < 0.7 * size[0.0]
    assert rates[0] == pytest.approx(0.03)
    assert rates[-1] < 1e-4


def test_penalty_draws_sums_to_one(tmp_path):
    free, benchmark = impresslearn(controls=False)
    run(free, benchmark, RunConfig(), tmp_path / "free")
    held, benchmark = impresslearn(controls=False, penalty=3.0)
    run(held, benchmark, RunConfig(), tmp_path / "held")
    distance = [(m.bank["task 3"].alphas.abs().sum(1) - 1).abs().max() for m in (free, held)]
    assert distance[1] < distance[0]
    assert distance[1] < 0.2


@pytest.mark.parametrize(("fields", "expected"), [({}, 0.0 + 1.0 + 0.5625), ({"hybrid": True}, 0.0 + 1.0)])
def test_penalty_by_hand(fields, expected):
    method, benchmark = impresslearn(penalty=0.5, **fields)
    for name in ("task 0", "task 1"):
        method.bank.commit(name)
    method.make_alphas(method.basis)
    with torch.no_grad():
        method.alphas.copy_(torch.tensor([[0.5, 0.5], [1.0, -1.0], [0.0, 0.25]]))
    x, y = benchmark.test(0).tensors()
    clock = type("Clock", (), {"phase": "alpha", "task": 2})()
    batch = type("Batch", (), {"x": x, "y": y})()
    plain = torch.nn.functional.cross_entropy(method.logits(batch, clock), y)
    assert method.loss(batch, clock).item() == pytest.approx(plain.item() + 0.5 * expected, rel=1e-6)


# ---- bases ----------------------------------------------------------------------------------------------------------

KINDS = {  # fields -> (basis, basis tasks, new tasks) of six tasks
    "heterogeneous": ({}, ["task 0", "task 1"], [0, 1], [2, 3, 4, 5]),
    "homogeneous": (
        {"basis_kind": "homogeneous", "basis": 3},
        ["task 0", "task 0, seed 1", "task 0, seed 2"],
        [0],
        [1, 2, 3, 4, 5],
    ),
    "random": ({"basis_kind": "random", "basis": 2}, ["random 0", "random 1"], [], [0, 1, 2, 3, 4, 5]),
    "a mix": (
        {"basis_seeds": 1, "basis_random": 1},
        ["task 0", "task 1", "task 0, seed 1", "random 0"],
        [0, 1],
        [2, 3, 4, 5],
    ),
    "homogeneous and random": (
        {"basis_kind": "homogeneous", "basis_random": 1},
        ["task 0", "task 0, seed 1", "random 0"],
        [0],
        [1, 2, 3, 4, 5],
    ),
    "some passed over": ({"new_tasks": 2}, ["task 0", "task 1"], [0, 1], [4, 5]),
    "spread": ({"new_tasks": 2, "basis_from": "spread"}, ["task 0", "task 2"], [0, 2], [4, 5]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_bases(kind, tmp_path):
    fields, basis, basis_tasks, new = KINDS[kind]
    method, benchmark = impresslearn(tasks=6, basis_epochs=2, epochs=2, own_mask=False, **fields)
    result = run(method, benchmark, RunConfig(), tmp_path)
    assert method.basis == basis
    assert sorted(method.bank.masks) == sorted(basis)
    assert all(method.bank[f"task {i}"].over == tuple(basis) for i in new)
    assert [i for i, right in enumerate(result.final) if right is not None] == [*basis_tasks, *new]
    report = result.method_report
    assert (report["basis_tasks"], report["new_tasks"], report["basis_masks"]) == (basis_tasks, new, len(basis))
    masks = [method.bank.bits(name) for name in basis]
    for layer, key in zip(method.bank.layers(), method.bank.layer_names):
        assert {int(sk.count(bits[key])) for bits in masks} == {layer.k}
        assert all(not torch.equal(a[key], b[key]) for a, b in itertools.combinations(masks, 2))
    assert len(report["reuse"]["correlation"]) == len(basis)  # of every two masks, from their bits


def test_random_masks_are_uniform(tmp_path):
    """Any two share what chance has them share, and coefficients over many of them learn."""
    method, benchmark = impresslearn(tasks=2, basis_kind="random", basis=12, own_mask=False, epochs=40)
    result = run(method, benchmark, RunConfig(), tmp_path)
    found = torch.tensor(result.method_report["reuse"]["correlation"])
    pairs = found[~torch.eye(12, dtype=torch.bool)]
    assert pairs.abs().max() < 0.05  # 11,800 weights: the deviation is .009
    assert min(result.final) >= 75


@pytest.mark.parametrize("kind", ["topk", "signed", "real"])
def test_kinds_of_masks_learn(kind, tmp_path):
    method, benchmark = impresslearn(mask=kind, own_mask=False)
    result = run(method, benchmark, RunConfig(), tmp_path)
    assert min(result.final) >= 90
    assert result.bwt == 0.0
    assert result.method_report["nearest_mask_mean"] >= 90


def test_signed_masks_have_two_planes_and_one_coefficient(tmp_path):
    method, benchmark = short(mask="signed", controls=False)
    run(method, benchmark, RunConfig(), tmp_path)
    assert all(bits.shape[0] == 2 for bits in method.bank.bits("task 0").values())
    assert method.bank["task 2"].alphas.shape == (3, 2)


# ---- real-valued masks ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["float16", "float32"])
def real(request, tmp_path_factory):
    method, benchmark = impresslearn(mask="real", real_dtype=request.param, tasks=3, own_mask=False)
    return method, benchmark, run(method, benchmark, RunConfig(), tmp_path_factory.mktemp("real"))


def real_mask(method, name, key, layer):
    """A real mask from what the bank holds of it, float64."""
    mask = sk.unpack(method.bank.bits(name)[key], layer.weight.shape)
    dense = torch.zeros(layer.weight.shape, dtype=torch.float64)
    dense[mask] = method.bank[name].tensors[f"values/{key}"].double()
    return dense


def test_real_masks_are_scores_where_they_are_open(real):
    method, _, _ = real
    for key, layer in zip(method.bank.layer_names, method.bank.layers()):
        values = method.bank["task 1"].tensors[f"values/{key}"]
        assert values.shape == (layer.k,)
        assert values.dtype == getattr(torch, method.config.real_dtype)
        assert values.abs().unique().numel() > layer.k // 8


def test_real_masks_and_their_combination_by_hand(real):
    method, benchmark, _ = real
    x, _ = benchmark.test(0).tensors()
    layers = dict(zip(method.bank.layer_names, method.bank.layers()))
    method.eval()
    for task, weigh in ((1, lambda i, masks: masks[1]), (2, None)):
        h = x.double()
        for i, (key, layer) in enumerate(layers.items()):
            masks = [real_mask(method, name, key, layer) for name in method.basis]
            alphas = method.bank["task 2"].alphas[i].double()
            mask = weigh(i, masks) if weigh else alphas[0] * masks[0] + alphas[1] * masks[1]
            h = h @ (layer.weight.double() * mask).t()
            h = h.relu() if key != "head" else h
        with torch.no_grad():
            logits = method.predict(x, task).logits
        assert torch.allclose(logits.double(), h, atol=1e-5, rtol=1e-5)


def test_real_masks_count_their_values(real):
    method, _, result = real
    total = sum(layer.weight.numel() for layer in method.bank.layers())
    opened = sum(layer.k for layer in method.bank.layers())
    size = 2 if method.config.real_dtype == "float16" else 4
    capacity = result.capacity
    assert capacity["value_bytes"] == 2 * opened * size
    stored = capacity["mask_bytes"] + capacity["value_bytes"] + 4 * 6
    assert capacity["seed_only_cap"] == pytest.approx(100 * stored / (4 * total))
    assert capacity["bits_per_weight"] == pytest.approx(8 * stored / total / 3)


def test_real_scores_learn_straight_through():
    """dL/dS = G * W over the scores' bound, closed ones included."""
    method, benchmark = impresslearn(mask="real")
    method.begin_mask(0)
    x, y = benchmark.task(0).train.tensors()
    weights = {key: value.detach().requires_grad_() for key, value in method.real_weights().items()}
    method.bank.substitute(weights)
    torch.nn.functional.cross_entropy(method.model(x), y).backward()
    method.run_live()
    torch.nn.functional.cross_entropy(method.network(x), y).backward()
    for key, layer in zip(method.bank.layer_names, method.bank.layers()):
        expected = weights[key].grad * layer.weight * layer.weight[0].numel() ** 0.5
        assert torch.allclose(layer.scores.grad, expected, rtol=1e-4, atol=1e-7)


# ---- a backbone that is trained, a last layer of one's own ----------------------------------------------------------


def test_a_trained_backbone(tmp_path):
    method, benchmark = short(backbone="trained", backbone_epochs=20, backbone_lr=0.01, basis_epochs=15, epochs=15)
    drawn = [layer.weight.clone() for layer in method.bank.layers()]
    plan = [phase.name for phase in method.plan(benchmark.task(0))]
    assert plan == ["backbone", "mask"]
    result = run(method, benchmark, RunConfig(), tmp_path)
    assert all(not torch.equal(layer.weight, w) for layer, w in zip(method.bank.layers(), drawn))
    dense = [line for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if '"backbone"' in line]
    assert len(dense) == 20
    assert result.capacity["seed_only_cap"] is None
    assert min(result.final) >= 90
    assert method.dense is None


def test_a_signed_constant_backbone():
    method, _ = impresslearn(backbone="signed_constant")
    for layer in method.bank.layers():
        assert torch.allclose(layer.weight.abs(), torch.tensor((2 / layer.weight.shape[1]) ** 0.5))


@pytest.mark.parametrize("mask", ["topk", "signed"])
def test_hybrid(mask, tmp_path):
    method, benchmark = impresslearn(hybrid=True, own_mask=False, mask=mask, scale_basis=mask == "signed")
    seen = []
    watch_alphas(method, seen)
    result = run(method, benchmark, RunConfig(), tmp_path)
    assert min(result.final) >= 90
    assert result.bwt == 0.0
    bank = method.bank
    entry, own = bank["task 3"], bank.bits("task 3, last layer")
    assert entry.over == ("task 0", "task 1", "task 3, last layer")
    assert torch.equal(entry.alphas[-1], torch.tensor([0.0, 0.0, 1.0]))
    assert torch.equal(entry.alphas[:-1, -1], torch.zeros(2))
    assert [int(sk.count(bits.reshape(-1))) for bits in own.values()] == [0, 0, bank.layers()[-1].k]
    assert bank["task 2"].over[:2] == bank["task 3"].over[:2] == tuple(method.basis)
    assert result.method_report["alphas_per_task"] == 4


# ---- networks with norms --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["task", "batch"])
def test_a_residual_network(norm, tmp_path):
    """Every entry has statistics of its own, and what was learnt before keeps its logits."""
    fields = {"model": "gem-resnet-18", "width": 0.2, "norm": norm, "batch_size": 14, "basis_epochs": 2, "epochs": 2}
    method, benchmark = impresslearn(stream=Images, tasks=4, erdos_renyi=8.0, basis_random=1, own_mask=False, **fields)
    result = run(method, benchmark, RunConfig(), tmp_path)
    assert result.bwt == 0.0
    means = [method.bank[name].state for name in ("task 0", "random 0", "task 2", "task 3")]
    if norm == "batch":
        assert means == [{}] * 4
        return
    key = next(key for key in means[0] if key.endswith("running_mean"))
    assert all(not torch.equal(a[key], b[key]) for a, b in itertools.combinations(means, 2))
    assert all(state[key].abs().max() > 0 for state in means)


# ---- going on -------------------------------------------------------------------------------------------------------


def assert_same_alphas(a, b):
    for name in a.bank.names:
        if a.bank[name].alphas is not None:
            assert torch.equal(a.bank[name].alphas, b.bank[name].alphas), name
        for key, value in a.bank[name].tensors.items():
            assert torch.equal(value, b.bank[name].tensors[key]), (name, key)


RESUMED = {
    "as it is": ({}, [4, 9, 8, 2]),
    "a trained backbone": ({"backbone": "trained", "backbone_epochs": 2}, [3, 9, 8]),
    "hybrid": ({"hybrid": True, "own_mask": False, "optimizer": "adam"}, [7, 5, 2]),
    "real": ({"mask": "real"}, [4, 9, 8, 2]),
    "signed, scaled": ({"mask": "signed", "scale_basis": True, "alpha_init": "optimal", "schedule": "cosine"}, [4, 9, 8, 2]),
    "a mix": ({"basis_seeds": 1, "basis_random": 1}, [4, 5, 8, 9]),
    "components": ({"basis_random": 2, "components": "nonnegative", "component_count": 2}, [4, 9, 8, 2]),
    "smaller bases": ({"basis_random": 2, "sizes": [1, 3]}, [4, 2, 3, 2]),
    "seeds at once": ({"basis_kind": "homogeneous", "basis": 3, "parallel_tasks": 2}, [2, 5, 4]),
}


@pytest.mark.parametrize("name", RESUMED)
def test_resumes_to_the_same_bits(name, tmp_path):
    fields, stops = RESUMED[name]
    method, benchmark = short(**fields)
    whole = method, run(method, benchmark, RunConfig(), tmp_path / "whole")
    broken = broken_run(lambda: short(**fields), tmp_path / "broken", stops)
    assert_same_run(whole, broken)
    assert_same_alphas(method, broken[0])


@pytest.mark.parametrize("parallel", [2, 3, 5])
@pytest.mark.parametrize(
    "fields",
    [
        {"tasks": 5, "basis": 4},
        {"tasks": 2, "basis_kind": "homogeneous", "basis": 4, "basis_schedule": "cosine", "basis_weight_decay": 1e-3},
        {"tasks": 4, "basis": 3, "basis_seeds": 2, "basis_random": 1, "backbone": "trained", "mask": "signed"},
    ],
    ids=["heterogeneous", "homogeneous", "a mix over a trained backbone"],
)
def test_masks_trained_at_once_are_those_of_one_by_one(fields, parallel, tmp_path):
    found = []
    for many in (1, parallel):
        method, benchmark = short(**fields, controls=False, parallel_tasks=many)
        result = asdict(run(method, benchmark, RunConfig(), tmp_path / str(many)))
        found.append((method, {**result, "seconds": None, "config": None}))
    assert found[0][1] == found[1][1]
    for name in found[0][0].bank.masks:
        for key, bits in found[0][0].bank.bits(name).items():
            assert torch.equal(bits, found[1][0].bank.bits(name)[key]), (name, key)
    assert_same_alphas(found[0][0], found[1][0])
    assert not found[1][0].together.networks


@pytest.mark.parametrize("mask", ["topk", "real"])
def test_smaller_bases_are_those_of_their_own(mask, tmp_path):
    """Coefficients over a smaller basis end as those of a run that has no other masks: same masks, same batches, same start."""
    fields = {"tasks": 5, "stream": Shuffled, "new_tasks": 1, "own_mask": False, "mask": mask}
    whole, benchmark = short(**fields, basis=4, sizes=[1, 2])
    report = run(whole, benchmark, RunConfig(), tmp_path / "whole").method_report
    assert whole.some_of_basis(2) == ["task 0", "task 2"]
    assert whole.bank["task 4"].over == ("task 0", "task 1", "task 2", "task 3")
    assert "task 4" in report["combination_of_1"]
    small, benchmark = short(**fields, basis=2, basis_from="spread")
    assert small.basis == ["task 0", "task 2"]
    alone = run(small, benchmark, RunConfig(), tmp_path / "small").method_report
    assert report["combination_of_2"] == alone["combination"]
    curve = report["curves"]["size of the basis"]["lines"]["combination"]
    assert curve == [[1, report["combination_of_1_mean"]], [2, report["combination_of_2_mean"]], [4, report["combination_mean"]]]


def test_masks_of_other_angles(tmp_path):
    """Alone, over the angle between mask and task the short way round: 20 and 350 degrees are 30 apart."""
    method, benchmark = short(tasks=4, own_mask=False)
    benchmark.angle = [0, 350, 20, 10].__getitem__
    report = run(method, benchmark, RunConfig(), tmp_path).method_report
    each = report["each_mask"]
    assert report["curves"]["a mask alone"]["lines"]["mask of another angle"] == [
        [10, each["task 3"]["task 0"]],
        [20, (each["task 2"]["task 0"] + each["task 3"]["task 1"]) / 2],
        [30, each["task 2"]["task 1"]],
    ]
    assert report["curves"]["new tasks"]["x"] == "angle (degrees)"


def test_superfluous_outputs(tmp_path):
    method, benchmark = short(outputs=5)
    run(method, benchmark, RunConfig(), tmp_path)
    x = benchmark.test(2).tensors()[0]
    assert method.predict(x, 2).logits.shape == (len(x), 5)


def test_a_spread_basis_cannot_grow(tmp_path):
    fields = {"new_tasks": 1, "basis_from": "spread", "controls": False}
    method, benchmark = short(tasks=3, **fields)
    run(method, benchmark, RunConfig(), tmp_path)
    method, benchmark = short(tasks=5, **fields)
    with pytest.raises(Refusal, match="the basis must have 'task 2', which the stream has passed"):
        run(method, benchmark, RunConfig(), tmp_path, resume=True)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"basis": 4}, "basis must leave new tasks: it takes 4 and they 1, contrary has 4 tasks"),
        ({"new_tasks": 3}, "basis must leave new tasks: it takes 2 and they 3"),
        ({"new_tasks": 0}, "new_tasks must be at least 1"),
        ({"basis": 0}, "basis must be at least 1"),
        ({"basis_seeds": 1, "basis_kind": "homogeneous"}, "basis_seeds goes with a heterogeneous basis"),
        ({"basis_random": 1, "basis_kind": "random"}, "basis_random goes with a trained basis"),
        ({"basis_random": -1}, "basis_random must not be negative"),
        ({"basis_from": "spread"}, "basis_from spread needs new_tasks"),
        ({"mask": "real", "hybrid": True}, "hybrid must be false where mask is real"),
        ({"mask": "real", "parallel_tasks": 2}, "parallel_tasks must be 1 where mask is real"),
        ({"parallel_tasks": 0}, "parallel_tasks must be at least 1"),
        ({"backbone_epochs": 0}, "backbone_epochs must be at least 1"),
        ({"backbone_lr": 0.0}, "backbone_lr must be positive"),
        ({"erdos_renyi": 0.0}, "erdos_renyi must be positive"),
        ({"alpha_weight_decay": -1.0}, "alpha_weight_decay must not be negative"),
        ({"penalty": -1.0}, "penalty must not be negative"),
        ({"sizes": [1, 2]}, "sizes must be numbers of masks from 1 to 1, got 2"),
        ({"sizes": [1], "alpha_init": "optimal"}, "alpha_init must be equal where sizes gives smaller bases"),
        ({"components": "principal", "mask": "signed"}, "components principal go with mask topk"),
        ({"components": "nonnegative", "scale_basis": True}, "components nonnegative go with mask topk"),
        ({"components": "principal", "component_count": 3}, "component_count must be at most the 2 masks of the basis, got 3"),
        ({"mask": "real", "basis_passes": 1}, "basis_passes must be 0 where mask is real"),
        ({"outputs": 1}, "outputs must be at least the 2 classes of contrary, got 1"),
        ({"density": 0.0}, "density must be in"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"width": 2.0}, "width must be 1 for model mlp"),
    ],
)
def test_bad_settings(fields, words):
    with pytest.raises(Refusal, match=words):
        impresslearn(**fields)
