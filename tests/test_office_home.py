"""Office-Home: its folder or zip, LASEM's stream of it, files that are wrong; on pictures made here."""

from itertools import chain

import image_sets as sets
import numpy as np
import pytest
import torch

from subnet_pipelines import BENCHMARKS, Refusal
from subnet_pipelines.benchmarks import office_home


def places(split) -> set[int]:
    """Row numbers of the base tensors."""
    return set(split.index.tolist())


@pytest.mark.parametrize(("zipped", "photographs"), [(False, "Real World"), (True, "RealWorld")])
def test_office_home(zipped, photographs, tmp_path):
    """Five groups of thirteen classes, products first; of every class 60, 10 and 30 % of its pictures, drawn from the seed."""
    assert [len(group) for group in office_home.GROUPS] == [13] * 5
    assert len(set(chain(*office_home.GROUPS))) == 65
    sets.write_office_home(tmp_path, office_home.GROUPS, photographs=photographs, zipped=zipped)
    x, rows = office_home.load_office_home(tmp_path)
    assert (x.shape, x.dtype, len(rows)) == ((1300, 3, 128, 128), torch.uint8, 130)  # nothing of the domain Art
    assert (tmp_path / "OfficeHomeDataset_10072016.128x128.safetensors").is_file()
    cls = BENCHMARKS["office-home"]
    one, again, two = (cls(cls.Config(), seed, tmp_path) for seed in (1, 1, 2))
    assert (len(one), one.classes, one.input_shape) == (10, 13, (3, 128, 128))
    assert [one.title(i) for i in (0, 4, 5)] == ["Product, group 0", "Product, group 4", "Real World, group 0"]
    for i in (0, 4, 5, 9):
        task, test = one.task(i), one.test(i)
        found = [places(split) for split in (task.train, task.val, test)]
        assert [len(part) for part in found] == [78, 13, 39]
        assert set().union(*found) == set(chain(*(rows[one.domain(i), name] for name in one.group(i))))
        for split, each in ((task.train, 6), (task.val, 1), (test, 3)):
            seen, labels = split.tensors()
            assert (seen.shape[1:], seen.dtype) == ((3, 128, 128), torch.float32)
            assert torch.equal(seen, x[split.index].float() / 255)
            assert labels.bincount().tolist() == [each] * 13
            assert all(place in rows[one.domain(i), one.group(i)[c]] for place, c in zip(split.index.tolist(), labels.tolist()))
        assert places(again.test(i)) == found[2] != places(two.test(i))
    few = cls(cls.Config(tasks=5, test_fraction=0.5, val_fraction=0.0), 1, tmp_path)
    assert (len(few), few.task(0).val, len(few.task(0).train), len(few.test(0))) == (5, None, 65, 65)


def test_office_home_files_that_are_wrong(tmp_path):
    cls = BENCHMARKS["office-home"]

    def refused(sentence, **fields):
        office_home.load_office_home.cache_clear()
        with pytest.raises(Refusal, match=sentence):
            cls(cls.Config(**fields), 1, tmp_path)

    refused(r"Office-Home \(folder OfficeHomeDataset_10072016 or its zip\): .* lacks OfficeHomeDataset_10072016.zip")
    home = tmp_path / "OfficeHomeDataset_10072016"
    (home / "Product" / "TV").mkdir(parents=True)
    refused("should hold pictures Product/CLASS/NAME.jpg, holds none")
    (home / "Product" / "TV" / "00001.jpg").write_bytes(b"no picture")
    refused("should hold pictures Real World/CLASS/NAME.jpg, holds none")
    (home / "Real World" / "TV").mkdir(parents=True)
    (home / "Real World" / "TV" / "1.JPG").write_bytes(b"no picture")
    refused("Product/TV/00001.jpg: is no JPEG picture that can be read")
    picture = sets.encoded(sets.pictures(np.array([0]), (3, 20, 30))[0].transpose(1, 2, 0), "JPEG")
    for domain, name in (("Product", "00001.jpg"), ("Real World", "1.JPG")):
        (home / domain / "TV" / name).write_bytes(picture)
    refused("class TV of Product, of task 0, should have pictures for training and test, has 1 in all")
    refused("tasks must be at most the 10 of office-home, got 11", tasks=11)
    refused(r"test_fraction must be in \(0, 1\), got 1.0", test_fraction=1.0)
    header = bytearray(picture)
    at = header.index(b"\xff\xc0") + 5  # height and width in the frame's header
    header[at : at + 4] = b"\xff\xff\xff\xff"
    (home / "Product" / "TV" / "00001.jpg").write_bytes(header)
    refused("Product/TV/00001.jpg: (should have at most 134217728 pixels, is 65535 x 65535|is no JPEG)")
