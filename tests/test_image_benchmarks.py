"""The image benchmarks as task streams: rows, labels, splits, views, augmentation; on tiny sets, and on the real ones at hand."""

import random
from dataclasses import asdict, fields
from itertools import chain
from pathlib import Path

import image_sets as sets
import numpy as np
import pytest
import real_sets
import torch
import torch.nn as nn
from streams import broken_run

from subnet_pipelines import BENCHMARKS, Refusal, RunConfig, run
from subnet_pipelines.benchmarks import cifar, cifar_few, omniglot, stl10
from subnet_pipelines.benchmarks.base import batches
from subnet_pipelines.benchmarks.images import CropFlip, Normal
from subnet_pipelines.chance import seeded, stream
from subnet_pipelines.config import Settings
from subnet_pipelines.methods.base import Method, MethodConfig, Phase, Prediction

IMAGES = ("five-datasets", "omniglot-rotation", "cifar100-split", "cifar100-superclass", "tiny-imagenet")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Tiny sets for three tasks of each benchmark."""
    return sets.write_all(tmp_path_factory.mktemp("data"))


def make(name, data_dir, seed=1, **fields):
    cls = BENCHMARKS[name]
    return cls(cls.Config(**{"tasks": 3, "val_fraction": 0.1, **fields}), seed, data_dir)


def places(split) -> set[int]:
    """Row numbers of the base tensors."""
    return set(range(len(split.y)) if split.index is None else split.index.tolist())


# ---- every benchmark ------------------------------------------------------------------------------------------------

SHAPES = {  # input, classes, rows for training, validation, test of a task
    "five-datasets": ((3, 32, 32), 10, (90, 10, 40)),
    "omniglot-rotation": ((1, 32, 32), 12, (648, 72, 240)),
    "cifar100-split": ((3, 32, 32), 10, (90, 10, 40)),
    "cifar100-superclass": ((3, 32, 32), 5, (45, 5, 20)),
    "tiny-imagenet": ((3, 64, 64), 5, (45, 5, 20)),
}


@pytest.mark.parametrize("name", IMAGES)
def test_tasks(name, data):
    benchmark = make(name, data)
    shape, classes, counts = SHAPES[name]
    assert (benchmark.input_shape, benchmark.classes, len(benchmark)) == (shape, classes, 3)
    seen, titles = [], set()
    for i in range(3):
        task, test = benchmark.task(i), benchmark.test(i)
        if name == "five-datasets" and i:
            counts = (72, 8, 40)
        assert (len(task.train), len(task.val), len(test)) == counts
        assert (task.index, task.classes) == (i, classes)
        titles.add(task.name)
        for split in (task.train, task.val, test):
            x, y = split.tensors()
            assert (x.shape, x.dtype, y.dtype) == ((len(split), *shape), torch.float32, torch.int64)
            assert x.is_contiguous()
        assert task.train.tensors()[1].unique().tolist() == list(range(classes))
        assert test.tensors()[1].bincount().tolist() == [len(test) // classes] * classes
        assert not places(task.train) & places(task.val)
        if test.x is task.train.x:
            assert not places(test) & (places(task.train) | places(task.val))
        seen.append({row.numpy().tobytes() for split in (task.train, task.val, test) for row in split.tensors()[0]})
        assert len(seen[-1]) == sum(counts)  # no picture twice, none in two halves
    assert not seen[0] & seen[1]
    assert not seen[1] & seen[2]
    assert len(titles) == 3


@pytest.mark.parametrize("name", IMAGES)
def test_seeds(name, data):
    one, again, two = (make(name, data, seed) for seed in (1, 1, 2))

    def rows(benchmark):
        task = benchmark.task(1)
        return [task.train.tensors()[0], task.val.tensors()[0]]

    assert all(map(torch.equal, rows(one), rows(again)))
    assert not torch.equal(rows(one)[1], rows(two)[1])
    assert torch.equal(
        one.test(1).tensors()[0], make(name, data, tasks=2).test(1).tensors()[0]
    )  # the first tasks of a longer stream
    assert places(one.task(1).val) != places(two.task(1).val)


@pytest.mark.parametrize("name", IMAGES)
def test_validation(name, data):
    none = make(name, data, val_fraction=0.0)
    assert none.task(1).val is None
    every = len(none.task(1).train)
    task = make(name, data, val_fraction=0.2, val_split="train").task(1)
    assert len(task.train) == len(task.val) == every
    assert torch.equal(task.train.tensors()[0], task.val.tensors()[0])
    task = make(name, data, seed=5, val_fraction=0.2, val_split="shuffle").task(1)
    order = np.arange(every)
    np.random.RandomState(5).shuffle(order)  # sklearn.utils.shuffle(r, random_state=seed), then r[:nvalid]
    x = make(name, data, seed=5, val_fraction=0.0).task(1).train.tensors()[0]
    assert torch.equal(task.val.tensors()[0], x[np.sort(order[: int(0.2 * every)])])
    assert torch.equal(task.train.tensors()[0], x[np.sort(order[int(0.2 * every) :])])
    few = make(name, data, val_fraction=1e-6).task(1)
    assert (len(few.val), len(few.train)) == (1, every - 1)
    assert len(make(name, data, eval_images=5).test(2)) == 5


@pytest.mark.parametrize("name", IMAGES)
def test_too_many_tasks(name, data):
    with pytest.raises(Refusal, match=r"tasks must be at most the [0-9]+ of"):
        make(name, data, tasks=101)


@pytest.mark.parametrize("name", IMAGES)
def test_missing_data_names_it(name, tmp_path, monkeypatch):
    monkeypatch.setattr("pooch.retrieve", lambda *_args, **_fields: 1 / 0)
    with pytest.raises(
        Refusal, match=r" lacks .*\.(zip|gz) \(no .*; put what is missing there, or name the folder that holds "
    ) as error:
        make(name, tmp_path / "nowhere")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "nowhere").exists()


class Probe(Method):
    """A linear layer for each task: what any method does with a stream, in the least code."""

    name = "probe"
    forget_free = True

    def __init__(self, benchmark, seed=1, epochs=4):
        super().__init__(MethodConfig(epochs=epochs, batch_size=16), benchmark, seed)
        size = int(np.prod(benchmark.input_shape))
        with seeded(seed, "init"):
            self.layers = nn.ModuleList(nn.Linear(size, benchmark.classes) for _ in range(len(benchmark)))
        self.layers.to(benchmark.device)

    def plan(self, task):
        layer = self.layers[task.index]
        return [Phase("train", self.config.epochs, batch_size=16, optimizer=lambda: torch.optim.Adam(layer.parameters(), 1e-3))]

    def logits(self, batch, clock):
        return self.layers[clock.task](batch.x.flatten(1))

    def predict(self, x, task):
        return Prediction(self.layers[task](x.flatten(1)))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("five-datasets", {"val_split": "shuffle"}),
        ("omniglot-rotation", {"val_split": "train"}),
        ("cifar100-split", {"labels": "global"}),
        ("cifar100-superclass", {"pixels": "interleaved"}),
        ("tiny-imagenet", {"augment": "none"}),
    ],
)
def test_a_stream_is_learnt(name, fields, data, tmp_path):
    benchmark = make(name, data, **fields)
    result = run(Probe(benchmark), benchmark, RunConfig(eval_batch=64), tmp_path / "run")
    assert min(result.final) > 60, result.final  # chance is 8 to 20
    assert result.forgetting == 0


# ---- 5-Datasets -----------------------------------------------------------------------------------------------------


def test_five_datasets(data):
    benchmark = make("five-datasets", data, tasks=5, val_fraction=0.0)
    assert [benchmark.title(i) for i in range(5)] == ["cifar-10", "mnist", "svhn", "fashion-mnist", "notmnist"]
    raw = benchmark.test(1).x
    x, y = benchmark.test(1).tensors()
    assert raw.shape == (40, 28, 28)
    expected = torch.zeros(40, 32, 32, dtype=torch.float64)
    expected[:, 2:30, 2:30] = raw.double() / 255
    for channel in range(3):
        torch.testing.assert_close(x[:, channel].double(), (expected - 0.1) / 0.2752, atol=1e-6, rtol=0)
    assert y.bincount().tolist() == [4] * 10
    raw, x = benchmark.test(2).x, benchmark.test(2).tensors()[0]
    for channel, (mean, std) in enumerate(((0.4377, 0.198), (0.4438, 0.201), (0.4728, 0.197))):
        torch.testing.assert_close(x[:, channel].double(), (raw[:, channel].double() / 255 - mean) / std, atol=1e-5, rtol=0)


def test_some_of_the_five(data):
    benchmark = make("five-datasets", data, tasks=2, sets=["notmnist", "svhn"])
    assert [benchmark.title(i) for i in range(2)] == ["notmnist", "svhn"]
    settings = Settings("finetune", "five-datasets").resolve(None, {"sets": "mnist,notmnist"})
    assert settings.values["tasks"] == 2
    for given, sentence in (
        ({"sets": ["mnits"]}, "sets must be of cifar-10, mnist, svhn, fashion-mnist, notmnist, got 'mnits'"),
        ({"sets": ["mnist", "mnist"], "tasks": 2}, "sets must be different ones, got mnist, mnist"),
        ({"sets": ["mnist"], "tasks": 2}, "tasks must be at most the 1 of sets, got 2"),
    ):
        with pytest.raises(Refusal, match=sentence):
            make("five-datasets", data, **given)


# ---- Omniglot Rotation ----------------------------------------------------------------------------------------------


def test_omniglot_rotations(data):
    benchmark = make("omniglot-rotation", data, val_fraction=0.0)
    drawn = omniglot.load_omniglot(data)
    for i in (0, 2):
        task, test = benchmark.task(i), benchmark.test(i)
        assert task.train.tensors()[1].bincount().tolist() == [60] * 12
        assert test.tensors()[1].bincount().tolist() == [20] * 12
        x, y = (torch.cat(parts) for parts in zip(task.train.tensors(), test.tensors()))
        for label in (0, 11):
            character = drawn[12 * i + label].numpy()
            turned = np.concatenate([np.rot90(character, k, (1, 2)) for k in range(4)])
            expected = {(row / np.float32(255)).astype(np.float32).tobytes() for row in turned}
            assert {row.numpy().tobytes() for row in x[y == label]} == expected


# ---- CIFAR-100 ------------------------------------------------------------------------------------------------------


def test_cifar100_split(data):
    raw, labels = cifar.load_cifar100(data)[0]
    benchmark = make("cifar100-split", data, val_fraction=0.0)
    for i in range(3):
        x, y = benchmark.task(i).train.tensors()
        mine = (labels[:, 1] // 10 == i).nonzero().flatten()
        assert y.tolist() == (labels[mine, 1] % 10).tolist()
        scaled = raw[mine].double() / 255
        for channel, (mean, std) in enumerate(((125.3, 63.0), (123.0, 62.1), (113.9, 66.7))):
            expected = (scaled[:, channel] * 255 - mean) / std
            torch.testing.assert_close(x[:, channel].double(), expected, atol=1e-5, rtol=0)
    whole = make("cifar100-split", data, val_fraction=0.0, labels="global")
    assert whole.classes == 100
    assert whole.task(2).train.tensors()[1].unique().tolist() == list(range(20, 30))
    assert whole.test(2).tensors()[1].unique().tolist() == list(range(20, 30))


def test_cifar100_in_other_orders(tmp_path):
    sets.write_cifar100(tmp_path, classes=100, train=2, test=1)

    def classes(**fields):
        fields = {"tasks": 20, "classes_per_task": 5, "val_fraction": 0.0, "labels": "global", **fields}
        benchmark = make("cifar100-split", tmp_path, **fields)
        return [
            benchmark.groups[i]
            for i in range(20)
            if set(benchmark.groups[i]) == set(benchmark.task(i).train.tensors()[1].tolist())
        ]

    np.random.seed(3)  # noqa: NPY002 - as the authors draw it
    assert classes(order="numpy", seed=3) == np.random.permutation(100).reshape(20, 5).tolist()  # noqa: NPY002
    first, second = classes(order="stream", seed=1), classes(order="stream", seed=2)
    assert first != second
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(100))
    benchmark = make("cifar100-split", tmp_path, tasks=20, classes_per_task=5, order="numpy", seed=3)
    y = benchmark.test(7).tensors()[1]
    assert y.sort().values.tolist() == list(range(5))
    rows = benchmark.test(7).index
    assert [benchmark.groups[7][label] for label in y.tolist()] == cifar.load_cifar100(tmp_path)[1][1][rows, 1].tolist()
    with pytest.raises(Refusal, match="classes_per_task must divide 100, got 7"):
        make("cifar100-split", tmp_path, classes_per_task=7)
    with pytest.raises(Refusal, match="tasks must be at most the 10 of cifar100-split, got 11"):
        make("cifar100-split", tmp_path, tasks=11)


def test_superclasses(tmp_path):
    sets.write_cifar100(tmp_path, classes=100, train=2, test=1)
    for order, first in (("A", [0, 1, 2]), ("B", [15, 12, 5]), ("C", [17, 1, 19]), ("D", [11, 9, 6]), ("E", [6, 14, 0])):
        benchmark = make("cifar100-superclass", tmp_path, order=order, tasks=20, val_fraction=0.0, labels="global")
        assert sorted(benchmark.coarse) == list(range(20))
        assert benchmark.coarse[:3] == first
        for i, coarse in enumerate(benchmark.coarse):  # the tiny set's fine classes 5 c to 5 c + 4 have coarse class c
            assert benchmark.task(i).train.tensors()[1].unique().tolist() == list(range(5 * coarse, 5 * coarse + 5))
    local = make("cifar100-superclass", tmp_path, order="E", tasks=20, val_fraction=0.0)
    assert local.classes == 5
    assert local.test(1).tensors()[1].sort().values.tolist() == list(range(5))
    assert 0 <= local.test(1).tensors()[0].min() < local.test(1).tensors()[0].max() <= 1


def test_the_authors_superclass_pictures(data):
    raw = cifar.load_cifar100(data)[1][0]
    benchmark = make("cifar100-superclass", data, pixels="interleaved")
    flat = raw.reshape(len(raw), -1).numpy().astype(np.float32) / 255  # as the python version of the set has them
    expected = flat.reshape(-1, 32, 32, 3).swapaxes(2, 3).swapaxes(1, 2)
    x = benchmark.test(1).tensors()[0]
    assert np.array_equal(x.numpy(), expected[benchmark.test(1).index])
    assert not torch.equal(x, make("cifar100-superclass", data).test(1).tensors()[0])


def test_classes_that_are_not_there(tmp_path):
    sets.write_cifar100(tmp_path, classes=12, train=2, test=1)
    with pytest.raises(Refusal, match="cifar100-split: class 12, of task 1, has no training picture"):
        make("cifar100-split", tmp_path, tasks=2)
    with pytest.raises(Refusal, match="CIFAR-100: coarse class 2 should have 5 fine classes, has 2"):
        make("cifar100-superclass", tmp_path)
    path = tmp_path / "cifar-100-binary" / "train.bin"
    records = bytearray(path.read_bytes())
    records[0] = 7
    path.write_bytes(records)
    cifar.load_cifar100.cache_clear()
    with pytest.raises(Refusal, match="CIFAR-100: fine class 0 should have one coarse class, has 2"):
        make("cifar100-superclass", tmp_path, tasks=2)


# ---- TinyImageNet ---------------------------------------------------------------------------------------------------


def test_tiny_imagenet_orders(data):
    order = list(range(15))
    random.seed(4)
    random.shuffle(order)  # as the authors draw it
    benchmark = make("tiny-imagenet", data, seed=4, order="python", labels="global")
    assert list(chain(*benchmark.groups)) == order
    assert benchmark.classes == 15
    assert sorted(benchmark.test(1).tensors()[1].unique().tolist()) == sorted(order[5:10])
    assert list(chain(*make("tiny-imagenet", data, order="sorted").groups)) == list(range(15))
    one, two = (make("tiny-imagenet", data, seed=seed).groups for seed in (1, 2))
    assert one != two


def test_only_training_is_augmented(data):
    task = make("tiny-imagenet", data).task(0)
    assert task.train.augment is not None
    assert task.val.augment is None
    assert make("tiny-imagenet", data).test(0).augment is None
    assert make("tiny-imagenet", data, augment="none").task(0).train.augment is None
    assert make("cifar100-split", data).task(0).train.augment is None
    assert make("cifar100-split", data, augment="crop-flip").task(0).train.augment is not None


# ---- crops and flips ------------------------------------------------------------------------------------------------


def draw(down: int, right: int, flip: int) -> int:
    return down + 9 * right + 81 * flip


def test_crops_and_flips_by_hand():
    normal = Normal([0.5, 0.25], [0.5, 0.125])
    assert normal.black.flatten().tolist() == [-1, -2]
    raw = torch.randint(0, 256, (1, 2, 6, 7), dtype=torch.uint8, generator=stream(0, "x"))
    framed = torch.nn.functional.pad(raw, (4, 4, 4, 4))
    crop = CropFlip(4, normal.black)
    for down, right, flip in ((4, 4, 0), (4, 4, 1), (0, 8, 0), (8, 0, 1), (3, 5, 1)):
        expected = framed[:, :, down : down + 6, right : right + 7]
        expected = normal(expected.flip(3) if flip else expected)
        assert torch.equal(crop(normal(raw), torch.tensor([draw(down, right, flip)])), expected)


def test_crops_and_flips_of_a_batch():
    x = torch.randn(200, 3, 8, 8, generator=stream(0, "x"))
    crop, draws = CropFlip(4, torch.zeros(3, 1, 1)), torch.randint(1 << 62, (200,), generator=stream(0, "draws"))
    together = crop(x, draws)
    assert torch.equal(together, torch.cat([crop(x[i : i + 1], draws[i : i + 1]) for i in range(200)]))
    assert (draws // 81 % 2).float().mean() == pytest.approx(0.5, abs=0.1)
    assert (draws % 9).bincount().min() > 5
    assert (draws // 9 % 9).bincount().min() > 5
    assert len({row.numpy().tobytes() for row in together}) == 200
    assert x.equal(torch.randn(200, 3, 8, 8, generator=stream(0, "x")))  # what it is given stays


@pytest.mark.parametrize("chunk", [1, 1 << 18])
def test_batches_are_augmented_in_their_places(chunk, monkeypatch):
    monkeypatch.setattr("subnet_pipelines.benchmarks.base.CHUNK", chunk)
    x, y = torch.arange(23.0)[:, None], torch.arange(23)
    order, draws = torch.randperm(23, generator=stream(1, "order")), torch.arange(23) * 1000
    found = list(batches(x, y, None, order, 5, 1, lambda rows, drawn: rows + drawn[:, None], draws))
    assert torch.equal(torch.cat([b.x for b in found]).flatten(), (x.flatten()[order] + draws)[5:])
    assert torch.equal(torch.cat([b.y for b in found]), order[5:])


def test_an_augmented_run_resumes_to_the_same_bits(data, tmp_path, monkeypatch):
    rows, crop = [], CropFlip.__call__

    def counted(self, x, draws):
        rows.append(len(x))
        return crop(self, x, draws)

    monkeypatch.setattr(CropFlip, "__call__", counted)

    def made():
        benchmark = make("tiny-imagenet", data, tasks=2)
        return Probe(benchmark, epochs=2), benchmark

    method, benchmark = made()
    whole = run(method, benchmark, RunConfig(), tmp_path / "whole")
    assert sum(rows) == 2 * 2 * 45  # tasks, epochs, rows of a task
    resumed, result = broken_run(made, tmp_path / "broken", [4])
    for name, tensor in method.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    first, second = asdict(whole), asdict(result)
    assert first.pop("seconds") is not None
    second.pop("seconds")
    assert first == second


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", IMAGES)
def test_streams_on_a_gpu(name, data):
    fields = {} if name in ("five-datasets", "omniglot-rotation") else {"augment": "crop-flip"}
    cls = BENCHMARKS[name]
    benchmarks = [cls(cls.Config(tasks=3, val_fraction=0.1, **fields), 1, data, device) for device in ("cpu", "cuda")]
    order, draws = torch.randperm(40), torch.randint(1 << 62, (40,))
    for i in range(3):
        seen = []
        for benchmark in benchmarks:
            task, device = benchmark.task(i), benchmark.device
            feed = batches(*task.train.marked(i), order.to(device), 16, 0, task.train.augment, draws.to(device))
            seen.append([torch.cat(parts).cpu() for parts in zip(*feed)])
            assert task.val.tensors()[0].device.type == benchmark.test(i).tensors()[0].device.type == device.type
        assert torch.equal(seen[0][1], seen[1][1])
        torch.testing.assert_close(seen[0][0], seen[1][0], atol=1e-6, rtol=1e-6)


# ---- CIFAR-100 with few rows ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hundred(tmp_path_factory) -> Path:
    """All hundred classes, thirty training rows of each."""
    folder = tmp_path_factory.mktemp("hundred")
    sets.write_cifar100(folder, classes=100, train=30, test=2)
    return folder


FEW = {"cifar100-few": 10, "cifar100-few-20": 20, "cifar100-few-40": 40}


@pytest.mark.parametrize("name", FEW)
def test_cifar100_few(name, hundred):
    """The classes of the authors' lists in their order, a few rows of each, and of a class in two tasks other rows."""
    cls = BENCHMARKS[name]
    benchmark = cls(cls.Config(rows_per_class=5, val_fraction=0.2), 1, hundred)
    assert len(benchmark) == FEW[name]
    assert all(len(set(group)) == 10 for group in benchmark.groups)
    (raw, labels), (raw_test, labels_test) = cifar.load_cifar100(hundred)
    where = {picture.numpy().tobytes(): (row, int(labels[row, 1])) for row, picture in enumerate(raw)}
    seen: set[int] = set()
    for i in range(FEW[name]):
        task, test = benchmark.task(i), benchmark.test(i)
        halves = [[where[split.x[row].numpy().tobytes()] for row in split.index] for split in (task.train, task.val)]
        for split, found, each in zip((task.train, task.val), halves, (4, 1)):
            assert [c for _, c in found] == [benchmark.groups[i][y] for y in split.tensors()[1].tolist()]
            assert split.tensors()[1].bincount().tolist() == [each] * 10
        rows = {row for found in halves for row, _ in found}
        assert len(rows) == 50
        assert not seen & rows
        seen |= rows
        x, y = test.tensors()
        assert len(x) == 20
        places = torch.cat([(labels_test[:, 1] == c).nonzero().flatten() for c in benchmark.groups[i]])
        assert torch.equal(test.x, raw_test[places])
        assert [benchmark.groups[i][label] for label in y.tolist()] == labels_test[places, 1].tolist()


