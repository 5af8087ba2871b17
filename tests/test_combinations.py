"""ImpressLearn without a task id: whose combination it is, a basis task without its mask, and a task that drifts."""

import dataclasses

import pytest
import torch
from streams import Contrary, Shuffled, assert_same_run, broken_run

from subnet_pipelines import METHODS, Refusal, RunConfig, reevaluate, run
from subnet_pipelines.benchmarks.base import BenchmarkConfig
from subnet_pipelines.cli import main
from subnet_pipelines.inference import entropy, information
from subnet_pipelines.report import read_result
from subnet_pipelines.tables import Cell, curves_of, entry


def impresslearn(tasks=5, scenario="GNs", stream=Shuffled, seed=1, **fields):
    cls = METHODS["impresslearn"]
    benchmark = stream(BenchmarkConfig(tasks=tasks, val_fraction=0.25, scenario=scenario), seed)
    fields = {
        "basis": 3,
        "basis_epochs": 20,
        "basis_lr": 0.01,
        "epochs": 20,
        "lr": 0.01,
        "batch_size": 24,
        "model": "mlp",
        **fields,
    }
    given = {
        "density": 0.3,
        "controls": False,
        "inference": "gradient",
        "passes": 2,
        "inference_batch": 16,
        "basis_passes": 2,
        **fields,
    }
    return cls(cls.Config(**given), benchmark, seed), benchmark


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    method, benchmark = impresslearn()
    return method, benchmark, run(method, benchmark, RunConfig(), tmp_path_factory.mktemp("combinations"))


def other(learnt, **fields):
    """The same bank, asked otherwise."""
    method, benchmark = impresslearn(**fields)
    method.bank = learnt[0].bank
    method.model = learnt[0].model
    return method.eval(), benchmark


def test_what_is_found_is_what_predicts(learnt):
    method, benchmark, result = learnt
    report = result.method_report["gn"]
    assert list(report["tasks"]) == [f"task {i}" for i in range(5)]
    assert all(len(found) == 3 for found in report["tasks"].values())  # after the first gradient, and after each of two passes
    last = [report["tasks"][f"task {i}"][-1] for i in range(5)]
    assert last[:3] == [0, 1, 2]  # masks are found
    assert report["found"][-1] == 100 * sum(i == found for i, found in enumerate(last)) / 5
    assert result.task_inference["accuracy"] == report["found"][-1]
    assert result.acc == pytest.approx(report["accuracy"][-1])  # GNs: right is right, through whatever combination
    assert result.method_report["curves"]["combinations found"]["lines"]["found"] == [
        [k, v] for k, v in enumerate(report["found"])
    ]
    method.eval()
    for i in range(5):
        x = benchmark.test(i).tensors()[0]
        method.prepare(x, torch.arange(len(x)))
        inferred = method.predict(x, None)
        assert inferred.task.unique().tolist() == [method.found.task]
        torch.testing.assert_close(inferred.logits, method.predict(x, method.found.task).logits)


@pytest.mark.parametrize("rows", [None, 20])
@pytest.mark.parametrize("objective", ["entropy", "information"])
def test_exhaustive_search_takes_the_surest(objective, rows, learnt):
    method, benchmark = other(learnt, inference="exhaustive", inference_objective=objective, inference_rows=rows)
    x, doubts = benchmark.test(4).tensors()[0], []
    order = torch.randperm(len(x))
    for i in range(5):
        method.bank.activate(f"task {i}")
        logits = method.model(x[order[:rows]])
        own = method.bank[f"task {i}"].tensors["information"].item()
        doubts.append(entropy(logits).mean().item() if objective == "entropy" else information(logits).item() - own)
    method.bank.activate(None)
    assert method.find(x, order).tasks == [min(range(5), key=doubts.__getitem__)]


def test_how_sure_an_entry_is_of_its_own_rows(learnt):
    """Of all training rows, as there are fewer than are looked at."""
    method, benchmark, _ = learnt
    for i in (0, 4):
        method.bank.activate(f"task {i}")
        logits = method.model(benchmark.task(i).train.tensors()[0])
        assert method.bank[f"task {i}"].tensors["information"].item() == pytest.approx(information(logits).item(), abs=1e-5)
    method.bank.activate(None)


@pytest.mark.parametrize("candidates", ["all", "new"])
def test_a_step_superposes_the_masks_whatever_the_number_of_combinations(learnt, candidates, monkeypatch):
    method, benchmark = other(learnt, candidates=candidates)
    assert method.known() == ([0, 1, 2, 3, 4] if candidates == "all" else [3, 4])
    asked, superpose = [], method.bank.superpose
    monkeypatch.setattr(
        method.bank, "superpose", lambda alphas, over: asked.append((alphas.shape, len(over))) or superpose(alphas, over=over)
    )
    x = benchmark.test(3).tensors()[0]  # 64 rows
    found = method.find(x, torch.arange(len(x)))
    assert asked == [((3, 3), 3)] * 8  # three layers, three masks; 64 rows by 16, twice
    assert found.tasks[-1] in method.known()
    assert method.bank.is_live


