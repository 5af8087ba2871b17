"""select, refresh_, threshold, refresh_threshold_: scores to bits, exactly, and without the host ever learning a score.

The key of a score is an integer that orders as the specification says: the bits of its magnitude, negated for a negative score
where the sign counts. So -0.0 and +0.0 share key 0, and every NaN gets the key after infinity's, the largest.

Few scores fit one program, which finds the key of the k-th by bisection. Of many, a sample gives an interval of keys that almost
surely holds it. Each round counts the keys above the interval and those in each of its bins, and makes the k-th key's bin the next
interval; where the interval did not hold that key, the next one is all that is left on its side. So many rounds are launched that
the worst case ends with one key; those that are not needed return at once. Then bits are written, all ties open or none, and where
ties are cut the blocks that have some are written again, with their ranks from a scan of the blocks' counts.

Hints are not used. An effective weight is written by `apply_to` from the bits: the same bytes as beside them, but for an eighth of
one a weight.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from subnet_kernels import reference
from subnet_kernels.triton._build import Build, on_device, plain, typed
from subnet_kernels.triton._packed import (
    AS_INTEGER,
    BLOCK,
    INTEGERS,
    build,
    check,
    check_bits,
    check_lengths,
    each,
    in_place,
    places,
    programs,
    step_of,
    store_packed,
)
from subnet_kernels.triton.apply import apply_to

# ----------------------------------------------------------------------------------------------------------------- keys


@triton.jit
def _keys(scores, at, ok, infinity, value, MOST: tl.constexpr):
    """Keys of scores, int32; where not ok, one below all others."""
    raw = tl.load(scores + at, mask=ok, other=0).to(tl.int32)
    magnitude = tl.minimum(raw & MOST, infinity + 1)
    negative = (value != 0) & (raw < 0) & (magnitude <= infinity)
    return tl.where(ok, tl.where(negative, -magnitude, magnitude), -0x7FFFFFFF)


@triton.jit
def _kth(keys, k, low, high):
    """The k-th largest of the keys, k >= 1, which is between low and high; int64 numbers."""
    while low < high:
        middle = low + (high - low + 1) // 2
        if tl.sum((keys >= middle.to(tl.int32)).to(tl.int32), 0) >= k:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def _kept_ties(ties, need, rule):
    """The ordinals [first, last) of so many ties that are kept where `need` of them are; rule: 0 first, 1 last, 2 all."""
    first = tl.where(rule == 1, ties - need, 0)
    return first, tl.where(rule == 0, need, ties)


# What is known of one tensor's cut, int64 numbers on the device: the interval [LOW, HIGH] of keys, in bins of 2^SHIFT keys; whether
# it is DONE, and then the KEY of the k-th score, and of its TIES those that are kept, [FIRST, LAST).
_LOW, _HIGH, _SHIFT, _DONE, _KEY, _TIES, _FIRST, _LAST = (tl.constexpr(i) for i in range(8))


@triton.jit
def _bin_size(state, low, high, BINS: tl.constexpr):
    """The smallest shift with which BINS bins hold the interval."""
    widths = (high - low) >> tl.arange(0, 64).to(tl.int64)
    tl.store(state + _SHIFT, tl.sum((widths >= BINS).to(tl.int64), 0))


# -------------------------------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["infinity", "value", "rule", "k", "n"])
def _few_kernel(
    scores,
    bits,
    infinity: tl.int32,
    value: tl.int32,
    rule: tl.int32,
    k: tl.int32,  # 1 to n
    n: tl.int64,
    FEW: tl.constexpr,
    MOST: tl.constexpr,
):
    """The whole selection among at most FEW scores, one program."""
    at = tl.arange(0, FEW)
    keys = _keys(scores, at, at < n, infinity, value, MOST)
    least = tl.where(value != 0, -infinity, 0).to(tl.int64)
    cut = _kth(keys, k, least, infinity.to(tl.int64) + 1).to(tl.int32)
    tie = (keys == cut).to(tl.int32)
    above = tl.sum((keys > cut).to(tl.int32), 0)
    first, last = _kept_ties(tl.sum(tie, 0), k - above, rule)
    turn = tl.cumsum(tie, 0) - 1
    kept = (keys > cut) | ((tie != 0) & (turn >= first) & (turn < last))
    store_packed(bits, tl.reshape(kept, (FEW // 8, 8)), n, FEW)


@triton.jit(do_not_specialize=["infinity", "value", "upper", "lower", "n"])
def _guess_kernel(
    scores,
    state,
    infinity: tl.int32,
    value: tl.int32,
    upper: tl.int32,  # rank in the sample of the interval's upper end; below 1: no end
    lower: tl.int32,  # rank of its lower end; above SAMPLE: no end
    n: tl.int64,  # at least SAMPLE
    SAMPLE: tl.constexpr,
    BINS: tl.constexpr,
    MOST: tl.constexpr,
):
    """The first interval, from one score of each of SAMPLE parts of the tensor, at a place that looks random."""
    part = tl.arange(0, SAMPLE).to(tl.int64)
    at = part * n // SAMPLE + ((part * 2654435761) >> 7) % (n // SAMPLE)
    keys = _keys(scores, at, at < n, infinity, value, MOST)
    low, high = tl.where(value != 0, -infinity, 0).to(tl.int64), infinity.to(tl.int64) + 1
    if upper >= 1:
        high = _kth(keys, upper, low, high)
    if lower <= SAMPLE:
        low = _kth(keys, lower, low, high)
    tl.store(state + _LOW, low)
    tl.store(state + _HIGH, high)
    tl.store(state + _DONE, low * 0)
    _bin_size(state, low, high, BINS)


@triton.jit(do_not_specialize=["infinity", "value", "n"])
def _round_kernel(
    scores,
    state,
    counts,  # int32 (COPIES, BINS) keys in each bin, then (COPIES,) keys above; zeros at first
    infinity: tl.int32,
    value: tl.int32,
    n: tl.int64,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
    COPIES: tl.constexpr,
    MOST: tl.constexpr,
):
    """Counts a block's keys. Programs count in COPIES places, so that few wait for each other."""
    for STEP in tl.static_range(1, 17, 15):
        if step_of(n) == STEP:
            size = n // STEP * STEP
            if tl.load(state + _DONE) == 0:
                low, high, shift = tl.load(state + _LOW), tl.load(state + _HIGH), tl.load(state + _SHIFT)
                at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
                keys = _keys(scores, at, at < size, infinity, value, MOST).to(tl.int64)
                copy = tl.program_id(0) % COPIES
                within = (keys >= low) & (keys <= high)
                above = tl.sum((keys > high).to(tl.int32), 0)
                tl.atomic_add(counts + COPIES * BINS + copy, above, sem="relaxed")
                if low == high:  # one key, of which there may be as many as scores
                    tl.atomic_add(counts + copy * BINS, tl.sum(within.to(tl.int32), 0), sem="relaxed")
                else:
                    place = tl.where(within, (keys - low) >> shift, 0)
                    tl.atomic_add(counts + copy * BINS + place, within.to(tl.int32), mask=within, sem="relaxed")