def test_cifar100_few_is_the_papers_data(hundred):
    """Two tasks by hand, and its sizes: 170, 30 and all test rows of ten classes; the second ten tasks have the other superclasses."""
    assert (cifar_few.TEN[0], cifar_few.TEN[9]) == ((4, 1, 54, 9, 0, 5, 6, 3, 12, 8), (87, 71, 38, 75, 99, 98, 93, 80, 96, 89))
    assert sorted(chain(*cifar_few.TEN)) == list(range(100))
    assert sorted(chain(*cifar_few.FORTY[:20])) == sorted([*range(100)] * 2)
    assert sorted(chain(*cifar_few.FORTY)) == sorted([*range(100)] * 4)
    benchmark = BENCHMARKS["cifar100-few"](cifar_few.FewConfig(), 1, hundred)
    assert [len(split) for split in (benchmark.task(0).train, benchmark.task(0).val, benchmark.test(0))] == [170, 30, 20]


@pytest.mark.parametrize("whose", ["train", "each"])
def test_cifar100_few_is_standardised(whose, hundred):
    benchmark = BENCHMARKS["cifar100-few"](cifar_few.FewConfig(tasks=2, standardise=whose), 1, hundred)
    for i in range(2):
        task = benchmark.task(i)
        for split in (task.train, task.val, benchmark.test(i)):
            mean, std = moments(split.tensors()[0])
            exact = whose == "each" or split is task.train
            assert (mean == pytest.approx([0, 0, 0], abs=1e-4)) == exact
            assert (std == pytest.approx([1, 1, 1], abs=1e-4)) == exact


