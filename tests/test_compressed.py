"""compress and compressed_linear: the same as the masked layer, from the open weights alone."""

import pytest
import torch
import torch.nn.functional as F
from device import DEVICE, compiled_only, cpu_only, cuda_kernels, no_sync
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import subnet_kernels as sk
from subnet_kernels import reference
from subnet_kernels.ops import compressed

OPS = torch.ops.subnet_kernels
FORMATS = ["bitmap", "index"]
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
nan, inf = float("nan"), float("inf")


def draw(rows, outputs, inputs, density, dtype=torch.float32):
    weight, mask = torch.randn(outputs, inputs).to(dtype), torch.rand(outputs, inputs) < density
    return torch.randn(rows, inputs).to(dtype), weight, mask, torch.randn(outputs).to(dtype)


def where_open(mask, weight):
    return torch.where(mask, weight, torch.zeros((), dtype=weight.dtype))


def test_by_hand(cpu_isa):
    weight, mask = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.tensor([[True, False, True], [False, False, False]])
    x = torch.tensor([1.0, 10.0, 100.0])
    for form in FORMATS:
        small = sk.compress(weight, sk.pack(mask), form)
        assert small.values.tolist() == [1.0, 3.0]
        assert small.offsets.tolist() == [0, 2, 2]
        assert (small.shape, small.format) == ((2, 3), form)
        assert small.dense().tolist() == [[1.0, 0.0, 3.0], [0.0, 0.0, 0.0]]
        assert sk.compressed_linear(x, small).tolist() == [301.0, 0.0]
        assert sk.compressed_linear(x, small, torch.tensor([0.5, 2.0])).tolist() == [301.5, 2.0]
    assert sk.compress(weight, sk.pack(mask), "index").positions.tolist() == [0, 2]
    assert sk.compress(weight, sk.pack(mask), "bitmap").positions.tolist() == [[5, *[0] * 7], [0] * 8]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.03, 0.4, 1.0])
def test_against_the_masked_layer(cpu_isa, density, dtype, form):
    """Rows around what is taken together; inputs around a piece and a word; error at most twice the masked layer's."""
    for rows, outputs, inputs in [(1, 1, 1), (2, 9, 63), (3, 8, 64), (4, 7, 65), (5, 3, 784), (16, 5, 100), (19, 33, 15)]:
        x, weight, mask, bias = draw(rows, outputs, inputs, density, dtype)
        small = sk.compress(weight, sk.pack(mask), form)
        assert torch.equal(small.dense(), where_open(mask, weight))
        y = sk.compressed_linear(x, small, bias)
        exact = F.linear(x.double(), where_open(mask, weight).double(), bias.double())
        theirs = F.linear(x, where_open(mask, weight), bias)
        assert (y.dtype, y.shape) == (dtype, exact.shape)
        if dtype == torch.float64:  # there the masked layer is itself what is exact
            torch.testing.assert_close(y, exact, rtol=1e-12, atol=1e-12)
            continue
        error = lambda y: (y.double() - exact).pow(2).mean().sqrt()  # noqa: B023, E731
        assert error(y) <= 2 * error(theirs) + torch.finfo(dtype).eps * exact.abs().max() / 2
        assert torch.equal(sk.compressed_linear(x, small), sk.compressed_linear(x, small, torch.zeros_like(bias)))


@pytest.mark.parametrize("form", FORMATS)
def test_reference(form):
    x, weight, mask, bias = draw(4, 9, 70, 0.3, torch.float64)
    small = sk.compress(weight, sk.pack(mask), form)
    torch.testing.assert_close(reference.compressed_linear(x, *small[:3], bias), F.linear(x, where_open(mask, weight), bias))
    assert torch.equal(reference.decompress(*small[:3], 70), where_open(mask, weight))


