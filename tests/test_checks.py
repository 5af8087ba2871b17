"""Bad arguments of every public function end in a ValueError of one sentence: which function, what it expected, what came."""

import re

import pytest
import torch
from device import ON_CPU, name_of_device, no_sync

import subnet_kernels as sk

META = torch.device("meta")
HERE = name_of_device()
NAN = float("nan")

x = torch.randn(3, 6)
weight = torch.randn(4, 6)
scores = torch.randn(4, 6)
bias = torch.randn(4)
mask = torch.rand(4, 6) < 0.5
bits = sk.pack(mask)
values = weight[mask]
twice = torch.cat([bits, bits])
image = torch.randn(2, 6, 5)
maps = torch.randn(2, 3, 5, 5)
kernel = torch.randn(4, 3, 3)
kernel_bits = sk.pack(torch.rand(4, 3, 3) < 0.5)
grad_y = torch.randn(3, 4)
alphas = torch.randn(5)
bank = sk.pack_bank(torch.rand(5, 4, 6) < 0.5)
counts = torch.zeros(4, 6, dtype=torch.int32)


def conv(**changed):
    arguments = {"x": image, "weight": kernel, "bits": kernel_bits, "groups": 2} | changed
    return lambda: sk.masked_conv(**arguments)


def linear(**changed):
    arguments = {"x": x, "weight": weight, "bits": bits} | changed
    return lambda: sk.masked_linear(**arguments)


def subnet(**changed):
    arguments = {"x": x, "weight": weight, "scores": scores, "k": 5} | changed
    return lambda: sk.subnet_linear(**arguments)


def superpose(**changed):
    arguments = {"weight": weight, "bank": bank, "alphas": alphas} | changed
    return lambda: sk.superpose(**arguments)


def alpha_grad(**changed):
    arguments = {"x": x, "grad_y": grad_y, "weight": weight, "bank": bank} | changed
    return lambda: sk.alpha_grad(**arguments)


ids = torch.tensor([4, 0, 4])
small = sk.compress(weight, bits)


def mixed(**changed):
    arguments = {"x": x, "weight": weight, "bank": bank, "task_ids": ids} | changed
    return lambda: sk.mixed_linear(**arguments)


def compress(**changed):
    arguments = {"weight": weight, "bits": bits} | changed
    return lambda: sk.compress(**arguments)


def compressed(**changed):
    arguments = {"x": x, "weight": small} | changed
    return lambda: sk.compressed_linear(**arguments)


def restore(w=weight, b=bits, v=values):
    return lambda: sk.restore_([w.clone() if isinstance(w, torch.Tensor) else w], [b], [v])


