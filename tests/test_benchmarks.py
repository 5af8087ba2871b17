"""Readers and their refusals, permutations, rotations against Pillow, splits, streams of chance."""

import gzip
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from subnet_pipelines import BENCHMARKS, Refusal
from subnet_pipelines.benchmarks import GG, SCENARIOS, GNs, GNu, NNs, files, mnist
from subnet_pipelines.benchmarks.base import Visit, balanced, batches
from subnet_pipelines.benchmarks.idx import read_idx, write_idx
from subnet_pipelines.chance import seed_of, seeded, stream

IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


def make(name="permuted-mnist-mini", seed=1, **fields):
    cls = BENCHMARKS[name]
    return cls(cls.Config(**fields), seed)


# ---- files ----------------------------------------------------------------------------------------------------------


def test_the_shipped_images():
    (x, y), (test_x, test_y) = mnist.load(None)
    assert (x.shape, x.dtype, y.dtype) == ((4000, 28, 28), torch.uint8, torch.int64)
    assert test_x.shape == (1000, 28, 28)
    assert y.bincount().tolist() == [400] * 10
    assert test_y.bincount().tolist() == [100] * 10
    assert y[:100].unique().numel() == 10  # shuffled
    train, held_out = {r.numpy().tobytes() for r in x}, {r.numpy().tobytes() for r in test_x}
    assert not train & held_out
    assert 30 < x.float().mean() < 36  # MNIST's mean is 33.3


@pytest.mark.parametrize("suffix", [".gz", ""])
def test_idx_round_trip(tmp_path, suffix):
    array = np.arange(2 * 3 * 5, dtype=np.uint8).reshape(2, 3, 5)
    write_idx(tmp_path / "a.gz", array)
    if not suffix:
        (tmp_path / "a").write_bytes(gzip.decompress((tmp_path / "a.gz").read_bytes()))
    assert read_idx(tmp_path / f"a{suffix}", 3).numpy().tolist() == array.tolist()


def idx(shape, data, magic=None):
    return struct.pack(f">{len(shape) + 1}I", magic or 0x0800 | len(shape), *shape) + data


def damage(raw, end):
    return gzip.compress(raw)[:end]