@cpu_only
@compiled_only
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_instruction_sets_and_threads_agree(form, dtype):
    from conftest import switch_isa

    _, weight, mask, bias = draw(1, 400, 517, 0.4, dtype)
    small = sk.compress(weight, sk.pack(mask), form)
    before = switch_isa(None)
    for rows in (1, 4, 17):
        x, results = torch.randn(rows, 517).to(dtype), []
        try:
            for isa in ("portable", "avx2", "avx512"):
                switch_isa(isa)
                for count in (1, 2):
                    torch.set_num_threads(count)
                    results.append(sk.compressed_linear(x, small, bias))
        finally:
            switch_isa(before)
        assert all(torch.equal(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("form", FORMATS)
def test_only_the_open_take_part(cpu_isa, form, rows):
    """NaN in closed weights, and in an x that only closed weights meet, does not get out; an open one does."""
    x, weight, mask, _ = draw(rows, 9, 70, 0.4)
    mask[:, 5] = False
    mask[3, 6] = True
    y = sk.compressed_linear(x, sk.compress(weight, sk.pack(mask), form))
    small = sk.compress(torch.where(mask, weight, nan), sk.pack(mask), form)
    x[:, 5] = inf
    assert torch.equal(sk.compressed_linear(x, small), y)
    torch.testing.assert_close(reference.compressed_linear(x, *small[:3]), y)
    x[0, 6] = nan
    assert sk.compressed_linear(x, small)[0].isnan().tolist() == mask[:, 6].tolist()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(0, 4, 6), (3, 0, 6), (3, 4, 0)])
def test_nothing_there(cpu_isa, form, rows, outputs, inputs):
    x, weight, mask, bias = draw(rows, outputs, inputs, 0.5)
    small = sk.compress(weight, sk.pack(mask), form)
    y = sk.compressed_linear(x, small, bias)
    assert torch.equal(y, F.linear(x, where_open(mask, weight), bias))
    assert small.dense().shape == (outputs, inputs)


@pytest.mark.parametrize("form", FORMATS)
def test_shapes_and_strides(cpu_isa, form):
    x, weight, mask, bias = draw(12, 7, 70, 0.3)
    small = sk.compress(weight.t().contiguous().t(), sk.pack(mask), form)
    y = sk.compressed_linear(x, small, bias)
    torch.testing.assert_close(sk.compressed_linear(x[0], small, bias), y[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(sk.compressed_linear(x.view(3, 4, 70), small, bias), y.view(3, 4, 7))
    assert torch.equal(sk.compressed_linear(x.t().contiguous().t(), small, torch.stack([bias] * 2, 1)[:, 0]), y)


def test_many_inputs(cpu_isa):
    """Columns that do not fit sixteen bits, and the last that do."""
    for inputs, dtype in ((1 << 16, torch.uint16), ((1 << 16) + 1, torch.int32)):
        x, weight, mask, _ = draw(3, 2, inputs, 0.01)
        mask[:, -1] = True
        small = sk.compress(weight, sk.pack(mask), "index")
        assert small.positions.dtype == dtype
        for rows in (1, 3):
            torch.testing.assert_close(
                sk.compressed_linear(x[:rows], small), F.linear(x[:rows], where_open(mask, weight)), rtol=1e-4, atol=1e-4
            )


@cuda_kernels
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("outputs", "inputs", "density"),
    [(1, 5000, 0.1), (3, 9217, 0.4), (130, 200, 0.3), (7, 2048, 1.0), (5, 20_000, 0.02), (2, 34_001, 0.01)],
)
def test_long_rows_and_many(outputs, inputs, density, dtype, form):
    """Rows that several warps share, and of more columns than they decode at a time; more rows than a grid has warps; rows of x in
    all the numbers that are taken together, and more of them than shared memory holds; memory that begins anywhere."""
    _, weight, mask, bias = draw(1, outputs, inputs, density, dtype)
    small = sk.compress(weight, sk.pack(mask), form)
    assert torch.equal(small.dense(), where_open(mask, weight))
    for rows in (1, 2, 3, 8, 9, 65) if outputs * inputs < 20_000 else (1, 3, 5):
        x = torch.randn(rows * inputs + 1).to(dtype)[1:].view(rows, inputs)
        y = sk.compressed_linear(x, small, bias)
        exact = F.linear(x.double(), where_open(mask, weight).double(), bias.double())
        if dtype == torch.float64:
            torch.testing.assert_close(y, exact, rtol=1e-11, atol=1e-11)
            continue
        error = lambda y: (y.double() - exact).pow(2).mean().sqrt()  # noqa: B023, E731
        norm = (
            (x.double().pow(2) @ where_open(mask, weight).double().pow(2).t()).sqrt().max()
        )  # of what is summed: one sum may cancel
        least = torch.finfo(dtype).eps * exact.abs().max() / 2 + 2 * torch.finfo(torch.float32).eps * norm
        assert error(y) <= 2 * error(F.linear(x, where_open(mask, weight), bias)) + least
        assert torch.equal(sk.compressed_linear(x, small, bias), y)


@pytest.mark.parametrize(("device", "limit"), [("cpu", 0.25), ("cuda", 0.5), ("unheard of", 0.25)])
def test_the_format_follows_the_density_and_the_device(device, limit):
    for density, form in ((0.0, "index"), (limit - 0.01, "index"), (limit, "bitmap"), (1.0, "bitmap")):
        assert compressed.faster_format(int(density * 4000), 4000, device) == form


def test_compress_takes_the_faster_format_of_its_device():
    weight = torch.randn(40, 100)
    for density in (0.01, 0.24, 0.25, 0.3, 0.5, 1.0):
        bits, form = sk.select(weight, int(density * 4000)), compressed.faster_format(int(density * 4000), 4000, DEVICE)
        assert sk.compress(weight, bits).format == form


def test_a_snapshot():
    """It does not follow the weight, and shares no memory with it."""
    weight = torch.randn(4, 6, requires_grad=True)
    small = sk.compress(weight, sk.pack(torch.ones(4, 6, dtype=torch.bool)))
    before = small.values.clone()
    with torch.no_grad():
        weight.zero_()
    assert torch.equal(small.values, before)
    assert not small.values.requires_grad
    with pytest.raises(AttributeError):
        small.values = before


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", [(3, 6), (6,), (2, 2, 6), (0, 6)])
def test_gradients(form, shape):
    _, weight, mask, bias = draw(1, 4, 6, 0.5, torch.float64)
    small = sk.compress(weight, sk.pack(mask), form)
    x, bias = torch.randn(shape, dtype=torch.float64, requires_grad=True), bias.requires_grad_()
    call = lambda x, b: sk.compressed_linear(x, small, b)  # noqa: E731
    assert gradcheck(call, (x, bias), check_batched_grad=True)
    assert gradgradcheck(call, (x, bias))


@pytest.mark.parametrize("form", FORMATS)
def test_autocast(form):
    x, weight, mask, bias = draw(3, 5, 70, 0.3)
    small = sk.compress(weight.bfloat16(), sk.pack(mask), form)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = sk.compressed_linear(x, small, bias)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), F.linear(x, where_open(mask, weight), bias), rtol=3e-2, atol=0.2)


