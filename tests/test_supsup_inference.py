"""SupSup without a task id: every rule and unit, batch norms of tasks, how sure it is, and a finished run measured again."""

import dataclasses
import json

import pytest
import torch
from streams import Shuffled
from test_supsup import Images, learnt, supsup, with_fields  # noqa: F401  (a fixture)

import subnet_kernels as sk
from subnet_pipelines import BENCHMARKS, METHODS, Refusal, RunConfig, calibration, reevaluate, run
from subnet_pipelines.cli import main
from subnet_pipelines.inference import entropy
from subnet_pipelines.models import batch_norms, batch_statistics
from subnet_pipelines.report import read_result


def found(learnt, j, **fields):  # noqa: F811
    method, benchmark = with_fields(learnt, **fields)
    x, _ = benchmark.test(j).tensors()
    return method.predict(x, None).task


# ---- rules and units ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("j", range(3))
def test_exhaustive_takes_the_mask_of_least_entropy(learnt, j):  # noqa: F811
    method, benchmark = with_fields(learnt, inference="exhaustive")
    x, _ = benchmark.test(j).tensors()
    tried = torch.stack([entropy(method.predict(x, k).logits) for k in range(3)], 1)
    tasks = found(learnt, j, inference="exhaustive")
    assert torch.equal(tasks, tried.argmin(1))
    assert (tasks == j).float().mean() >= 0.9
    units = found(learnt, j, inference="exhaustive", inference_unit="n", unit_rows=16, deciding_rows=4)
    assert units.view(4, 16).tolist() == [[k] * 16 for k in tried.view(4, 16, 3)[:, :4].mean(1).argmin(1).tolist()]


@pytest.mark.parametrize("objective", ["G", "H"])
def test_every_row_halves_its_own_candidates(learnt, objective):  # noqa: F811
    """Rows of the same candidates run together, and decide as each does alone."""
    method, benchmark = with_fields(learnt, inference="binary", objective=objective)
    x = torch.cat([benchmark.test(j).tensors()[0][:20] for j in (2, 0, 1)])
    tasks = method.infer(x)
    assert torch.equal(tasks, torch.stack([method.binary(row) for row in x.split(1)]))
    assert (tasks == torch.tensor([2, 0, 1]).repeat_interleave(20)).float().mean() >= 0.8


# ---- batch norms ----------------------------------------------------------------------------------------------------


class Turned(Images):
    """Pictures whose colours and brightness say whose they are."""

    name = "turned"

    def view(self, i):
        shared = super().view(i)
        return lambda x: shared(x).roll(i, 1) * (1 + i)

    task, test = Shuffled.task, Shuffled.test


@pytest.fixture(scope="module")
def normed(tmp_path_factory):
    fields = {"model": "gem-resnet-18", "width": 0.1, "outputs": 8, "iterations": 3, "batch_size": 16, "mask": "topk"}
    method, benchmark = supsup(Turned, **fields, lr=1e-2, optimizer="adam")
    result = run(method, benchmark, RunConfig(eval_rows="last"), tmp_path_factory.mktemp("normed"))
    return method, benchmark, result


def by_hand(method, x, norms, objective):
    """Gradients to equal alphas, of a network of plain layers: weights are superposed, norms have these statistics or the batch's."""
    net = METHODS["supsup"](method.config, method.benchmark, method.seed).model.eval()
    masks = [[sk.unpack(bits, layer.weight.shape) for bits, layer in zip(method.bank.bits(name).values(), method.bank.layers())]
             for name in method.bank.masks]  # fmt: skip
    alphas = torch.full((len(masks),), 1 / len(masks), requires_grad=True)
    for i, norm in enumerate(batch_norms(net)):
        norm.training = norms is None
        if norms is not None:
            norm.running_mean, norm.running_var = norms[i]
    weights = {f"{name}.weight": layer.weight.detach() * sum(a * mask[i] for a, mask in zip(alphas, masks))
               for i, (name, layer) in enumerate(zip(method.bank.layer_names, method.bank.layers()))}  # fmt: skip
    dense = sk.MaskBank(net)
    for layer in dense.layers():
        layer.uninstall()
    logits = torch.func.functional_call(net, weights, (x,))
    return torch.autograd.grad(objective(logits).mean(), alphas)[0]


def statistics(method, names):
    """Mean running statistics of each norm over some tasks."""
    states = [method.bank[name].state for name in names]
    keys = [key for key in states[0] if key.endswith(("running_mean", "running_var"))]
    means = [torch.stack([state[key] for state in states]).mean(0) for key in keys]
    return list(zip(means[::2], means[1::2]))


