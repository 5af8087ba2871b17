"""SupSup without any task id: masks are allocated, left, taken up again and merged; and a run that is killed ends with the same bits."""

import math
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from streams import assert_same_run, broken_run, view

import subnet_kernels as sk
from subnet_pipelines import METHODS, Clock, Interrupted, NotLearnt, Refusal, RunConfig, run
from subnet_pipelines.benchmarks.base import Batch, Benchmark, BenchmarkConfig
from subnet_pipelines.chance import stream
from subnet_pipelines.methods.nns import NNs

VISITS = [0, 1, 0, 2, 1]


class Patterns(Benchmark):
    """Noisy pictures of four patterns of 64 bright and dark inputs; task i has the inputs in an order of its own."""

    name = "patterns"
    classes = 4
    input_shape = (64,)

    def __init__(self, config: BenchmarkConfig, seed: int = 1):
        super().__init__(config, seed, torch.device("cpu"), self.draw(256, "train"), self.draw(64, "test"))

    def draw(self, count, purpose):
        y = torch.arange(count) % 4
        patterns = torch.randint(0, 2, (4, 64), generator=stream(0, "patterns"), dtype=torch.uint8) * 135
        return patterns[y] + torch.randint(0, 120, (count, 64), generator=stream(0, purpose), dtype=torch.uint8), y

    def view(self, i):
        order = torch.randperm(64, generator=stream(self.seed, "order of inputs", i))
        return lambda x: (2 * view(x))[:, order]


def nns(visits=VISITS, seed=1, uneven=None, **fields):
    config = BenchmarkConfig(tasks=max(visits) + 1, val_fraction=0.0, scenario="NNs", visits=list(visits), uneven=uneven)
    fields = {"iterations": 60, "batch_size": 32, "lr": 5e-3, "outputs": 40, "model": "mlp", "check_every": 20, **fields}
    fields = {"threshold": 1.16, **fields}
    benchmark = Patterns(config, seed)
    return NNs(NNs.Config(**fields), benchmark, seed), benchmark


def bits(method):
    return {name: method.bank.bits(name) for name in method.bank.masks}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(autouse=True, scope="module")
