"""Some seconds of `make fuzz`, and that its parts do what they say."""

import random
import shutil

import fuzz
import pytest
from device import cpu_only

pytestmark = cpu_only
pytest.importorskip("subnet_kernels._codec", reason="the codec is not compiled: pip install with pybind11 there")


@pytest.mark.long  # which `make fuzz` does too, for longer
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile the decoder with sanitizers")
def test_the_decoder_withstands_changed_masks(tmp_path):
    said = fuzz.fuzz_decoder(2, 5, tmp_path)
    executions, decoded = (int(part.split()[0]) for part in said.split(", "))
    assert executions > decoded > 50


def test_the_reader_withstands_changed_banks(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "WHOLE", 20)
    said = fuzz.fuzz_reader(5, 7, tmp_path)
    executions, refused, whole = (int(part.split()[0]) for part in said.split(", "))
    assert executions > refused > 20
    assert whole > 0


def test_the_corpus_is_whole():
    """Unchanged, everything in it is read: so what is refused was changed."""
    banks = [path for path in fuzz.CORPUS.iterdir() if not path.name.endswith(".bin")]
    assert len(banks) == 4
    for path in banks:
        fuzz.read(path, fuzz.model_of("learn" in path.name))
        assert len(list(fuzz.show(path))) > 5
    assert len(list(fuzz.CORPUS.glob("mask-*.bin"))) == len(fuzz.MASKS)


def test_a_crash_would_be_seen(tmp_path, monkeypatch):
    entry = fuzz.Target.entry
    monkeypatch.setattr(fuzz.Target, "entry", lambda self, stored, row: entry(self, stored, row) or [][1])
    with pytest.raises(IndexError):
        fuzz.fuzz_reader(5, 7, tmp_path)


def test_too_much_memory_would_be_seen(tmp_path, monkeypatch):
    entry = fuzz.Target.entry
    monkeypatch.setattr(fuzz.Target, "entry", lambda self, stored, row: entry(self, stored, row) or bytearray(b"x" * (64 << 20)))
    with pytest.raises(AssertionError, match="bytes of memory for files of"):
        fuzz.fuzz_reader(5, 7, tmp_path)


def test_changes_change():
    chance, data = random.Random(0), (fuzz.CORPUS / "fixed.safetensors").read_bytes()
    found = [fuzz.change(data, "fixed.safetensors", chance) for _ in range(50)]
    assert sum(other != data for other in found) > 40
    assert any(len(other) != len(data) for other in found)