@triton.jit(do_not_specialize=["infinity", "value", "rule", "k"])
def _decide_kernel(
    state,
    counts,
    infinity: tl.int32,
    value: tl.int32,
    rule: tl.int32,
    k: tl.int64,  # 1 to n
    BINS: tl.constexpr,
    COPIES: tl.constexpr,
):
    """The next interval, or the cut, from what a round counted; counts are zeros again. One program."""
    if tl.load(state + _DONE) == 0:
        low, high, shift = tl.load(state + _LOW), tl.load(state + _HIGH), tl.load(state + _SHIFT)
        place = tl.arange(0, BINS)
        own = tl.zeros((BINS,), tl.int64)
        for copy in range(COPIES):
            own += tl.load(counts + copy * BINS + place).to(tl.int64)
        copies = COPIES * BINS + tl.arange(0, COPIES)
        need = k - tl.sum(tl.load(counts + copies).to(tl.int64), 0)  # of the interval's keys
        tl.debug_barrier()  # every warp reads all copies: none may find the zeros of a faster one
        for copy in range(COPIES):
            tl.store(counts + copy * BINS + place, tl.zeros((BINS,), tl.int32))
        tl.store(counts + copies, tl.zeros((COPIES,), tl.int32))
        within = tl.sum(own, 0)
        upwards = within - tl.cumsum(own, 0) + own  # keys of a bin and of those above it
        if need < 1:
            low = high + 1
            high = infinity.to(tl.int64) + 1
        elif need > within:
            high = low - 1
            low = tl.where(value != 0, -infinity, 0).to(tl.int64)
        else:
            found = tl.sum((upwards >= need).to(tl.int64), 0) - 1
            low += found << shift
            high = tl.minimum(high, low + (((found * 0 + 1) << shift) - 1))
            if shift == 0:
                ties = tl.sum(tl.where(place == found, own, 0), 0)
                need -= tl.sum(tl.where(place == found, upwards, 0), 0) - ties
                first, last = _kept_ties(ties, need, rule)
                tl.store(state + _KEY, low)
                tl.store(state + _TIES, ties)
                tl.store(state + _FIRST, first)
                tl.store(state + _LAST, last)
                tl.store(state + _DONE, low * 0 + 1)
        tl.store(state + _LOW, low)
        tl.store(state + _HIGH, high)
        _bin_size(state, low, high, BINS)


