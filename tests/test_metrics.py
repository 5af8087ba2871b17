"""Metrics against 3 x 3 matrices worked by hand; capacities against the papers' tables."""

import copy

import numpy as np
import pytest
import torch

import subnet_kernels as sk
from subnet_pipelines import capacity, metrics

# Task 0: 90 -> 80 -> 70. Task 1: 88 -> 92, before learning 20. Task 2: 95, before learning 30 (after task 0) and 40 (after task 1).
MATRIX = [[90.0, 20.0, 30.0], [80.0, 88.0, 40.0], [70.0, 92.0, 95.0]]
LOWER = [[90.0, None, None], [80.0, 88.0, None], [70.0, 92.0, 95.0]]


@pytest.mark.parametrize("matrix", [MATRIX, LOWER])
def test_by_hand(matrix):
    before = copy.deepcopy(matrix)
    diag, last = metrics.diagonal(matrix), metrics.final(matrix)
    assert diag == [90, 88, 95]
    assert last == [70, 92, 95]
    assert metrics.acc(last) == pytest.approx(257 / 3)
    assert metrics.bwt(diag, last) == pytest.approx((-20 + 4) / 2)
    assert metrics.forgetting(matrix) == pytest.approx((90 - 70 + 88 - 92) / 2)
    assert matrix == before


def test_forgetting_is_from_the_best_before_the_end():
    assert metrics.forgetting([[50.0, None, None], [90.0, 60.0, None], [40.0, 60.0, 70.0]]) == pytest.approx((90 - 40 + 0) / 2)


def test_ratio_of_what_is_kept():
    assert metrics.ratio(30.0, 40.0) == 0.75
    assert metrics.ratio(30.0, None) is metrics.ratio(None, 40.0) is metrics.ratio(0.0, 0.0) is None


def test_forward_transfer():
    assert metrics.fwt(MATRIX, [10.0, 12.0, 14.0]) == pytest.approx(((20 - 12) + (40 - 14)) / 2)
    assert metrics.fwt(LOWER, [10.0, 12.0, 14.0]) is None
    assert metrics.fwt(MATRIX, None) is None


def test_null_in_null_out():
    holed = [[90.0, None, None], [None, 88.0, None], [70.0, None, 95.0]]
    assert metrics.acc(metrics.final(holed)) is None
    assert metrics.bwt(metrics.diagonal(holed), metrics.final(holed)) is None
    assert metrics.forgetting(holed) is None
    assert metrics.acc([]) is None


def test_one_task_has_no_transfer():
    assert metrics.acc([80.0]) == 80
    assert metrics.bwt([80.0], [80.0]) is None
    assert metrics.forgetting([[80.0]]) is None


# WSN's table 1 and 2: used fractions and CAP of the same cells, N tasks.
@pytest.mark.parametrize(
    ("used", "tasks", "printed"),
    [(0.130, 10, 19.87), (0.335, 10, 40.41), (0.912, 10, 98.10), (0.246, 5, 28.01), (0.143, 100, 83.08), (0.212, 40, 48.65)],
)
def test_wsn_cap(used, tasks, printed):
    assert capacity.wsn_cap(used, tasks) == pytest.approx(printed, abs=0.06)  # used is rounded to three digits


@pytest.mark.parametrize(("tasks", "printed"), [(5, 82.86), (10, 96.38), (20, 126.65), (40, 188.67)])
def test_packnet_cap(tasks, printed):
    assert capacity.packnet_cap(tasks) == pytest.approx(printed, abs=0.01)


def test_capacity_counts_values_and_mask_bytes():
    found = capacity.capacity(used=50, total=200, tasks=4, mask_bytes=100, paper_cap=None)
    assert found["used_fraction"] == 0.25
    assert found["measured_cap"] == pytest.approx(25 + 100 * 100 / 800)
    assert found["bits_per_weight"] == pytest.approx(1.0)
    seed_only = capacity.capacity(used=50, total=200, tasks=4, mask_bytes=100, paper_cap=None, seed_only=True)
    assert seed_only["measured_cap"] == pytest.approx(112.5)
    assert seed_only["seed_only_cap"] == pytest.approx(12.5)


WSN_TASKS = {"permuted-mnist": 10, "five-datasets": 5, "omniglot-rotation": 100, "cifar100": 10, "superclass": 20, "tiny": 40}


def test_wsn_used_inverts_wsn_cap():
    for tasks in WSN_TASKS.values():
        assert capacity.wsn_used(capacity.wsn_cap(0.3, tasks), tasks) == pytest.approx(0.3)
    assert capacity.wsn_used(40.41, 10) == pytest.approx(0.335, abs=0.0005)


# ---- Huffman codes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "lengths"),
    [
        ([5, 9, 12, 13, 16, 45], [4, 4, 3, 3, 3, 1]),
        ([1, 1, 2, 4], [3, 3, 2, 1]),
        ([0, 3, 0, 2], [0, 1, 0, 1]),
        ([0, 7], [0, 0]),
        ([0, 0], [0, 0]),
    ],
)
def test_code_lengths_by_hand(counts, lengths):
    assert capacity.code_lengths(counts) == lengths


def test_no_code_is_shorter():
    """The words are a complete prefix code within a bit of the entropy; the worst counts are as deep as they must be."""
    chance = np.random.default_rng(0)
    for symbols in (2, 3, 128):
        counts = np.floor(chance.pareto(0.5, symbols) * 10 + 1).astype(np.int64)
        lengths = np.array(capacity.code_lengths(counts))
        assert (2.0**-lengths).sum() == 1
        share = counts / counts.sum()
        entropy = -(share * np.log2(share)).sum()
        assert entropy <= (share * lengths).sum() < entropy + 1
        assert (np.diff(lengths[np.lexsort((-lengths, counts))]) <= 0).all()  # never a longer word for what is more frequent
    fibonacci = [1, 1]
    while len(fibonacci) < 30:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    assert max(capacity.code_lengths(fibonacci)) == 29


@pytest.mark.parametrize("n", [1, 511, 513, 3_000_000])
@pytest.mark.parametrize("tasks", [1, 3, 7])
def test_joint_counts(n, tasks):
    chance = torch.Generator(device="cpu").manual_seed(n)
    masks = torch.rand(tasks, n, generator=chance, device="cpu") < 0.3
    expected = np.bincount((masks.numpy() << np.arange(tasks)[:, None]).sum(0), minlength=1 << tasks)
    assert capacity.joint_counts([sk.pack(mask) for mask in masks], n).tolist() == expected.tolist()


def test_joint_huffman_by_hand():
    """Nine tasks make a group of seven and one of two; a layer where every weight has the same pattern costs no word."""
    empty, full = torch.zeros(600, dtype=torch.bool), torch.ones(40, dtype=torch.bool)
    halves = empty.clone()
    halves[:300] = True
    rows = [{"a": sk.pack(halves if t == 8 else empty), "b": sk.pack(full)} for t in range(9)]
    found = capacity.joint_huffman(rows, {"a": 600, "b": 40})
    assert found == {"group": 7, "code_bits": 600, "table_bits": 2 * 8 * (128 + 4), "rate": 1 - 600 / (9 * 640)}
    assert capacity.joint_huffman([], {"a": 600})["rate"] is None


def test_capacity_with_huffman():
    stored = capacity.capacity(used=50, total=200, tasks=4, mask_bytes=100, paper_cap=None)
    coded = capacity.with_huffman(stored, {"code_bits": 300, "table_bits": 100}, 200)
    assert coded["huffman_cap"] == pytest.approx(25 + 100 * 50 / 800)
    assert coded["measured_cap"] == stored["measured_cap"]
