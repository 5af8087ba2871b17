"""Numbers from an accuracy matrix: pure functions, null in, null out, nothing mutated.

A matrix is a list of rows of percent or None: entry (t, j) is task j's accuracy just after task t was learnt.
"""

from __future__ import annotations

from collections.abc import Sequence

Matrix = Sequence[Sequence[float | None]]


def mean(values: Sequence[float | None]) -> float | None:
    """The mean; None where there is none or one is None."""
    return None if not values or any(v is None for v in values) else sum(values) / len(values)


def diagonal(matrix: Matrix) -> list[float | None]:
    """Each task's accuracy just after it was learnt."""
    return [row[t] for t, row in enumerate(matrix)]


def final(matrix: Matrix) -> list[float | None]:
    """Each task's accuracy after the last task."""
    return list(matrix[-1]) if matrix else []


def acc(last: Sequence[float | None]) -> float | None:
    """ACC: the mean of the final row."""
    return mean(last)


def bwt(diag: Sequence[float | None], last: Sequence[float | None]) -> float | None:
    """Backward transfer in percent points: mean over all tasks but the last of final - diagonal. None for one task."""
    return mean([None if a is None or b is None else b - a for a, b in zip(diag[:-1], last[:-1])])


def forgetting(matrix: Matrix) -> float | None:
    """Mean over all tasks but the last of the best accuracy it ever had before the end, less its final one, in percent points."""
    drops = []
    for j in range(len(matrix) - 1):
        seen = [row[j] for row in matrix[j:-1]]
        drops.append(None if None in seen or matrix[-1][j] is None else max(seen) - matrix[-1][j])
    return mean(drops)


def ratio(last: float | None, peak: float | None) -> float | None:
    """The forgetting ratio (Lee et al., ICML 2021): mean final over mean peak accuracy, 1 where nothing was lost; None in, None out."""
    return last / peak if last is not None and peak else None


def fwt(matrix: Matrix, untrained: Sequence[float | None] | None) -> float | None:
    """Forward transfer in percent points: mean over all tasks but the first of (accuracy just before it is learnt - untrained one)."""
    if untrained is None:
        return None
    pairs = [(matrix[j - 1][j], untrained[j]) for j in range(1, len(matrix))]
    return mean([None if a is None or b is None else a - b for a, b in pairs])
