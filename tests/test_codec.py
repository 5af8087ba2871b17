"""Coded masks: every mask comes back, near its entropy, and nothing else than a coded mask is taken for one."""

import contextlib
import math
import re
import struct
import threading
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from subnet_kernels import codec, reference

pytest.importorskip("subnet_kernels._codec", reason="the codec is not compiled: pip install with pybind11 there")
from subnet_kernels import _codec

BLOCK = 524_288  # weights
DENSITIES = (0.0, 0.001, 0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 0.97, 1.0)
SIZES = (0, 1, 7, 8, 9, 63, 64, 65, 511, 512, 513, 30_000, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 12_345)
DOCS = Path(__file__).parent.parent / "docs" / "codec.md"


def mask(n, density, seed=0):
    return reference.pack(torch.rand(n, generator=torch.Generator().manual_seed(seed)) < density)


def h(p):
    return -(p * math.log2(p) + (1 - p) * math.log2(1 - p)) if 0 < p < 1 else 0.0


@pytest.fixture(scope="module")
def reader():
    """The functions that docs/codec.md prints."""
    names = {}
    exec(re.search(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)[1], names)
    return names["read"]


@pytest.mark.parametrize("planes", [0, 1, 2, 3])
@pytest.mark.parametrize("n", SIZES)
def test_every_mask_comes_back(n, planes):
    context = [mask(n, 0.2 + 0.3 * k, 100 + k) for k in range(planes)]
    for density in DENSITIES:
        bits = mask(n, density)
        data = codec.encode(bits, n, context)
        assert torch.equal(codec.decode(data, n, context), bits)
        blocks = -(-n // BLOCK)
        assert len(data) <= -(-n // 8) + 24 + 11 * blocks


@pytest.mark.parametrize("planes", [0, 1, 2, 3])
@pytest.mark.parametrize("n", [0, 1, 7, 513, 5000])
def test_entropy_is_counted_over_contexts(n, planes):
    chance = torch.Generator().manual_seed(n)
    bits, *context = (torch.rand(n, generator=chance) < p for p in (0.2, 0.5, 0.1, 0.0)[: planes + 1])
    which = sum((plane.long() << k for k, plane in enumerate(context)), torch.zeros(n, dtype=torch.int64))
    expected = 0.0
    for value in which.unique().tolist():
        share = bits[which == value].double().mean()
        expected += int((which == value).sum()) * float(
            -(torch.xlogy(share, share) + torch.xlogy(1 - share, 1 - share)) / math.log(2)
        )
    found = codec.entropy(reference.pack(bits), n, [reference.pack(plane) for plane in context])
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-9)


@pytest.mark.parametrize("density", DENSITIES[1:-1])
@pytest.mark.parametrize("n", [30_000, 266_200, 1_000_000, 5_000_000])
def test_size_is_the_entropy(n, density):
    """The bound of the project's plan is .5 % and 64 bytes; blocks of rare ones need their headers beside that."""
    bits = mask(n, density)
    floor = codec.entropy(bits, n) / 8
    assert floor == pytest.approx(n * h(reference.unpack(bits, (n,)).double().mean().item()) / 8)
    size = len(codec.encode(bits, n))
    assert floor <= size + 16  # with one share of ones a block the code may know a little more than one for all
    assert size <= 1.005 * floor + (64 if density > 0.001 else 64 * -(-n // BLOCK))


def test_context_pays():
    """Of 30 % open weights, 45 % of those in use and 7.5 % of the others: .749 bits and not .881."""
    n = 2_000_000
    chance = torch.Generator().manual_seed(1)
    used = torch.rand(n, generator=chance) < 0.6
    opened = torch.rand(n, generator=chance) < torch.where(used, 0.45, 0.075)
    bits, context = reference.pack(opened), reference.pack(used)
    alone, given = len(codec.encode(bits, n)), len(codec.encode(bits, n, [context]))
    assert 8 * alone / n == pytest.approx(h(0.3), abs=2e-3)
    assert 8 * given / n == pytest.approx(0.6 * h(0.45) + 0.4 * h(0.075), abs=2e-3)
    assert given <= 1.005 * codec.entropy(bits, n, [context]) / 8 + 64
    assert torch.equal(codec.decode(codec.encode(bits, n, [context]), n, [context]), bits)


def test_a_context_may_say_all():
    n = 100_003
    bits = mask(n, 0.3)
    data = codec.encode(bits, n, [bits])
    assert len(data) < 32  # both contexts are constant
    assert torch.equal(codec.decode(data, n, [bits]), bits)


def test_the_printed_reader_reads(reader):
    cases = ((0, 0.5, 0), (1, 1.0, 0), (3_001, 0.1, 0), (5_000, 0.004, 1), (4_097, 0.6, 2), (2_000, 0.3, 3), (900, 0.5, 0))
    for n, density, planes in cases:
        context = [mask(n, 0.3 + 0.2 * k, 7 + k) for k in range(planes)]
        bits = mask(n, density, 3)
        data = codec.encode(bits, n, context)
        lists = [reference.unpack(plane, (n,)).int().tolist() for plane in context]
        assert reader(data, lists) == reference.unpack(bits, (n,)).int().tolist()


def test_the_printed_reader_crosses_blocks(reader):
    n = BLOCK + 70
    bits = torch.zeros(reference.nbytes(n), dtype=torch.uint8)
    bits[: BLOCK // 8] = 255  # a constant block, and a coded one
    bits[-64:] = mask(70, 0.2)[-64:]
    assert reader(codec.encode(bits, n)) == reference.unpack(bits, (n,)).int().tolist()


@given(data=st.data())
def test_any_bits_come_back(data):
    n = data.draw(st.integers(0, 600))
    packed = st.lists(st.booleans(), min_size=n, max_size=n).map(lambda v: reference.pack(torch.tensor(v, dtype=torch.bool)))
    bits, context = data.draw(packed), data.draw(st.lists(packed, max_size=3))
    assert torch.equal(codec.decode(codec.encode(bits, n, context), n, context), bits)


@pytest.mark.parametrize("n", [0, 1, 8, 108, 4_001, BLOCK + 9])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5])
def test_sealed_masks_come_back(n, density):
    """In no more than their own bytes and a checksum."""
    bits, context = mask(n, density), [mask(n, 0.4, 1)]
    data = codec.seal(bits, n, context)
    assert len(data) == 4 + min(-(-n // 8), len(codec.encode(bits, n, context)))
    assert torch.equal(codec.unseal(data, n, context), bits)


def test_a_sealed_mask_is_no_other_one():
    """Another context, any byte changed, cut or added: each is noticed."""
    n = 2_000
    context = [mask(n, 0.5, 1)]
    for density in (0.1, 0.5):  # coded, and as it is
        bits = mask(n, density)
        data = codec.seal(bits, n, context)
        assert (len(data) == 4 + n // 8) == (density == 0.5)
        spoilt = [data[:-1], data[:3], torch.cat([data, data[:1]])]
        for i in range(len(data)):
            other = data.clone()
            other[i] ^= 1 << (i % 8)
            spoilt.append(other)
        for other in spoilt:
            with pytest.raises(ValueError, match="decode: "):
                codec.unseal(other, n, context)
    data = codec.seal(mask(n, 0.1), n, context)
    moved = 0
    for seed in range(20):
        one, other = (seed * 97) % n, (seed * 97 + 1) % n  # two weights change places in the context, all counts stay
        plane = reference.unpack(context[0], (n,)).clone()
        plane[[one, other]] = plane[[other, one]]
        changed = reference.pack(plane)
        if torch.equal(changed, context[0]):
            continue
        with contextlib.suppress(ValueError):
            assert torch.equal(codec.unseal(data, n, [changed]), mask(n, 0.1))
            continue
        moved += 1
    assert moved  # found by the checksum of the mask alone


def test_instruction_sets_threads_and_alignment_make_the_same_bytes():
    n = 3 * BLOCK + 777
    bits, context = mask(n, 0.1), [mask(n, 0.5, 1), mask(n, 0.2, 2)]
    data = codec.encode(bits, n, context, threads=1)
    assert codec.encode(bits, n, context, threads=2) == codec.encode(bits, n, context, threads=7) == data
    odd = torch.empty(len(bits) + 1, dtype=torch.uint8)[1:].copy_(bits)
    assert codec.encode(odd, n, context) == data
    try:
        _codec.use_portable(True)
        assert codec.encode(bits, n, context) == data
        assert torch.equal(codec.decode(data, n, context), bits)
    finally:
        _codec.use_portable(False)


def test_other_threads_run_meanwhile():
    """The lock of the interpreter is free: a thread that counts goes on while a mask is coded."""
    n = 20_000_000
    bits, counted, done = mask(n, 0.3), [0], threading.Event()

    def count():
        while not done.is_set():
            counted[0] += 1

    other = threading.Thread(target=count)
    other.start()
    before = counted[0]
    codec.encode(bits, n, threads=1)
    during = counted[0] - before
    done.set()
    other.join()
    assert during > 1000  # with the lock held it would be a handful


@given(data=st.data())
def test_damage_is_refused(data):
    n = 40_000
    bits = mask(n, data.draw(st.sampled_from([0.01, 0.3, 0.5])))
    coded = bytearray(codec.encode(bits, n))
    kind = data.draw(st.sampled_from(["flip", "cut", "grow"]))
    if kind == "flip":
        coded[data.draw(st.integers(0, len(coded) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del coded[data.draw(st.integers(0, len(coded) - 1)) :]
    else:
        coded += data.draw(st.binary(min_size=1, max_size=9))
    with pytest.raises(ValueError, match="decode"):
        codec.decode(bytes(coded), n)


@given(data=st.data())
def test_damage_behind_right_checksums_is_refused_or_harmless(data):
    """Whoever writes such bytes can write checksums: what is decoded then may be any mask, but nothing outside of it is touched."""
    n = data.draw(st.sampled_from([100, 5_000, 40_000]))
    context = [mask(n, 0.4, 9)] if data.draw(st.booleans()) else []
    coded = bytearray(codec.encode(mask(n, 0.2), n, context))
    begin = 5 + len(number(n)) + len(number(len(coded)))  # one block, whose size takes as many bytes as all of them
    while zlib.crc32(coded[:begin]) != struct.unpack("<I", coded[begin : begin + 4])[0]:
        begin -= 1
    block = coded[begin + 4 :]
    for _ in range(data.draw(st.integers(1, 4))):
        block[data.draw(st.integers(4, len(block) - 1))] = data.draw(st.integers(0, 255))
    block[:4] = struct.pack("<I", zlib.crc32(block[4:]))
    bits = torch.zeros(reference.nbytes(n), dtype=torch.uint8)
    with contextlib.suppress(ValueError):
        bits = codec.decode(bytes(coded[: begin + 4] + block), n, context)
    assert n % 8 == 0 or int(bits[n // 8]) >> n % 8 == 0
    assert not bits[-(-n // 8) :].any()


def number(value):
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def test_large_claims_of_small_files_are_refused():
    """Before anything of their size is made."""
    for n in (1 << 40, (1 << 62) + 5):
        head = b"SKM1\0" + number(n)
        with pytest.raises(ValueError, match=r"decode: the coded mask must be of 10 weights, it is of \d+"):
            codec.decode(head + struct.pack("<I", zlib.crc32(head)), 10)
    head = b"SKM1\0" + number(10) + number(1 << 50)
    with pytest.raises(ValueError, match="a block has no possible size"):
        codec.decode(head + struct.pack("<I", zlib.crc32(head)), 10)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: codec.encode(torch.zeros(64), 10),
            r"bits of encode must be uint8 \(64,\) on the CPU for 10 weights, got torch.float32",
        ),
        (lambda: codec.encode(torch.zeros(64, dtype=torch.uint8), 513), r"bits of encode must be uint8 \(128,\)"),
        (lambda: codec.encode(torch.full((64,), 255, dtype=torch.uint8), 10), "zero padding after the 10 weights"),
        (lambda: codec.encode(mask(10, 0.5), 10, [mask(10, 0.5)] * 4), "at most 3 masks, got 4"),
        (lambda: codec.encode(mask(10, 0.5), 10, [mask(600, 0.5)]), "context 0 of encode must be uint8"),
        (lambda: codec.encode(mask(10, 0.5), 10, threads=0), "threads must be at least 1, got 0"),
        (lambda: codec.encode(mask(10, 0.5), -1), "n must be a number of weights, got -1"),
        (lambda: codec.decode(codec.encode(mask(10, 0.5), 10), 11), "must be of 11 weights, it is of 10"),
        (lambda: codec.decode(codec.encode(mask(10, 0.5), 10), 10, [mask(10, 0.5)]), "as many planes as the mask was coded with"),
        (lambda: codec.decode(b"", 10), "it does not begin as one"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call()