def test_gradient_is_that_of_the_uncollapsed_network_in_float64(learnt):
    """To beta of five weighed sums, masks unpacked, in float64, against one superposition in float32."""
    method, benchmark = other(learnt, inference_objective="entropy")
    bank, x = method.bank, benchmark.test(3).tensors()[0]
    candidates = method.coefficients_of(method.known())
    assert candidates.shape == (5, 3, 3)
    assert torch.equal(candidates[1], torch.eye(3)[1].expand(3, 3))  # a basis task is its mask
    beta = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25], dtype=torch.float64, requires_grad=True)
    weights = []
    for j, name in enumerate(bank.names):
        dense = bank.export(name).double()
        parts = [m.weight for m in dense.modules() if hasattr(m, "weight")]
        weights = [w + beta[j] * p.detach() for w, p in zip(weights, parts)] if weights else [beta[j] * p.detach() for p in parts]
    h = x.double()
    for k, w in enumerate(weights):
        h = h @ w.T
        h = h.relu() if k < len(weights) - 1 else h
    (expected,) = torch.autograd.grad(entropy(h).mean(), beta)
    grad = method.unlabelled_gradient(torch.einsum("j,jlk->lk", beta.detach().float(), candidates), bank.masks, x)
    torch.testing.assert_close(torch.einsum("lk,jlk->j", grad, candidates).double(), expected, rtol=1e-4, atol=1e-6)
    bank.activate(None)


def test_candidates_are_made_alike(learnt):
    method, _ = other(learnt)
    alike = method.alike(method.coefficients_of(method.known()))
    overlap = torch.stack(list(method.bank.overlap().values())).to(alike)
    sizes = torch.einsum("jlk,lkm,jlm->jl", alike, overlap, alike).sqrt()
    torch.testing.assert_close(sizes, sizes[:1].expand_as(sizes))


def test_a_basis_task_without_its_mask(learnt):
    method, benchmark, result = learnt
    report = result.method_report["basis_gn"]
    assert list(report["combination"]) == list(report["own_mask"]) == ["task 0", "task 1", "task 2"]
    assert all(len(passes) == 2 for passes in report["combination"].values())
    assert report["combination_mean"][-1] >= report["own_mask_mean"] - 0.5
    assert report["combination_mean"][0] == pytest.approx(sum(p[0] for p in report["combination"].values()) / 3)
    assert report["own_mask_mean"] >= 90
    x = benchmark.test(1).tensors()[0]
    first, second = method.eval().descend(x, torch.arange(len(x)))
    assert first.shape == (3, 3)

    def doubt(alphas):
        with torch.no_grad():
            method.bank.superpose(alphas, over=method.bank.masks)
            return information(method.model(x))

    assert doubt(second) <= doubt(first) < doubt(torch.full((3, 3), 1 / 3))  # it goes down
    method.bank.activate(None)


def test_a_descent_starts_at_the_surest_mask_or_at_equal_ones(learnt):
    method, benchmark = other(learnt)
    x = benchmark.test(1).tensors()[0]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    start = method.descent_start(x, order)
    rows = order[: method.config.inference_rows]
    surest = min(range(3), key=lambda k: method.doubt(x, rows, method.basis[k]))
    assert method.basis[surest] == "task 1"
    assert start.tolist() == [0.5 if k == surest else 0.25 for k in range(3)]
    equal, _ = other(learnt, basis_start="equal")
    assert torch.equal(equal.descent_start(x, order), torch.full((3,), 1 / 3))


@pytest.mark.parametrize("fields", [{"basis_step": "sgd"}, {"basis_step": "rmsprop", "basis_step_lr": 0.01}])
def test_other_steps_without_a_mask_go_down_too(learnt, fields):
    method, benchmark = other(learnt, basis_start="equal", **fields)
    x = benchmark.test(2).tensors()[0]
    assert method.first_choice(x, torch.arange(len(x))) == 2
    after = method.descend(x, torch.arange(len(x)))
    with torch.no_grad():
        seen = []
        for alphas in (torch.full((3, 3), 1 / 3), *after):
            method.bank.superpose(alphas, over=method.bank.masks)
            seen.append(information(method.model(x)).item())
    method.bank.activate(None)
    assert seen[2] < seen[1] < seen[0]


