"""pack, unpack, count, union_, stats, overlap: the layout worked by hand, numpy as oracle, every instruction set against the reference."""

import numpy as np
import pytest
import torch
from device import compiled_only, cpu_only
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import subnet_kernels as sk
from subnet_kernels import reference

SIZES = [0, 1, 7, 8, 31, 63, 64, 65, 511, 512, 513, 1021]  # around a byte, a word and a tile; a prime
TASKS = [1, 3, 4, 5, 16, 17, 64, 65, 130]  # around the steps of overlap and a block


def random_mask(*shape, density=0.3):
    return torch.rand(shape) < density


def test_layout_by_hand():
    """Weight 0 is the lowest bit of byte 0, weight 8 that of byte 1, and everything after the last weight is zero."""
    mask = torch.tensor([1, 0, 0, 1, 0, 0, 0, 1, 0, 1], dtype=torch.bool)
    bits = sk.pack(mask)
    assert bits.shape == (64,)
    assert bits[:3].tolist() == [0b10001001, 0b00000010, 0]
    assert int(bits[3:].sum()) == 0
    assert sk.unpack(bits, (2, 5)).tolist() == [[True, False, False, True, False], [False, False, True, False, True]]
    assert sk.count(bits).item() == 4


def test_padding_is_zero():
    for n in (1, 511, 513):
        bits = sk.pack(torch.ones(n, dtype=torch.bool))
        assert len(bits) == reference.nbytes(n)
        assert sk.count(bits).item() == n


@pytest.mark.parametrize("n", SIZES)
def test_numpy_agrees(cpu_isa, n):
    mask = random_mask(n)
    bits = sk.pack(mask).cpu().numpy()
    expected = np.packbits(mask.cpu().numpy(), bitorder="little")
    assert np.array_equal(bits[: len(expected)], expected)
    assert not bits[len(expected) :].any()


@pytest.mark.parametrize("n", SIZES)
def test_against_reference(cpu_isa, n):
    mask, other = random_mask(n), random_mask(n, density=0.6)
    bits, owned = reference.pack(mask), reference.pack(other)
    assert torch.equal(sk.pack(mask), bits)
    unpacked = sk.unpack(bits, (n,))
    assert unpacked.dtype == torch.bool
    assert torch.equal(unpacked, mask)
    assert torch.equal(unpacked.view(torch.uint8), mask.view(torch.uint8))  # true is 1, whatever comparison says
    assert torch.equal(sk.count(bits), mask.sum())
    assert sk.stats(bits, owned).tolist() == [int(mask.sum()), int((mask & ~other).sum()), int((mask & other).sum())]
    union = owned.clone()
    assert sk.union_(union, bits) is union
    assert torch.equal(union, reference.pack(mask | other))


def test_empty_and_scalar(cpu_isa):
    assert sk.pack(torch.zeros(0, 3, dtype=torch.bool)).shape == (0,)
    assert sk.unpack(torch.zeros(0, dtype=torch.uint8), (0, 3)).shape == (0, 3)
    assert sk.count(torch.zeros(0, dtype=torch.uint8)).item() == 0
    assert sk.stats(torch.zeros(0, dtype=torch.uint8), torch.zeros(0, dtype=torch.uint8)).tolist() == [0, 0, 0]
    assert sk.pack(torch.tensor(True))[:2].tolist() == [1, 0]
    assert sk.unpack(sk.pack(torch.tensor(True)), ()).item() is True


def test_strides(cpu_isa):
    """Logical order, whatever the memory looks like; bits may start at any byte of their storage."""
    mask = random_mask(13, 6, 5, 7)
    for view in (
        mask.transpose(0, 1),
        mask[2:, 1:4],
        mask[..., ::3],
        mask.to(memory_format=torch.channels_last),
        mask[:, :1].expand(13, 9, 5, 7),
    ):
        assert torch.equal(sk.pack(view), reference.pack(view.contiguous()))
    for offset in (1, 2, 5):
        storage = torch.full((offset + 128,), 255, dtype=torch.uint8)
        bits = storage[offset : offset + 128]
        bits.copy_(reference.pack(random_mask(1000)))
        assert torch.equal(sk.unpack(bits, (1000,)), reference.unpack(bits, (1000,)))
        assert torch.equal(sk.count(bits), reference.count(bits))
        other = reference.pack(random_mask(1000))
        assert torch.equal(sk.stats(bits, other), reference.stats(bits, other))
        expected = bits | other
        sk.union_(bits, other)
        assert torch.equal(bits, expected)
        assert (storage[:offset] == 255).all()


