"""threshold and refresh_threshold_: answers worked by hand, then every CPU instruction set against the reference, bit for bit."""

import numpy as np
import pytest
import torch
from device import DEVICE, compiled_only

import subnet_kernels as sk
from subnet_kernels import reference
from subnet_kernels.ops import refresh_threshold_

inf, nan = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(autouse=True)
def _one_thread():
    """Parallel regions are slow where neighbours hold the cores; the tests of threads ask for more."""
    torch.set_num_threads(1)


def packed(n, open_):
    """The bits of n weights of which those in `open_` are open, by numpy."""
    mask = np.zeros((n + 511) // 512 * 512, dtype=bool)
    mask[list(open_)] = True
    return torch.from_numpy(np.packbits(mask, bitorder="little")).to(DEVICE)


# scores, value, open where score >= value, open where score > value
TABLE = [
    ([-1, 0, 1, 2], 1.0, [2, 3], [3]),
    ([-2, -1, -0.5, 3], -1.0, [1, 2, 3], [2, 3]),
    # both zeros equal a threshold of either zero
    ([-1, -0.0, 0.0, 1], 0.0, [1, 2, 3], [3]),
    ([-1, -0.0, 0.0, 1], -0.0, [1, 2, 3], [3]),
    # NaN is closed, whatever its sign and the value
    ([nan, -nan, inf, -inf], -inf, [2, 3], [2]),
    ([nan, -nan, inf, 5], inf, [2], []),
    ([nan, 1, -1], nan, [], []),
    ([0.5, 1, 2], 1.0, [1, 2], [2]),
    ([], 0.0, [], []),
    ([3], 3.0, [0], []),
]


def check_table(function, dtype):
    for scores, value, inclusive, exclusive in TABLE:
        for flag, open_ in ((True, inclusive), (False, exclusive)):
            bits = function(torch.tensor(scores, dtype=dtype), value, flag)
            assert torch.equal(bits, packed(len(scores), open_)), f"{scores}, {value}, inclusive={flag}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_gives_the_answers_worked_by_hand(dtype):
    check_table(lambda s, v, inclusive: reference.threshold([s], v, inclusive)[0], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_gives_the_answers_worked_by_hand(cpu_isa, dtype):
    check_table(sk.threshold, dtype)


def same(scores, value):
    for inclusive in (True, False):
        expected = reference.threshold([scores], value, inclusive)[0]
        assert torch.equal(sk.threshold(scores, value, inclusive), expected), f"{value}, inclusive={inclusive}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_value_is_rounded_to_the_dtype_first(cpu_isa, dtype):
    """Values beside, between and beyond what the dtype holds, and one that rounds differently by way of float32."""
    near = torch.tensor([1.0, 1.0078125, 5e-3, 0.0, -1.0, 65504.0, inf, -inf, 1e-45], dtype=dtype)
    values = [1 + 2**-30, 1.00390625, 1.00390625 + 2**-40, 5e-3, 1e-50, -1e-50, 65519.9, 65520.0, 7e-46, 3e38]
    for value in values:
        same(near, value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 7, 63, 64, 65, 511, 512, 513, 9999])
def test_sizes_about_a_byte_a_word_and_a_tile(cpu_isa, dtype, n):
    scores = torch.randn(n).round(decimals=1).to(dtype)
    scores[::11] = nan
    for value in (0.0, -0.3, inf):
        same(scores, value)


def test_strides_offsets_and_denormals(cpu_isa):
    same(torch.randn(32, 16, 3, 3).to(memory_format=torch.channels_last), 0.1)
    same(torch.randn(40, 61).t(), 0.0)
    same(torch.randn(80, 50)[::2, 5:45], -0.2)
    same(torch.randn(2001)[1:], 0.0)
    same(torch.randint(-9, 9, (500,)) * 1e-45, 2e-45)


def test_list_of_tensors_and_thread_counts(cpu_isa):
    """One call for many layers is the calls one by one, on any number of threads; shares end inside layers."""
    scores = [torch.randn(90_001), torch.zeros(0), torch.randn(()), torch.randn(70_000).bfloat16(), torch.randn(500).double()]
    expected = reference.threshold(scores, 0.25)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for bits, answer in zip(sk.threshold(scores, 0.25), expected):
            assert torch.equal(bits, answer)
    assert sk.threshold([], 0.0) == []


def test_many_layers_of_every_dtype(cpu_isa):
    """More layers than one launch of a GPU carries, with sizes about what a warp and a block take at a time."""
    sizes = [1023, 1024, 1025, 8191, 8192, 8193, 20_000] + [1 + i % 70 for i in range(293)]
    scores = [torch.randn(n).to(DTYPES[i % 4]) for i, n in enumerate(sizes)]
    for bits, answer in zip(sk.threshold(scores, -0.1), reference.threshold(scores, -0.1)):
        assert torch.equal(bits, answer)


@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_memory(cpu_isa, dtype):
    """Scores, weights, bits and effective weights that begin one element past any alignment."""
    n = 2000
    scores, weight, w_eff = (torch.randn(n + 1).to(dtype)[1:] for _ in range(3))
    bits = torch.empty(reference.nbytes(n) + 1, dtype=torch.uint8)[1:]
    refresh_threshold_([scores], [weight], 0.1, True, [bits], [w_eff])
    assert torch.equal(bits, reference.threshold([scores], 0.1)[0])
    assert torch.equal(w_eff, reference.apply(weight, bits))


@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_refresh_writes_bits_and_effective_weight(cpu_isa, weight_dtype):
    """Outputs are filled with what must not survive; NaN and infinity lie behind closed bits; some layers want no weight."""
    scores = [torch.randn(n) for n in (7, 64, 1000, 4099, 0, 300)]
    weights = [torch.randn(s.shape).to(weight_dtype) for s in scores]
    for w in weights:
        w[::3] = torch.tensor([nan, inf, -0.0], dtype=weight_dtype).repeat(w.numel())[: len(w[::3])]
    bits = [torch.full((reference.nbytes(s.numel()),), 0xFF, dtype=torch.uint8) for s in scores]
    w_eff = [torch.full_like(w, nan) for w in weights]
    w_eff[-1] = torch.empty(0)
    for inclusive in (True, False):
        refresh_threshold_(scores, weights, 0.1, inclusive, bits, w_eff)
        for b, e, w, answer in zip(bits, w_eff, weights, reference.threshold(scores, 0.1, inclusive)):
            assert torch.equal(b, answer)
            if e.numel():
                size = {2: torch.int16, 4: torch.int32, 8: torch.int64}[e.element_size()]
                assert torch.equal(e.view(size), reference.apply(w, answer).view(size))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"weights": []}, "expected 1 weights, got 0"),
        ({"bits": [torch.zeros(8, dtype=torch.uint8)]}, "bits must be contiguous uint8 with 64 bytes"),
        ({"w_eff": [torch.zeros(5)]}, "w_eff must be contiguous with 4 elements or empty, got 5"),
        ({"w_eff": [torch.zeros(4, dtype=torch.float64)]}, "w_eff must have its weight's dtype"),
        ({"scores": [torch.zeros(4, dtype=torch.int32)]}, "scores must be float16, bfloat16, float32 or float64"),
    ],
)
@compiled_only
def test_refresh_refuses(change, sentence):
    good = {
        "scores": [torch.randn(4)],
        "weights": [torch.randn(4)],
        "value": 0.0,
        "inclusive": True,
        "bits": [torch.zeros(64, dtype=torch.uint8)],
        "w_eff": [torch.zeros(4)],
    }
    with pytest.raises(RuntimeError, match=sentence):
        refresh_threshold_(**{**good, **change})


def test_threshold_refuses():
    with pytest.raises(ValueError, match="floating dtype"):
        sk.threshold(torch.zeros(4, dtype=torch.int32), 0.0)
