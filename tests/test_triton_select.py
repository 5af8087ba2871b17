"""The Triton kernels of select, refresh_ and threshold against the reference, bit for bit: one program, and many with a sample."""

import itertools
import math

import pytest
import torch
from interpreter import DEVICE, apart, note_launches, only_where_kernels_run, poison, thinned
from test_select import check_table

from subnet_kernels import reference

only_where_kernels_run()

from subnet_kernels.triton import select as kernels  # noqa: E402

FLOATS = [torch.float32, torch.float16, torch.bfloat16]  # moved and compared as integers, so that the interpreter is right in all
BY, TIES = ("magnitude", "value"), ("last", "first", "all")
FEW = [0, 1, 8, 511, 513, 2049, 8191, 8192]
MANY = [8193, 20_011]
NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    poison(monkeypatch)
    return note_launches(monkeypatch)


def scores_of(kind, n, dtype):
    t = torch.randn(n, device=DEVICE)
    if kind == "special":
        t[torch.rand(n, device=DEVICE) < 0.5] = 0.0
        for share, value in ((0.1, -0.0), (0.1, NAN), (0.05, -NAN), (0.1, INF), (0.1, -INF), (0.1, 1e-40)):
            t[torch.rand(n, device=DEVICE) < share] = value
    if kind == "few values":
        t = (t * 2).round() / 4
    if kind == "constant":
        t = torch.full_like(t, -0.5)
    if kind == "sorted":
        t = t.sort().values
    return t.to(dtype)


def agree(scores, k, by, ties):
    ours = kernels.select([scores], [k], by, ties)[0]
    assert torch.equal(ours, reference.select([scores], [k], by, ties)[0]), f"k={k}, {by}, {ties}"


@pytest.mark.parametrize("dtype", thinned(FLOATS, 3), ids=str)
def test_answers_worked_by_hand(dtype):
    check_table(lambda s, k, by, ties: kernels.select([s.to(DEVICE)], [k], by, ties)[0].cpu(), dtype)