def test_rows_norm_by_the_candidates_mean_statistics(normed):
    method, benchmark, _ = normed
    method.eval()
    x = benchmark.test(1).tensors()[0][:3]
    rows = method.bank.row_alpha_grad(x, method.objective)
    mean = statistics(method, method.bank.masks)
    for b in range(3):
        torch.testing.assert_close(rows[b], by_hand(method, x[b : b + 1], mean, method.objective), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(method.gradient(x[b : b + 1], None), rows[b], rtol=1e-3, atol=1e-5)
    last = by_hand(method, x[:1], statistics(method, method.bank.masks[-1:]), method.objective)
    assert not torch.allclose(rows[0], last, rtol=0.05)  # the authors' trap: a network left with the last task's statistics
    torch.testing.assert_close(method.bank.row_alpha_grad(x.flip(0), method.objective).flip(0), rows)  # and rows alone decide
    some = method.bank.masks[1:]
    torch.testing.assert_close(
        method.row_gradients(x, torch.tensor([[False, True, True]] * 3))[:, 1:],
        method.bank.row_alpha_grad(x, method.objective, over=some),
    )


def test_units_norm_by_their_own_statistics(normed):
    method, benchmark, _ = normed
    method.eval()
    x = benchmark.test(0).tensors()[0][:6]
    method.bank.activate(None)
    before = {key: value.clone() for key, value in method.bank.model.state_dict().items()}
    torch.testing.assert_close(method.gradient(x, None), by_hand(method, x, None, method.objective), rtol=1e-3, atol=1e-5)
    method.bank.activate(None)
    assert all(torch.equal(value, before[key]) for key, value in method.bank.model.state_dict().items())


@pytest.mark.parametrize("fields", [{}, {"inference_unit": "batch"}, {"inference": "binary"}, {"inference": "exhaustive"}])
def test_answers_come_from_the_chosen_tasks_own_statistics(normed, fields):
    method, benchmark = with_fields(normed, **fields)
    method.eval()
    own = {k: method.bank.view(f"task {k}") for k in range(3)}
    for j in range(3):
        x = benchmark.test(j).tensors()[0][:16]
        logits, tasks = method.predict(x, None)
        expected = torch.stack([own[k](x[b : b + 1])[0] for b, k in enumerate(tasks.tolist())])
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
        given = method.predict(x, j).logits  # and nothing of inference is left in the model
        torch.testing.assert_close(given, own[j](x), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(own[0](x), own[2](x), rtol=0.1)


def test_batch_statistics_leave_no_trace():
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(3, affine=False), torch.nn.BatchNorm1d(3, track_running_stats=False)).eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    x = 5 + 2 * torch.randn(8, 3)
    with batch_statistics(batch_norms(net)):
        torch.testing.assert_close(net[0](x), (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt())
    torch.testing.assert_close(net[0](x), x, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not any(m.training for m in net)


# ---- how sure it is -------------------------------------------------------------------------------------------------


def test_auroc_is_the_chance_of_a_greater_score():
    own, others = torch.tensor([0.1, 0.5, 0.5, 0.9, 0.9]), torch.tensor([0.5, 0.2, 0.9])
    pairs = [(a > b) + 0.5 * (a == b) for a in own.tolist() for b in others.tolist()]
    assert calibration.auroc(own, others) == pytest.approx(sum(pairs) / len(pairs))
    assert calibration.auroc(torch.ones(4), torch.zeros(2)) == 1.0


def test_the_gap_is_a_share():
    grad = torch.tensor([[-3.0, 1.0, 0.0], [2.0, 2.0, 5.0], [0.0, 0.0, 0.0]])
    assert calibration.gap(grad).tolist() == [0.75, 0.0, 0.0]
    assert calibration.gap(grad[:, :1]).isnan().all()
    assert calibration.summary(calibration.gap(grad[:, :1]), torch.ones(1)) is None


def test_outsiders_are_compared_at_the_end_of_a_run(tmp_path):
    method, benchmark = supsup(outsiders="noise")
    report = run(method, benchmark, RunConfig(), tmp_path).method_report["outsiders"]
    assert (report["kind"], report["rows"], report["outside_rows"]) == ("noise", 3 * 64, 999)
    for score in ("confidence", "gap"):
        assert 0 <= report[score]["outsiders"]["mean"] < report[score]["own"]["mean"] <= 1
        assert 0.5 < report[score]["auroc"] <= 1
        assert list(report[score]["own"]["quantiles"].values()) == sorted(report[score]["own"]["quantiles"].values())
    assert "outsiders" not in method.report()


# ---- a finished run, measured again ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    argv = ["train", "supsup", "--benchmark", "permuted-mnist-mini", "--tasks", "2", "--iterations", "40", "--seeds", "1,2"]
    assert main([*argv, "--outputs", "30", "--eval-images", "200", "--model", "mlp", "--out", str(out)]) == 0
    return out


def evaluate(capsys, *argv):
    code = main(["evaluate", *map(str, argv)])
    return code, *capsys.readouterr()


def test_a_run_is_measured_again(finished, capsys):
    files = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    result = read_result(finished / "seed-1" / "result.json")
    code, out, err = evaluate(capsys, finished)
    assert (code, err, out.count("\n")) == (0, "", 2)
    code, out, err = evaluate(
        capsys,
        finished / "seed-1",
        "--objective",
        "H",
        "--inference-unit",
        "batch",
        "--deciding-rows",
        "1",
        "--outsiders",
        "noise",
    )
    assert (code, err) == (0, "")
    assert evaluate(capsys, finished / "seed-1", "--scenario", "GG", "--eval-images", "300")[0] == 0
    written = [json.loads(path.read_text()) for path in (finished / "seed-1").glob("evaluation-*.json")]
    same, given, other = sorted(written, key=lambda e: len(e["changed"]))
    assert (same["changed"], same["final"], same["task_inference"]) == ({}, result.final, result.task_inference)
    assert other["changed"] == {"objective": "H", "inference_unit": "batch", "deciding_rows": 1, "outsiders": "noise"}
    assert other["task_inference"]["unit"] == "batch"
    assert other["method_report"]["outsiders"]["kind"] == "noise"
    assert given["changed"] == {"scenario": "GG", "eval_images": 300}
    assert given["task_inference"] is None
    assert f"ACC {other['acc']:.2f} %" in out
    assert {path: path.read_bytes() for path in files} == files


def test_what_training_knows_is_refused(finished, capsys):
    folder = finished / "seed-1"
    for argv, words in (
        (["--lr", "1"], f"lr belongs to the training of {folder}: train again for another; evaluation has objective, inference"),
        (["--tasks", "1"], "tasks belongs to the training"),
        (["--scenario", "NNs"], "scenario must tell the task in training"),
        (["--inferense", "binary"], "--inferense is no flag of supsup on permuted-mnist-mini; did you mean --inference?"),
        (["--log-base", "1"], "log_base must be at least 2, got 1"),
        (["--objective", "M"], "objective must be one of G, H, got 'M'"),
    ):
        code, out, err = evaluate(capsys, folder, *argv)
        assert (code, out) == (2, "")
        assert words in err
    code, _, err = evaluate(capsys, finished.parent / "absent")
    assert (code, err.count("\n")) == (2, 1)
    assert "holds no finished run" in err
    assert evaluate(capsys)[0] == 2


def test_runs_of_other_methods_too(tmp_path, capsys):
    argv = ["train", "wsn", "--benchmark", "permuted-mnist-mini", "--tasks", "2", "--iterations", "5", "--eval-images", "100"]
    assert main([*argv, "--out", str(tmp_path / "run")]) == 0
    result = read_result(tmp_path / "run" / "seed-1" / "result.json")
    assert evaluate(capsys, tmp_path / "run")[0] == 0
    (path,) = (tmp_path / "run" / "seed-1").glob("evaluation-*.json")
    assert json.loads(path.read_text())["final"] == result.final
    assert "density belongs to the training" in evaluate(capsys, tmp_path / "run", "--density", ".3")[2]


def test_a_run_that_cannot_be_read(finished, tmp_path):
    (tmp_path / "result.json").write_bytes((finished / "seed-1" / "result.json").read_bytes())
    with pytest.raises(Refusal, match="has no checkpoint to read the network from"):
        reevaluate.evaluate_run(tmp_path, {}, None, torch.device("cpu"))


def test_fields_of_evaluation_make_no_other_network(learnt):  # noqa: F811
    """What may change at evaluation changes nothing that training leaves behind."""
    cls = METHODS["supsup"]
    assert set(cls.evaluation) <= {f.name for f in dataclasses.fields(cls.Config)}
    names = {f.name for f in dataclasses.fields(BENCHMARKS["permuted-mnist"].Config)} | {
        f.name for f in dataclasses.fields(RunConfig)
    }
    assert set(reevaluate.STREAM) <= names
    assert not set(cls.evaluation) & set(reevaluate.STREAM)
