"""SupSup's Split CIFAR-100 and Split ImageNet: classes, pictures and crops as the authors' code has them, and what is in memory when."""

from dataclasses import asdict
from itertools import chain
from pathlib import Path

import image_sets as sets
import numpy as np
import pytest
import torch
from PIL import Image
from streams import broken_run
from test_image_benchmarks import Probe

from subnet_pipelines import BENCHMARKS, Refusal, RunConfig, run
from subnet_pipelines.benchmarks import cifar, imagenet
from subnet_pipelines.benchmarks.base import Late, batches
from subnet_pipelines.chance import stream
from subnet_pipelines.config import Settings

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def cifar_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cifar")
    sets.write_cifar100(folder, classes=100, train=6, test=2)
    return folder


@pytest.fixture(scope="module")
def imagenet_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("imagenet")
    sets.write_imagenet(folder / "imagenet")
    return folder


def twenty(data_dir, seed=1, **fields):
    cls = BENCHMARKS["cifar100-split-20"]
    return cls(cls.Config(**{"val_fraction": 0.0, **fields}), seed, data_dir)


def split(data_dir, seed=1, **fields):
    cls = BENCHMARKS["imagenet-split"]
    return cls(cls.Config(**{"tasks": 3, "classes_per_task": 2, "val_fraction": 0.0, **fields}), seed, data_dir)


# ---- Split CIFAR-100 ------------------------------------------------------------------------------------------------


def test_twenty_tasks_of_five(cifar_dir):
    (raw, labels), _ = cifar.load_cifar100(cifar_dir)
    benchmark = twenty(cifar_dir, seed=3, order="numpy")
    np.random.seed(3)  # noqa: NPY002 - the authors' lines
    order = np.random.permutation(100)  # noqa: NPY002
    assert (len(benchmark), benchmark.classes, benchmark.input_shape) == (20, 5, (3, 32, 32))
    for i in (0, 7, 19):
        own = order[5 * i : 5 * i + 5].tolist()
        rows = [row for row in range(len(raw)) if labels[row, 1] in own]
        x, y = benchmark.task(i).train.tensors()
        assert y.tolist() == [own.index(labels[row, 1]) for row in rows]
        scaled = raw[rows].double().numpy() / 255
        for channel, (mean, std) in enumerate(((0.491, 0.247), (0.482, 0.243), (0.447, 0.262))):
            np.testing.assert_allclose(x[:, channel].numpy(), (scaled[:, channel] - mean) / std, atol=1e-5)
    assert benchmark.task(0).train.augment is not None
    assert benchmark.test(0).augment is None
    first, second = twenty(cifar_dir, seed=1).groups, twenty(cifar_dir, seed=2).groups
    assert first != second
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(100))


def test_twenty_tasks_are_learnt_by_supsup(cifar_dir, tmp_path):
    settings = Settings("supsup", "cifar100-split-20").resolve(None, {"tasks": 2, "epochs": 12, "batch_size": 10}, "code")
    method_config, benchmark_config, run_config = settings.build()
    benchmark = settings.benchmark(benchmark_config, 1, cifar_dir)
    method = settings.method(method_config, benchmark, 1)
    assert sum(layer.weight.numel() for layer in method.bank.layers()) == 1_090_940
    result = run(method, benchmark, run_config, tmp_path)
    assert min(result.final) > 40  # chance is 20
    assert result.bwt == 0


# ---- ImageNet's files -----------------------------------------------------------------------------------------------


def test_one_layout_is_as_good_as_another(imagenet_dir, tmp_path):
    kaggle = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    sets.write_imagenet(kaggle, flat=True)
    (kaggle / "LOC_val_solution.csv").rename(tmp_path / "LOC_val_solution.csv")
    sets.write_imagenet(tmp_path / "flat", flat=True)
    for folder in (tmp_path, tmp_path / "flat"):
        one, other = split(imagenet_dir, order="sorted"), split(folder, order="sorted")
        for i in range(3):
            for a, b in ((one.test(i), other.test(i)), (one.task(i).train, other.task(i).train)):
                assert torch.equal(a.tensors()[0][:], b.tensors()[0][:])
                assert torch.equal(a.y, b.y)