def test_cifar100_few_has_rows_again_where_there_are_no_others(tmp_path):
    sets.write_cifar100(tmp_path, classes=100, train=3, test=1)
    benchmark = BENCHMARKS["cifar100-few-20"](cifar_few.Few20Config(val_fraction=0.1), 1, tmp_path)
    assert [len(benchmark.task(i).train) + len(benchmark.task(i).val) for i in range(20)] == [30] * 20
    one, two = (BENCHMARKS["cifar100-few"](cifar_few.FewConfig(rows_per_class=2), seed, tmp_path) for seed in (1, 2))
    assert not torch.equal(one.task(0).train.x, two.task(0).train.x)
    with pytest.raises(Refusal, match="rows_per_class must be at least 1, got 0"):
        cifar_few.FewConfig(rows_per_class=0).check()
    with pytest.raises(Refusal, match="tasks must be at most the 10 of cifar100-few, got 11"):
        BENCHMARKS["cifar100-few"](cifar_few.FewConfig(tasks=11), 1, tmp_path)
    sets.write_cifar100(tmp_path / "some", classes=50, train=3, test=1)
    with pytest.raises(Refusal, match="cifar100-few: class 54, of task 0, has no training picture"):
        BENCHMARKS["cifar100-few"](cifar_few.FewConfig(), 1, tmp_path / "some")


