"""Eight threads that ask one predictor about 64 tasks of LeNet-300-100, a row a request, against the loop over the requests.

The loops run in one thread. The one-by-one loop is what a bank's user writes: `activate`, then the model's forward; a target is 3 times
its throughput. Beside it the forward of views that are all kept, which need 32 times the bank's bytes. Expected before any measurement,
on two threads: 3 times that one too where threads wait for each answer, or ask for 16 at once.
"""

import resource
import threading
import time

import torch
from bench_bank import lenet
from measure import only_on

import subnet_kernels as sk

pytestmark = only_on("cpu")
TASKS, THREADS, REQUESTS = 64, 8, 1_250  # requests of each thread


def seconds(call, rounds=3):
    """Of the clock, and of the processor, whose time a busy machine does not stretch as much: the least of some calls."""
    found = []
    for _ in range(rounds):
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        found.append((time.perf_counter() - wall, time.process_time() - cpu))
    return [min(times) for times in zip(*found)]


def bench_predictor(thread_count):
    bank = sk.MaskBank(lenet())
    for task in range(TASKS):
        bank.begin(scores="init")
        bank.commit(str(task))
    x, asked = torch.randn(256, 784), torch.randint(0, TASKS, (THREADS, REQUESTS)).tolist()
    views = {name: bank.view(name) for name in bank.names}
    predictor = sk.Predictor(bank)
    expected = {}
    with torch.no_grad():
        for name in bank.names:
            bank.activate(name)
            expected[name] = torch.cat([bank.model(row[None]) for row in x])

    def ask(mine, at_once):
        for start in range(0, len(mine), at_once):
            tasks = mine[start : start + at_once]
            rows = [(start + i) % len(x) for i in range(len(tasks))]
            requests = [predictor.submit(x[row : row + 1], str(task)) for row, task in zip(rows, tasks)]
            for request, row, task in zip(requests, rows, tasks):
                assert torch.equal(request.result().logits[0], expected[str(task)][row])

    def run(at_once):
        running = [threading.Thread(target=ask, args=(mine, at_once)) for mine in asked]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()

    def activated():
        for i, task in enumerate(asked[0][:100]):
            bank.activate(str(task))
            bank.model(x[i % len(x)][None])

    def viewed():
        for i, task in enumerate(asked[0]):
            views[str(task)](x[i % len(x)][None])

    run(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.no_grad():
        calls = {"loop, activate": (activated, 100), "loop, views": (viewed, REQUESTS)}
        each = {name: [value / count for value in seconds(call)] for name, (call, count) in calls.items()}
    for at_once in (1, 16):
        whole = seconds(lambda n=at_once: run(n))
        each[f"predictor, {at_once} at once"] = [value / THREADS / REQUESTS for value in whole]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(
        f"\n{TASKS} tasks, {THREADS} threads, {THREADS * REQUESTS} requests, torch on {thread_count} threads; grew by {grown:.1f} MB"
    )
    for name, (wall, cpu) in each.items():
        ratios = " ".join(
            f"{loop} / it {each[loop][0] / wall:5.2f}, CPU {each[loop][1] / cpu:5.2f};"
            for loop in ("loop, activate", "loop, views")
        )
        print(f"{name:24} {1e6 * wall:8.1f} us a request, CPU {1e6 * cpu:8.1f}; {ratios}")