def _quick():
    """One thread, as the networks are tiny, and no plots."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("subnet_pipelines.report.draw", lambda results, folder: [])
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    method, benchmark = nns()
    out = tmp_path_factory.mktemp("nns") / "run"
    left, taken = [], []
    leave, take = method.leave, method.take

    def note_leave():
        number = method.current
        if number is not None:
            left.append((number, method.scores()))
        leave()

    def note_take(number, opt):
        before = method.current
        take(number, opt)
        if number != before:
            taken.append((number, method.scores()))
            assert not opt.state

    method.leave, method.take = note_leave, note_take
    weights = [layer.weight.clone() for layer in method.bank.layers()]
    result = run(method, benchmark, RunConfig(), out)
    assert all(torch.equal(layer.weight, w) for layer, w in zip(method.bank.layers(), weights))
    return method, benchmark, result, left, taken


def test_a_stream_gets_a_mask_a_task_and_knows_those_that_come_back(learnt):
    _, _, result, *_ = learnt
    report = result.method_report
    assert report["allocated"] == 3
    assert report["mapping"] == {"mask 0": 0, "mask 1": 1, "mask 2": 2}
    assert report["purity"] == 100
    assert (report["switches"], report["switches_seen"], report["changes_of_mask"]) == (4, 4, 2)
    assert (report["returns"], report["returns_recognised"]) == (2, 100)
    assert (report["skipped_batches"], report["merged"]) == (0, 0)
    assert min(result.final) >= 90
    assert result.task_inference["unit"] == "row"
    assert result.task_inference["accuracy"] >= 90
    assert [sum(v is not None for v in row) for row in result.accuracy_matrix] == [1, 2, 3]


def test_scores_are_left_in_a_file_and_come_back_from_it(learnt):
    method, _, _, left, taken = learnt
    assert [number for number, _ in left] == [0, 1, 0, 2]
    assert [number for number, _ in taken] == [0, 1]
    for (_, before), (_, after) in ((left[0], taken[0]), (left[1], taken[1])):
        assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert any(not torch.equal(a, b) for a, b in zip(taken[0][1], left[2][1]))  # and go on learning
    files = load_file(method.folder() / method.files[2])
    assert same(files, dict(zip(method.bank.layer_names, left[3][1])))
    for number, scores in left[2:]:  # what the bank has are the bits of those scores
        expected = dict(zip(method.bank.layer_names, sk.threshold(scores, 0.0)))
        assert same(method.bank.bits(f"mask {number}"), expected)
    assert not any(method.bank[name].scores for name in method.bank.names)


def test_rows_go_through_the_mask_they_find(learnt):
    method, benchmark, *_ = learnt
    x, _ = benchmark.test(2).tensors()
    logits, tasks = method.predict(x, None)
    found = method.infer(x)
    for place in found.unique().tolist():
        with method.bank.as_task(method.bank.masks[place]):
            torch.testing.assert_close(logits[found == place], method.model(x)[found == place], rtol=1e-5, atol=1e-5)
        assert (tasks[found == place] == [0, 1, 2][place]).all()


def test_what_is_learnt_does_not_depend_on_the_accounts(learnt, tmp_path):
    method, benchmark = nns()
    step = method.step

    def blind(batch, opt, clock):
        assert batch.t is None
        assert clock.task is None
        return step(batch, opt, Clock(visit=3))

    method.step = blind
    run(method, benchmark, RunConfig(), tmp_path)
    for name, found in bits(method).items():
        assert same(found, learnt[0].bank.bits(name))


def test_a_new_mask_begins_as_the_candidate_that_it_was(tmp_path):
    method, benchmark = nns([0])
    run(method, benchmark, RunConfig(), tmp_path)
    live, kept = method.scores(), bits(method)
    with method.filled_up():
        assert method.bank.masks == [f"mask {i}" for i in range(5)]
        candidates = bits(method)
    assert all(torch.equal(a, b) for a, b in zip(method.scores(), live))
    assert method.bank.masks == ["mask 0"]
    assert same(bits(method)["mask 0"], kept["mask 0"])
    method.allocate(torch.optim.SGD(method.model.parameters()))
    method.keep()
    assert same(bits(method)["mask 1"], candidates["mask 1"])
    assert not same(bits(method)["mask 1"], candidates["mask 2"])


def looking(grad, margin=None, learning=2, masks=3, **fields):
    """A method with some masks, one of them learning, after a look that found this gradient; margin: that of the look before."""
    method, benchmark = nns(**fields)
    opt = torch.optim.SGD([layer.scores for layer in method.bank.layers()], 0.1)
    method.leave = lambda: None  # without a folder
    for _ in range(masks):
        method.allocate(opt)
        method.keep()
    x, y = benchmark.task(0).train.tensors()
    method.read, method.files = lambda number: method.scores(), dict.fromkeys(range(masks), "")
    method.candidate_gradient = lambda x: torch.tensor(grad)
    method.current, method.margin = learning, margin
    method.look(Batch(x[:32], y[:32], None), opt)
    return method


def test_an_untrained_mask_that_stands_out_is_no_answer():
    assert looking([0.0, 0.0, 0.0, 0.0, -1.0]).masks == [0, 1, 2, 3]
    assert looking([0.0, -1.0, 0.0, 0.0, 0.0]).current == 1


@pytest.mark.parametrize(
    ("drop", "margin", "learning", "expected"),
    [
        (0.5, 0.6, 1, "new"),
        (0.5, 0.4, 1, "known"),
        (0.5, None, 1, "known"),
        (None, 9.0, 1, "known"),
        (0.5, 9.0, 0, "known"),  # another mask than the one that learns: a task that comes back
    ],
)
def test_a_drop(drop, margin, learning, expected):
    """The gradient prefers mask 1, whose n p - 1 is .26."""
    method = looking([0.0, -0.3, 0.0, 0.0, 0.0], drop=drop, margin=margin, learning=learning)
    assert (method.masks, method.current) == (([0, 1, 2, 3], 3) if expected == "new" else ([0, 1, 2], 1))
    assert method.margin == (None if expected == "new" else pytest.approx(5 * math.exp(0.3) / (4 + math.exp(0.3)) - 1, rel=1e-5))


@pytest.mark.parametrize(
    ("threshold", "learning", "expected"),
    [(1.3, 0, "new"), (1.2, 0, "known"), (None, 0, "known"), (1.3, 1, "known")],  # the last one learns already
)
def test_a_return_is_asked_for_more(threshold, learning, expected):
    """The gradient prefers mask 1, whose n p is 1.26."""
    method = looking([0.0, -0.3, 0.0, 0.0, 0.0], return_threshold=threshold, learning=learning)
    assert (method.masks, method.current) == (([0, 1, 2, 3], 3) if expected == "new" else ([0, 1, 2], 1))


@pytest.mark.parametrize(("fields", "current", "skipping"), [({}, 2, True), ({"when_spent": "reuse"}, 1, False)])
@pytest.mark.parametrize("grad", [[0.0, -0.01, 0.0, -0.02, 0.0], [0.0, -0.01, 0.0, -5.0, 0.0]], ids=["new", "untrained"])
def test_a_spent_budget(grad, fields, current, skipping):
    method = looking(grad, budget=3, **fields)
    assert method.masks == [0, 1, 2]
    assert (method.current, method.skipping) == (current, skipping)


def test_batches_are_skipped_until_a_known_task_comes(tmp_path):
    method, benchmark = nns([0, 1, 0], budget=1)
    result = run(method, benchmark, RunConfig(), tmp_path)
    skipped = result.method_report["skipped_batches"]
    assert result.method_report["allocated"] == 1
    assert skipped == 60
    assert result.method_report["purity"] == 100
    assert result.method_report["returns_recognised"] == 100
    assert result.final[0] >= 90


def test_a_spent_budget_reused(tmp_path):
    method, benchmark = nns([0, 1], budget=1, when_spent="reuse")
    result = run(method, benchmark, RunConfig(), tmp_path)
    assert (result.method_report["allocated"], result.method_report["skipped_batches"]) == (1, 0)
    assert result.method_report["purity"] == 50
    assert result.final[1] >= 90


def test_a_new_mask_has_its_grace():
    method, benchmark = nns([0], check_every=5, grace=17)
    looks, look = [], method.look
    method.look = lambda *args: (looks.append(sum(method.trained.get(0, {}).values())), look(*args))
    x, y = benchmark.task(0).train.tensors()
    opt = method.optimizer()
    for _ in range(40):
        method.step(Batch(x[:32], y[:32], None), opt, Clock(visit=0))
    assert looks[:3] == [0, 17, 22]


# ---- masks that turn out to be one task's ---------------------------------------------------------------------------

HASTY = {"visits": [0, 1], "lr": 1e-3, "threshold": 1.125}  # a mask is not known again after the 20 batches that it gets


def test_two_masks_of_a_task_are_merged(tmp_path):
    method, benchmark = nns(**HASTY)
    apart = run(method, benchmark, RunConfig(), tmp_path / "apart").method_report
    assert apart["mapping"] == {"mask 0": 0, "mask 1": 0, "mask 2": 1}
    method, benchmark = nns(**HASTY, merge=0.8)
    result = run(method, benchmark, RunConfig(), tmp_path / "merged")
    report = result.method_report
    assert report["merged"] == 1
    assert report["allocated"] == 2
    assert sorted(report["mapping"].values()) == [0, 1]
    assert report["purity"] == 100
    assert method.bank.masks == list(report["mapping"])
    assert min(result.final) >= 90


def test_masks_of_different_tasks_are_not_merged(learnt, tmp_path):
    method, benchmark = nns(merge=0.8)
    result = run(method, benchmark, RunConfig(), tmp_path)
    assert result.method_report == learnt[2].method_report
    for name, found in bits(method).items():
        assert same(found, learnt[0].bank.bits(name))


@pytest.mark.parametrize("current", [0, 1])
def test_the_better_of_two_stays(current, monkeypatch):
    """Two masks that agree in every row, the second one with less loss: whichever is live, that one goes on."""
    method, benchmark = nns(merge=1.0)
    opt = torch.optim.SGD([layer.scores for layer in method.bank.layers()], 0.1)
    method.leave = lambda: None
    for _ in range(2):
        method.allocate(opt)
        method.keep()
    method.trained, method.current, method.files = {0: {0: 5, 1: 7}, 1: {0: 2}}, current, {1 - current: ""}
    method.read = lambda number: method.scores()
    x, y = benchmark.task(0).train.tensors()
    logits = {f"mask {i}": torch.nn.functional.one_hot(y, 40).float() * (1 + i) for i in range(2)}
    monkeypatch.setattr(method.model, "forward", lambda x: logits[method.bank.active])
    method.candidate_gradient = lambda x: torch.tensor([-1.0, -0.5, 0.0, 0.0, 0.0])
    method.look(Batch(x, y, None), opt)
    assert (method.masks, method.current, method.bank.masks) == ([1], 1, ["mask 1"])
    assert method.trained == {0: {1: 12}, 1: {1: 2}}
    assert method.files == {}


# ---- stopped and gone on with ---------------------------------------------------------------------------------------

MANY = {"check_every": 6, "grace": 20, "uneven": 0.3, "threshold": 1.3, "drop": 0.5}  # looks and borders at odd places


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    method, benchmark = nns(**MANY)
    result = run(method, benchmark, RunConfig(), tmp_path_factory.mktemp("whole"))
    assert list(result.method_report["mapping"].values()) == [0, 0, 1, 2]  # one was looked at before it knew enough
    assert result.method_report["changes_of_mask"] == 2
    assert result.method_report["returns_recognised"] == 100
    assert 95 < result.method_report["purity"] < 100
    assert min(result.final) >= 90
    return method, result


@pytest.mark.parametrize("stops", [[3], [33, 61, 30], [140, 1, 1, 55], [230]])
def test_resumes_to_the_same_bits(stops, unbroken, tmp_path):
    assert_same_run(unbroken, broken_run(lambda: nns(**MANY), tmp_path, stops))


def killed(out, at):
    """A run that dies after step `at`, with a checkpoint after each of the last steps."""
    with pytest.raises(Interrupted):
        run(*stopping(at - 4, lambda: os.kill(os.getpid(), signal.SIGTERM)), RunConfig(), out)

    def die():
        raise OSError("the machine died")

    method, benchmark = stopping(5, die)
    with pytest.raises(OSError, match="died"):
        run(method, benchmark, RunConfig(), out, resume=True, save_every=0)
    return method


def stopping(at, stop):
    """A method that calls `stop` before its step of that number, and its benchmark."""
    method, benchmark = nns(**MANY)
    step, made = method.step, []

    def counted(*args):
        made.append(1)
        if len(made) == at:
            stop()
        return step(*args)

    method.step = counted
    return method, benchmark


@pytest.fixture(scope="module")
def returned(unbroken, tmp_path_factory):
    """The step at which the first mask is taken up again."""
    method, benchmark = nns(**MANY)
    step, take, made, found = method.step, method.take, [], []

    def counted(*args):
        made.append(1)
        return step(*args)

    def noted(number, opt):
        if number != method.current:
            found.append(len(made))
        take(number, opt)

    method.step, method.take = counted, noted
    run(method, benchmark, RunConfig(), tmp_path_factory.mktemp("counted"))
    return found[0]


@pytest.mark.parametrize("later", [-1, 0, 1, 2, 9])
@pytest.mark.parametrize("torn", [False, True])
def test_a_killed_run_finds_the_scores_its_checkpoint_had(later, torn, returned, unbroken, tmp_path):
    """Around the step at which a mask is left and another one's scores come from their file; torn: the last checkpoint is not whole."""
    killed(tmp_path, returned + later)
    newest = max(path for path in (tmp_path / "checkpoint").iterdir() if path.name.isdigit())
    if torn:
        (newest / "facts.json").write_bytes((newest / "facts.json").read_bytes()[:-20])
    method, benchmark = nns(**MANY)
    assert_same_run(unbroken, (method, run(method, benchmark, RunConfig(), tmp_path, resume=True)))


