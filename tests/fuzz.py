"""Hostile files: `python tests/fuzz.py [--seconds 30] [--seed 1] [--only decoder|reader]` (make fuzz), from the corpus in tests/corpus.

decoder: tests/fuzz_codec.cpp, the codec under the address and undefined-behaviour sanitizers, on changed coded masks. reader: banks of
which a file is changed, in bytes and in the JSON of manifest and headers. An execution reads what has changed, the manifest or an entry's
mask, values and state, over a bank that is there already; every 200th loads the whole over its model, runs every task, and shows it
without a model. What is raised must be ValueError, in one line, and no execution may take more memory than twice its bytes and 16 MB.
Each says how many executions there were; whatever else happens is an error. `--write` makes the corpus anew.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import subnet_kernels as sk
from subnet_kernels import codec, reference, storage
from subnet_kernels.heads import fixed_copy
from subnet_kernels.manifest import BankFolder, PackedBank, open_bank
from subnet_pipelines.bank_show import show

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
MEMORY = Path("/dev/shm")  # a file system in memory: on a disk an execution waits for the file of the one before
FLAGS = ["-std=c++20", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-pthread"]
MASKS = [  # weights, density, planes of context
    *((n, density, planes) for n in (9, 600, 3000) for density, planes in ((0.1, 0), (0.02, 1), (0.3, 2), (0.5, 3))),
    (1200, 0.0, 0),
    (524_288 + 40, 0.0001, 0),
]
ROOM = 16 << 20  # bytes that an execution may take beside twice those of its files
WHOLE = 200  # one of so many executions of the reader loads and shows the whole bank
BATCH = 32  # executions between two looks at the memory
VALUES = (None, True, -1, 0, 1, 2**31, 2**63, 1e308, "", "x", "\0", "../x", [], {}, [0], {"a": 0}, [[]], "99999-a.safetensors")


def write_corpus() -> None:
    """Coded masks, as tests/fuzz_codec.cpp reads them, and a bank in each of its forms."""
    shutil.rmtree(CORPUS, ignore_errors=True)
    CORPUS.mkdir()
    for i, (n, density, planes) in enumerate(MASKS):
        chance = torch.Generator().manual_seed(i)
        bits, *context = (reference.pack(torch.rand(n, generator=chance) < c) for c in (density, 0.5, 0.3, 0.2)[: planes + 1])
        parts = [n.to_bytes(8, "little"), planes.to_bytes(8, "little"), *(p[: -(-n // 8)].numpy().tobytes() for p in context)]
        (CORPUS / f"mask-{i:02d}.bin").write_bytes(b"".join([*parts, codec.encode(bits, n, context)]))
    segment, storage.SEGMENT = storage.SEGMENT, 2
    for train_weights in (True, False):
        bank = sk.MaskBank(model_of(train_weights))
        for t in range(3):
            bank.begin(scores="init")
            bank.commit(f"task {t}", number=t)
        bank.commit("mix", alphas=torch.ones(3) / 3)
        name = "learn" if train_weights else "fixed"
        bank.save(CORPUS / name, coded=train_weights)
        bank.pack_file(CORPUS / f"{name}.safetensors", coded=not train_weights)
    storage.SEGMENT = segment


def model_of(train_weights: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 4))
    return sk.convert(model, sk.SubnetConfig(density=0.2, train_weights=train_weights, per_task=["2"]))


def fuzz_decoder(seconds: float, seed: int, folder: Path) -> str:
    """What the program says."""
    program = folder / "fuzz_codec"
    subprocess.run(["g++", *FLAGS, str(HERE / "fuzz_codec.cpp"), "-o", str(program)], check=True)
    masks = sorted(map(str, CORPUS.glob("mask-*.bin")))
    done = subprocess.run([program, str(seconds), str(seed), *masks], capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"the decoder failed with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def places_in(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key of a JSON tree."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], (dict, list)):
            yield from places_in(tree[key])


def change_json(data: bytes, chance: random.Random) -> bytes:
    """JSON with some places put to other values, taken out, or exchanged; a manifest within a header too."""
    tree = json.loads(data)
    inner = tree.get("__metadata__", {}) if isinstance(tree, dict) else {}
    if "manifest" in inner and chance.random() < 0.7:
        inner["manifest"] = change_json(inner["manifest"].encode(), chance).decode()
        return json.dumps(tree).encode()
    for _ in range(chance.randint(1, 3)):
        places = list(places_in(tree))
        if not places:
            break
        (where, key), (other, there) = chance.choice(places), chance.choice(places)
        action = chance.random()
        if action < 0.5:
            where[key] = copy.deepcopy(chance.choice(VALUES))  # what is put in may be changed in its turn
        elif action < 0.75:
            where[key] = json.loads(json.dumps(other[there]))
        else:
            del where[key]
    return json.dumps(tree).encode()


def change_bytes(data: bytes, chance: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at, action = chance.randrange(len(found) + 1), chance.random()
        if action < 0.6 and at < len(found):
            found[at] = chance.choice([found[at] ^ 1 << chance.randrange(8), chance.randrange(256), 0, 255])
        elif action < 0.8:
            del found[at : at + chance.randint(1, 40)]
        else:
            found[at:at] = found[at : at + chance.randint(1, 40)]
    return bytes(found)


def change(data: bytes, name: str, chance: random.Random) -> bytes:
    """A file's content, changed so that much of it still holds together."""
    if chance.random() < 0.3:
        return change_bytes(data, chance)
    if name.endswith(".json"):
        return change_json(data, chance)
    size = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + size], data[8 + size :]
    if chance.random() < 0.5 and rest:
        return data[: 8 + size] + change_bytes(rest, chance)
    header = change_json(header, chance)
    return len(header).to_bytes(8, "little") + header + rest