@triton.jit(do_not_specialize=["infinity", "value", "n"])
def _write_kernel(
    scores,
    state,
    bits,
    ties,  # int32, of each block
    infinity: tl.int32,
    value: tl.int32,
    n: tl.int64,
    BLOCK: tl.constexpr,
    MOST: tl.constexpr,
):
    """A block's bits: keys above the cut, and its ties if all are kept."""
    for STEP in tl.static_range(1, 17, 15):
        if step_of(n) == STEP:
            size = n // STEP * STEP
            cut = tl.load(state + _KEY).to(tl.int32)
            every = (tl.load(state + _FIRST) == 0) & (tl.load(state + _LAST) == tl.load(state + _TIES))
            at = places(BLOCK)
            keys = _keys(scores, at, at < size, infinity, value, MOST)
            tie = keys == cut
            store_packed(bits, (keys > cut) | (tie & every), size, BLOCK)
            tl.store(ties + tl.program_id(0), tl.sum(tl.sum(tie.to(tl.int32), 1), 0))


@triton.jit(do_not_specialize=["infinity", "value", "n"])
def _cut_ties_kernel(
    scores,
    state,
    bits,
    ties,
    before,  # int64: ties up to the end of each block
    infinity: tl.int32,
    value: tl.int32,
    n: tl.int64,
    BLOCK: tl.constexpr,
    MOST: tl.constexpr,
):
    """A block's bits once more, if it has ties and not all are kept."""
    first, last = tl.load(state + _FIRST), tl.load(state + _LAST)
    own = tl.load(ties + tl.program_id(0))
    if (own > 0) & (last - first < tl.load(state + _TIES)):
        cut = tl.load(state + _KEY).to(tl.int32)
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        keys = _keys(scores, at, at < n, infinity, value, MOST)
        tie = (keys == cut).to(tl.int32)
        turn = tl.load(before + tl.program_id(0)) - own + tl.cumsum(tie, 0) - 1
        kept = (keys > cut) | ((tie != 0) & (turn >= first) & (turn < last))
        store_packed(bits, tl.reshape(kept, (BLOCK // 8, 8)), n, BLOCK)


@triton.jit(do_not_specialize=["infinity", "least", "n"])
def _threshold_kernel(
    scores,
    bits,
    infinity: tl.int32,
    least: tl.int32,  # the least key that is open
    n: tl.int64,
    BLOCK: tl.constexpr,
    MOST: tl.constexpr,
):
    """A block's bits: keys from `least` to infinity's, so that NaN is closed."""
    for STEP in tl.static_range(1, 17, 15):
        if step_of(n) == STEP:
            size = n // STEP * STEP
            at = places(BLOCK)
            keys = _keys(scores, at, at < size, infinity, 1, MOST)
            store_packed(bits, (keys >= least) & (keys <= infinity) & (at < size), size, BLOCK)


# --------------------------------------------------------------------------------------------------------------- builds

_FEW = 8192
_SAMPLE = 4096
_BINS, _COPIES = 2048, 16
_MOST = {2: 0x7FFF, 4: 0x7FFFFFFF}  # the bits of a magnitude, by the size of a score
_ROUNDS = {2: 3, 4: 4}  # one that may miss, then all bits of a key, 11 at a time
_INFINITY = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80, torch.float32: 0x7F800000}


_STATE = {"scores": "", "state": "i64"}
_KINDS = {size: INTEGERS[size] for size in _MOST}
_FEW_BUILDS = each(_few_kernel, _KINDS, {"scores": "", "bits": "u8"}, "infinity value rule k", "n", warps=8, FEW=_FEW, MOST=_MOST)
_GUESS = each(_guess_kernel, _KINDS, _STATE, "infinity value upper lower", "n", warps=8, SAMPLE=_SAMPLE, BINS=_BINS, MOST=_MOST)
_ROUND = each(
    _round_kernel,
    _KINDS,
    _STATE | {"counts": "i32"},
    "infinity value",
    "n",
    BLOCK=BLOCK,
    BINS=_BINS,
    COPIES=_COPIES,
    MOST=_MOST,
)
_DECIDE = build(
    _decide_kernel,
    "",
    typed({"state": "i64", "counts": "i32"}, "infinity value rule", "k"),
    {"BINS": _BINS, "COPIES": _COPIES},
    8,
)
_WRITTEN = _STATE | {"bits": "u8", "ties": "i32"}
_WRITE = each(_write_kernel, _KINDS, _WRITTEN, "infinity value", "n", BLOCK=BLOCK, MOST=_MOST)
_CUT_TIES = each(_cut_ties_kernel, _KINDS, _WRITTEN | {"before": "i64"}, "infinity value", "n", BLOCK=BLOCK, MOST=_MOST)
_THRESHOLD = each(_threshold_kernel, _KINDS, {"scores": "", "bits": "u8"}, "infinity least", "n", BLOCK=BLOCK, MOST=_MOST)


def builds() -> list[Build]:
    """Every build that a launch of this module can choose."""
    tables = (_FEW_BUILDS, _GUESS, _ROUND, _WRITE, _CUT_TIES, _THRESHOLD)
    return [build for table in tables for build in table.values()] + [_DECIDE]


# ------------------------------------------------------------------------------------------------------------- launches


def select(scores: Sequence[Tensor], k: Sequence[int], by: str = "magnitude", ties: str = "last") -> list[Tensor]:
    """The op of `reference.select` on a GPU."""
    _check_selection("select", scores, k, by, ties)
    bits = [_new_bits(s) for s in scores]
    _select_into(scores, k, bits, by, ties)
    return bits


def refresh_(
    scores: Sequence[Tensor],
    weights: Sequence[Tensor],
    k: Sequence[int],
    bits: Sequence[Tensor],
    w_eff: Sequence[Tensor],
    hints: Sequence[Tensor],
    by: str = "magnitude",
    ties: str = "last",
) -> None:
    """The op of `reference.refresh_` on a GPU."""
    op = "refresh_"
    _check_selection(op, scores, k, by, ties)
    check_lengths(op, len(scores), len(hints), "hints")
    for h in hints:
        check(
            h.dtype == torch.float64 and h.numel() == 4 and h.is_contiguous(),
            op,
            f"hints must be contiguous float64 with 4 elements, got {h.numel()}",
        )
    _check_refresh(op, scores, weights, bits, w_eff)
    _select_into(scores, k, bits, by, ties)
    _apply_all(weights, bits, w_eff)


def threshold(scores: Sequence[Tensor], value: float, inclusive: bool = True) -> list[Tensor]:
    """The op of `reference.threshold` on a GPU."""
    _check_scores("threshold", scores)
    bits = [_new_bits(s) for s in scores]
    _threshold_into(scores, value, inclusive, bits)
    return bits


def refresh_threshold_(
    scores: Sequence[Tensor],
    weights: Sequence[Tensor],
    value: float,
    inclusive: bool,
    bits: Sequence[Tensor],
    w_eff: Sequence[Tensor],
) -> None:
    """The op of `reference.refresh_threshold_` on a GPU."""
    op = "refresh_threshold_"
    _check_scores(op, scores)
    _check_refresh(op, scores, weights, bits, w_eff)
    _threshold_into(scores, value, inclusive, bits)
    _apply_all(weights, bits, w_eff)


def _check_scores(op: str, scores: Sequence[Tensor]) -> None:
    for s in scores:
        known = s.dtype in _INFINITY or s.dtype == torch.float64
        check(known, op, "scores must be float16, bfloat16, float32 or float64, got another dtype")


def _check_selection(op: str, scores: Sequence[Tensor], k: Sequence[int], by: str, ties: str) -> None:
    check_lengths(op, len(scores), len(k), "values of k")
    check(by in ("magnitude", "value"), op, f"by must be 'magnitude' or 'value', got '{by}'")
    check(ties in _RULES, op, f"ties must be 'last', 'first' or 'all', got '{ties}'")
    _check_scores(op, scores)
    for s, kept in zip(scores, k):
        check(0 <= kept <= s.numel(), op, f"k must be between 0 and {s.numel()}, got {kept}")


def _check_refresh(
    op: str, scores: Sequence[Tensor], weights: Sequence[Tensor], bits: Sequence[Tensor], w_eff: Sequence[Tensor]
) -> None:
    for given, what in ((weights, "weights"), (bits, "bits"), (w_eff, "effective weights")):
        check_lengths(op, len(scores), len(given), what)
    for s, w, b, e in zip(scores, weights, bits, w_eff):
        n = s.numel()
        check_bits(op, b, n)
        if e.numel() == 0:
            continue
        check(w.numel() == n, op, f"weights must have the {n} elements of their scores, got {w.numel()}")
        fits = e.numel() == n and e.is_contiguous()
        check(fits, op, f"w_eff must be contiguous with {n} elements or empty, got {e.numel()}")
        check(w.dtype == e.dtype, op, "w_eff must have its weight's dtype")


def _new_bits(scores: Tensor) -> Tensor:
    return torch.empty(reference.nbytes(scores.numel()), dtype=torch.uint8, device=scores.device)


def _apply_all(weights: Sequence[Tensor], bits: Sequence[Tensor], w_eff: Sequence[Tensor]) -> None:
    for w, b, e in zip(weights, bits, w_eff):
        if e.numel() > 0:
            apply_to(w, b, e)


_RULES = {"first": 0, "last": 1, "all": 2}


def _select_into(scores: Sequence[Tensor], k: Sequence[int], bits: Sequence[Tensor], by: str, ties: str) -> None:
    counts = None  # of one device at a time, left as zeros
    for s, kept, b in zip(scores, k, bits):
        n = s.numel()
        if s.dtype == torch.float64 or not in_place(b):
            b.copy_(reference.select([s], [kept], by, ties)[0])
        elif kept == 0 or n == 0:
            b.zero_()
        else:
            key = {"infinity": _INFINITY[s.dtype], "value": int(by == "value")}.values()
            size, rule = s.element_size(), _RULES[ties]
            raw = plain(s).view(AS_INTEGER[size])
            with on_device(s):
                if n <= _FEW:
                    _FEW_BUILDS[size].launch((1,), raw, b, *key, rule, kept, n)
                    continue
                if counts is None or counts.device != s.device:
                    counts = torch.zeros(_COPIES * (_BINS + 1), dtype=torch.int32, device=s.device)
                _select_many(raw, kept, b, counts, *key, rule)


def _select_many(scores: Tensor, k: int, bits: Tensor, counts: Tensor, infinity: int, value: int, rule: int) -> None:
    n, size = scores.numel(), scores.element_size()
    grid = programs(n)
    state = torch.empty(8, dtype=torch.int64, device=scores.device)
    ties = torch.empty(grid, dtype=torch.int32, device=scores.device)
    share = k / n
    rank, margin = share * _SAMPLE, 4 * math.sqrt(_SAMPLE * share * (1 - share)) + 2  # four standard deviations of a binomial
    _GUESS[size].launch((1,), scores, state, infinity, value, math.floor(rank - margin), math.ceil(rank + margin), n)
    for _ in range(_ROUNDS[size]):
        _ROUND[size].launch(grid, scores, state, counts, infinity, value, n)
        _DECIDE.launch((1,), state, counts, infinity, value, rule, k)
    _WRITE[size].launch(grid, scores, state, bits, ties, infinity, value, n)
    if rule != _RULES["all"] and k < n:
        before = ties.cumsum(0)  # int64, and in a fixed order
        _CUT_TIES[size].launch(grid, scores, state, bits, ties, before, infinity, value, n)


def _threshold_into(scores: Sequence[Tensor], value: float, inclusive: bool, bits: Sequence[Tensor]) -> None:
    for s, b in zip(scores, bits):
        n = s.numel()
        if s.dtype == torch.float64 or not in_place(b):
            b.copy_(reference.threshold([s], value, inclusive)[0])
        elif n > 0:
            size = s.element_size()
            raw = plain(s).view(AS_INTEGER[size])
            with on_device(s):
                _THRESHOLD[size].launch(programs(n), raw, b, _INFINITY[s.dtype], _least_open(s.dtype, value, inclusive), n)


def _least_open(dtype: torch.dtype, value: float, inclusive: bool) -> int:
    """The least key that is open, of the value in the scores' dtype; that of NaN if none is."""
    infinity, size = _INFINITY[dtype], dtype.itemsize
    raw = int(torch.full((), value, dtype=dtype, device="cpu").view(AS_INTEGER[size]).numpy())
    magnitude = raw & _MOST[size]
    if magnitude > infinity:
        return infinity + 1
    key = -magnitude if raw < 0 else magnitude
    return key if inclusive else key + 1
