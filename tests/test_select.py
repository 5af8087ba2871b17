"""select and refresh_: answers worked by hand for the reference, then every CPU instruction set against the reference, bit for bit."""

import numpy as np
import pytest
import torch
from device import DEVICE, ON_CPU, compiled_only, cpu_only
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import subnet_kernels as sk
from subnet_kernels import reference
from subnet_kernels.ops import refresh_

inf, nan = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TIES = ("last", "first", "all")


@pytest.fixture(autouse=True)
def _one_thread():
    """Parallel regions are slow where neighbours hold the cores; the tests of threads ask for more."""
    torch.set_num_threads(1)


def packed(n, kept):
    """The bits of n weights of which `kept` are open, by numpy."""
    mask = np.zeros((n + 511) // 512 * 512, dtype=bool)
    mask[list(kept)] = True
    return torch.from_numpy(np.packbits(mask, bitorder="little")).to(DEVICE)


# scores, k, by, {ties: kept indices}
TABLE = [
    # no ties: the largest magnitudes, whatever their sign
    ([1, -4, 2, -3], 2, "magnitude", {"last": [1, 3], "first": [1, 3], "all": [1, 3]}),
    ([1, -4, 2, -3], 2, "value", {"last": [0, 2], "first": [0, 2], "all": [0, 2]}),
    # k at its ends and beside them
    ([3, 1, 2], 0, "magnitude", {"last": [], "first": [], "all": []}),
    ([3, 1, 2], 1, "magnitude", {"last": [0], "first": [0], "all": [0]}),
    ([3, 1, 2], 2, "magnitude", {"last": [0, 2], "first": [0, 2], "all": [0, 2]}),
    ([3, 1, 2], 3, "magnitude", {"last": [0, 1, 2], "first": [0, 1, 2], "all": [0, 1, 2]}),
    # three ties of which one, or two, may stay
    ([2, 5, 2, 2], 2, "magnitude", {"last": [1, 3], "first": [0, 1], "all": [0, 1, 2, 3]}),
    ([2, 5, -2, 2], 3, "magnitude", {"last": [1, 2, 3], "first": [0, 1, 2], "all": [0, 1, 2, 3]}),
    ([2, 5, -2, 2], 3, "value", {"last": [0, 1, 3], "first": [0, 1, 3], "all": [0, 1, 3]}),
    # constant scores: position alone decides
    ([7, 7, 7, 7, 7], 2, "magnitude", {"last": [3, 4], "first": [0, 1], "all": [0, 1, 2, 3, 4]}),
    # -0 and +0 are one score, and below every negative score's magnitude but above its value
    ([0.0, -0.0, 0.0, -0.0], 2, "magnitude", {"last": [2, 3], "first": [0, 1], "all": [0, 1, 2, 3]}),
    ([-0.0, 0.0, -0.0, 0.0], 1, "value", {"last": [3], "first": [0], "all": [0, 1, 2, 3]}),
    ([-0.0, -1, 0.0, 1], 3, "value", {"last": [0, 2, 3], "first": [0, 2, 3], "all": [0, 2, 3]}),
    ([-0.0, -1, 0.0, 1], 2, "value", {"last": [2, 3], "first": [0, 3], "all": [0, 2, 3]}),
    # every NaN is largest and ties with every other NaN, whatever its sign
    ([1, nan, inf, nan], 1, "magnitude", {"last": [3], "first": [1], "all": [1, 3]}),
    ([1, -nan, inf, nan], 1, "value", {"last": [3], "first": [1], "all": [1, 3]}),
    ([1, nan, inf, -nan], 3, "value", {"last": [1, 2, 3], "first": [1, 2, 3], "all": [1, 2, 3]}),
    ([nan, nan, nan], 2, "magnitude", {"last": [1, 2], "first": [0, 1], "all": [0, 1, 2]}),
    # infinities: one magnitude, two values
    ([-inf, 5, inf, 6], 1, "magnitude", {"last": [2], "first": [0], "all": [0, 2]}),
    ([-inf, 5, inf, 6], 1, "value", {"last": [2], "first": [2], "all": [2]}),
    ([-inf, 5, inf, 6], 4, "value", {"last": [0, 1, 2, 3], "first": [0, 1, 2, 3], "all": [0, 1, 2, 3]}),
    ([-inf, -5, -inf, -6], 3, "value", {"last": [1, 2, 3], "first": [0, 1, 3], "all": [0, 1, 2, 3]}),
    # nothing to select from
    ([], 0, "magnitude", {"last": [], "first": [], "all": []}),
    ([4], 1, "value", {"last": [0], "first": [0], "all": [0]}),
]


def check_table(function, dtype):
    for scores, k, by, answers in TABLE:
        for ties, kept in answers.items():
            bits = function(torch.tensor(scores, dtype=dtype), k, by, ties)
            assert torch.equal(bits, packed(len(scores), kept)), f"{scores}, k={k}, {by}, {ties}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_gives_the_answers_worked_by_hand(dtype):
    check_table(lambda s, k, by, ties: reference.select([s], [k], by, ties)[0], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_gives_the_answers_worked_by_hand(cpu_isa, dtype):
    check_table(sk.select, dtype)


def test_logical_order_whatever_the_strides():
    """Equal scores: the last k in row-major order, though in memory the columns come first."""
    ones = torch.ones(3, 4).t()  # (4, 3), column-major
    assert torch.equal(reference.select([ones], [5])[0], packed(12, [7, 8, 9, 10, 11]))
    assert torch.equal(sk.select(ones, 5), packed(12, [7, 8, 9, 10, 11]))


# ------------------------------------------------------------------------------------------------- against the reference


def same(scores, k, by="magnitude", ties=TIES):
    for rule in ties:
        assert torch.equal(sk.select(scores, k, by, rule), reference.select([scores], [k], by, rule)[0]), f"k={k}, {by}, {rule}"


@pytest.mark.parametrize("n", [1, 63, 64, 65, 511, 512, 513, 1024, 1025, 4096, 9999])
def test_sizes_about_a_byte_a_word_a_tile_and_the_sampling_limit(cpu_isa, n):
    scores = torch.randn(n)
    for k in {0, 1, n // 3, n - 1, n}:
        same(scores, k, "value", ties=("last",))


@pytest.mark.parametrize("by", ["magnitude", "value"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_with_special_values_in_a_sampled_tensor(cpu_isa, dtype, by):
    """16-bit scores tie at every cut; k up to 3 cuts among NaN, then among infinities."""
    scores = torch.randn(30_001).to(dtype)
    scores[torch.randperm(30_001)[:12]] = torch.tensor([nan, inf, -inf, 0.0, -0.0, -nan] * 2, dtype=dtype)
    for k in (1, 3, 5, 9_000, 29_998):
        same(scores, k, by)


CASES = {
    "all equal: one key holds every score": lambda n: torch.full((n,), -0.25),
    "all zero, of both signs": lambda n: torch.zeros(n) * torch.randn(n).sign(),
    "two values, the cut within the larger": lambda n: torch.where(torch.rand(n) < 0.6, 1.0, -0.5),
    "two values, the cut near the border, the window between them": lambda n: torch.where(torch.arange(n) % 10 < 3, 1.0, 0.5),
    "ascending: all candidates lie side by side": lambda n: torch.arange(n, dtype=torch.float32),
    "descending": lambda n: -torch.arange(n, dtype=torch.float32),
    "denormals": lambda n: torch.randint(-5000, 5000, (n,)) * 1e-45,
    "a third is NaN": lambda n: torch.where(torch.rand(n) < 1 / 3, nan, torch.randn(n)),
    "a tie group of 40 % straddles the cut": lambda n: torch.where(torch.rand(n) < 0.4, 0.7, torch.randn(n)),
    "one score in a thousand is not zero": lambda n: torch.where(torch.rand(n) < 1e-3, torch.randn(n), 0.0),
    "every magnitude a float has": lambda n: torch.randint(-(2**31), 2**31 - 1, (n,), dtype=torch.int32).view(torch.float32),
    "period 16: what one register holds": lambda n: torch.arange(n) % 16 + 0.5,
}


@pytest.mark.parametrize("case", CASES)
def test_distributions(cpu_isa, case):
    n = 20_011
    scores = CASES[case](n)
    for by in ("magnitude", "value"):
        same(scores, int(0.3 * n), by)
    same(scores, n - 2, "value", ties=("last",))


def lying(n, *samples):
    """Scores that are huge wherever one of the samples looks."""
    scores = torch.rand(n)
    for sample in samples:
        scores[torch.from_numpy(sample).to(scores.device)] = 10 + torch.rand(len(sample))
    return scores


def refreshed(scores, k):
    """Refreshes one layer without hints, checks its bits and returns its hint."""
    hint = torch.zeros(4, dtype=torch.float64)
    bits = torch.empty(reference.nbytes(scores.numel()), dtype=torch.uint8)
    refresh_([scores], [scores], [k], [bits], [torch.empty(0)], [hint])
    assert torch.equal(bits, reference.select([scores], [k])[0])
    return hint


def test_sample_that_lies(cpu_isa):
    """The scores that are sampled are huge: the window misses."""
    n, k = 50_000, 15_000
    scores = lying(n, cpu_sample(n), cuda_sample(n, 0))
    assert refreshed(scores, k)[3] == 1, "the sample was not fooled, so what follows a miss was not tested"
    same(scores.double(), k)


def test_every_sample_that_lies(cpu_isa):
    """Both samples of the CUDA kernels are fooled: what remains is to select from all scores."""
    n, k = 200_000, 60_000
    scores = lying(n, cpu_sample(n), cuda_sample(n, 0), cuda_sample(n, 1))
    assert 1 <= refreshed(scores, k)[3] <= 2
    for by, dtype in (("value", torch.float32), ("magnitude", torch.bfloat16)):
        same(scores.to(dtype), k, by, ("last", "first"))


def hashed(x):
    """The top 32 bits of a shortened splitmix64 of uint64."""
    with np.errstate(over="ignore"):
        x = x * np.uint64(0x9E3779B97F4A7C15)
        return (x ^ (x >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9) >> np.uint64(32)


def cpu_sample(n):
    """The scores that the CPU kernel looks at before the scan: groups of four at places hashed from their number."""
    groups = int(np.cbrt(float(n) * float(n))) // 4
    stride = n // groups
    g = np.arange(1, groups + 1, dtype=np.uint64)
    start = np.arange(groups) * stride + (hashed(g) * np.uint64(stride - 3) >> np.uint64(32)).astype(np.int64)
    return (start[:, None] + np.arange(4)).reshape(-1)


def cuda_sample(n, attempt):
    """Those that the CUDA kernel looks at: one of each of so many equal parts, and of 127 others, its pilots."""
    samples = []
    for parts, stream in ((8192 if attempt else 2048 * min(max(n >> 17, 2), 32), 0), (127, 1)):
        g = np.arange(1, parts + 1, dtype=np.uint64) + (np.uint64(2 * attempt + stream) << np.uint64(32))
        samples.append(np.arange(parts) * (n // parts) + (hashed(g) * np.uint64(n // parts) >> np.uint64(32)).astype(np.int64))
    return np.concatenate(samples)


def test_strides_and_offsets(cpu_isa):
    """Conv scores in channels_last, a transposed and a sliced matrix, and scores that begin 4 bytes past a register's alignment."""
    conv = torch.randn(32, 16, 3, 3).round(decimals=1)
    same(conv.to(memory_format=torch.channels_last), 1400)
    same(torch.randn(40, 61).round(decimals=1).t(), 700)
    same(torch.randn(80, 50).round(decimals=1)[::2, 5:45], 500)
    same(torch.randn(2001).round(decimals=1)[1:], 600)
    same(torch.randn(1, 7).expand(300, 7), 630)


def test_list_of_tensors(cpu_isa):
    """One call for layers of every size and dtype, empty ones and scalars among them, is the calls one by one."""
    scores = [
        torch.randn(100, 784),
        torch.zeros(0),
        torch.randn(()),
        torch.randn(300, 5).bfloat16(),
        torch.randn(2, 3),
        torch.ones(3000).double(),
    ]
    k = [23_521, 0, 1, 450, 2, 1000]
    together = sk.select(scores, k)
    assert [b.numel() for b in together] == [reference.nbytes(s.numel()) for s in scores]
    for bits, s, n in zip(together, scores, k):
        assert torch.equal(bits, reference.select([s], [n])[0])
    assert sk.select([], []) == []


@cpu_only
@pytest.mark.parametrize("n", [150_000, 66_000])
def test_thread_counts_give_equal_bits(cpu_isa, n):
    """Ties straddle the border between the threads' shares."""
    scores = [torch.randn(n).bfloat16(), torch.randn(n // 2), torch.full((n,), 0.5), torch.arange(n, dtype=torch.float32)]
    k = [int(0.3 * s.numel()) for s in scores]
    expected = reference.select(scores, k)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for bits, answer in zip(sk.select(scores, k), expected):
            assert torch.equal(bits, answer)


VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0, 2.0, nan, -nan, inf, -inf, 1e-45, -1e-45, 0.5]) | st.floats(width=32)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(VALUES, max_size=130),
    share=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    by=st.sampled_from(["magnitude", "value"]),
    ties=st.sampled_from(["last", "first", "all"]),
)
def test_any_small_tensor(cpu_isa, values, share, dtype, by, ties):
    scores = torch.tensor(values, dtype=torch.float64).to(dtype)
    same(scores, round(share * len(values)), by, (ties,))


# ------------------------------------------------------------------------------------------------------------- refresh_


class Layers:
    """Layers for refresh_, their outputs filled with what must not survive."""

    def __init__(self, scores, weights=None, k=None, materialise=True):
        self.scores = scores
        self.weights = weights or [torch.randn(s.shape) for s in scores]
        self.k = k or [int(0.3 * s.numel()) for s in scores]
        self.bits = [torch.full((reference.nbytes(s.numel()),), 0xFF, dtype=torch.uint8) for s in scores]
        self.w_eff = [torch.full(w.shape if materialise else (0,), nan, dtype=w.dtype) for w in self.weights]
        self.hints = [torch.zeros(4, dtype=torch.float64) for _ in scores]

    def check(self, by="magnitude", ties="last", threads=1):
        """Refreshes, and compares what was written with the reference: bits, and effective weights down to the sign of zero."""
        for b, e in zip(self.bits, self.w_eff):
            b.fill_(0xFF)
            e.fill_(nan)
        torch.set_num_threads(threads)
        refresh_(self.scores, self.weights, self.k, self.bits, self.w_eff, self.hints, by, ties)
        torch.set_num_threads(1)
        expected = reference.select(self.scores, self.k, by, ties)
        for bits, e, w, answer in zip(self.bits, self.w_eff, self.weights, expected):
            assert torch.equal(bits, answer)
            if e.numel():
                assert_same_bytes(e, reference.apply(w, answer))


def assert_same_bytes(a, b):
    size = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    assert torch.equal(a.contiguous().view(size), b.contiguous().view(size))


@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_effective_weight_of_any_dtype(cpu_isa, weight_dtype):
    """NaN, infinity and -0 lie behind closed bits and open ones; the shapes end inside a byte, a register and a word."""
    scores = [torch.randn(n) for n in (7, 64, 1000, 4099)]
    weights = [torch.randn(s.shape).to(weight_dtype) for s in scores]
    for w in weights:
        w[::3] = torch.tensor([nan, inf, -0.0], dtype=weight_dtype).repeat(w.numel())[: len(w[::3])]
    Layers(scores, weights).check()


def test_poisoned_outputs_at_the_ends_of_k(cpu_isa):
    Layers([torch.randn(777), torch.randn(777), torch.randn(0)], k=[0, 777, 0]).check()


def test_strided_weights_and_layers_without_effective_weight(cpu_isa):
    scores = [torch.randn(50, 40).t(), torch.randn(2000), torch.randn(8, 16, 3, 3).to(memory_format=torch.channels_last)]
    layers = Layers(scores, [torch.randn(50, 40).t(), torch.randn(2000), torch.randn(8, 16, 3, 3)])
    layers.w_eff[1] = torch.empty(0)
    layers.w_eff = [e.contiguous() for e in layers.w_eff]
    layers.check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_warm_hints_after_small_moves(cpu_isa, dtype):
    """Steps as an optimizer makes them: every refresh is exact, and after the first ones hardly any window misses."""
    layers = Layers([torch.empty(100, 200).uniform_(-0.06, 0.06).to(dtype), torch.randn(5000).to(dtype)])
    for _ in range(20):
        layers.check()
        for s in layers.scores:
            s += (torch.randn(s.shape) * 1e-3).to(dtype)
    for scores, hint in zip(layers.scores, layers.hints):
        assert hint[3] <= 4, "the windows miss"
        assert hint[2] <= scores.numel() / 4, "the windows hold too many scores"


BAD_HINTS = {
    "NaN": [nan, nan, nan, nan],
    "infinite": [inf, inf, -inf, inf],
    "a NaN key with a width": [nan, 100.0, 0.0, 0.0],
    "beyond every key": [1e300, 1e300, 0, 0],
    "a window above all scores": [float(0x7F000000), 3.0, 0, 0],
    "a window below all scores": [-float(0x7F000000), 3.0, 0, 0],
    "a window that holds everything": [0.0, 9e18, 0, 0],
    "a negative width": [1e9, -5.0, 0, 0],
    "a window narrower than a key": [1065353216.5, 1e-3, 0, 0],
    "negative counts": [1065353216.0, 1000.0, -7.0, -1e300],
    "the largest doubles": [1.7e308, 1.7e308, 1.7e308, 1.7e308],
}


@pytest.mark.parametrize("hint", BAD_HINTS.values(), ids=BAD_HINTS)
def test_no_hint_changes_a_bit(cpu_isa, hint):
    """Whatever the hints hold the result is exact, the hints are good afterwards, and the next refresh is exact too."""
    layers = Layers([torch.randn(8192), torch.randn(600).bfloat16(), torch.randn(3000).double(), torch.full((2000,), 2.0)])
    for by in ("magnitude", "value"):
        for h in layers.hints:
            h.copy_(torch.tensor(hint, dtype=torch.float64))
        layers.check(by)
        for h, s in (
            zip(layers.hints, layers.scores) if ON_CPU else ()
        ):  # a kernel that takes no window of a small layer writes none
            assert h.isfinite().all(), h
            assert h[1] > 0, h
            assert 0 <= h[2] <= s.numel(), h
            assert h[3] >= 0, h
        layers.check(by, ties="first")


def test_hints_of_another_density_and_dtype(cpu_isa):
    """k may change between calls, and so may the scores' dtype: the window misses, the result does not."""
    layers = Layers([torch.randn(20_000)])
    for k in (6000, 200, 19_999, 0, 20_000, 6000):
        layers.k = [k]
        layers.check()
    layers.scores = [layers.scores[0].bfloat16()]
    layers.check()


def test_wide_window_overflows_the_list_of_candidates(cpu_isa):
    """Half of the scores differ and lie within the hinted window: more than are listed."""
    layers = Layers([torch.rand(100_000) + 1])
    layers.hints[0][:2] = torch.tensor([float(0x3FC00000), float(0x200000)])
    layers.check()
    if ON_CPU:  # how many are listed is the kernel's affair
        assert layers.hints[0][3] >= 1


@cpu_only
def test_many_layers_on_two_threads(cpu_isa):
    """The threads' shares end inside a layer."""
    layers = Layers([torch.randn(n) for n in (60_000, 10, 80_000, 1030)])
    for _ in range(3):
        layers.check(threads=2)
        for s in layers.scores:
            s += torch.randn(s.shape) * 1e-3


# ------------------------------------------------------------------------------------ layers too large for one block of a GPU

LARGE = {
    "all equal": lambda n: torch.full((n,), 0.5),
    "zeros of both signs": lambda n: torch.zeros(n) * torch.randn(n).sign(),
    "all NaN": lambda n: torch.full((n,), nan),
    "two values": lambda n: torch.where(torch.rand(n) < 0.5, 1.0, -2.0),
    "two values side by side": lambda n: torch.where(torch.arange(n) < n // 2, 2.0, 1.0),
    "40 % tie, scattered": lambda n: torch.where(torch.rand(n) < 0.4, 0.7, torch.randn(n)),
    "40 % tie, side by side": lambda n: torch.where((torch.arange(n) / n - 0.6).abs() < 0.2, 0.7, torch.randn(n)),
    "ascending": lambda n: torch.arange(n) / n,
    "a period that divides the samples' parts": lambda n: torch.arange(n) % 6 + torch.rand(n) * (torch.arange(n) % 6 == 3),
    "a period of a strip": lambda n: (torch.arange(n) % 1024) / 1024 + (torch.arange(n) // 1024) * 1e-6,
    "a narrow cluster and outliers": lambda n: torch.where(torch.rand(n) < 0.01, 1e6 * torch.randn(n), 1 + 1e-6 * torch.randn(n)),
    "mostly infinite": lambda n: torch.where(torch.rand(n) < 0.7, inf, torch.randn(n)),
}


@pytest.mark.parametrize("case", LARGE)
def test_large_layers_cold_and_warm(cpu_isa, case):
    """Candidates overflow or all tie; twice, so that the second call starts from hints. Sizes end inside a strip and at its end."""
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    layers = Layers([LARGE[case](n).to(d) for n, d in zip((40_011, 36_864, 17_000), dtypes)])
    for by, ties in (("magnitude", "last"), ("magnitude", "first"), ("value", "all")):
        for share in (0.3, 0.41):
            layers.k = [int(share * s.numel()) for s in layers.scores]
            layers.check(by, ties)
            layers.check(by, ties)


@pytest.mark.parametrize("hint", BAD_HINTS.values(), ids=BAD_HINTS)
def test_no_hint_changes_a_bit_of_a_large_layer(cpu_isa, hint):
    layers = Layers([torch.randn(20_000).to(d) for d in DTYPES] + [torch.full((20_000,), 2.0)])
    for ties in TIES:
        for h in layers.hints:
            h.copy_(torch.tensor(hint, dtype=torch.float64))
        layers.check("value", ties)
        for h, s in zip(layers.hints, layers.scores):
            assert h.isfinite().all(), h
            assert h[1] > 0, h
            assert 0 <= h[2] <= s.numel(), h
            assert h[3] >= 0, h
        layers.check("value", ties)


def test_windows_that_miss_by_a_little_and_by_much(cpu_isa):
    """Hints whose window lies just above, just below and far from the threshold; then the scores are replaced."""
    layers = Layers([torch.rand(30_000) + 1])
    layers.check()
    good = layers.hints[0].clone()
    for shift in (-3.0, -1.001, -0.999, 0.0, 0.999, 1.001, 3.0, 1e6):
        layers.hints[0].copy_(good)
        layers.hints[0][0] += shift * good[1]
        layers.check()
    for scores in (torch.randn(30_000) * 1e-3, torch.full((30_000,), 7.0), torch.randn(30_000) * 1e3):
        layers.scores = [scores]
        layers.check()
        layers.check(ties="all")


@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_effective_weight_of_large_layers(cpu_isa, weight_dtype):
    """Every pair of dtypes; what lies behind closed bits is NaN, infinity and -0; k ends at 0 and n."""
    scores = [torch.randn(n).to(d) for n, d in zip((16_385, 17_408, 20_001, 18_000), DTYPES)]
    weights = [torch.randn(s.shape).to(weight_dtype) for s in scores]
    for w in weights:
        w[::3] = torch.tensor([nan, inf, -0.0], dtype=weight_dtype).repeat(w.numel())[: len(w[::3])]
    layers = Layers(scores, weights)
    for share in (0.3, 0, 1, 1e-4):
        layers.k = [int(share * s.numel()) for s in scores]
        layers.check()


def test_misaligned_memory(cpu_isa):
    """Scores, weights, bits and effective weights that begin one element past any alignment."""
    for n in (700, 20_000):
        layers = Layers([torch.randn(n + 1)[1:], torch.randn(n + 1).bfloat16()[1:]])
        layers.weights = [torch.randn(n + 1)[1:], torch.randn(n + 1).half()[1:]]
        layers.bits = [torch.empty(reference.nbytes(n) + 1, dtype=torch.uint8)[1:] for _ in layers.scores]
        layers.w_eff = [torch.empty(n + 1, dtype=w.dtype)[1:] for w in layers.weights]
        layers.check()


def test_forty_layers_of_every_size_and_dtype(cpu_isa):
    sizes = [0, 1, 31, 33, 511, 1024, 1025, 9408, 16_383, 16_384, 16_385, 16_896, 32_768, 65_537, 200_000, 5] + [700] * 24
    scores = [torch.randn(n).to(DTYPES[i % 4]) for i, n in enumerate(sizes)]
    layers = Layers(scores, [torch.randn(n).to(DTYPES[i % 3]) for i, n in enumerate(sizes)])
    layers.k = [int(n * (i % 7) / 6) for i, n in enumerate(sizes)]
    layers.check("value", "first")
    layers.check("value", "first")


def test_more_layers_than_one_launch_carries(cpu_isa):
    """A long list is cut into several launches, each with large layers of its own."""
    scores = [torch.randn(17_000 if i % 97 == 50 else 3 + i % 60) for i in range(300)]
    k = [s.numel() // 3 for s in scores]
    for bits, answer in zip(sk.select(scores, k), reference.select(scores, k)):
        assert torch.equal(bits, answer)


def test_same_scores_give_same_bits_and_hints(cpu_isa):
    layers = Layers([torch.randn(50_000), torch.randn(30_000).bfloat16(), torch.randn(500)])
    found = []
    for _ in range(3):
        for h in layers.hints:
            h.zero_()
        layers.check()
        layers.check()
        found.append(torch.stack(layers.hints))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layers=st.lists(
        st.tuples(
            st.integers(1, 4000) | st.integers(16_385, 24_000),
            st.sampled_from(list(LARGE)),
            st.sampled_from(DTYPES),
            st.sampled_from([0.0, 1.0, 0.5, 0.999, 1e-4]) | st.floats(0, 1),
        ),
        min_size=1,
        max_size=4,
    ),
    by=st.sampled_from(["magnitude", "value"]),
    ties=st.sampled_from(TIES),
    move=st.sampled_from([0.0, 1e-3, 1.0]),
)
def test_any_list_of_layers(cpu_isa, layers, by, ties, move):
    """Twice, with the scores moved between the calls: hints are good, stale or useless."""
    scores = [LARGE[case](n).to(dtype) for n, case, dtype, _ in layers]
    all_layers = Layers(scores, k=[round(share * n) for n, _, _, share in layers])
    all_layers.check(by, ties)
    for s in scores:
        s += (torch.randn(s.shape) * move).to(s.dtype)
    all_layers.check(by, ties)


# ---------------------------------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((torch.ones(4), 5), "k must be an int between 0 and 4, got 5"),
        ((torch.ones(4), -1), "k must be an int between 0 and 4, got -1"),
        ((torch.ones(4), 2.0), "k must be an int"),
        (([torch.ones(4)] * 2, [1, 2, 3]), "got 3 for 2 tensors"),
        ((torch.ones(4, dtype=torch.int32), 1), "floating dtype"),
        ((torch.ones(4), 1, "abs"), "by must be one of"),
        ((torch.ones(4), 1, "value", "any"), "ties must be one of"),
    ],
)
def test_select_refuses(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        sk.select(*arguments)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"k": [5]}, "k must be between 0 and 4, got 5"),
        ({"k": [1, 2]}, "expected 1 values of k, got 2"),
        ({"hints": []}, "expected 1 hints, got 0"),
        ({"bits": [torch.zeros(8, dtype=torch.uint8)]}, "bits must be contiguous uint8 with 64 bytes"),
        ({"bits": [torch.zeros(128, dtype=torch.uint8)[::2]]}, "bits must be contiguous"),
        ({"w_eff": [torch.zeros(5)]}, "w_eff must be contiguous with 4 elements or empty, got 5"),
        ({"w_eff": [torch.zeros(4, dtype=torch.float64)]}, "w_eff must have its weight's dtype"),
        ({"weights": [torch.zeros(5)]}, "weights must have the 4 elements of their scores, got 5"),
        ({"hints": [torch.zeros(4)]}, "hints must be contiguous float64 with 4 elements"),
        ({"scores": [torch.zeros(4, dtype=torch.int32)]}, "scores must be float16, bfloat16, float32 or float64"),
        ({"by": "abs"}, "by must be 'magnitude' or 'value', got 'abs'"),
        ({"ties": "none"}, "ties must be 'last', 'first' or 'all', got 'none'"),
    ],
)
@compiled_only
def test_refresh_refuses(change, sentence):
    good = {
        "scores": [torch.randn(4)],
        "weights": [torch.randn(4)],
        "k": [1],
        "bits": [torch.zeros(64, dtype=torch.uint8)],
        "w_eff": [torch.zeros(4)],
        "hints": [torch.zeros(4, dtype=torch.float64)],
    }
    with pytest.raises(RuntimeError, match=sentence):
        refresh_(**{**good, **change})