def test_missing_files_are_named(imagenet_dir, tmp_path):
    with pytest.raises(Refusal, match=r"imagenet lacks train and val \(no download is known.*--data-dir"):
        split(tmp_path)
    sets.write_imagenet(tmp_path / "imagenet", flat=True)
    home = tmp_path / "imagenet"
    text = (home / "LOC_val_solution.csv").read_text()
    for changed, sentence in (
        (text.replace("n00023757", "n9"), "'ILSVRC2012_val_00000000' is of class 'n9', of which train has no folder"),
        (text + "lonely\n", "'lonely' is of class '', of which train has no folder"),
        (text + "\xe9,n00023757\n", "LOC_val_solution.csv: cannot be read"),
    ):
        (home / "LOC_val_solution.csv").write_text(changed)
        with pytest.raises(Refusal, match=sentence):
            split(tmp_path)
    (home / "LOC_val_solution.csv").write_text(text)
    next((home / "val").iterdir()).unlink()
    with pytest.raises(Refusal, match=r"ILSVRC2012_val_.*: cannot be read"):
        [split(tmp_path).test(i).tensors()[0][:] for i in range(3)]
    (home / "LOC_val_solution.csv").unlink()
    with pytest.raises(Refusal, match=r"val: should hold a folder for each class, or LOC_val_solution\.csv lie in"):
        split(tmp_path)
    sets.write_imagenet(tmp_path / "few")
    for path in (tmp_path / "few" / "train" / "n00023757").iterdir():
        path.unlink()
    with pytest.raises(Refusal, match="imagenet-split: class n00023757, of task 0, has no training picture"):
        split(tmp_path / "few", order="sorted")
    with pytest.raises(Refusal, match="tasks must be at most the 3 of imagenet-split with 6 classes, got 4"):
        split(imagenet_dir, tasks=4)
    with pytest.raises(Refusal, match="classes_per_task must be at least 1, got 0"):
        split(imagenet_dir, classes_per_task=0)


def test_bad_pictures_are_named(tmp_path, monkeypatch):
    sets.write_imagenet(tmp_path / "imagenet", classes=2, train=1, val=1)
    (path,) = (tmp_path / "imagenet" / "train" / "n00023757").iterdir()
    files, name = imagenet.ImageNet(tmp_path), f"train/n00023757/{path.name}"
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], b"", b"GIF89a" + bytes(50)):
        path.write_bytes(data)
        with pytest.raises(Refusal, match=f"{path.name}: is no picture that can be read"):
            files.read(name)
    Image.new("RGB", (2, 200)).save(path, "JPEG")
    with pytest.raises(Refusal, match=r"a long side at most 64 times the short one, is 2 x 200"):
        files.read(name)
    path.write_bytes(whole)
    monkeypatch.setattr(imagenet, "FILE", len(whole) - 1)
    with pytest.raises(Refusal, match=f"should be at most {len(whole) - 1} bytes"):
        files.read(name)


# ---- ImageNet's tasks -----------------------------------------------------------------------------------------------


def reference(path: Path) -> np.ndarray:
    """Resize 256, CenterCrop 224, ToTensor and Normalize, written down once more: float64 (3, 224, 224)."""
    picture = Image.open(path).convert("RGB")
    width, height = picture.size
    size = (256, int(256 * height / width)) if width <= height else (int(256 * width / height), 256)
    picture = picture.resize(size, Image.Resampling.BILINEAR)
    left, top = round((picture.width - 224) / 2), round((picture.height - 224) / 2)
    pixels = np.asarray(picture.crop((left, top, left + 224, top + 224)), dtype=np.float64) / 255
    return ((pixels - MEAN) / STD).transpose(2, 0, 1)