def test_files_that_no_checkpoint_needs_are_deleted(returned, tmp_path):
    method = killed(tmp_path, returned + 3)
    assert {path.name for path in (tmp_path / "scores").iterdir()} == set(method.files.values())
    assert len(method.files) == len(method.masks) - 1
    entries = {path.name for path in (tmp_path / "bank").glob("*.safetensors")}
    assert entries == {method.bank[name].saved.name for name in method.bank.names}


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"torn"), lambda path: path.unlink()], ids=["torn", "gone"])
def test_lost_scores_are_named(damage, returned, tmp_path):
    number, name = next(iter(killed(tmp_path, returned + 2).files.items()))
    damage(tmp_path / "scores" / name)
    with pytest.raises(Refusal, match=rf"scores/{name}: must hold the scores of mask {number} and cannot be read"):
        run(*nns(**MANY), RunConfig(), tmp_path, resume=True)


# ---- settings -------------------------------------------------------------------------------------------------------


def test_it_promises_no_more_than_it_can():
    assert not NNs.forget_free
    assert not NNs.static_step
    with pytest.raises(NotLearnt):
        nns()[0].predict(torch.zeros(1, 64), None)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"check_every": 0}, "check_every must be at least 1, got 0"),
        ({"grace": -1}, "grace must not be negative"),
        ({"threshold": 1.0}, "threshold must exceed 1"),
        ({"return_threshold": 1.0}, "return_threshold must exceed 1"),
        ({"drop": 1.0}, r"drop must be in \(0, 1\)"),
        ({"candidates": 1}, "candidates must be at least 2"),
        ({"budget": 0}, "budget must be at least 1"),
        ({"merge": 0.0}, r"merge must be in \(0, 1\]"),
        ({"merge": 1.5}, r"merge must be in \(0, 1\]"),
        ({"check_objective": "G", "objective": "H", "outputs": None}, "outputs must exceed the 4 classes"),
    ],
)
def test_bad_settings(fields, words):
    with pytest.raises(Refusal, match=words):
        nns(**fields)


@pytest.mark.parametrize(
    ("method", "scenario", "other"), [("supsup", "NNs", "nns"), ("nns", "GG", "supsup"), ("nns", "GNu", "supsup")]
)
def test_who_serves_a_scenario(method, scenario, other):
    benchmark = Patterns(BenchmarkConfig(scenario=scenario))
    with pytest.raises(Refusal, match=f"not {scenario} of patterns; for {scenario} train {other}$"):
        METHODS[method](METHODS[method].Config(), benchmark, 1)
