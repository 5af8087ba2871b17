"""Thousands of tasks in one bank: what the last one costs is what the first one cost, in memory and on disk."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from banks import masks_of
from device import generator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import subnet_kernels as sk
from subnet_kernels import reference, storage

BLOCK = reference.BLOCK


def random_bits(bank, seed):
    """A mask that opens about half of every layer, cheaply: random bytes, zero after the last weight."""
    chance, mask = generator(seed), {}
    for name, layer in zip(bank.layer_names, bank.layers()):
        n = layer.weight.numel()
        bits = torch.randint(0, 256, layer.bits.shape, dtype=torch.uint8, generator=chance)
        bits[-(-n // 8) :] = 0
        if n % 8:
            bits[n // 8] &= (1 << n % 8) - 1
        mask[name] = bits
    return mask


def bank_of(tasks, train_weights=False):
    model = nn.Sequential(nn.Linear(20, 30, bias=False), nn.ReLU(), nn.Linear(30, 3, bias=False))
    bank = sk.MaskBank(sk.convert(model, sk.SubnetConfig(density=0.3, train_weights=train_weights)))
    grow(bank, tasks)
    return bank


def grow(bank, tasks):
    for i in range(len(bank), tasks):
        bank.commit(f"task {i}", bits=random_bits(bank, i))


class Work(TorchDispatchMode):
    """Every op within the block, and the bytes of the tensors it made."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.ops.append((str(func), sum(t.nbytes for t in tree_leaves(made) if isinstance(t, torch.Tensor))))
        return made


def work_of(call):
    with Work() as work:
        call()
    return work.ops


def test_many_masks_are_kept_in_blocks():
    """K = 130: blocks of 64, 64 and 2; earlier ones never move; each mask comes back."""
    model = sk.convert(nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 3)), sk.SubnetConfig(density=0.3))
    bank = sk.MaskBank(model)
    masks = [{key: torch.rand(m.weight.shape) < 0.3 for key, m in zip(bank.layer_names, bank.layers())} for _ in range(130)]
    pointers = None
    for i, mask in enumerate(masks):
        bank.commit(str(i), bits={key: reference.pack(m) for key, m in mask.items()})
        if i == 127:
            pointers = [block.data_ptr() for block in bank._masks.blocks["0"]]
    assert [tuple(block.shape) for block in bank._masks.blocks["0"]] == [(2, 64, 64), (2, 64, 64), (2, 2, 64)]
    assert [block.data_ptr() for block in bank._masks.blocks["0"]][:2] == pointers
    for i in (0, 63, 64, 127, 128, 129):
        assert all(torch.equal(m, masks[i][key]) for key, m in masks_of(bank, str(i)).items())
    packed = reference.pack_bank(torch.stack([m["0"] for m in masks]))
    assert all(torch.equal(a, b) for a, b in zip(packed, bank._masks.blocks["0"]))
    alphas = torch.rand(130)
    bank.superpose(alphas)
    x = torch.randn(4, 20)
    first, last = (torch.tensordot(alphas, torch.stack([m[key] for m in masks]).float(), 1) for key in ("0", "1"))
    expected = F.linear(F.linear(x, model[0].weight * first, model[0].bias), model[1].weight * last, model[1].bias)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("train_weights", [False, True])
