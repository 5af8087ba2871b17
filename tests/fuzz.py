"""Hostile files: `python tests/fuzz.py [--seconds 30] [--seed 1] [--only decoder|reader]` (make fuzz), from the corpus in tests/corpus.

decoder: tests/fuzz_codec.cpp, the codec under the address and undefined-behaviour sanitizers, on changed coded masks. reader: banks
whose files are changed, in bytes and in the JSON of manifest and headers, are loaded over their model and shown without one; what is
raised must be ValueError, in one line, and the process must not grow. Each says how many executions there were; whatever else happens is
an error. `--write` makes the corpus anew.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
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
from subnet_pipelines.bank_show import show

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
FLAGS = ["-std=c++20", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-pthread"]
MASKS = [  # weights, density, planes of context
    *((n, density, planes) for n in (9, 600, 3000) for density, planes in ((0.1, 0), (0.02, 1), (0.3, 2), (0.5, 3))),
    (1200, 0.0, 0),
    (524_288 + 40, 0.0001, 0),
]
GROWTH = 64 << 20  # bytes by which a process that reads small files may grow, torch's own included
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
            where[key] = chance.choice(VALUES)
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


def fuzz_reader(seconds: float, seed: int, folder: Path) -> str:
    """How many banks were read, and how many of them were refused."""
    chance, until = random.Random(seed), time.monotonic() + seconds
    models, runs, refused = {True: model_of(True), False: model_of(False)}, 0, 0
    banks = [path for path in sorted(CORPUS.iterdir()) if not path.name.endswith(".bin")]
    grown = None
    while time.monotonic() < until:
        bank = chance.choice(banks)
        target = folder / bank.name
        files = {"": bank.read_bytes()} if bank.is_file() else {p.name: p.read_bytes() for p in sorted(bank.iterdir())}
        spoilt = chance.choice(list(files))
        files[spoilt] = change(files[spoilt], spoilt or bank.name, chance)
        if bank.is_file():
            target.write_bytes(files[""])
        else:
            target.mkdir(exist_ok=True)
            for name, data in files.items():
                (target / name).write_bytes(data)
        for use in (lambda t=target, b=bank: read(t, models["learn" in b.name]), lambda t=target: list(show(t))):
            runs += 1
            try:
                use()
            except ValueError as error:
                refused += 1
                if "\n" in str(error):
                    raise AssertionError(f"seed {seed}, execution {runs}: more than a line: {error}") from error
        if runs == 200:  # everything has been used once
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if grown is not None and 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - grown) > GROWTH:
        raise AssertionError(f"seed {seed}: the process grew beyond {GROWTH} bytes")
    return f"{runs} executions, {refused} of them refused"


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
        with tempfile.TemporaryDirectory() as folder:
            print(f"{name}: {FUZZERS[name](given.seconds, given.seed, Path(folder))}", flush=True)


if __name__ == "__main__":
    main()