# ---- STL-10 ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stl(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stl")
    sets.write_stl10(folder / "stl10_binary")
    return folder


def test_stl10(stl):
    """Three classes a task, never the same three; pictures upright; noise and colours of the task's own, the same at every look."""
    (x, y), (x_test, y_test) = stl10.load_stl10(stl)
    assert torch.equal(x, torch.from_numpy(sets.pictures(sets.labels_of(10, 8), (3, 96, 96), 60)))
    assert (x_test.shape, y.tolist(), y_test.bincount().tolist()) == ((30, 3, 96, 96), [*range(10)] * 8, [3] * 10)
    benchmark = BENCHMARKS["stl10-split"](stl10.STL10Config(val_fraction=0.25), 1, stl)
    assert (len(benchmark), benchmark.classes, benchmark.input_shape) == (20, 3, (3, 96, 96))
    assert len({frozenset(group) for group in benchmark.groups}) == 20
    assert {mean for mean, _ in benchmark.noise} == {-2, -1, 0, 1}
    assert {std for _, std in benchmark.noise} == {0, 1}
    plain = BENCHMARKS["stl10-split"](stl10.STL10Config(val_fraction=0.25, disturb=False), 1, stl)
    for i in (0, 1, 2):
        task, test = benchmark.task(i), benchmark.test(i)
        assert [len(split) for split in (task.train, task.val, test)] == [18, 6, 9]
        assert not places(task.train) & places(task.val)
        (mean, std), order = benchmark.noise[i], benchmark.colours[i]
        for split, other in ((task.train, plain.task(i).train), (task.val, plain.task(i).val), (test, plain.test(i))):
            (seen, labels), (clean, same) = split.tensors(), other.tensors()
            assert torch.equal(seen, split.tensors()[0])
            assert torch.equal(labels, same)
            assert (clean.min() >= -0.5, clean.max() <= 0.5) == (True, True)
            noise = (seen - clean[:, order]).double()
            assert float(noise.mean()) == pytest.approx(0.025 * mean, abs=5e-4)
            assert float(noise.std()) == pytest.approx(0.025 * std, abs=5e-4)
            rows = split.x if split.index is None else split.x[split.index]
            lines = {
                picture.numpy().tobytes(): int(c) for picture, c in zip(*((x, y) if split is not test else (x_test, y_test)))
            }
            assert [lines[picture.numpy().tobytes()] for picture in rows] == [benchmark.groups[i][c] for c in labels.tolist()]