def test_one_more_task_is_the_same_work(train_weights):
    """Same ops, same bytes, at 10 tasks and at 10 blocks more; counts are added to and not counted again."""
    found = []
    for tasks in (10, 10 + 10 * BLOCK):
        bank = bank_of(tasks, train_weights)
        bank.superpose(None)
        bank.activate(None)
        more = random_bits(bank, tasks)
        found.append(work_of(lambda bank=bank, more=more: bank.commit("more", bits=more)))
        assert [len(blocks) for blocks in bank._masks.blocks.values()] == [-(-len(bank) // BLOCK)] * 2
    assert found[0] == found[1]
    assert found[0]


def test_running_a_task_and_asking_what_the_bank_costs_are_the_same_work():
    found = []
    for tasks in (10, 10 + 10 * BLOCK):
        bank = bank_of(tasks)
        calls = (partial(bank.activate, "task 3"), partial(bank.activate, None), bank.capacity, bank.begin)
        found.append([work_of(call) for call in calls])
    assert all(found[0])
    assert found[0] == found[1]


def test_a_new_block_begins_without_a_copy():
    """The dearest task is the last one of a block: it copies the 63 before it, and no earlier block."""
    bank = bank_of(2 * BLOCK - 1)
    size = sum(layer.bits.numel() for layer in bank.layers())
    copied = [sum(made for op, made in work_of(lambda: grow(bank, len(bank) + 1)) if "cat" in op) for _ in range(3)]
    assert copied == [BLOCK * size, 0, 2 * size]


def test_an_equal_superposition_is_the_same_work_forward_but_for_the_alphas():
    """Ops and bytes of the forward do not know how many tasks there are, whose coefficients alone grow."""
    x, found = torch.randn(4, 20), []
    for tasks in (10, 10 + 10 * BLOCK):
        bank = bank_of(tasks)
        bank.superpose(None)
        bank.activate(None)
        ours = work_of(lambda bank=bank: (bank.superpose(None), bank.model(x)))
        assert sum(made for _, made in ours if made == 4 * tasks) < 10 * 4 * tasks
        found.append([(op, made) for op, made in ours if made != 4 * tasks])
    assert found[0] == found[1]


def test_counts_are_those_of_all_masks():
    """After commits, subsets, a removal in the middle, and beyond a block."""
    bank = bank_of(BLOCK - 2)
    bank.superpose(None)

    def check():
        for name, layer in zip(bank.layer_names, bank.layers()):
            stacked = torch.stack([masks_of(bank, task)[name] for task in bank.masks])
            counts = bank._masks.counts()[name]
            assert counts.dtype == torch.int32
            assert torch.equal(counts, stacked.sum(0, dtype=torch.int32))
            assert torch.equal(bank.owned()[name], reference.pack(stacked.any(0)))
            layer.zero_grad()

    check()
    grow(bank, BLOCK + 3)
    check()
    bank.superpose(None, over=["task 1", "task 65"])
    grow(bank, BLOCK + 4)
    check()
    for name in ("task 66", "task 3"):
        bank.remove(name)
        assert [bank[task].index for task in bank.masks] == list(range(len(bank)))
        check()
    again = bank_of(0)
    for task in bank.masks:
        again.commit(task, bits=bank.bits(task))
    for name, blocks in bank._masks.blocks.items():
        assert all(torch.equal(a, b) for a, b in zip(blocks, again._masks.blocks[name], strict=True))


def test_a_commit_leaves_an_equal_superposition_as_it_was():
    """Forward and backward: the counts that it reads are not those that the commit adds to."""
    bank = bank_of(5)
    x = torch.randn(4, 20)
    alphas = bank.superpose(None)
    y = bank.model(x)
    (expected,) = torch.autograd.grad(y.square().sum(), alphas, retain_graph=True)
    bank.commit("more", bits=random_bits(bank, 99))
    assert torch.equal(bank.model(x), y)
    assert torch.equal(torch.autograd.grad(y.square().sum(), alphas)[0], expected)
    assert len(bank.superpose(None)) == 6
    assert not torch.equal(bank.model(x), y)


def test_a_subset_is_read_once():
    bank = bank_of(2 * BLOCK)
    over = ["task 5", "task 70"]
    bank.superpose(None, over=over)
    grow(bank, len(bank) + 1)
    again = work_of(lambda: bank.superpose(None, over=over))
    assert sum(made for op, made in again if "detach" not in op) == 4 * len(over)  # the alphas


def test_one_mask_takes_a_thirtieth_of_floats():
    """2,500 tasks of LeNet-300-100 with 100 outputs: every tensor that the bank holds, in bytes."""
    model = nn.Sequential(*(nn.Linear(i, o, bias=False) for i, o in ((784, 300), (300, 100), (100, 100))))
    bank = sk.MaskBank(sk.convert(model, sk.SubnetConfig(select="threshold")))
    one, tasks = random_bits(bank, 0), 2500
    for i in range(tasks):
        bank.commit(str(i), bits=one)
    bank.superpose(None)
    held = [
        *(b for blocks in bank._masks.blocks.values() for b in blocks),
        *bank._masks.owned.values(),
        *bank._masks.counts().values(),
    ]
    held += [t for entry in bank._entries.values() for kept in (entry.state, entry.scores, entry.tensors) for t in kept.values()]
    took = sum(t.untyped_storage().nbytes() for t in held)
    floats = 4 * tasks * sum(layer.weight.numel() for layer in bank.layers())
    assert took <= floats / 30
    assert bank.capacity()["mask_bytes"] <= took


# ------------------------------------------------------------------------------------------------------------- on disk


@pytest.fixture
def writes(monkeypatch):
    """(name, bytes) of every file that is written, and small segments."""
    done, write = [], storage.write_atomic
    monkeypatch.setattr(storage, "SEGMENT", 8)
    monkeypatch.setattr(storage, "write_atomic", lambda path, data: (done.append((path.name, len(data))), write(path, data)))
    return done


def test_saving_one_more_task_writes_two_files(writes, tmp_path):
    bank = bank_of(3)
    bank.save(tmp_path)
    writes.clear()
    grow(bank, 4)
    bank.save(tmp_path)
    early = list(writes)
    grow(bank, 99)
    bank.save(tmp_path)
    writes.clear()
    grow(bank, 100)
    bank.save(tmp_path)  # 12 segments of 8, and 4 entries in the manifest
    assert len(early) == len(writes) == 2
    assert early[0][1] == writes[0][1]
    assert writes[1][0] == "manifest.json"
    assert writes[1][1] < early[1][1] + 13 * 45
    assert len(list(tmp_path.glob("segment-*.json"))) == 12
    writes.clear()
    grow(bank, 104)
    bank.save(tmp_path)
    assert [name.split("-")[0] for name, _ in writes[-2:]] == ["segment", "manifest.json"]
    other = sk.MaskBank.load(tmp_path, bank.model)
    assert other.names == bank.names
    for task in ("task 0", "task 7", "task 8", "task 95", "task 96", "task 103"):
        assert all(torch.equal(bits, other.bits(task)[name]) for name, bits in bank.bits(task).items())
    writes.clear()
    other.save(tmp_path)
    assert [name for name, _ in writes] == ["manifest.json"]  # entries and segments are there


def test_a_folder_that_somebody_else_wrote_is_looked_at_again(writes, tmp_path):
    bank = bank_of(20)
    bank.save(tmp_path)
    for file in tmp_path.iterdir():
        file.unlink()
    grow(bank, 21)
    bank.save(tmp_path)
    assert sk.MaskBank.load(tmp_path, bank.model).names == bank.names
    other = bank_of(2)
    other.save(tmp_path)
    bank.save(tmp_path)
    assert sk.MaskBank.load(tmp_path, bank.model).names == bank.names


def test_a_removal_is_saved_too(writes, tmp_path):
    bank = bank_of(20)
    bank.save(tmp_path)
    bank.remove("task 3")
    bank.save(tmp_path)
    assert sk.MaskBank.load(tmp_path, bank.model).names == bank.names == [f"task {i}" for i in range(20) if i != 3]


def test_a_crash_between_segment_and_manifest_leaves_the_old_bank(writes, tmp_path, monkeypatch):
    bank = bank_of(7)
    bank.save(tmp_path)
    grow(bank, 9)
    write = storage.write_atomic

    def crash(path, data):
        if path.name == "manifest.json":
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(storage, "write_atomic", crash)
    with pytest.raises(KeyboardInterrupt):
        bank.save(tmp_path)
    assert len(list(tmp_path.glob("segment-*.json"))) == 1
    assert sk.MaskBank.load(tmp_path, bank.model).names == [f"task {i}" for i in range(7)]
    monkeypatch.setattr(storage, "write_atomic", write)
    bank.save(tmp_path)
    assert sk.MaskBank.load(tmp_path, bank.model).names == bank.names