def test_every_second_byte(cpu_isa):
    bits = torch.randint(0, 256, (256,), dtype=torch.uint8)[::2]
    owned = torch.randint(0, 256, (256,), dtype=torch.uint8)
    expected = owned.clone()
    expected[1::2] |= bits
    sk.union_(owned[1::2], bits)
    assert torch.equal(owned, expected)
    assert torch.equal(sk.count(bits), reference.count(bits))


def test_odd_bool_bytes(cpu_isa):
    """A bool made of some other non-zero byte is true, as in PyTorch."""
    mask = torch.tensor([0, 2, 128, 255, 1, 0, 16, 4, 0, 64] * 30, dtype=torch.uint8)
    assert torch.equal(sk.pack(mask.view(torch.bool)), reference.pack(mask != 0))


@cpu_only
def test_threads_agree(cpu_isa):
    n = 4_300_013
    mask = random_mask(n)
    torch.set_num_threads(1)
    bits = sk.pack(mask)
    one = [bits, sk.unpack(bits, (n,)), sk.count(bits), sk.stats(bits, bits.flip(0)), sk.union_(bits.flip(0), bits)]
    torch.set_num_threads(2)
    two = [sk.pack(mask), sk.unpack(bits, (n,)), sk.count(bits), sk.stats(bits, bits.flip(0)), sk.union_(bits.flip(0), bits)]
    assert all(torch.equal(a, b) for a, b in zip(one, two))
    assert one[2].item() == int(mask.sum())


@pytest.mark.parametrize("tasks", TASKS)
def test_overlap(cpu_isa, tasks):
    masks = random_mask(tasks, 700)
    ones = masks.double()
    bank = reference.pack_bank(masks)
    result = sk.overlap(bank)
    assert torch.equal(result, (ones @ ones.T).long())
    assert result.dtype == torch.int64


def test_overlap_of_uneven_blocks(cpu_isa):
    """Blocks need not be full: tasks are counted through them in order."""
    masks = random_mask(12, 1025)
    bank = [block for part in masks.split([5, 1, 6]) for block in reference.pack_bank(part)]
    ones = masks.double()
    for count in (1, 2):
        torch.set_num_threads(count)
        assert torch.equal(sk.overlap(bank), (ones @ ones.T).long())


def test_bank_round_trip():
    masks = random_mask(130, 3, 171)
    bank = sk.pack_bank(masks)
    assert [tuple(block.shape) for block in bank] == [(2, 64, 64), (2, 64, 64), (2, 2, 64)]
    assert torch.equal(reference.unpack_bank(bank, (3, 171)), masks)
    assert torch.equal(bank[1][:, 3].reshape(-1), sk.pack(masks[67]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.booleans(), max_size=1200), st.integers(0, 3))
def test_round_trip(cpu_isa, values, offset):
    mask = torch.tensor([False] * offset + values, dtype=torch.bool)[offset:]
    bits = sk.pack(mask)
    assert torch.equal(sk.unpack(bits, mask.shape), mask)
    assert torch.equal(sk.pack(sk.unpack(bits, mask.shape)), bits)
    assert sk.count(bits).item() == sum(values)


def test_bad_arguments_get_a_sentence():
    bits = sk.pack(random_mask(600))
    with pytest.raises(ValueError, match="mask must be of dtype"):
        sk.pack(torch.zeros(3))
    with pytest.raises(ValueError, match="must have 64 bytes for 500 weights, got 128"):
        sk.unpack(bits, (500,))
    with pytest.raises(ValueError, match="owned must be padded to 64 bytes"):
        sk.union_(bits[:100], bits)
    with pytest.raises(ValueError, match="must have 64 bytes"):
        sk.stats(bits, bits[:64])
    with pytest.raises(ValueError, match="bank must hold at least one block"):
        sk.overlap([])


@compiled_only
def test_dispatched_calls_check_too():
    """Called past the public functions, a kernel still refuses sizes that would read beyond a tensor."""
    ops, bits = torch.ops.subnet_kernels, torch.zeros(64, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="128 bytes for 600 weights"):
        ops.unpack(bits, [600])
    with pytest.raises(RuntimeError, match="owned has 64 bytes, bits 128"):
        ops.union_(bits, torch.zeros(128, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="mask must be bool"):
        ops.pack(torch.zeros(4))


@pytest.mark.parametrize("name", ["pack", "unpack", "count", "union_", "stats", "overlap"])
def test_opcheck(name):
    bits, owned = sk.pack(random_mask(700)), sk.pack(random_mask(700))
    arguments = {
        "pack": (random_mask(5, 7),),
        "unpack": (bits, [7, 100]),
        "count": (bits,),
        "union_": (owned, bits),
        "stats": (bits, owned),
        "overlap": (sk.pack_bank(random_mask(3, 700)),),
    }[name]
    torch.library.opcheck(getattr(torch.ops.subnet_kernels, name).default, arguments)
