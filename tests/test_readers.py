"""Readers of image sets: what they make of files in the official formats, and that damaged or hostile files are refused in a sentence."""

import gzip
import os
import shutil
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import image_sets as sets
import numpy as np
import pytest
import torch
from PIL import Image

from subnet_pipelines import Refusal
from subnet_pipelines.benchmarks import cifar, files, five, omniglot, pictures, tiny_imagenet
from subnet_pipelines.benchmarks.mat import read_mat
from subnet_pipelines.benchmarks.pictures import Tree


@pytest.fixture(autouse=True)
def _fresh():
    """No set is remembered from another test."""
    for load in (
        cifar.load_cifar10,
        cifar.load_cifar100,
        five.load_set,
        omniglot.load_omniglot,
        tiny_imagenet.load_tiny_imagenet,
    ):
        load.cache_clear()


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    import pooch

    def retrieve(*_args, **_fields):
        raise OSError("no network")

    monkeypatch.setattr(pooch, "retrieve", retrieve)


def refused(match: str, read, *args) -> str:
    with pytest.raises(Refusal, match=match) as error:
        read(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def survives(read, data: bytes, path: Path, tries: int) -> int:
    """Read the file cut short anywhere, and with a byte changed anywhere: it is read or refused, nothing else. How often refused."""
    chance, count = np.random.default_rng(5), 0
    for number in range(tries):
        changed, at = bytearray(data), int(chance.integers(len(data)))
        if number % 2:
            del changed[at:]
        else:
            changed[at] ^= int(chance.integers(1, 256))
        path.write_bytes(changed)
        try:
            read(path)
        except Refusal:
            count += 1
    return count


def peak_of(read, *args) -> int:
    """Bytes that Python and numpy had at most while the file was refused."""
    tracemalloc.start()
    try:
        with pytest.raises(Refusal):
            read(*args)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# ---- CIFAR ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("archive", [False, True])
def test_cifar(archive, tmp_path):
    sets.write_cifar10(tmp_path, archive=archive)
    sets.write_cifar100(tmp_path, classes=10, archive=archive)
    (x, y), (test_x, test_y) = cifar.load_cifar10(tmp_path)
    assert (x.shape, x.dtype, y.dtype) == ((100, 3, 32, 32), torch.uint8, torch.int64)
    assert y.bincount().tolist() == [10] * 10
    assert test_y.bincount().tolist() == [4] * 10
    assert torch.equal(x[20:40].flatten(), torch.from_numpy(sets.pictures(sets.labels_of(10, 2), (3, 32, 32), 12)).flatten())
    (x, y), (test_x, test_y) = cifar.load_cifar100(tmp_path)
    assert (x.shape, test_x.shape) == ((100, 3, 32, 32), (40, 3, 32, 32))
    assert y.tolist() == [[label // 5, label] for label in sets.labels_of(10, 10)]
    assert test_y.tolist() == [[label // 5, label] for label in sets.labels_of(10, 4)]


def test_a_cifar_record_by_hand(tmp_path):
    planes = bytes([1] * 1024) + bytes([2] * 1024) + bytes(range(256)) * 4  # red, green, blue
    path = tmp_path / "train.bin"
    path.write_bytes(bytes([19, 99]) + planes)
    with open(path, "rb") as file:
        x, y = cifar.read_records(file, 3074, "here", (20, 100))
    assert y.tolist() == [[19, 99]]
    assert x[0, 0].unique().tolist() == [1]
    assert x[0, 1].unique().tolist() == [2]
    assert x[0, 2, 0].tolist() == list(range(32))  # row by row
    assert x[0, 2, 1].tolist() == list(range(32, 64))


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "1 to 50000 records of 3074 bytes, has 0"),
        (bytes(3073), "records of 3074 bytes, has 3073"),
        (bytes([20, 0]) + bytes(3072), "label byte 0 should be below 20, one is 20"),
        (bytes(3074) + bytes([0, 100]) + bytes(3072), "label byte 1 should be below 100, one is 100"),
    ],
)
def test_damaged_cifar(data, sentence, tmp_path):
    sets.write_cifar100(tmp_path, classes=5)
    (tmp_path / "cifar-100-binary" / "train.bin").write_bytes(data)
    assert str(tmp_path / "cifar-100-binary" / "train.bin") in refused(sentence, cifar.load_cifar100, tmp_path)


def test_a_cifar_file_longer_than_any(tmp_path):
    sets.write_cifar100(tmp_path, classes=5)
    with open(tmp_path / "cifar-100-binary" / "train.bin", "wb") as file:
        file.truncate(3074 << 24)  # of holes: 50 GB, if they were read
    assert peak_of(cifar.load_cifar100, tmp_path) < 1 << 22


def test_missing_cifar(tmp_path):
    message = refused("CIFAR-100", cifar.load_cifar100, tmp_path)
    assert (
        f"{tmp_path} lacks cifar-100-binary.tar.gz (no download: OSError at https://www.cs.toronto.edu/~kriz/cifar-100" in message
    )
    sets.write_cifar10(tmp_path)
    for name in ("data_batch_2.bin", "test_batch.bin"):
        (tmp_path / "cifar-10-batches-bin" / name).unlink()
    message = refused("CIFAR-10", cifar.load_cifar10, tmp_path)
    assert "cifar-10-batches-bin lacks data_batch_2.bin, test_batch.bin (no official download is known)" in message


def test_damaged_archives_of_cifar(tmp_path):
    sets.write_cifar100(tmp_path, classes=5, train=2, test=1, archive=True)
    path = tmp_path / "cifar-100-binary.tar.gz"

    def read(_path):
        cifar.load_cifar100.cache_clear()
        return cifar.load_cifar100(tmp_path)

    raw = path.read_bytes()
    assert survives(read, raw, path, 100) > 40
    path.write_bytes(b"hello there, I am no archive")
    assert str(path) in refused("is damaged or cut short", read, path)
    for size, sentence in ((1 << 33, "should have at most 153700000 bytes, has 8589934592"), (3075, "records of 3074 bytes")):
        member = tarfile.TarInfo("cifar-100-binary/train.bin")
        member.size = size
        path.write_bytes(gzip.compress(member.tobuf() + bytes(10240)))
        refused(sentence, read, path)
    with tarfile.open(path, "w:gz") as tar:
        member = tarfile.TarInfo("cifar-100-binary/train.bin")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    refused("lacks train.bin, test.bin", read, path)


def test_an_archive_that_unpacks_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "ARCHIVE", 1 << 22)
    member = tarfile.TarInfo("cifar-100-binary/readme")
    member.size = 1 << 30
    (tmp_path / "cifar-100-binary.tar.gz").write_bytes(gzip.compress(member.tobuf() + bytes(1 << 23), 1))
    refused("unpacks to more than 4194304 bytes", cifar.load_cifar100, tmp_path)


# ---- SVHN -----------------------------------------------------------------------------------------------------------


def test_svhn(tmp_path):
    sets.write_svhn(tmp_path / "svhn")
    (x, y), (test_x, test_y) = five.load_set("svhn", tmp_path)
    assert (x.shape, x.dtype, y.dtype) == ((80, 3, 32, 32), torch.uint8, torch.int64)
    assert torch.equal(x, torch.from_numpy(sets.pictures(sets.labels_of(10, 8), (3, 32, 32), 30)))
    assert y.tolist() == sets.labels_of(10, 8).tolist()  # the format's 10 is a 0
    assert (test_x.shape, test_y.bincount().tolist()) == ((40, 3, 32, 32), [4] * 10)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("deflated", [False, True])
def test_mat_arrays(order, deflated, tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (3, 4, 5), dtype=np.uint8)
    y = np.array([[1.5, -2.0, 1e300]])
    other = sets.mat_array("other", np.zeros((70, 9)), order, deflated)
    small = np.array([[7, 9]], dtype=np.uint8)  # fits beside its tag
    parts = [other, sets.mat_array("X", x, order, deflated), sets.mat_array("y", y, order, deflated)]
    path = tmp_path / "a.mat"
    path.write_bytes(sets.mat_file([*parts, sets.mat_array("small", small, order, deflated)], order))
    found = read_mat(path, ["y", "X", "small"])
    assert np.array_equal(found["X"], x)
    assert np.array_equal(found["y"], y)
    assert np.array_equal(found["small"], small)
    assert set(found) == {"X", "y", "small"}


X = np.zeros((32, 32, 3, 2), dtype=np.uint8)
Y = np.array([[1], [10]], dtype=np.uint8)
NOISE = np.random.default_rng(0).integers(0, 256, X.shape, dtype=np.uint8)


def mat(*arrays, **fields):
    return sets.mat_file([sets.mat_array(name, values, **fields) for name, values in arrays])


def with_dimensions(*shape, data=b"", deflated=True):
    """A file whose X says that it has this shape."""
    body = sets.mat_element(6, struct.pack("<II", 9, 0)) + sets.mat_element(5, struct.pack(f"<{len(shape)}i", *shape))
    body += sets.mat_element(1, b"X") + struct.pack("<II", 2, min(abs(int(np.prod(shape, dtype=object))), 2**32 - 1)) + data
    whole = struct.pack("<II", 14, len(body)) + body
    packed = zlib.compress(whole)
    return sets.mat_file([struct.pack("<II", 15, len(packed)) + packed if deflated else whole])


BAD_MAT = {
    "empty": (b"", "is no MATLAB file of version 5"),
    "text": (b"x" * 400, "is no MATLAB file of version 5"),
    "hdf5": (b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(512), "is no MATLAB file of version 5"),
    "no y": (mat(("X", X)), "has no array y"),
    "nothing": (mat(), "has no array X or y"),
    "counts": (mat(("X", X), ("y", Y[:1])), "has 2 pictures and 1 labels"),
    "labels": (mat(("X", X), ("y", Y * 2)), "labels should be 1 to 10, are 2 to 20"),
    "type": (mat(("X", X.astype(float)), ("y", Y)), r"X should be bytes \(32, 32, 3, n\), is float64"),
    "shape": (mat(("X", X[:, :, 0]), ("y", Y)), r"X should be bytes \(32, 32, 3, n\), is uint8 \(32, 32, 2\)"),
    "none": (mat(("X", X[..., :0]), ("y", Y[:0])), r"X should be bytes .*, is uint8 \(32, 32, 3, 0\)"),
    "cut": (mat(("X", X), ("y", Y))[:200], "cut short"),
    "huge": (with_dimensions(2**31 - 1, 2**31 - 1), "which no set of this format has"),
    "negative": (with_dimensions(-32, 32, -3, 2), "which no set of this format has"),
    "large, short": (with_dimensions(32, 32, 3, 600_000), "cut short: 1843200000 bytes should follow, 0 do"),
    "more numbers": (mat(("X", X)).replace(struct.pack("<4i", 32, 32, 3, 2), struct.pack("<4i", 32, 32, 3, 1)), "damaged|has no"),
}


@pytest.mark.parametrize("name", BAD_MAT)
def test_damaged_svhn(name, tmp_path):
    data, sentence = BAD_MAT[name]
    path = tmp_path / "train_32x32.mat"
    path.write_bytes(data)
    assert str(path) in refused(sentence, five.read_svhn, path)


def test_a_mat_element_longer_than_its_file(tmp_path):
    path = tmp_path / "a.mat"
    path.write_bytes(sets.mat_file([struct.pack("<II", 14, 1 << 31)]))
    refused("an element promises 2147483648 bytes, 0 are there", read_mat, path, ["X"])


@pytest.mark.parametrize("at", [-1, -5, -30])
def test_damaged_bits_of_a_deflated_array(at, tmp_path):
    path, data = tmp_path / "a.mat", bytearray(mat(("X", NOISE)))
    data[at] ^= 1
    path.write_bytes(data)
    refused("damaged", read_mat, path, ["X"])


@pytest.mark.parametrize(("kind", "size"), [(9, 7), (12, 12), (4, 1)])
def test_mat_numbers_that_are_cut(kind, size, tmp_path):
    body = sets.mat_element(6, struct.pack("<II", 9, 0)) + sets.mat_element(5, struct.pack("<2i", 1, 1))
    body += sets.mat_element(1, b"X") + sets.mat_element(kind, bytes(size))
    path = tmp_path / "a.mat"
    path.write_bytes(sets.mat_file([struct.pack("<II", 14, len(body)) + body]))
    refused("damaged", read_mat, path, ["X"])


def test_mat_survives(tmp_path):
    path = tmp_path / "a.mat"
    for deflated in (True, False):
        data = mat(("X", X), ("y", Y), deflated=deflated)
        assert survives(five.read_svhn, data, path, 100) > 40


@pytest.mark.parametrize("deflated", [True, False])
def test_mat_takes_no_more_memory_than_is_there(deflated, tmp_path):
    path = tmp_path / "a.mat"
    path.write_bytes(with_dimensions(32, 32, 3, 600_000, data=bytes(1000), deflated=deflated))
    assert peak_of(five.read_svhn, path) < 1 << 23


def test_complex_numbers_are_no_set(tmp_path):
    path, real, complex_ = tmp_path / "a.mat", struct.pack("<4I", 6, 8, 9, 0), struct.pack("<4I", 6, 8, 0x809, 0)
    path.write_bytes(mat(("X", X), ("y", Y), deflated=False).replace(real, complex_))
    refused("array X is not one of real numbers", five.read_svhn, path)


# ---- sets in MNIST's format -----------------------------------------------------------------------------------------


def test_fashion_mnist_is_not_taken_for_mnist(tmp_path):
    sets.write_idx_set(tmp_path / "mnist", purpose=0)
    refused("Fashion-MNIST: .*fashion-mnist lacks train-images", five.load_set, "fashion-mnist", tmp_path)
    sets.write_idx_set(tmp_path / "FashionMNIST" / "raw", purpose=1)
    assert not torch.equal(five.load_set("fashion-mnist", tmp_path)[0][0], five.load_set("mnist", tmp_path)[0][0])


def test_missing_notmnist_has_no_address(tmp_path):
    sets.write_idx_set(tmp_path / "notmnist")
    (tmp_path / "notmnist" / "t10k-labels-idx1-ubyte.gz").unlink()
    message = refused("notMNIST", five.load_set, "notmnist", tmp_path)
    assert (
        f"{tmp_path}/notmnist lacks t10k-labels-idx1-ubyte.gz (no official download is known); put what is missing there"
        in message
    )


# ---- pictures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [False, True])
def test_omniglot(zipped, tmp_path):
    sets.write_omniglot(tmp_path / "omniglot", 2, 1, zipped)
    x = omniglot.load_omniglot(tmp_path)
    assert (x.shape, x.dtype) == ((3, 20, 32, 32), torch.uint8)
    drawn = Image.fromarray(sets.drawings(2)[7])
    assert np.array_equal(x[2, 7].numpy(), np.asarray(drawn.convert("L").resize((32, 32), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize("zipped", [False, True])
def test_tiny_imagenet(zipped, tmp_path):
    sets.write_tiny_imagenet(tmp_path, classes=3, train=4, val=2, zipped=zipped)
    names, (x, y), (test_x, test_y) = tiny_imagenet.load_tiny_imagenet(tmp_path)
    assert names == sorted(names)
    assert (x.shape, x.dtype, y.tolist()) == ((12, 3, 64, 64), torch.uint8, [0] * 4 + [1] * 4 + [2] * 4)
    assert test_x.shape == (6, 3, 64, 64)
    assert test_y.bincount().tolist() == [2, 2, 2]
    for label in range(3):  # a class looks like itself in both halves, also after JPEG
        near = (x.float()[:, None] - test_x[test_y == label].float()).square().mean((1, 2, 3, 4))
        assert near.view(3, 4).mean(1).argmin() == label


def counted(monkeypatch) -> list:
    made, decode = [], pictures.decode

    def count(*args):
        made.append(args[1])
        return decode(*args)

    monkeypatch.setattr(pictures, "decode", count)
    return made


@pytest.mark.parametrize("zipped", [False, True])
def test_pictures_are_decoded_once(zipped, tmp_path, monkeypatch):
    sets.write_tiny_imagenet(tmp_path, classes=2, train=2, val=1, zipped=zipped)
    made = counted(monkeypatch)

    def load():
        tiny_imagenet.load_tiny_imagenet.cache_clear()
        return tiny_imagenet.load_tiny_imagenet(tmp_path)[1][0]

    first = load()
    assert len(made) == 6
    assert torch.equal(load(), first)
    assert len(made) == 6
    tree = "tiny-imagenet-200.zip" if zipped else "tiny-imagenet-200"
    assert {p.name for p in tmp_path.iterdir()} == {tree, "tiny-imagenet-200.64x64.safetensors"}
    cache = tmp_path / "tiny-imagenet-200.64x64.safetensors"
    whole = cache.read_bytes()
    for damaged in (b"", whole[:-1], whole[: len(whole) // 2], b"\xff" * 100):
        cache.write_bytes(damaged)
        assert torch.equal(load(), first)
    assert len(made) == 30
    assert cache.read_bytes() == whole


def test_the_cache_notices_other_pictures(tmp_path, monkeypatch):
    sets.write_omniglot(tmp_path, 1, 1)
    first = omniglot.load_omniglot(tmp_path)
    at = next((tmp_path / "images_background").rglob("*_03.png"))
    at.write_bytes(sets.encoded(np.zeros((105, 105), bool), "PNG"))
    os.utime(at, ns=(1, 1))
    made = counted(monkeypatch)
    omniglot.load_omniglot.cache_clear()
    second = omniglot.load_omniglot(tmp_path)
    assert len(made) == 20  # of the changed folder, not of the other
    assert second[0, 2].max() == 0
    assert torch.equal(first[1], second[1])


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    sets.write_omniglot(tmp_path, 1, 1)

    def no_space(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pictures, "save_file", no_space)
    assert omniglot.load_omniglot(tmp_path).shape == (2, 20, 32, 32)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images_background", "images_evaluation"]


def png(width: int, height: int) -> bytes:
    """A PNG that says it has this size and holds nothing of it."""
    head = struct.pack(">II5B", width, height, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks
    )


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (png(105, 104), "should be 105 x 105, is 105 x 104"),
        (png(9000, 9000), "should be 105 x 105, is 9000 x 9000"),
        (png(105, 105), "no PNG picture that can be read"),
        (png(10**6, 10**6), "no PNG picture that can be read"),  # more pixels than Pillow opens
        (b"", "no PNG picture that can be read"),
        (b"GIF89a" + bytes(100), "no PNG picture that can be read"),
        (sets.encoded(np.zeros((105, 105, 3), np.uint8), "JPEG"), "no PNG picture that can be read"),
        (sets.encoded(np.random.default_rng(0).integers(0, 2, (105, 105)) > 0, "PNG")[:500], "no PNG picture that can be read"),
        (bytes(2**20 + 1), "should be at most 1048576 bytes"),
    ],
)
def test_damaged_pictures(data, sentence, tmp_path):
    sets.write_omniglot(tmp_path, 1, 1)
    at = next((tmp_path / "images_background").rglob("*_03.png"))
    at.write_bytes(data)
    assert at.name in refused(sentence, omniglot.load_omniglot, tmp_path)


def test_pictures_survive(tmp_path):
    picture = sets.encoded(sets.pictures(np.zeros(1, int), (3, 64, 64))[0].transpose(1, 2, 0), "JPEG")

    def read(path):
        return pictures.decode(path.read_bytes(), "here", "JPEG", "RGB", 64, 64)

    survives(read, picture, tmp_path / "a.JPEG", 150)


def test_zips_survive(tmp_path):
    sets.write_tiny_imagenet(tmp_path, classes=1, train=2, val=1, zipped=True)
    path = tmp_path / "tiny-imagenet-200.zip"

    def read(_path):
        tiny_imagenet.load_tiny_imagenet.cache_clear()
        return tiny_imagenet.load_tiny_imagenet(tmp_path)

    assert survives(read, path.read_bytes(), path, 100) > 40


def test_zips_that_lie(tmp_path):
    path = tmp_path / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("tiny-imagenet-200/wnids.txt", bytes(1 << 26))  # 64 MB in 64 kB
    assert peak_of(tiny_imagenet.load_tiny_imagenet, tmp_path) < 1 << 23
    refused("wnids.txt should be at most 1048576 bytes", tiny_imagenet.load_tiny_imagenet, tmp_path)
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("elsewhere/wnids.txt", "n00000001")
    refused("lacks wnids.txt", tiny_imagenet.load_tiny_imagenet, tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("wnids.txt", "n00000001", "is of class 'n[0-9]+', which wnids.txt does not list"),
        ("wnids.txt", "", "is of class 'n[0-9]+', which wnids.txt does not list"),
        ("wnids.txt", "\xff\xfe", "should be plain text"),
        ("val/val_annotations.txt", "", "should list different classes in wnids.txt"),
        ("val/val_annotations.txt", "val_0.JPEG\n", "val_0.JPEG is of class ''"),
        (
            "val/val_annotations.txt",
            "../../wnids.txt\tCLASS\n",
            "lacks val/images/../../wnids.txt, which val/val_annotations.txt lists",
        ),
        ("val/val_annotations.txt", "val_7.JPEG\tCLASS\n", "lacks val/images/val_7.JPEG, which"),
    ],
)
def test_lists_that_do_not_fit(name, text, sentence, tmp_path):
    sets.write_tiny_imagenet(tmp_path, classes=1, train=2, val=1)
    folder = tmp_path / "tiny-imagenet-200"
    label = (folder / "wnids.txt").read_text().strip()
    (folder / name).write_bytes(text.replace("CLASS", label).encode("latin-1"))
    assert str(folder) in refused(sentence, tiny_imagenet.load_tiny_imagenet, tmp_path)


def test_odd_omniglots(tmp_path):
    message = refused("Omniglot", omniglot.load_omniglot, tmp_path)
    assert f"{tmp_path}/omniglot lacks images_background.zip, images_evaluation.zip (no download" in message
    sets.write_omniglot(tmp_path, 1, 1)
    shutil.rmtree(tmp_path / "images_evaluation")
    assert "lacks images_evaluation.zip (no" in refused("Omniglot", omniglot.load_omniglot, tmp_path)
    (tmp_path / "images_evaluation").mkdir()
    refused("images_evaluation: holds no pictures", omniglot.load_omniglot, tmp_path)
    next((tmp_path / "images_background").rglob("*_03.png")).unlink()
    refused("Alphabet_00/character01 should hold 20 pictures, holds 19", omniglot.load_omniglot, tmp_path)


def test_what_is_no_file_is_not_read(tmp_path):
    sets.write_omniglot(tmp_path, 1, 1)
    os.mkfifo(tmp_path / "images_background" / "pipe.png")  # reading it would wait for ever
    assert Tree(tmp_path / "images_background").names == sorted(
        p.relative_to(tmp_path / "images_background").as_posix() for p in (tmp_path / "images_background").rglob("*_*.png")
    )


# ---- downloads ------------------------------------------------------------------------------------------------------


def test_downloads_are_checked_and_kept(tmp_path, monkeypatch):
    import pooch

    asked = []

    def retrieve(url, known_hash, fname, path, progressbar):
        asked.append((url, known_hash))
        (Path(path) / fname).write_bytes(made[fname])
        return str(Path(path) / fname)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    other = tmp_path / "other"
    sets.write_omniglot(other, 1, 1, zipped=True)
    made = {path.name: path.read_bytes() for path in other.glob("*.zip")}
    home = tmp_path / "data"
    assert omniglot.load_omniglot(home).shape == (2, 20, 32, 32)
    assert asked == [(source.url, source.checksum) for source in omniglot.SOURCES.values()]
    omniglot.load_omniglot.cache_clear()
    omniglot.load_omniglot(home)
    assert len(asked) == 2
    assert sorted(path.name for path in (home / "omniglot").glob("*.zip")) == ["images_background.zip", "images_evaluation.zip"]


def test_every_source_has_a_checksum():
    sources = [*five.SVHN.values(), *five.FASHION.values(), *omniglot.SOURCES.values(), tiny_imagenet.SOURCE]
    sources += [files.Source(cifar.HOME + archive, checksum) for _, archive, checksum in (cifar.CIFAR10, cifar.CIFAR100)]
    for source in sources:
        kind, digest = source.checksum.split(":")
        assert len(bytes.fromhex(digest)) == {"md5": 16, "sha256": 32}[kind]
        assert source.url.startswith("http")


def test_a_wrong_download_is_not_kept(tmp_path, monkeypatch):
    def get(_self, url, output_file, *_args, **_fields):
        Path(output_file).write_bytes(b"something else")

    monkeypatch.undo()
    monkeypatch.setattr("pooch.HTTPDownloader.__call__", get)
    message = refused("lacks train_32x32.mat, test_32x32.mat", five.load_set, "svhn", tmp_path)
    assert "does not match the known hash" in message
    assert not list(tmp_path.rglob("*.mat"))