# (call, what the message must say was expected, what it must say came)
BAD = {
    "k_sort": [
        *[(lambda d=d: sk.k_sort(10, d), "density must be in (0, 1]", repr(d)) for d in (0, -0.1, 1.01, NAN, "half", None, True)],
        *[(lambda n=n: sk.k_sort(n, 0.5), "n must be an int of at least 0", repr(n)) for n in (-1, 2.5, True, None)],
    ],
    "k_kth": [
        *[(lambda d=d: sk.k_kth(10, d), "density must be in (0, 1]", repr(d)) for d in (0, -0.1, 1.01, NAN, "half", None, True)],
        *[(lambda n=n: sk.k_kth(n, 0.5), "n must be an int of at least 0", repr(n)) for n in (-1, 2.5, True, None)],
    ],
    "select": [
        *[(lambda k=k: sk.select(scores, k), "k must be an int between 0 and 24", repr(k)) for k in (-1, 25, True, 0.5, "3", None)],
        (lambda: sk.select([scores, scores], [3, 25]), "k must be an int between 0 and 24", "25"),
        (lambda: sk.select([scores, scores], [3]), "k must be one int or one for each score tensor", "1 for 2 tensors"),
        (lambda: sk.select(scores, [3, 3]), "k must be one int or one for each score tensor", "2 for 1 tensors"),
        (lambda: sk.select(scores, 3, by="size"), "by must be one of 'magnitude', 'value'", "'size'"),
        (lambda: sk.select(scores, 3, by=None), "by must be one of 'magnitude', 'value'", "None"),
        (lambda: sk.select(scores, 3, ties="some"), "ties must be one of 'last', 'first', 'all'", "'some'"),
        (lambda: sk.select(mask, 3), "scores must be of a floating dtype", "torch.bool"),
        (lambda: sk.select([scores, scores.int()], 3), "scores[1] must be of a floating dtype", "torch.int32"),
        (lambda: sk.select(scores.cfloat(), 3), "scores must be of a floating dtype", "torch.complex64"),
        (lambda: sk.select(None, 3), "scores must be a list of tensors", "NoneType"),
        (lambda: sk.select([1.0], 3), "scores[0] must be a tensor", "float"),
        (lambda: sk.select([scores, scores.to(META)], 3), f"scores[1] must be on {HERE}", "meta"),
    ],
    "threshold": [
        (lambda: sk.threshold(scores.int(), 0.0), "scores must be of a floating dtype", "torch.int32"),
        (lambda: sk.threshold([scores, mask], 0.0), "scores[1] must be of a floating dtype", "torch.bool"),
        (lambda: sk.threshold([scores, scores.to(META)], 0.0), f"scores[1] must be on {HERE}", "meta"),
        (lambda: sk.threshold(None, 0.0), "scores must be a list of tensors", "NoneType"),
        (lambda: sk.threshold(scores, "0"), "value must be a number", "'0'"),
        (lambda: sk.threshold(scores, None), "value must be a number", "None"),
    ],
    "pack": [
        (lambda: sk.pack(scores), "mask must be of dtype torch.bool", "torch.float32"),
        (lambda: sk.pack(mask.byte()), "mask must be of dtype torch.bool", "torch.uint8"),
        (lambda: sk.pack([True, False]), "mask must be a tensor", "list"),
    ],
    "unpack": [
        (lambda: sk.unpack(bits, (600,)), "bits must have 128 bytes for 600 weights", "64"),
        (lambda: sk.unpack(twice, (4, 6)), "bits must have 64 bytes for 24 weights", "128"),
        (lambda: sk.unpack(bits[:-1], (4, 6)), "bits must have 64 bytes for 24 weights", "63"),
        (lambda: sk.unpack(bits.int(), (4, 6)), "bits must be packed bits, uint8 of one dimension", "torch.int32"),
        (lambda: sk.unpack(bits.view(2, 32), (4, 6)), "bits must be packed bits, uint8 of one dimension", "(2, 32)"),
        (lambda: sk.unpack(None, (4, 6)), "bits must be a tensor", "NoneType"),
        *[
            (lambda s=s: sk.unpack(bits, s), "shape must be a sequence of sizes, none negative", repr(s))
            for s in ((-4, 6), (-4, -6), (0, -6), 24, "ab", (4, 6.0))
        ],
    ],
    "count": [
        (lambda: sk.count(bits[:63]), "bits must be padded to 64 bytes", "63"),
        (lambda: sk.count(mask), "bits must be packed bits, uint8 of one dimension", "torch.bool"),
        (lambda: sk.count(None), "bits must be a tensor", "NoneType"),
    ],
    "union_": [
        (lambda: sk.union_(bits.clone(), twice), "bits must have 64 bytes", "128"),
        (lambda: sk.union_(bits.clone(), bits.to(META)), f"bits must be on {HERE}", "meta"),
        (lambda: sk.union_(mask, bits), "owned must be packed bits", "torch.bool"),
        (lambda: sk.union_(bits.clone(), mask), "bits must be packed bits", "torch.bool"),
    ],
    "stats": [
        (lambda: sk.stats(twice, bits), "bits must have 64 bytes", "128"),
        (lambda: sk.stats(bits.to(META), bits), f"bits must be on {HERE}", "meta"),
        (lambda: sk.stats(bits, mask), "owned must be packed bits", "torch.bool"),
        (lambda: sk.stats(mask, bits), "bits must be packed bits", "torch.bool"),
    ],
    "overlap": [
        (lambda: sk.overlap(bank[0]), "bank must be a list of blocks from pack_bank", "Tensor"),
        (lambda: sk.overlap(None), "bank must be a list of blocks from pack_bank", "NoneType"),
        (lambda: sk.overlap([]), "bank must hold at least one block", "an empty list"),
        (lambda: sk.overlap([bits]), "bank[0] must be uint8 of shape", "(64,)"),
        (lambda: sk.overlap([bank[0].int()]), "bank[0] must be uint8", "torch.int32"),
        (lambda: sk.overlap([None]), "bank[0] must be a tensor", "NoneType"),
        (lambda: sk.overlap([bank[0], bank[0].repeat(2, 1, 1)]), "bank[1] must be uint8 of shape (1, k, 64)", "(2, 5, 64)"),
        (lambda: sk.overlap([bank[0].repeat(1, 13, 1)]), "bank[0] must hold 1 to 64 tasks", "65"),
        (lambda: sk.overlap([bank[0][:, :0]]), "bank[0] must hold 1 to 64 tasks", "0"),
        (lambda: sk.overlap([bank[0], bank[0].to(META)]), f"bank[1] must be on {HERE}", "meta"),
    ],
    "pack_bank": [
        (lambda: sk.pack_bank(weight), "masks must be bool of shape (K, *shape) with K >= 1", "torch.float32"),
        (lambda: sk.pack_bank(mask[0]), "masks must be bool of shape (K, *shape) with K >= 1", "(6,)"),
        (lambda: sk.pack_bank(mask[:0]), "masks must be bool of shape (K, *shape) with K >= 1", "(0, 6)"),
        (lambda: sk.pack_bank([mask]), "masks must be a tensor", "list"),
    ],
    "apply": [
        (lambda: sk.apply(weight, twice), "bits must have 64 bytes for 24 weights", "128"),
        (lambda: sk.apply(weight, mask), "bits must be packed bits", "torch.bool"),
        (lambda: sk.apply(weight, bits.to(META)), f"bits must be on {HERE}", "meta"),
        (lambda: sk.apply(None, bits), "weight must be a tensor", "NoneType"),
        (lambda: sk.apply(weight, None), "bits must be a tensor", "NoneType"),
    ],
    "restore_": [
        (lambda: sk.restore_([weight], [bits, bits], [values]), "must be lists of one length", "1, 2, 1"),
        (lambda: sk.restore_(weight, [bits], [values]), "weights must be a list of tensors", "Tensor"),
        (lambda: sk.restore_(None, None, None), "weights must be a list of tensors", "NoneType"),
        (restore(w=None), "weights[0] must be a tensor", "NoneType"),
        (restore(b=mask), "bits[0] must be packed bits", "torch.bool"),
        (restore(b=twice), "bits[0] must have 64 bytes for 24 weights", "128"),
        (restore(b=bits.to(META)), f"bits[0] must be on {HERE}", "meta"),
        (restore(v=None), "values[0] must be a tensor", "NoneType"),
        (restore(v=values.double()), "values[0] must be one-dimensional torch.float32", "torch.float64"),
        (restore(v=values[None]), "values[0] must be one-dimensional", f"(1, {len(values)})"),
        (restore(v=values.to(META)), f"values[0] must be one-dimensional torch.float32 on {HERE}", "meta"),
    ],
    "masked_linear": [
        (linear(x=x[:, :5]), "x must be (..., I) and weight (O, I)", "(3, 5) and (4, 6)"),
        (linear(x=x[0, 0]), "x must be (..., I) and weight (O, I)", "() and (4, 6)"),
        (linear(weight=weight[None]), "x must be (..., I) and weight (O, I)", "(3, 6) and (1, 4, 6)"),
        (linear(x=x.double()), "x must have the dtype of weight, torch.float32", "torch.float64"),
        (linear(x=x.int()), "x must be of a floating dtype", "torch.int32"),
        (linear(weight=weight.int()), "weight must be of a floating dtype", "torch.int32"),
        (linear(x=None), "x must be a tensor", "NoneType"),
        (linear(x=x.to(META)), f"x must be on {HERE}", "meta"),
        (linear(bits=twice), "bits must have 64 bytes for 24 weights", "128"),
        (linear(bits=mask), "bits must be packed bits", "torch.bool"),
        (linear(bits=bits.to(META)), f"bits must be on {HERE}", "meta"),
        (linear(bias=bias[:3]), "bias must have shape (4,)", "(3,)"),
        (linear(bias=bias.double()), "bias must have the dtype of weight, torch.float32", "torch.float64"),
        (linear(bias=bias.to(META)), f"bias must be on {HERE}", "meta"),
        (linear(bias=1.0), "bias must be a tensor", "float"),
    ],
    "masked_conv": [
        (conv(x=image[0]), "weight must have 3, 4 or 5 dimensions and x as many", "(4, 3, 3) and x of (6, 5)"),
        (conv(weight=kernel[0]), "weight must have 3, 4 or 5 dimensions and x as many", "(3, 3)"),
        (conv(groups=1), "x must have 3 * groups channels", "(2, 6, 5)"),
        (conv(x=torch.randn(2, 9, 5), groups=3), "the outputs divide by groups = 3", "(4, 3, 3)"),
        *[(conv(groups=g), "groups must be an int of at least 1", repr(g)) for g in (0, -2, 2.0, True, None)],
        *[(conv(stride=s), "stride must be an int of at least 1 or 1 of them", repr(s)) for s in (0, -1, 1.5, (1, 1), None)],
        *[(conv(padding=p), "padding must be an int of at least 0 or 1 of them", repr(p)) for p in (-1, "same", (1, 1))],
        *[(conv(dilation=d), "dilation must be an int of at least 1 or 1 of them", repr(d)) for d in (0, -1, (1, 1))],
        (conv(x=image[..., :2]), "x must be at least as large as the dilated kernel (3,)", "(2,) padded by [0]"),
        (conv(dilation=3, padding=0), "x must be at least as large as the dilated kernel (7,)", "(5,) padded by [0]"),
        (conv(x=image.double()), "x must have the dtype of weight, torch.float32", "torch.float64"),
        (conv(x=image.int()), "x must be of a floating dtype", "torch.int32"),
        (conv(x=image.to(META)), f"x must be on {HERE}", "meta"),
        (conv(bits=twice), "bits must have 64 bytes for 36 weights", "128"),
        (conv(bits=kernel_bits.to(META)), f"bits must be on {HERE}", "meta"),
        (conv(bias=bias[:2]), "bias must have shape (4,)", "(2,)"),
        (conv(bias=bias.double()), "bias must have the dtype of weight, torch.float32", "torch.float64"),
    ],
    "subnet_linear": [
        *[(subnet(k=k), "k must be an int between 0 and 24", repr(k)) for k in (-1, 25, True, 0.5, None)],
        (subnet(scores=scores[:3]), "scores must have the shape of weight, (4, 6)", "(3, 6)"),
        (subnet(scores=mask), "scores must be of a floating dtype", "torch.bool"),
        (subnet(scores=scores.to(META)), f"scores must be on {HERE}", "meta"),
        (subnet(by="size"), "by must be one of 'magnitude', 'value'", "'size'"),
        (subnet(ties="some"), "ties must be one of 'last', 'first', 'all'", "'some'"),
        (subnet(frozen=mask), "frozen must be packed bits", "torch.bool"),
        (subnet(frozen=twice), "frozen must have 64 bytes for 24 weights", "128"),
        (subnet(frozen=bits.to(META)), f"frozen must be on {HERE}", "meta"),
        (subnet(x=x[:, :5]), "x must be (..., I) and weight (O, I)", "(3, 5) and (4, 6)"),
        (subnet(x=x.double()), "x must have the dtype of weight, torch.float32", "torch.float64"),
        (subnet(x=x.to(META)), f"x must be on {HERE}", "meta"),
        (subnet(bias=bias.double()), "bias must have the dtype of weight, torch.float32", "torch.float64"),
        (subnet(bias=bias[:3]), "bias must have shape (4,)", "(3,)"),
    ],
    "superpose": [
        (superpose(weight=weight.int()), "weight must be of a floating dtype", "torch.int32"),
        (superpose(weight=torch.randn(600)), "bank[0] must be uint8 of shape (2, k, 64)", "(1, 5, 64)"),
        (superpose(bank=[]), "bank must hold at least one block", "an empty list"),
        (superpose(bank=bank[0]), "bank must be a list of blocks from pack_bank", "Tensor"),
        (superpose(bank=[bank[0].to(META)]), f"bank[0] must be on {HERE}", "meta"),
        (superpose(alphas=alphas[:3]), "alphas must have shape (5,)", "(3,)"),
        (superpose(alphas=alphas.int()), "alphas must be of a floating dtype", "torch.int32"),
        (superpose(alphas=[0.2] * 5), "alphas must be a tensor", "list"),
        (superpose(alphas=alphas.to(META)), f"alphas must be on {HERE}", "meta"),
        (superpose(alphas=None, counts=counts.long()), "counts must be int32 of shape (4, 6)", "torch.int64"),
        (superpose(alphas=None, counts=counts[:3]), "counts must be int32 of shape (4, 6)", "(3, 6)"),
        (superpose(alphas=None, counts=counts.to(META)), f"counts must be on {HERE}", "meta"),
        (superpose(alphas=None, counts=3), "counts must be a tensor", "int"),
    ],
    "mixed_linear": [
        (mixed(x=x[:, :5]), "x must be (..., I) and weight (O, I)", "(3, 5) and (4, 6)"),
        (mixed(x=x[None]), "x must be (B, I)", "(1, 3, 6)"),
        (mixed(x=x.double()), "x must have the dtype of weight, torch.float32", "torch.float64"),
        (mixed(x=x.to(META)), f"x must be on {HERE}", "meta"),
        (mixed(weight=weight.int()), "weight must be of a floating dtype", "torch.int32"),
        (mixed(bank=[]), "bank must hold at least one block", "an empty list"),
        (mixed(bank=[bank[0].to(META)]), f"bank[0] must be on {HERE}", "meta"),
        (mixed(task_ids=[4, 0, 4]), "task_ids must be a tensor", "list"),
        (mixed(task_ids=ids.int()), "task_ids must be int64 of shape (3,)", "torch.int32"),
        (mixed(task_ids=ids[:2]), "task_ids must be int64 of shape (3,)", "(2,)"),
        (mixed(task_ids=ids.to(META)), f"task_ids must be on {HERE}", "meta"),
        *[
            (mixed(task_ids=ids + d), "task_ids must be between 0 and 4", str(came))
            for d, came in ((1, 5), (-1, -1))
            if ON_CPU  # elsewhere that would wait for the device
        ],
        (mixed(bias=bias[:3]), "bias must have shape (4,)", "(3,)"),
    ],
    "compress": [
        (compress(weight=weight.int()), "weight must be of a floating dtype", "torch.int32"),
        (compress(weight=weight[None]), "weight must be (O, I)", "(1, 4, 6)"),
        (compress(bits=mask), "bits must be packed bits", "torch.bool"),
        (compress(bits=twice), "bits must have 64 bytes for 24 weights", "128"),
        (compress(bits=bits.to(META)), f"bits must be on {HERE}", "meta"),
        (compress(format="csr"), "format must be one of 'bitmap', 'index'", "'csr'"),
    ],
    "compressed_linear": [
        (compressed(weight=weight), "weight must come from compress", "Tensor"),
        (compressed(weight=small._replace(values=torch.ones(3, requires_grad=True))), "a snapshot that needs no gradient", "requires"),
        (compressed(x=x[:, :5]), "x must be (..., 6)", "(3, 5)"),
        (compressed(x=3), "x must be a tensor", "int"),
        (compressed(x=x.double()), "x must have the dtype of the weight's values, torch.float32", "torch.float64"),
        (compressed(x=x.to(META)), f"x must be on {HERE}", "meta"),
        (compressed(bias=bias.double()), "bias must have the dtype of the weight's values", "torch.float64"),
        (compressed(bias=bias[:3]), "bias must have shape (4,)", "(3,)"),
        (compressed(bias=bias.to(META)), f"bias must be on {HERE}", "meta"),
    ],
    "max_pool_relu": [
        *[(lambda w=w: sk.max_pool_relu(maps, w), "window must be an integer from 1 to 15", repr(w)) for w in (0, 16, -1, 2.0, True)],
        (lambda: sk.max_pool_relu(maps[0], 2), "x must be (N, C, H, W) with C, H and W positive", "(3, 5, 5)"),
        (lambda: sk.max_pool_relu(maps[:, :0], 2), "x must be (N, C, H, W) with C, H and W positive", "(2, 0, 5, 5)"),
        (lambda: sk.max_pool_relu(maps, 2, split=True), "x must have an even number of channels to be split", "3"),
        (lambda: sk.max_pool_relu(maps.int(), 2), "x must be of a floating dtype", "torch.int32"),
        (lambda: sk.max_pool_relu(None, 2), "x must be a tensor", "NoneType"),
    ],
    "alpha_grad": [
        (alpha_grad(x=x[:, :5]), "x must be (B, I), grad_y (B, O) and weight (O, I)", "(3, 5), (3, 4) and (4, 6)"),
        (alpha_grad(x=x[None]), "x must be (B, I), grad_y (B, O) and weight (O, I)", "(1, 3, 6), (3, 4) and (4, 6)"),
        (alpha_grad(grad_y=grad_y[:2]), "x must be (B, I), grad_y (B, O) and weight (O, I)", "(3, 6), (2, 4) and (4, 6)"),
        (alpha_grad(x=None), "x must be a tensor", "NoneType"),
        (alpha_grad(grad_y=grad_y.int()), "grad_y must be of a floating dtype", "torch.int32"),
        (alpha_grad(x=x.double()), "x must have the dtype of weight, torch.float32", "torch.float64"),
        (alpha_grad(grad_y=grad_y.bfloat16()), "grad_y must have the dtype of weight, torch.float32", "torch.bfloat16"),
        (alpha_grad(x=x.to(META)), f"x must be on {HERE}", "meta"),
        (alpha_grad(grad_y=grad_y.to(META)), f"grad_y must be on {HERE}", "meta"),
        (alpha_grad(bank=[]), "bank must hold at least one block", "an empty list"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "call", "expected", "came"),
    [pytest.param(name, *row, id=f"{name}-{i}") for name, rows in BAD.items() for i, row in enumerate(rows)],
)
def test_bad_argument(name, call, expected, came):
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert re.match(rf"{name}: .*, got .+", message), message
    assert expected in message
    assert came in message.split("got ")[-1]
    assert "\n" not in message


def test_every_function_is_here():
    """A new public function brings its rows."""
    functions = {name for name in sk.__all__ if callable(getattr(sk.ops, name, None)) and name != "Compressed"}
    assert functions == set(BAD)


@no_sync
@pytest.mark.parametrize("few", [0, 1])
def test_restore_checks_the_number_of_values(few):
    """Fewer kept values than bits is not seen from the sizes alone; a kernel must not read past them."""
    with pytest.raises((ValueError, RuntimeError)):
        restore(v=values[:few])()


def test_meta_tensors_pass():
    """What is all on one device is right, also where that device holds no data."""
    assert linear(x=x.to(META), weight=weight.to(META), bits=bits.to(META), bias=bias.to(META))().shape == (3, 4)
    assert conv(x=image.to(META), weight=kernel.to(META), bits=kernel_bits.to(META))().shape == (2, 4, 3)
    assert subnet(x=x.to(META), weight=weight.to(META), scores=scores.to(META))().shape == (3, 4)
    assert superpose(weight=weight.to(META), bank=[bank[0].to(META)], alphas=alphas.to(META))().shape == (4, 6)