@pytest.mark.parametrize("form", FORMATS)
def test_vmap(form):
    _, weight, mask, _ = draw(1, 5, 70, 0.3)
    small = sk.compress(weight, sk.pack(mask), form)
    x = torch.randn(3, 2, 70)
    torch.testing.assert_close(torch.vmap(lambda x: sk.compressed_linear(x, small))(x), sk.compressed_linear(x, small))


@compiled_only
def test_dispatched_calls_check_too():
    x, weight, mask, _ = draw(2, 4, 6, 0.5)
    values, columns, offsets = sk.compress(weight, sk.pack(mask), "index")[:3]
    with pytest.raises(RuntimeError, match="columns must be one for each"):
        OPS.compressed_linear(x, values, columns[:-1].contiguous(), offsets)
    with pytest.raises(RuntimeError, match="must be a uint8 bitmap, or uint16 or int32 columns"):
        OPS.compressed_linear(x, values, columns.long(), offsets)


@compiled_only
@no_sync
def test_dispatched_calls_check_offsets():
    x, weight, mask, _ = draw(2, 4, 6, 0.5)
    values, columns, offsets = sk.compress(weight, sk.pack(mask), "index")[:3]
    with pytest.raises(RuntimeError, match="offsets must go from 0 to"):
        OPS.compressed_linear(x, values, columns, offsets + 1)
    with pytest.raises(RuntimeError, match="offsets must grow by at most 6 a row"):
        OPS.compressed_linear(x, values, columns, offsets.flip(0)[[-1, 0, 0, 0, 0]])