class Target:
    """A bank of the corpus in a folder of its own, where a file of it is changed, read, and put back."""

    def __init__(self, bank: Path, folder: Path):
        self.path, self.model = folder / bank.name, model_of("learn" in bank.name)
        if bank.is_file():
            self.files = {self.path: bank.read_bytes()}
            shutil.copy(bank, self.path)
        else:
            shutil.copytree(bank, self.path)
            self.files = {path: path.read_bytes() for path in sorted(self.path.iterdir())}
        self.size = sum(map(len, self.files.values()))
        self.bank, self.stored = sk.MaskBank.load(self.path, self.model), open_bank(self.path)
        self.rows = {self.stored.place(row): row for row in self.stored.manifest["entries"]}  # by file, in a folder
        self.heads = {key: fixed_copy(self.model.get_submodule(key)) for key in self.bank._per_task}

    def entry(self, stored: BankFolder | PackedBank, row: dict) -> None:
        """What loading does with an entry."""
        bank, tensors = self.bank, stored.tensors(row)
        bank._entry(stored, row, self.heads)
        if row["kind"] == "mask" and row["name"] in bank:
            index = bank[row["name"]].index or 0
            owned = bank._owned_before(index)
            last = [bank._masks.bits(i) for i in range(index - 2, index) if i >= 0]
            bits = bank._mask(stored, row, tensors, owned, last)
            bank._values(stored.place(row), tensors, bits, owned, False)

    def part(self, path: Path) -> None:
        """Read what a changed file holds."""
        if path in self.rows:
            self.entry(self.stored, self.rows[path])
            return
        stored = open_bank(self.path)
        if stored.path == path and self.path == path:  # one file of the whole
            for row in stored.manifest["entries"]:
                self.entry(stored, row)


def peak(reset: bool) -> int:
    """Bytes that this process has had in memory at most, since the last reset; after one, what it has now."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))


def fuzz_reader(seconds: float, seed: int, folder: Path) -> str:
    """How many times something was read, how many of them the whole, and how many were refused."""
    chance, runs, whole, refused = random.Random(seed), 0, 0, 0
    targets = [Target(path, folder) for path in sorted(CORPUS.iterdir()) if not path.name.endswith(".bin")]
    for target in targets:  # what the first use of anything takes is not an execution's
        read(target.path, target.model)
        list(show(target.path))
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        before, size = peak(True), 0
        for _ in range(BATCH):
            target = chance.choice(targets)
            path = chance.choice(list(target.files))
            data = change(target.files[path], path.name, chance)
            path.write_bytes(data)
            size = max(size, target.size - len(target.files[path]) + len(data))
            uses = [lambda t=target, p=path: t.part(p)]
            if chance.random() < 1 / WHOLE:
                uses = [lambda t=target: read(t.path, t.model), lambda t=target: list(show(t.path))]
                whole += 1
            for use in uses:
                runs += 1
                try:
                    use()
                except ValueError as error:
                    refused += 1
                    if "\n" in str(error):
                        raise AssertionError(f"seed {seed}, execution {runs}: more than a line: {error}") from error
            path.write_bytes(target.files[path])
        if (grown := peak(False) - before) > 2 * size + ROOM:
            raise AssertionError(f"seed {seed}, executions to {runs}: {grown} bytes of memory for files of {size}")
    return f"{runs} executions, {refused} of them refused, {whole} of whole banks"


def read(path: Path, model: nn.Module) -> None:
    """All of a bank."""
    bank = sk.MaskBank.load(path, model)
    for name in bank.names:
        bank.activate(name)
    bank.activate(None)
    bank.capacity()


FUZZERS = {"decoder": fuzz_decoder, "reader": fuzz_reader}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--seconds", type=float, default=25, help="of each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=FUZZERS)
    parser.add_argument("--write", action="store_true", help="make the corpus and do nothing else")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.write:
        write_corpus()
        return
    for name in [given.only] if given.only else FUZZERS:
        with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
            print(f"{name}: {FUZZERS[name](given.seconds, given.seed, Path(folder))}", flush=True)


if __name__ == "__main__":
    main()