def ranks(n):
    return sorted({0, min(1, n), n // 20, n // 2, max(0, n - 1), n})


KINDS = ["random", "special", "few values", "constant", "sorted"]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_few(kind, dtype, launched):
    cases = [(n, k, by, ties) for n in FEW for k in ranks(n) for by in BY for ties in TIES]
    for n, k, by, ties in thinned(cases, 131, 17 * KINDS.index(kind) + 41 * FLOATS.index(dtype)):
        agree(scores_of(kind, n, dtype), k, by, ties)
    assert all("-few-" in name for name in launched)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_many(kind, dtype):
    cases = [(n, k, by, ties) for n in MANY for by in BY for k in ranks(n) for ties in TIES]
    for n, k, by, ties in thinned(cases, 41, 8 * KINDS.index(kind) + 19 * FLOATS.index(dtype)):
        agree(scores_of(kind, n, dtype), k, by, ties)


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("sampled", [0.0, 1.0, -1.0, 3e38, -3e38, NAN])
def test_a_sample_that_misleads(sampled, ties):
    """Every score of the sample has one value, and the k-th is far above it or below it, at the ends of what keys there are."""
    n = 3 * 4096
    part = torch.arange(4096, device=DEVICE)
    at = part * n // 4096 + ((part * 2654435761) >> 7) % (n // 4096)
    first = [0.0, 1.0, -1.0, 3e38, -3e38].index(sampled) if sampled == sampled else 5
    cases = itertools.product((torch.float32, torch.float16), (1, 100, n // 3, n // 2, n - 100, n), BY)
    for dtype, k, by in thinned(cases, 24, 7 * first + 5 * TIES.index(ties)):
        scores = torch.randn(n, device=DEVICE).to(dtype)
        scores[at] = torch.tensor(sampled).to(dtype).to(DEVICE)
        agree(scores, k, by, ties)


def test_rounds_stop_when_they_may(launched):
    """With a sample that tells, a round or two count and the others return at once; the number of launches is one for all scores."""
    counted = []
    for kind in ("random", "constant", "sorted"):
        launched.clear()
        agree(scores_of(kind, 9000, torch.float32), 4000, "magnitude", "last")
        counted.append(list(launched))
    assert counted[0] == counted[1] == counted[2]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_bit_pattern(dtype):
    """Keys order as torch sorts, over all half-precision scores there are, or the ends of the single ones."""
    if dtype == torch.float32:
        base = torch.tensor([0, 1, 2**22, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF], device=DEVICE)
        raw = torch.cat([base, base - 2**31]).to(torch.int32).repeat(601)
    else:
        raw = torch.arange(-(2**15), 2**15, device=DEVICE).to(torch.int16)
    scores = raw[torch.randperm(raw.numel(), device=DEVICE)].view(dtype)
    cases = itertools.product((1, 17, raw.numel() // 3, raw.numel() // 2 + 5, raw.numel() - 3), BY, TIES)
    for k, by, ties in thinned(cases, 15, 3 + 5 * FLOATS.index(dtype)):
        agree(scores, k, by, ties)


def test_lists_strides_and_wide_scores():
    """Tensors of all sizes, dtypes and strides in one call, each with its own k."""
    scores = [torch.randn(6, 20, 10, 9, device=DEVICE).to(memory_format=torch.channels_last), torch.randn(0, device=DEVICE)]
    scores += [torch.randn(9001, device=DEVICE).double(), *apart(scores_of("few values", 9001, torch.float16))]
    scores += [*apart(scores_of("special", 700, torch.float32)), torch.tensor(2.0, device=DEVICE)]
    k = [s.numel() // 2 for s in scores]
    for ties in thinned(TIES, 3):
        for ours, theirs in zip(kernels.select(scores, k, "value", ties), reference.select(scores, k, "value", ties)):
            assert torch.equal(ours, theirs)
    assert kernels.select([], []) == []


def layers_of(dtype, weight_dtype):
    sizes = [(5,), (40, 30), (95, 100), (0,)]
    scores = [torch.randn(s, device=DEVICE).to(dtype) for s in sizes]
    weights = [torch.randn(s, device=DEVICE).to(weight_dtype) for s in sizes]
    weights[1] = weights[1].t().contiguous().t()
    bits = [torch.full((reference.nbytes(s.numel()),), 255, dtype=torch.uint8, device=DEVICE) for s in scores]
    w_eff = [torch.full_like(w, NAN, memory_format=torch.contiguous_format) for w in weights]
    w_eff[0] = w_eff[0][:0]
    return scores, weights, bits, w_eff


def clone(tensors):
    return [t.clone() for t in tensors]


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.float16, torch.float64), (torch.float64, torch.float16)]
)
def test_refresh(dtypes):
    scores, weights, bits, w_eff = layers_of(*dtypes)
    hints = [torch.randn(4, dtype=torch.float64, device=DEVICE) for _ in scores]
    k, want_bits, want = [s.numel() // 3 for s in scores], clone(bits), clone(w_eff)
    reference.refresh_(scores, weights, k, want_bits, want, hints, "value", "first")
    kernels.refresh_(scores, weights, k, bits, w_eff, clone(hints), "value", "first")
    assert all(torch.equal(a, b) for a, b in zip([*bits, *w_eff], [*want_bits, *want]))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_threshold(dtype):
    lists = [scores_of(kind, n, dtype) for kind in ("special", "few values") for n in (1, 513, 3000)]
    lists += list(apart(scores_of("few values", 600, dtype)))
    cases = itertools.product((0.0, -0.0, 0.25, -0.25, 5e-3, -3.0, INF, -INF, NAN), (True, False))
    for value, inclusive in thinned(cases, 3, FLOATS.index(dtype) if dtype in FLOATS else 0):
        for ours, theirs in zip(kernels.threshold(lists, value, inclusive), reference.threshold(lists, value, inclusive)):
            assert torch.equal(ours, theirs), (value, inclusive)


def test_refresh_threshold():
    scores, weights, bits, w_eff = layers_of(torch.float32, torch.float16)
    want_bits, want = clone(bits), clone(w_eff)
    reference.refresh_threshold_(scores, weights, 0.1, True, want_bits, want)
    kernels.refresh_threshold_(scores, weights, 0.1, True, bits, w_eff)
    assert all(torch.equal(a, b) for a, b in zip([*bits, *w_eff], [*want_bits, *want]))


def test_refuses():
    scores, weights, bits, w_eff = layers_of(torch.float32, torch.float32)
    hints, k = [torch.zeros(4, dtype=torch.float64, device=DEVICE) for _ in scores], [1, 1, 1, 0]

    def refresh(**changed):
        given = {"scores": scores, "weights": weights, "k": k, "bits": bits, "w_eff": w_eff, "hints": hints} | changed
        kernels.refresh_(*given.values())

    for call, sentence in (
        (lambda: kernels.select(scores, k[1:]), "select: expected 4 values of k, got 3"),
        (lambda: kernels.select(scores, [6, 1, 1, 0]), "k must be between 0 and 5, got 6"),
        (lambda: kernels.select(scores, [-1, 1, 1, 0]), "k must be between 0 and 5, got -1"),
        (lambda: kernels.select(scores, k, "rank"), "by must be 'magnitude' or 'value', got 'rank'"),
        (lambda: kernels.select(scores, k, "value", "any"), "ties must be 'last', 'first' or 'all', got 'any'"),
        (lambda: kernels.select([s.int() for s in scores], k), "got another dtype"),
        (lambda: kernels.threshold([scores[0].int()], 0.0), "threshold: scores must be float16"),
        (lambda: refresh(weights=weights[1:]), "refresh_: expected 4 weights, got 3"),
        (lambda: refresh(bits=bits[1:]), "expected 4 bits, got 3"),
        (lambda: refresh(w_eff=w_eff[1:]), "expected 4 effective weights, got 3"),
        (lambda: refresh(hints=hints[1:]), "expected 4 hints, got 3"),
        (lambda: refresh(hints=[h.float() for h in hints]), "hints must be contiguous float64"),
        (lambda: refresh(bits=bits[::-1]), "bits must be contiguous uint8"),
        (lambda: refresh(weights=[weights[0], *weights[2:], weights[1]]), "weights must have the 1200 elements of their scores"),
        (lambda: refresh(w_eff=[w_eff[0], w_eff[1].t(), *w_eff[2:]]), "w_eff must be contiguous with 1200 elements or empty"),
        (lambda: refresh(w_eff=[w_eff[0], w_eff[1].double(), *w_eff[2:]]), "w_eff must have its weight's dtype"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            call()