@cuda_kernels
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_contents_are_not_trusted(dtype, form):
    """Offsets and positions that no weight has lead nowhere outside of it (which a sanitizer sees); a column that is none takes no
    part."""
    x, weight, mask, _ = draw(3, 40, 70, 0.5, dtype)
    values, positions, offsets, _, _ = sk.compress(weight, sk.pack(mask), form)
    huge = torch.randint(-(1 << 62), 1 << 62, (41,))
    anything = torch.randint(0, 256, (positions.numel() * positions.element_size(),), dtype=torch.uint8)
    anything = anything.view(positions.dtype).view(positions.shape)
    for wrong in (offsets + 1, offsets - 1, offsets.flip(0), offsets * 1000, huge, torch.zeros_like(offsets)):
        for where in (positions, anything):
            assert OPS.compressed_linear(x, values, where, wrong).shape == (3, 40)
            assert OPS.decompress(values, where, wrong, 70).shape == (40, 70)
    if form == "index":
        beyond = torch.full_like(positions, 70)
        beyond[0] = 3
        row = OPS.compressed_linear(x.abs(), values.abs(), beyond, offsets)[:, 0]
        assert torch.equal(row, (x.abs()[:, 3].to(torch.promote_types(dtype, torch.float32)) * values[0].abs()).to(dtype))
        assert OPS.decompress(values, beyond, offsets, 70).count_nonzero() <= 1
    else:
        dirty = positions.clone()
        dirty[:, 70 // 8] |= 0xC0
        dirty[:, 70 // 8 + 1 :] = 0xFF
        assert torch.equal(OPS.compressed_linear(x, values, dirty, offsets), OPS.compressed_linear(x, values, positions, offsets))
        assert torch.equal(OPS.decompress(values, dirty, offsets, 70), where_open(mask, weight))


def wide(**config):
    """Two layers that are compressed where few of their weights are open, and one that is too small for it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(520, 400), nn.ReLU(), nn.Linear(400, 520), nn.ReLU(), nn.Linear(520, 7))
    bank = sk.MaskBank(sk.convert(model, sk.SubnetConfig(**config)))
    bank.commit("a")
    return bank, torch.randn(5, 520)


@pytest.fixture
def _from_few(monkeypatch):
    """Layers of this file are small."""
    monkeypatch.setitem(compressed.BEATS_DENSE, "weights", 200_000)


def test_the_crossover():
    weight = torch.empty(1, 1 << 24, device="cpu")
    for kept, like, expected in (
        (1_677_722, weight, True),
        (1_677_723, weight, False),
        (0, weight[:, 1:], False),
        (0, weight.half(), False),
    ):
        assert compressed.beats_dense(kept, like) is expected


@cpu_only
@pytest.mark.usefixtures("_from_few")
def test_an_export_compresses_where_it_is_faster():
    bank, x = wide(density={"0": 0.1, "2": 0.5, "4": 0.1})
    small, dense = bank.export("a", compressed=True), bank.export("a")
    assert [type(m).__name__ for m in small if not isinstance(m, nn.ReLU)] == ["OpenLinear", "Linear", "Linear"]
    assert [type(m) for m in dense if not isinstance(m, nn.ReLU)] == [nn.Linear] * 3
    assert "in_features=520, out_features=400, open=20800" in repr(small)
    exact = dense.double()(x.double())
    error = lambda y: (y.double() - exact).pow(2).mean().sqrt()  # noqa: E731
    assert error(small(x)) <= 2 * error(bank.export("a")(x)) + 1e-7
    with torch.no_grad():
        assert torch.equal(small(x), small(x.requires_grad_()))
    small(x).sum().backward()  # x gets a gradient
    torch.testing.assert_close(x.grad, torch.autograd.grad(bank.export("a")(x).sum(), x)[0], rtol=1e-4, atol=1e-5)
    size = lambda module: sum(t.nbytes for t in module.state_dict().values())  # noqa: E731
    assert size(small[0]) < size(dense.float()[0]) / 5
    again = bank.export("a", compressed=True)
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(x), small(x))
    program = torch.export.export(small, (x.detach(),))
    assert torch.equal(program.module()(x.detach()), small(x.detach()))


@cpu_only
@pytest.mark.usefixtures("_from_few")
def test_a_combination_and_a_bare_layer_are_compressed():
    bank, x = wide(density=0.03)
    bank.begin(scores="init")
    bank.commit("b")
    bank.commit("both", alphas=torch.tensor([0.75, 0.25]))
    small = bank.export("both", compressed=True)
    assert type(small[0]).__name__ == "OpenLinear"
    torch.testing.assert_close(small(x), bank.export("both")(x), rtol=1e-4, atol=1e-5)
    bare = sk.MaskBank(sk.convert(nn.Linear(520, 400), sk.SubnetConfig(density=0.1)))
    bare.commit("a")
    torch.testing.assert_close(bare.export("a", compressed=True)(x), bare.export("a")(x), rtol=1e-4, atol=1e-5)