def test_stl10_files_that_are_wrong(tmp_path):
    with pytest.raises(Refusal, match=r"STL-10 .*stl10_binary lacks train_X.bin, train_y.bin, test_X.bin, test_y.bin"):
        stl10.load_stl10(tmp_path)
    sets.write_stl10(tmp_path / "stl10_binary", 1, 1)
    home = tmp_path / "stl10_binary"
    whole = (home / "train_X.bin").read_bytes()
    for name, data, sentence in (
        ("train_X.bin", whole[:-1], "train_X.bin: should be 1 to 8000 pictures of 27648 bytes, has 276479 bytes"),
        ("train_y.bin", bytes(9), "train_y.bin: should hold a label for each of 10 pictures, has 9 bytes"),
        ("test_y.bin", bytes([1] * 9 + [11]), "test_y.bin: labels should be from 1 to 10, one is 11"),
        ("test_y.bin", bytes([1] * 10), "stl10-split: class .*, of task 0, has no test picture"),
    ):
        before = (home / name).read_bytes()
        (home / name).write_bytes(data)
        with pytest.raises(Refusal, match=sentence):
            BENCHMARKS["stl10-split"](stl10.STL10Config(), 1, tmp_path)
        (home / name).write_bytes(before)
    with pytest.raises(Refusal, match="tasks must be at most the 120 of stl10-split, got 121"):
        BENCHMARKS["stl10-split"](stl10.STL10Config(tasks=121), 1, tmp_path)


