"""Metrics against 3 x 3 matrices worked by hand; capacities against the papers' tables."""

import copy

import pytest

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
