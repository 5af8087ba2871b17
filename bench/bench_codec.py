"""Coded masks against a Huffman code in Python, as WSN has one, and zlib.

Expected on one thread before any measurement: decode at 1 thousand million weights a second and encode at half of that, whatever the
density; 100 times the Python code, which makes a symbol of seven tasks' bits at each weight and joins strings of "0" and "1".
"""

import heapq
import itertools
import zlib
from collections import Counter

import pytest
import torch
from measure import measure, only_on, record, table, targets_on

import subnet_kernels as sk
from subnet_kernels import codec, reference

pytestmark = only_on("cpu")
N = 20_000_000
LENET = 266_200


def huffman_code(symbols: list[int]) -> dict[int, str]:
    """The words of an optimal prefix code."""
    order = itertools.count()
    heap = [(count, next(order), {symbol: ""}) for symbol, count in Counter(symbols).items()]
    heapq.heapify(heap)
    while len(heap) > 1:
        low, _, a = heapq.heappop(heap)
        high, _, b = heapq.heappop(heap)
        merged = {s: "0" + word for s, word in a.items()} | {s: "1" + word for s, word in b.items()}
        heapq.heappush(heap, (low + high, next(order), merged))
    return heap[0][2]


def huffman_encode(masks: list[list[int]]) -> tuple[dict[int, str], bytes, int]:
    """Seven tasks' masks, a list of 0 and 1 each: the code, the bytes, and how many of their bits count."""
    symbols = [sum(bit << k for k, bit in enumerate(bits)) for bits in zip(*masks)]
    code = huffman_code(symbols)
    text = "".join([code[symbol] for symbol in symbols])
    return code, int("1" + text, 2).to_bytes(len(text) // 8 + 1, "big"), len(text)


def huffman_decode(code: dict[int, str], data: bytes, length: int, tasks: int) -> list[list[int]]:
    words, symbols, word = {word: symbol for symbol, word in code.items()}, [], ""
    for bit in bin(int.from_bytes(data, "big"))[3 : 3 + length]:
        word += bit
        if word in words:
            symbols.append(words[word])
            word = ""
    return [[symbol >> k & 1 for symbol in symbols] for k in range(tasks)]


@pytest.mark.parametrize("density", [0.03, 0.1, 0.3, 0.5])
@pytest.mark.parametrize("planes", [0, 1])
def bench_codec(density, planes, thread_count):
    opened, used = torch.rand(N) < density, torch.rand(N) < 0.6
    bits, context = sk.pack(opened), [sk.pack(used)][:planes]
    data = codec.encode(bits, N, context)
    assert torch.equal(codec.decode(data, N, context), bits)
    raw = bits.numpy().tobytes()
    squeezed = zlib.compress(raw, 1)
    entropy = codec.entropy(bits, N, context)
    assert len(data) <= 1.005 * entropy / 8 + 64 * -(-N // 524_288)
    groups = {
        "encode": {"encode": lambda: codec.encode(bits, N, context), "zlib 1": lambda: zlib.compress(raw, 1)},
        "decode": {"decode": lambda: codec.decode(data, N, context), "zlib 1": lambda: zlib.decompress(squeezed)},
    }
    sizes = {"bits_a_weight": 8 * len(data) / N, "entropy": entropy / N, "zlib_bits_a_weight": 8 * len(squeezed) / N}
    for name, group in groups.items():
        times = measure(group, seconds=0.5, rounds=3)
        speed = {"gweights_a_second": N / times[name].min / 1e3}
        print("\n" + table(f"{name}, density {density}, {planes} planes: {8 * len(data) / N:.4f} bits a weight", times, name))
        print(f"{speed['gweights_a_second']:.2f} thousand million weights a second")
        record(f"codec_{name}", f"density={density} planes={planes}", times, {**sizes, **speed})


def bench_codec_python(thread_count):
    """Seven tasks of LeNet-300-100 that overlap: 60 % in use, of which each opens 45 %, and 7.5 % of the rest."""
    used = torch.rand(LENET) < 0.6
    masks = [torch.rand(LENET) < torch.where(used, 0.45, 0.075) for _ in range(7)]
    bits, owned = [sk.pack(mask) for mask in masks], sk.pack(used)
    lists = [mask.int().tolist() for mask in masks]
    coded = [codec.encode(mask, LENET, [owned]) for mask in bits]
    code, data, length = huffman_encode(lists)
    assert huffman_decode(code, data, length, 7) == lists
    assert [reference.unpack(codec.decode(d, LENET, [owned]), (LENET,)).int().tolist() for d in coded] == lists
    assert sum(map(len, coded)) < len(data)
    targets = targets_on(thread_count, {"Huffman in Python": 100})
    encode = {
        "encode": lambda: [codec.encode(mask, LENET, [owned]) for mask in bits],
        "Huffman in Python": lambda: huffman_encode(lists),
    }
    decode = {
        "decode": lambda: [codec.decode(d, LENET, [owned]) for d in coded],
        "Huffman in Python": lambda: huffman_decode(code, data, length, 7),
    }
    sizes = {"bits_a_weight": 8 * sum(map(len, coded)) / (7 * LENET), "huffman_bits_a_weight": length / (7 * LENET)}
    for name, group in (("encode", encode), ("decode", decode)):
        times = measure(group, seconds=1, rounds=3)
        print("\n" + table(f"{name}, seven tasks of LeNet-300-100", times, name, targets))
        record(f"codec_{name}", "seven tasks of LeNet-300-100", times, sizes, targets)