# ---- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IMAGES)
def test_as_the_code_has_it(name):
    expected = {
        "five-datasets": {"val_split": "shuffle"},
        "omniglot-rotation": {"val_split": "train"},
        "cifar100-split": {"labels": "global", "val_split": "shuffle"},
        "cifar100-superclass": {"labels": "global", "val_split": "shuffle", "pixels": "interleaved"},
        "tiny-imagenet": {"labels": "global", "order": "python"},
    }[name]
    sound, code = (Settings("finetune", name).resolve(None, {}, fidelity).values for fidelity in ("sound", "code"))
    mine = {f.name for f in fields(BENCHMARKS[name].Config)}
    assert {key: value for key, value in code.items() if key in mine and sound[key] != value} == expected
    tasks = {"five-datasets": 5, "omniglot-rotation": 100, "cifar100-split": 10, "cifar100-superclass": 20, "tiny-imagenet": 40}
    assert sound["tasks"] == tasks[name]


# ---- the real sets --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """Real files of every set that is at hand."""
    return real_sets.lay_out(tmp_path_factory.mktemp("real"))


needs_real = pytest.mark.skipif(
    not real_sets.FOLDER.is_dir(), reason=f"no image sets at {real_sets.FOLDER}: set SUBNET_REAL_DATA"
)