@pytest.mark.parametrize("labels", ["local", "global"])
def test_rows_of_a_task(imagenet_dir, labels):
    benchmark = split(imagenet_dir, order="sorted", labels=labels, val_fraction=0.25)
    assert (benchmark.input_shape, benchmark.classes) == ((3, 224, 224), 2 if labels == "local" else 6)
    for i in range(3):
        task, test = benchmark.task(i), benchmark.test(i)
        assert (len(task.train), len(task.val), len(test)) == (12, 4, 6)
        for half, part in (("train", task.train), ("train", task.val), ("val", test)):
            own = range(2 * i, 2 * i + 2)
            paths = [p for c in own for p in sorted((imagenet_dir / "imagenet" / half / benchmark.files.classes[c]).iterdir())]
            known = [c if labels == "global" else c - own[0] for c in own for _ in range(len(paths) // 2)]
            places = range(len(paths)) if part.index is None else part.index.tolist()
            x, y = part.tensors()
            assert isinstance(x, Late)
            assert x.shape == (len(part), 3, 224, 224)
            assert y.tolist() == [known[place] for place in places]
            for row, place in zip(x[:], places):
                np.testing.assert_allclose(row.numpy(), reference(paths[place]), atol=1e-5)
            assert torch.equal(x[torch.tensor([3, 1])], x[:][torch.tensor([3, 1])])


def test_orders_of_classes(imagenet_dir):
    order = np.random.RandomState(1).permutation(6).reshape(3, 2).tolist()
    assert split(imagenet_dir, seed=1, order="numpy").groups == split(imagenet_dir, seed=5, order="numpy").groups == order
    assert split(imagenet_dir, order="sorted").groups == [[0, 1], [2, 3], [4, 5]]
    assert len({str(split(imagenet_dir, seed=seed).groups) for seed in range(5)}) > 1
    np.random.seed(1)  # noqa: NPY002 - the authors' lines
    assert np.random.RandomState(1).permutation(1000).tolist() == np.random.permutation(1000).tolist()  # noqa: NPY002


def test_one_task_is_in_memory(imagenet_dir, monkeypatch):
    benchmark, read = split(imagenet_dir, order="sorted", val_fraction=0.25), []
    one = imagenet.ImageNet.read
    monkeypatch.setattr(imagenet.ImageNet, "read", lambda self, name: read.append(name) or one(self, name))
    tasks = [benchmark.task(i) for i in range(3)]
    views = [task.train.tensors()[0] for task in tasks]
    assert not read
    views[0][:1]
    assert len(read) == 16  # all of task 0, once
    benchmark.task(0).val.tensors()[0][:]
    benchmark.test(2).tensors()[0][:1]
    views[0][3:5]
    assert len(read) == 16 + 6
    views[1][:1]
    assert len(read) == 2 * 16 + 6
    assert {half: (i, len(held)) for half, (i, held) in benchmark._held.items()} == {"train": (1, 16), "val": (2, 6)}
    views[0][:1]
    assert len(read) == 3 * 16 + 6
    with pytest.raises(Refusal, match="imagenet-split cannot be learnt as one task"):
        benchmark.union()


# ---- crops ----------------------------------------------------------------------------------------------------------


def test_split_mix():
    """Against the generator's published first numbers from 1234567."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert imagenet.uniforms(np.array([1234567]), 5).tolist() == [[(v >> 11) * 2.0**-53 for v in known]]


def test_random_boxes():
    draws = torch.randint(1 << 62, (20_000,), generator=stream(0, "draws")).numpy()
    sizes = np.tile([[256, 341]], (len(draws), 1))
    boxes, mirrored = imagenet.random_boxes(sizes, draws)
    top, left, height, width = boxes.T
    assert mirrored.mean() == pytest.approx(0.5, abs=0.02)
    assert (boxes >= 0).all()
    assert ((top + height <= 256) & (left + width <= 341)).all()
    share, ratio = height * width / (256 * 341), width / height
    assert share.min() == pytest.approx(0.08, abs=0.005)
    assert (ratio.min(), ratio.max()) == (pytest.approx(3 / 4, abs=0.02), pytest.approx(4 / 3, abs=0.02))
    small = share < 0.5  # which always fit: uniform in area, the ratio log-uniform, the place uniform
    assert small.mean() / (share < 0.29).mean() == pytest.approx(2, abs=0.06)
    assert np.log(ratio[small]).mean() == pytest.approx(0, abs=0.01)
    assert (top[small] / (256 - height[small])).mean() == pytest.approx(0.5, abs=0.01)
    assert (left[small] / (341 - width[small])).mean() == pytest.approx(0.5, abs=0.01)
    alone, _ = imagenet.random_boxes(sizes[7:8], draws[7:8])
    assert alone.tolist() == boxes[7:8].tolist()
    assert len(np.unique(boxes, axis=0)) > 19_000


def test_boxes_of_a_band():
    """No crop fits a picture that is twenty times as wide as high: then it is the largest central one."""
    boxes, _ = imagenet.random_boxes(np.array([[256, 25_600], [25_600, 256], [256, 25_600]]), np.array([3, 4, 5]))
    assert boxes.tolist() == [[0, 12_629, 256, 341], [12_629, 0, 341, 256], [0, 12_629, 256, 341]]


def test_parts_of_pictures(imagenet_dir):
    benchmark = split(imagenet_dir, order="sorted")
    train = benchmark.task(1).train
    rows, draws = train.tensors()[0].rows, torch.randint(1 << 62, (len(train),), generator=stream(0, "draws"))
    found = imagenet.random_parts(rows, draws)
    pictures = rows.rows()
    boxes, mirrored = imagenet.random_boxes(np.array([p.shape[:2] for p in pictures]), draws.numpy())
    assert 0 < mirrored.sum() < len(mirrored)
    for row, picture, (top, left, height, width), flip in zip(found, pictures, boxes, mirrored):
        part = Image.fromarray(picture.numpy()).crop((left, top, left + width, top + height))
        part = np.asarray(part.resize((224, 224), Image.Resampling.BILINEAR), dtype=np.float64).transpose(2, 0, 1)
        assert np.abs(row.numpy() - (part[:, :, ::-1] if flip else part)).max() <= 1.01  # Pillow rounds to bytes twice
    order = torch.randperm(len(train), generator=stream(0, "order"))
    feed = list(batches(*train.marked(1), order, 6, 1, train.augment, draws))
    expected = benchmark.normal(imagenet.random_parts(rows[order], draws))
    assert torch.equal(torch.cat([b.x for b in feed]), expected[6:])
    assert torch.equal(torch.cat([b.y for b in feed]), train.y[order][6:])
    plain = split(imagenet_dir, order="sorted", augment="none").task(1).train
    assert plain.augment is None
    assert torch.equal(torch.cat([b.x for b in batches(*plain.marked(1), None, 6)]), plain.tensors()[0][:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_pictures_on_a_gpu(imagenet_dir):
    cls = BENCHMARKS["imagenet-split"]
    config, seen = cls.Config(tasks=1, classes_per_task=2, val_fraction=0.25), []
    order, draws = torch.randperm(12, generator=stream(0, "order")), torch.randint(1 << 62, (12,), generator=stream(0, "draws"))
    for device in ("cpu", "cuda"):
        benchmark = cls(config, 1, imagenet_dir, device)
        task, test = benchmark.task(0), benchmark.test(0)
        feed = list(batches(*task.train.marked(0), order.to(device), 5, 0, task.train.augment, draws.to(device)))
        plain = list(batches(*test.marked(0), None, 4))
        assert {b.x.device.type for b in feed + plain} == {device}
        seen.append([torch.cat([b.x for b in part]).cpu() for part in (feed, plain)])
        assert torch.equal(torch.cat([b.y for b in feed]).cpu(), task.train.tensors()[1].cpu()[order])
    torch.testing.assert_close(seen[0][0], seen[1][0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen[0][1], seen[1][1], atol=1e-6, rtol=1e-6)


# ---- runs -----------------------------------------------------------------------------------------------------------


def test_a_run_resumes_to_the_same_bits(imagenet_dir, tmp_path):
    def made():
        benchmark = split(imagenet_dir, tasks=2)
        return Probe(benchmark, epochs=2), benchmark

    method, benchmark = made()
    whole = run(method, benchmark, RunConfig(), tmp_path / "whole")
    resumed, result = broken_run(made, tmp_path / "broken", [2])
    for name, tensor in method.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    first, second = asdict(whole), asdict(result)
    first.pop("seconds")
    second.pop("seconds")
    assert first == second


def test_supsup_runs_on_it(imagenet_dir, tmp_path):
    flags = {"tasks": 1, "classes_per_task": 2, "iterations": 2, "batch_size": 4}
    settings = Settings("supsup", "imagenet-split").resolve(None, flags, "code")
    method_config, benchmark_config, run_config = settings.build()
    benchmark = settings.benchmark(benchmark_config, 1, imagenet_dir)
    result = run(settings.method(method_config, benchmark, 1), benchmark, run_config, tmp_path)
    assert len(result.final) == 1


def test_recipes():
    values = Settings("supsup", "cifar100-split-20").resolve(None, {}, "code").values
    expected = {"model": "gem-resnet-18", "head": "masked", "mask": "topk", "optimizer": "adam", "lr": 1e-3, "weight_decay": 1e-4}
    expected |= {"schedule": "cosine", "epochs": 250, "iterations": None, "batch_size": 128, "outputs": None, "scenario": "GG"}
    expected |= {"tasks": 20, "classes_per_task": 5, "order": "numpy", "augment": "crop-flip", "val_fraction": 0.0}
    assert {name: values[name] for name in expected} == expected
    values = Settings("supsup", "imagenet-split").resolve(None, {}, "code").values
    expected |= {
        "model": "resnet-50",
        "weight_decay": 0.0,
        "epochs": 100,
        "batch_size": 256,
        "tasks": 100,
        "classes_per_task": 10,
    }
    assert {name: values[name] for name in expected} == expected
    for fidelity in ("sound", "code"):
        values = Settings("supsup", "rotated-mnist").resolve(None, {}, fidelity).values
        expected = {"model": "fc-1024", "outputs": 200, "iterations": 1000, "batch_size": 128, "optimizer": "rmsprop", "lr": 1e-4}
        expected |= {"objective": "H", "inference": "binary", "inference_unit": "batch", "deciding_rows": None, "tasks": 36}
        assert {name: values[name] for name in expected} == expected
