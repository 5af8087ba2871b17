"""The Triton kernels of pack, unpack, count and stats against the reference, bit for bit, around a byte, a tile and a program."""

import pytest
import torch
from interpreter import DEVICE, apart, note_launches, only_where_kernels_run, poison

from subnet_kernels import reference

only_where_kernels_run()

from subnet_kernels.triton import bits as kernels  # noqa: E402

SIZES = [0, 1, 7, 8, 9, 511, 512, 513, 2047, 2048, 2049, 9001]


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    poison(monkeypatch)
    return note_launches(monkeypatch)


def mask_of(*shape, density=0.4):
    return torch.rand(*shape, device=DEVICE) < density


@pytest.mark.parametrize("n", SIZES)
def test_sizes(n, launched):
    mask, other = mask_of(n), mask_of(n)
    bits, owned = reference.pack(mask), reference.pack(other)
    assert torch.equal(kernels.pack(mask), bits)
    assert torch.equal(kernels.unpack(bits, [n]), mask)
    assert kernels.count(bits).item() == mask.sum().item()
    assert torch.equal(kernels.stats(bits, owned), reference.stats(bits, owned))
    assert len(launched) == (4 if n else 0)


def test_all_and_nothing():
    for density in (0, 2):
        mask = mask_of(1000, density=density)
        bits = kernels.pack(mask)
        assert torch.equal(bits, reference.pack(mask))
        assert kernels.count(bits).dtype == torch.int64
        assert kernels.stats(bits, bits).tolist() == [mask.sum().item(), 0, mask.sum().item()]


def test_strides_and_shapes():
    mask = mask_of(6, 10, 3)
    bits = reference.pack(mask)
    for moved in (*apart(mask), mask.transpose(0, 2).contiguous().transpose(0, 2)):
        assert torch.equal(kernels.pack(moved), bits)
    for moved in apart(bits):
        assert torch.equal(kernels.unpack(moved, mask.shape), mask)
        assert kernels.count(moved).item() == mask.sum().item()
        assert torch.equal(kernels.stats(moved, bits), reference.stats(bits, bits))
    assert kernels.pack(mask[0, 0, 0]).sum().item() == int(mask[0, 0, 0])
    assert kernels.unpack(kernels.pack(mask[0, 0, 0]), []).item() == mask[0, 0, 0].item()


def test_bytes_that_are_no_bits_of_a_mask(launched):
    data = torch.randint(256, (3, 7), dtype=torch.uint8, device=DEVICE)
    assert torch.equal(kernels.count(data), reference.count(data))
    assert torch.equal(kernels.stats(data, data), reference.stats(data, data))
    assert not launched


def test_more_words_than_a_program_counts():
    bits = torch.randint(256, (64 * 300,), dtype=torch.uint8, device=DEVICE)
    owned = bits.flip(0)
    assert torch.equal(kernels.count(bits), reference.count(bits))
    assert torch.equal(kernels.stats(bits, owned), reference.stats(bits, owned))


def test_refuses():
    bits = torch.zeros(64, dtype=torch.uint8, device=DEVICE)
    for call, sentence in (
        (lambda: kernels.pack(bits), "pack: mask must be bool"),
        (lambda: kernels.unpack(bits, [513]), "128 bytes for 513 weights, got 64"),
        (lambda: kernels.count(bits.int()), "count: bits must be uint8"),
        (lambda: kernels.stats(bits, bits.int()), "stats: bits and owned must be uint8"),
        (lambda: kernels.stats(bits, bits[:32]), "bits have 64 bytes, owned 32"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            call()