def moments(x: torch.Tensor) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel."""
    return x.double().mean((0, 2, 3)).tolist(), x.double().std((0, 2, 3)).tolist()


@needs_real
@pytest.mark.parametrize(
    ("name", "train", "test", "mean", "std"),
    [  # what the code's constants leave of the sets' own means and deviations; CIFAR-10 and notMNIST are there in part
        ("cifar-10", 5_000, 1_000, 0.03, 0.03),
        ("mnist", 60_000, 10_000, 0.03, 0.03),
        ("fashion-mnist", 60_000, 10_000, 0.03, 0.03),
        ("notmnist", 8_000, 2_000, 0.25, 0.05),  # whose constants are of pictures without the frame
    ],
)
def test_real_sets_of_five(name, train, test, mean, std, real):
    benchmark = make("five-datasets", real, tasks=1, sets=[name], val_fraction=0.05)
    task = benchmark.task(0)
    assert (len(task.train), len(task.val), len(benchmark.test(0))) == (round(0.95 * train), train // 20, test)
    assert benchmark.test(0).tensors()[1].unique().tolist() == list(range(10))
    some = torch.randperm(train, generator=stream(0, "some"))[:4_000]
    found = moments(task.train.view(task.train.x[some]))
    assert found[0] == pytest.approx([0.0] * 3, abs=mean)
    assert found[1] == pytest.approx([1.0] * 3, abs=std)


@needs_real
def test_real_svhn_is_asked_for(real, monkeypatch):
    monkeypatch.setattr("pooch.retrieve", lambda *_args, **_fields: 1 / 0)
    if (real / "svhn").exists():
        pytest.skip("SVHN is at hand")
    with pytest.raises(Refusal, match=r"SVHN: .*svhn lacks train_32x32.mat, test_32x32.mat \(no download"):
        make("five-datasets", real, tasks=5)


@needs_real
def test_real_cifar100(real):
    benchmark = make("cifar100-split", real, val_fraction=0.05)
    for i in range(3):
        task = benchmark.task(i)
        assert task.train.tensors()[1].bincount().tolist() == [475] * 10
        assert task.val.tensors()[1].bincount().tolist() == [25] * 10
        assert benchmark.test(i).tensors()[1].bincount().tolist() == [100] * 10
    superclass = make("cifar100-superclass", real, val_fraction=0.05)
    assert superclass.groups == [
        [4, 30, 55, 72, 95],
        [1, 32, 67, 73, 91],
        [54, 62, 70, 82, 92],
    ]  # beaver, dolphin, otter, seal, whale; ...
    assert [superclass.title(i) for i in range(3)] == ["aquatic mammals", "fish", "flowers"]
    for i in range(3):
        assert superclass.task(i).train.tensors()[1].bincount().tolist() == [475] * 5
        assert superclass.test(i).tensors()[1].bincount().tolist() == [100] * 5
    assert moments(superclass.test(1).tensors()[0])[0] == pytest.approx([0.45, 0.49, 0.45], abs=0.1)


@needs_real
def test_real_omniglot(real):
    benchmark = make("omniglot-rotation", real)
    x, y = benchmark.task(0).train.tensors()
    assert (len(x), y.unique().tolist(), benchmark.classes) == (648, list(range(12)), 12)
    assert 0.85 < x.mean() < 0.98  # paper is 1, ink 0
    assert x.max() == 1
    own = omniglot.load_omniglot(real).float().flatten(2)
    spread = (own - own.mean(1, keepdim=True)).square().mean()
    assert spread < 0.9 * (own - own.mean((0, 1), keepdim=True)).square().mean()  # drawings of a character look alike


@pytest.mark.long
@needs_real
def test_real_omniglot_whole(tmp_path):
    real_sets.link_omniglot(tmp_path)
    assert omniglot.load_omniglot(tmp_path).shape == (1623, 20, 32, 32)
    omniglot.load_omniglot.cache_clear()
    benchmark = make("omniglot-rotation", tmp_path, tasks=100)
    for i in (0, 99):
        assert (len(benchmark.task(i).train), len(benchmark.task(i).val), len(benchmark.test(i))) == (648, 72, 240)