def test_a_finished_run_is_searched_again(tmp_path):
    method = METHODS["impresslearn"]
    assert set(method.evaluation) <= {f.name for f in dataclasses.fields(method.Config)}
    assert not set(method.evaluation) & set(reevaluate.STREAM)
    small = ["--tasks", "3", "--basis", "2", "--basis-epochs", "1", "--iterations", "5", "--model", "mlp", "--controls", "false"]
    argv = ["train", "impresslearn", "--benchmark", "permuted-mnist-mini", *small, "--eval-images", "100", "--out", str(tmp_path)]
    assert main(argv) == 0
    folder = tmp_path / "seed-1"
    assert "gn" not in read_result(folder / "result.json").method_report
    changes = {"scenario": "GNs", "inference": "gradient", "passes": 1, "basis_passes": 1}
    found = reevaluate.evaluate_run(folder, changes, None, torch.device("cpu"))
    assert found["method_report"]["gn"]["found"][-1] == found["task_inference"]["accuracy"]
    assert found["acc"] == pytest.approx(found["method_report"]["gn"]["accuracy"][-1])
    assert len(found["method_report"]["basis_gn"]["combination_mean"]) == 1
    tried = reevaluate.evaluate_run(folder, {"scenario": "GNs", "inference": "exhaustive"}, None, torch.device("cpu"))
    assert all(len(tasks) == 1 for tasks in tried["method_report"]["gn"]["tasks"].values())


def test_not_learnt_and_given(tmp_path):
    method, benchmark = impresslearn(candidates="new")
    x = benchmark.test(0).tensors()[0]
    method.bank.commit("task 0")
    method.prepare(x, torch.arange(len(x)))
    assert method.found is None  # a mask is no candidate among the new tasks
    assert "gn" not in impresslearn(scenario="GG")[0].final_report()


def test_resumes_to_the_same_bits(tmp_path):
    short = {"basis_epochs": 2, "epochs": 2, "tasks": 5, "alpha_init": "previous", "passes": 1}
    method, benchmark = impresslearn(**short)
    whole = method, run(method, benchmark, RunConfig(), tmp_path / "whole")
    assert_same_run(whole, broken_run(lambda: impresslearn(**short), tmp_path / "broken", [10, 3]))
    for i in (3, 4):
        assert method.bank[f"task {i}"].alphas.shape == (3, 3)


def test_alpha_follows_from_the_task_before(tmp_path):
    method, benchmark = impresslearn(
        scenario="GG", stream=Contrary, basis=2, alpha_init="previous", basis_epochs=1, epochs=1, controls=True, own_mask_every=2
    )
    starts, begin = {}, method.begin_alphas

    def look(task, over):
        begin(task, over)
        starts[task.index] = method.alphas.detach().clone()

    method.begin_alphas = look
    report = run(method, benchmark, RunConfig(), tmp_path).method_report
    assert torch.equal(starts[2], torch.full((3, 2), 0.5))
    for i in (3, 4):
        assert torch.equal(starts[i], method.bank[f"task {i - 1}"].alphas)
    assert list(report["own_mask"]) == ["task 2", "task 4"]
    assert report["fixed_combination"]["task 2"] == report["combination"]["task 2"]
    assert set(report["fixed_mask"]) == {"task 2", "task 3", "task 4"}
    lines = report["curves"]["new tasks"]["lines"]
    assert lines["own mask"] == [[2, report["own_mask"]["task 2"]], [4, report["own_mask"]["task 4"]]]


def test_curves_of_seeds_are_drawn_as_means(learnt):
    result = learnt[2]
    curve = {"x": "angle", "y": "%", "lines": {"a": [[1, 10.0], [2, 20.0]], "b": [[1, 0.0]]}}
    second = {**curve, "lines": {"a": [[1, 30.0], [3, 5.0]]}}
    results = [dataclasses.replace(result, method_report={"curves": {"drift": c}}) for c in (curve, second)]
    found = entry(Cell("shuffled/row", "Row"), "sound", results, "done", None, None)
    assert curves_of("curve", "drift", [found]) == {"Row: a": [(1, 20.0), (2, 20.0), (3, 5.0)], "Row: b": [(1, 0.0)]}
    assert curves_of("curve", "none", [found]) == {}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"passes": -1}, "passes must not be negative"),
        ({"inference_lr": 0.0}, "inference_lr must be positive"),
        ({"inference_rows": 0}, "inference_rows must be at least 1"),
        ({"inference_batch": 1}, "inference_batch must be at least 2"),
        ({"own_mask_every": 0}, "own_mask_every must be at least 1"),
        ({"scenario": "NNs"}, "serves scenario GG and GNs and GNu, not NNs"),
    ],
)
def test_bad_settings(fields, words):
    with pytest.raises(Refusal, match=words):
        impresslearn(**fields)
