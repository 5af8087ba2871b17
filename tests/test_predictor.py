"""Serving: whatever asks at once, each answer is the one that it has alone."""

import itertools
import os
import random
import threading
import time
from pathlib import Path

import pytest
import torch
from banks import images, learnt
from device import compiled_only, cpu_only, generator
from torch import nn

import subnet_kernels as sk
from subnet_kernels.predictor import entropy


def mlp(tasks=6, heads=False, train_weights=False, **config):
    """A network of linear layers with biases, its bank, and rows to ask about; heads: of 3, 4 or 5 outputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 5))
    settings = {"density": 0.4, "train_weights": train_weights, "per_task": ["4"] if heads else [], **config}
    bank = sk.MaskBank(sk.convert(model, sk.SubnetConfig(**settings)))
    for t in range(tasks):
        bank.begin(scores="init", per_task={"4": 3 + t % 3} if heads else None)
        with torch.no_grad():
            model[0].bias.normal_()
        bank.commit(f"task {t}")
    return model.eval(), bank, torch.randn(64, 20, generator=generator(2))


def alone(bank, x, name):
    """A row of an activated task, by itself."""
    with torch.no_grad(), bank.as_task(name):
        return bank.model(x)


@cpu_only
@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("train_weights", [False, True])
def test_a_row_has_the_bits_that_it_has_alone(heads, train_weights):
    _, bank, x = mlp(heads=heads, train_weights=train_weights)
    predictor = sk.Predictor(bank)
    names = [f"task {i % 6}" for i in range(len(x))]
    expected = [alone(bank, x[i : i + 1], name) for i, name in enumerate(names)]
    requests = [predictor.submit(x[i : i + 1], name) for i, name in enumerate(names)]  # all in one batch
    for i, request in enumerate(requests):
        answer = request.result()
        assert answer.tasks == [names[i]]
        assert torch.equal(answer.logits, expected[i])
        assert torch.equal(predictor(x[i : i + 1], names[i]).logits, expected[i])
    whole = predictor(x, names).logits
    assert whole.shape == (64, 5)
    for row, own in zip(whole, expected):
        width = own.shape[1]
        assert torch.equal(row[:width], own[0])
        assert bool((row[width:] == -torch.inf).all())
    assert not predictor._views  # nothing had to be materialised


def combined():
    _, bank, x = mlp()
    bank.commit("mix", alphas=torch.tensor([0.5, 0.5]), over=["task 1", "task 4"])
    return bank, x


def signed():
    _, bank, x = mlp(select="signed")
    return bank, x


def network():
    """Convolutions, and norms with statistics of each task."""
    _, bank, _ = learnt(3)
    return bank, images(12)


@pytest.mark.parametrize("made", [combined, signed, network])
def test_what_cannot_run_together_runs_a_task_at_a_time(made):
    bank, x = made()
    predictor = sk.Predictor(bank)
    names = [bank.names[(5 * i) % len(bank)] for i in range(len(x))]
    answer = predictor(x, names)
    for i, name in enumerate(names):
        expected = alone(bank, x[i : i + 1], name)
        torch.testing.assert_close(answer.logits[i : i + 1, : expected.shape[1]], expected, rtol=1e-5, atol=1e-5)
        own = bank.view(name)(x[i : i + 1])
        if predictor._biases(name) is None:
            assert torch.equal(predictor(x[i : i + 1], name).logits, own)
    assert predictor._views


@cpu_only
def test_a_task_is_inferred_as_the_bank_infers_it():
    _, bank, x = mlp()
    predictor = sk.Predictor(bank)
    expected = [bank.masks[k] for k in bank.row_alpha_grad(x, entropy).argmin(1).tolist()]
    assert len(set(expected)) > 1
    names = [None if i % 2 else f"task {i % 6}" for i in range(len(x))]
    answer = predictor(x, names)
    assert answer.tasks == [name or own for name, own in zip(names, expected)]
    assert predictor(x).tasks == expected
    for i in range(8):
        one = predictor(x[i : i + 1])
        assert one.tasks == [expected[i]]
        assert torch.equal(one.logits, alone(bank, x[i : i + 1], expected[i]))
    other = sk.Predictor(bank, objective=lambda y: -entropy(y))
    assert other(x).tasks != expected


def test_it_serves_what_the_bank_was():
    """Commits, learning and activation after it was made change no answer; nor does it change the bank."""
    model, bank, x = mlp(train_weights=True)
    predictor, before = sk.Predictor(bank), sk.Predictor(bank)(x, "task 2").logits
    bank.activate("task 5")
    bank.activate(None)
    with torch.no_grad():
        model[0].bias.fill_(9.0)
        model[0].scores.normal_()
    bank.commit("new")
    bank.remove("task 3")
    assert torch.equal(predictor(x, "task 2").logits, before)
    with pytest.raises(KeyError, match="'new' must be one of its 6 entries"):
        predictor.submit(x, "new")
    predictor(x, "task 3")
    bank.verify()
    assert bank.is_live
    assert all(layer.weight.requires_grad for layer in bank.layers())


def test_a_bad_request_hurts_nobody_else():
    _, bank, x = mlp()
    predictor = sk.Predictor(bank)
    good, bad, last = predictor.submit(x[:2], "task 1"), predictor.submit(torch.zeros(2, 19), "task 1"), predictor.submit(x[:1])
    assert good.result().logits.shape == (2, 5)
    with pytest.raises((RuntimeError, ValueError)):
        bad.result()
    with pytest.raises((RuntimeError, ValueError)):
        bad.result()
    assert last.result().logits.shape == (1, 5)
    for wrong, message in (
        ((x[0, 0], "task 1"), r"x must be rows \(B, \.\.\.\) with B >= 1, got \(\)"),
        ((x[:0], "task 1"), r"B >= 1, got \(0, 20\)"),
        (([1.0], "task 1"), r"B >= 1, got list"),
        ((x[:3], ["task 1", None]), r"a task, or None, for each of 3 rows, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            predictor.submit(*wrong)
    with pytest.raises(KeyError, match="'nobody' must be one of its 6 entries"):
        predictor(x[:1], ["nobody"])
    with pytest.raises(ValueError, match="must have a task to serve"):
        sk.Predictor(sk.MaskBank(sk.convert(nn.Linear(3, 2), sk.SubnetConfig())))


def test_views_keep_to_their_bytes():
    bank, x = network()
    sizes = {name: sum(t.nbytes for t in bank.view(name).state_dict().values()) for name in bank.names}
    room = sum(sizes.values()) - 1
    predictor = sk.Predictor(bank, view_bytes=room)
    for name, kept in (("task 0", 1), ("task 1", 2), ("task 0", 2), ("task 2", 2), ("task 0", 2)):
        predictor(x, name)
        assert len(predictor._views) == kept
        assert predictor._held_bytes == sum(size for _, size in predictor._views.values()) <= room
    assert list(predictor._views) == ["task 2", "task 0"]
    expected = predictor(x, "task 1").logits
    none = sk.Predictor(bank, view_bytes=0)
    assert torch.equal(none(x, "task 1").logits, expected)
    assert (len(none._views), none._held_bytes) == (0, 0)


def threads(count, work, seconds=60):
    """Run work(number) on some threads; whatever is raised in one is raised here."""
    errors, begin = [], threading.Barrier(count)

    def body(number):
        try:
            begin.wait()
            work(number)
        except BaseException as error:
            errors.append(error)

    running = [threading.Thread(target=body, args=(i,)) for i in range(count)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(seconds)
    assert not any(thread.is_alive() for thread in running)
    if errors:
        raise errors[0]


@cpu_only
def test_eight_threads_get_their_own_answers():
    """Mixed tasks, inferred ones and errors; requests one by one and many at a time."""
    _, bank, x = mlp(heads=True)
    predictor = sk.Predictor(bank, most_rows=5)
    names = [*bank.names, None]
    expected = {(i, name): predictor(x[i : i + 1], name) for i in range(len(x)) for name in names}

    def work(number):
        chance = generator(100 + number)
        for step in range(40):
            asked = [(i, names[k]) for i, k in torch.randint(0, 7, (3, 2), generator=chance).tolist()]
            asked = [(9 * i, name) for i, name in asked]
            requests = [predictor.submit(x[i : i + 1], name) for i, name in asked]
            if step % 10 == 9:
                with pytest.raises((RuntimeError, ValueError)):
                    predictor(torch.zeros(1, 7), "task 0")
            for request, key in zip(requests, asked):
                found = request.result()
                assert found.tasks == expected[key].tasks
                assert torch.equal(found.logits, expected[key].logits)

    threads(8, work)
    assert not predictor._queue
    assert not predictor._busy


def resident():
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@cpu_only
@compiled_only
@pytest.mark.parametrize("requests", [300, pytest.param(10_000, marks=pytest.mark.long)])
def test_eight_threads_over_64_tasks(requests):
    """LeNet-300-100: each thread asks in turns one by one and some at once; every answer is compared bit for bit with the model's own on
    that row with that task active. From a fifth of the requests on memory is flat."""
    torch.manual_seed(0)
    sizes = (784, 300, 100, 100)
    layers = [layer for i, o in itertools.pairwise(sizes) for layer in (nn.Linear(i, o, bias=False), nn.ReLU())][:-1]
    bank = sk.MaskBank(sk.convert(nn.Sequential(*layers), sk.SubnetConfig(select="threshold")))
    for task in range(64):
        bank.begin(scores="init")
        bank.commit(str(task))
    x = torch.randn(40, 784)
    expected = {name: torch.cat([alone(bank, row[None], name) for row in x]) for name in bank.names}
    inferred = [bank.masks[k] for k in bank.row_alpha_grad(x, entropy).argmin(1).tolist()]
    predictor, used = sk.Predictor(bank), []
    pause = threading.Barrier(8, action=lambda: used.append(resident()))
    wrong = [0] * 8

    def work(number):
        chance, asked = random.Random(number), 0
        while asked < requests:
            many = min(chance.choice([1, 1, 1, 4, 16]), requests - asked)
            if asked < requests // 5 <= asked + many:
                pause.wait()
            sent = []
            for _ in range(many):
                i, name = chance.randrange(len(x)), None if chance.random() < 0.002 else str(chance.randrange(64))
                sent.append((predictor.submit(x[i : i + 1], name), i, name or inferred[i]))
            for request, i, name in sent:
                answer = request.result()
                wrong[number] += answer.tasks != [name] or not torch.equal(answer.logits[0], expected[name][i])
            asked += many

    threads(8, work, 500)
    assert sum(wrong) == 0
    if requests == 10_000:
        assert resident() - used[0] < 8 << 20, f"grew from {used[0]} to {resident()} bytes"


@cpu_only
def test_threads_that_ask_at_once_share_batches(monkeypatch):
    _, bank, x = mlp()
    predictor = sk.Predictor(bank, patience=0.05)
    sizes, answer = [], predictor._answer
    monkeypatch.setattr(predictor, "_answer", lambda batch: (sizes.append(len(batch)), time.sleep(0.002), answer(batch)))
    threads(8, lambda number: [predictor(x[number : number + 1], "task 1") for _ in range(20)])
    assert sum(sizes) == 160
    assert len(sizes) < 60


def test_who_is_interrupted_leaves_the_others_their_answers(monkeypatch):
    _, bank, x = mlp()
    predictor, answer, first = sk.Predictor(bank), sk.Predictor._answer, []

    def stopped(batch):
        if not first:
            first.append(batch)
            raise KeyboardInterrupt
        answer(predictor, batch)

    monkeypatch.setattr(predictor, "_answer", stopped)
    requests = [predictor.submit(x[i : i + 1], "task 1") for i in range(3)]
    with pytest.raises(KeyboardInterrupt):
        requests[1].result()
    threads(3, lambda number: requests[number].result())
    assert len(first[0]) == 3


def test_who_is_interrupted_when_it_is_his_turn_leaves_it_to_another():
    """The thread that a batch wakes so that it runs the next one."""
    _, bank, x = mlp()
    predictor = sk.Predictor(bank)
    second, third = (predictor.submit(x[i : i + 1], "task 1") for i in range(2))
    third._waits = second._waits = True  # their threads sleep

    class Interrupted:
        def acquire(self):
            second._waits = False  # it was woken
            raise KeyboardInterrupt

    second._wake = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        predictor._sleep(second)
    assert third._wake.acquire(timeout=0)  # it goes on in its place
    assert not third._waits


def test_a_stored_bank_is_served(tmp_path):
    model, bank, x = mlp()
    bank.save(tmp_path)
    names = [f"task {i % 6}" for i in range(len(x))]
    expected = sk.Predictor(bank)(x, names).logits
    assert torch.equal(sk.Predictor(sk.MaskBank.load(tmp_path, model))(x, names).logits, expected)


def test_a_copy_of_a_bank_goes_its_own_way():
    model, bank, x = mlp(train_weights=True)
    bank.activate("task 1")
    other = bank.copy()
    assert bank.active == "task 1"
    bank.activate(None)
    assert other.model is not model
    assert other.names == bank.names
    other.verify()
    other.begin(scores="init")
    other.commit("theirs")
    bank.commit("ours")
    assert (other.names[-1], bank.names[-1]) == ("theirs", "ours")
    for name in bank.names[:-1]:
        assert torch.equal(alone(bank, x, name), alone(other, x, name))
        assert all(torch.equal(bits, other.bits(name)[key]) for key, bits in bank.bits(name).items())
    assert not all(torch.equal(bits, other.owned()[key]) for key, bits in bank.owned().items())
    bank.remove("task 2")
    assert "task 2" in other
    other.verify()