DAMAGED = {
    "magic": (gzip.compress(idx((2, 2), bytes(4), magic=0x0D02)), "magic should be 0x00000803, is 0x00000d02"),
    "dims": (gzip.compress(idx((2, 2), bytes(4))), "magic should be 0x00000803"),
    "header": (gzip.compress(idx((2, 2), b"")[:9]), "cut short: an idx header has 16 bytes, the file 9"),
    "short": (gzip.compress(idx((2, 2, 2), bytes(7))), "header promises 8 bytes, 7 are there"),
    "long": (gzip.compress(idx((2, 2, 2), bytes(9))), "more than the 8 bytes"),
    "huge": (gzip.compress(idx((2**31, 28, 28), bytes(9))), "header promises 1683627180032 bytes"),
    "cut gzip": (damage(idx((2, 28, 28), np.random.default_rng(0).bytes(1568)), 900), "damaged or cut short"),
    "no gzip": (b"hello there, I am no gzip file", "damaged or cut short"),
    "crc": (gzip.compress(idx((2, 2, 2), bytes(8)))[:-8] + bytes(8), "damaged or cut short"),
    "empty": (b"", "cut short"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_idx(name, tmp_path):
    data, sentence = DAMAGED[name]
    path = tmp_path / "x-idx3-ubyte.gz"
    path.write_bytes(data)
    with pytest.raises(Refusal, match=sentence) as error:
        read_idx(path, 3)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_idx(tmp_path):
    with pytest.raises(Refusal, match=r"absent: cannot be read \(No such file or directory\)"):
        read_idx(tmp_path / "absent", 1)


def small_mnist(folder, images=20, labels=20, side=28, top=9):
    folder.mkdir(parents=True, exist_ok=True)
    chance = np.random.default_rng(0)
    for half in ("train", "t10k"):
        write_idx(folder / f"{half}-images-idx3-ubyte.gz", chance.integers(0, 256, (images, side, side), dtype=np.uint8))
        write_idx(folder / f"{half}-labels-idx1-ubyte.gz", (np.arange(labels) % (top + 1)).astype(np.uint8))


@pytest.mark.parametrize("inner", ["mnist", "MNIST/raw", "."])
def test_mnist_is_found_where_people_keep_it(inner, tmp_path):
    small_mnist(tmp_path / inner)
    cls = BENCHMARKS["permuted-mnist"]
    assert len(cls(cls.Config(val_fraction=0.0), 1, tmp_path).task(0).train) == 20


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [({"labels": 19}, "20 images.*19 labels"), ({"side": 27}, "28 x 28, are 27 x 27"), ({"top": 11}, "labels should be 0 to 9")],
)
def test_files_that_do_not_fit(fields, sentence, tmp_path):
    small_mnist(tmp_path, **fields)
    with pytest.raises(Refusal, match=sentence):
        mnist.load(tmp_path)


def test_missing_mnist_names_the_file_and_where_to_put_it(tmp_path, monkeypatch):
    import pooch

    def offline(*_args, **_fields):
        raise OSError("no network")

    monkeypatch.setattr(pooch, "retrieve", offline)
    with pytest.raises(Refusal) as error:
        mnist.load(tmp_path / "nowhere")
    assert str(error.value) == (
        f"MNIST: {tmp_path}/nowhere/mnist lacks {IMAGES}, {LABELS}, t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz (no download: "
        f"OSError at {mnist.MIRROR}{IMAGES}); put what is missing there, or name the folder that holds mnist/{IMAGES} with --data-dir"
    )
    assert not (tmp_path / "nowhere").exists()


def test_default_data_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("SUBNET_DATA_DIR", str(tmp_path))
    assert files.default_data_dir() == tmp_path
    monkeypatch.delenv("SUBNET_DATA_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert files.default_data_dir() == tmp_path / "cache" / "subnet-kernels"


# ---- views ----------------------------------------------------------------------------------------------------------


def test_permuted_view_by_hand():
    benchmark = make(tasks=3)
    order = benchmark.permutation(2)
    assert order.sort().values.tolist() == list(range(784))
    raw = mnist.load(None)[1][0][:5].flatten(1)
    seen = benchmark.test(2).tensors()[0][:5]
    expected = ((raw.double() / 255 - 0.1307) / 0.3081)[:, order]
    torch.testing.assert_close(seen.double(), expected, atol=1e-6, rtol=0)
    assert seen.dtype == torch.float32


def test_permutations_differ_between_tasks_and_seeds():
    found = {tuple(make(seed=s).permutation(i).tolist()) for s in (1, 2) for i in range(4)}
    assert len(found) == 8
    assert torch.equal(make(seed=1).permutation(3), make(seed=1, tasks=2500).permutation(3))


def test_the_authors_permutations():
    supsup = make(permutation="numpy", seed=3)
    np.random.seed(3 + 4)  # noqa: NPY002 - the authors' line
    assert supsup.permutation(4).tolist() == np.random.permutation(784).tolist()  # noqa: NPY002
    wsn = make(permutation="sklearn", seed=3, tasks=6)

    def shuffle(values, random_state):  # sklearn.utils.shuffle of one array
        order = np.arange(len(values))
        np.random.RandomState(random_state).shuffle(order)
        return values[order]

    seeds = shuffle(np.arange(6), 3)
    for i, r in enumerate(seeds):
        assert wsn.permutation(i).tolist() == shuffle(np.arange(784), int(r) * 100 + i).tolist()


@pytest.mark.parametrize("angle", [0, 5, 10, 45, 90, 137.5, 180, 200, 270, 350, -20])
def test_rotation_is_pillows(angle):
    raw = mnist.load(None)[1][0][:20]
    turned = np.stack([np.asarray(Image.fromarray(p.numpy()).rotate(angle, Image.Resampling.NEAREST)).reshape(784) for p in raw])
    seen = mnist.gather_view(mnist.rotation(angle))(raw.flatten(1))
    assert torch.equal(seen, mnist.gather_view(None)(torch.from_numpy(turned)))


def test_rotated_angles():
    benchmark = make("rotated-mnist-mini", tasks=4, angles=[0, 90, 5, 15])
    assert [benchmark.title(i) for i in range(4)] == ["0 degrees", "90 degrees", "5 degrees", "15 degrees"]
    assert make("rotated-mnist-mini").angle(3) == 30
    with pytest.raises(Refusal, match="tasks is 3 but angles lists only 2"):
        make("rotated-mnist-mini", tasks=3, angles=[0, 90])


@pytest.mark.parametrize("labels", ["local", "global"])
def test_pairs_of_digits(labels):
    benchmark = make("split-mnist-mini", tasks=5, labels=labels)
    assert (benchmark.classes, benchmark.input_shape) == ({"local": 2, "global": 10}[labels], (784,))
    (_, y), (test_x, test_y) = mnist.load(None)
    for i in range(5):
        task, test = benchmark.task(i), benchmark.test(i)
        assert (task.name, task.train.augment) == (f"digits {2 * i} and {2 * i + 1}", None)
        assert (len(task.train), len(task.val), len(test)) == (720, 80, 200)
        digits = torch.tensor([2 * i, 2 * i + 1] if labels == "global" else [0, 1])
        for split in (task.train, task.val, test):
            assert torch.equal(split.tensors()[1].unique(), digits)
        rows = (test_y // 2 == i).nonzero().flatten()
        shown, told = test.tensors()
        assert torch.equal(shown, mnist.gather_view(None)(test_x[rows].flatten(1)))
        assert torch.equal(told, test_y[rows] if labels == "global" else test_y[rows] % 2)
        kept = torch.cat([task.train.index, task.val.index]).sort().values
        assert torch.equal(kept, (y // 2 == i).nonzero().flatten())
    with pytest.raises(Refusal, match="tasks must be at most the 5 of split-mnist-mini, got 6"):
        make("split-mnist-mini", tasks=6)


# ---- splits and batches ---------------------------------------------------------------------------------------------


def test_validation_rows():
    first = make(val_split="first", val_fraction=0.1).task(0)
    assert first.val.index.tolist() == list(range(400))
    assert first.train.index.tolist() == list(range(400, 4000))
    task = make(val_fraction=0.1).task(0)
    assert task.val.y[task.val.index].bincount().tolist() == [40] * 10
    assert sorted(task.val.index.tolist() + task.train.index.tolist()) == list(range(4000))
    assert make(seed=2).task(0).val.index.tolist() != task.val.index.tolist()
    assert make(seed=1).task(5).val.index.tolist() == task.val.index.tolist()
    assert make(val_fraction=0.0).task(0).val is None
    assert len(make(val_fraction=0.0).task(0).train) == 4000


def test_test_subset():
    split = make(eval_images=50).test(0)
    assert split.tensors()[1].bincount().tolist() == [5] * 10
    assert len(make(eval_images=5000).test(0)) == 1000


def test_balanced_takes_what_there_is():
    y = torch.tensor([0] * 10 + [1] * 2)
    picked = balanced(y, 6, stream(0, "x"))
    assert y[picked].bincount().tolist() == [4, 2]
    assert picked.tolist() == sorted(picked.tolist())


def test_a_task_shares_its_base_tensors():
    benchmark = make(tasks=2500)
    assert len(benchmark) == 2500
    assert benchmark.task(2499).train.x.data_ptr() == benchmark.task(0).train.x.data_ptr()


@pytest.mark.parametrize("chunk", [1, 40, 1 << 18])
@pytest.mark.parametrize("skip", [0, 1, 3, 5])
def test_batches(chunk, skip, monkeypatch):
    monkeypatch.setattr("subnet_pipelines.benchmarks.base.CHUNK", chunk)
    x, y, t = torch.arange(46.0).reshape(23, 2), torch.arange(23), torch.full((1,), 7).expand(23)
    order = torch.randperm(23, generator=stream(1, "order"))
    found = list(batches(x, y, t, order, 5, skip))
    assert [len(b.y) for b in found] == [5, 5, 5, 5, 3][skip:]
    rows = order[skip * 5 :]
    if len(rows):
        assert torch.equal(torch.cat([b.x for b in found]), x[rows])
        assert torch.equal(torch.cat([b.y for b in found]), y[rows])
        assert torch.cat([b.t for b in found]).unique().tolist() == [7]
    in_place = list(batches(x, y, None, None, 5, skip))
    assert all(b.t is None for b in in_place)
    assert torch.equal(torch.cat([b.y for b in in_place]) if in_place else y[:0], y[skip * 5 :])
    assert len(list(batches(x, y, t, order[:12], 5))) == 3  # an epoch cut short


def test_scenarios():
    assert SCENARIOS == {"GG": GG, "GNs": GNs, "GNu": GNu, "NNs": NNs}
    assert GNu == (True, False, False)
    assert list(make(scenario="GG", tasks=3).stream()) == [0, 1, 2]
    assert list(make(scenario="NNs", tasks=3).stream()) == [None]


def test_visits():
    plain = make(scenario="NNs", tasks=3).visits()
    assert plain == [Visit(0, 1.0, 0), Visit(1, 1.0, 1), Visit(2, 1.0, 2)]
    assert make(scenario="NNs", tasks=1).visits() == [Visit(0, 1.0, 0)]
    again = make(scenario="NNs", tasks=6, returns=3).visits()
    tasks = [visit.task for visit in again]
    assert tasks[:6] == list(range(6))
    assert len(set(tasks[6:])) == 3
    assert 5 not in tasks[6:]  # the one that it would come back to without having left it
    assert [visit.row for visit in again] == [0, 1, 2, 3, 4, None, None, None, 5]
    assert tasks != [visit.task for visit in make(seed=2, scenario="NNs", tasks=6, returns=3).visits()]
    assert tasks == [visit.task for visit in make(scenario="NNs", tasks=6, returns=3).visits()]
    own = make(scenario="NNs", tasks=3, visits=[0, 0, 1, 0, 2, 1]).visits()
    assert [(visit.task, visit.row) for visit in own] == [(0, None), (0, 0), (1, None), (0, 1), (2, None), (1, 2)]


def test_uneven_visits():
    lengths = [visit.length for visit in make(scenario="NNs", tasks=400, uneven=0.25).visits()]
    assert 0.75 <= min(lengths) < 0.76
    assert 1.24 < max(lengths) <= 1.25
    assert sum(lengths) / 400 == pytest.approx(1, abs=0.03)
    assert lengths[:3] != [visit.length for visit in make(seed=2, scenario="NNs", tasks=400, uneven=0.25).visits()][:3]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"scenario": "NNu"}, "scenario NNu is none .SupSup's table 1.*; use GNu or NNs"),
        ({"scenario": "GNs", "returns": 1}, "returns is for streams whose borders are hidden, under scenario NNs, not GNs"),
        ({"visits": [0, 1]}, "visits is for streams whose borders are hidden, under scenario NNs, not GG"),
        ({"uneven": 0.1}, "uneven is for streams"),
        ({"scenario": "NNs", "tasks": 2, "visits": [0]}, r"visits must show tasks 0 to 1, .* got \[0\]"),
        ({"scenario": "NNs", "tasks": 2, "visits": [1, 0]}, "visits must show tasks 0 to 1"),
        ({"scenario": "NNs", "tasks": 2, "visits": [0, 1, 2]}, "visits must show tasks 0 to 1"),
        ({"scenario": "NNs", "tasks": 2, "visits": [0, 1], "returns": 1}, "visits and returns both say"),
        ({"scenario": "NNs", "tasks": 2, "returns": 2}, "returns must be at least 0 and fewer than the 2 tasks, got 2"),
        ({"scenario": "NNs", "uneven": 1.0}, r"uneven must be in \[0, 1\)"),
    ],
)
def test_streams_that_are_none(fields, words):
    with pytest.raises(Refusal, match=words):
        make(**fields)


@pytest.mark.parametrize("fields", [{"tasks": 0}, {"val_fraction": 1.0}, {"val_fraction": -0.1}, {"eval_images": 0}])
def test_ranges(fields):
    with pytest.raises(Refusal, match=next(iter(fields))):
        make(**fields)


# ---- chance ---------------------------------------------------------------------------------------------------------


def test_streams_are_their_own():
    assert seed_of(1, "order", 0) != seed_of(1, "order", 1) != seed_of(2, "order", 0)
    assert seed_of(1, "order", 0) == 299572666420262285  # fixed for ever: a changed stream changes every result
    a, b = torch.rand(4, generator=stream(1, "a")), torch.rand(4, generator=stream(1, "b"))
    assert not torch.equal(a, b)
    assert torch.equal(a, torch.rand(4, generator=stream(1, "a")))


def test_seeded_puts_the_global_generator_back():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with seeded(1, "init"):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(inside, torch.rand(3, generator=stream(1, "init")))
