"""Every op of torch.ops.subnet_kernels in PyTorch's dispatcher: schema, reference, fake, mutation, vmap, compile and export."""

import inspect
import shutil
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from schemas import SCHEMA_TO_CPP, disagreements, registrations, signature
from torch.utils._pytree import tree_map

import subnet_kernels as sk
from subnet_kernels import reference

OPS = sorted(
    name.split("::")[1]
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("subnet_kernels::") and "." not in name
)
MUTATING = [name for name in OPS if name.endswith("_")]
FUNCTIONAL = [name for name in OPS if not name.endswith("_")]
CSRC = Path(__file__).resolve().parents[1] / "csrc"
SOURCES = sorted([*(CSRC / "cpu").glob("*.cpp"), *(CSRC / "cuda").glob("*.cu")])


def op_of(name):
    return getattr(torch.ops.subnet_kernels, name).default


def has_kernel(name, key):
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"subnet_kernels::{name}", key)


# ------------------------------------------------------------------------------------------------------------------ inputs


def mask(*shape):
    return torch.rand(shape) < 0.5


def bits(*shape):
    return reference.pack(mask(*shape))


def bank(tasks, *shape):
    return reference.pack_bank(mask(tasks, *shape))


def lr():
    return torch.tensor(0.1)


def like(tensors):
    return [torch.rand_like(t) for t in tensors]


def params():
    return [torch.randn(4, 6), torch.randn(530), torch.randn(6, 4).t()]


def frozen():
    return [bits(4, 6), None, bits(4, 6)]


def steps():
    return [torch.tensor(2.0) for _ in range(3)]


def adam(amsgrad=False, decoupled=False, **how):
    p = params()
    largest = like(p) if amsgrad else []
    return (p, like(p), like(p), like(p), largest, steps(), how.get("frozen", frozen()), lr(), how.get("scale"), how.get("inf"),
            0.9, 0.999, 1e-8, 0.01, amsgrad, False, decoupled)  # fmt: skip


def rmsprop(centered=False, momentum=0.0):
    p = params()
    means, buffers = like(p) if centered else [], like(p) if momentum else []
    return (p, like(p), like(p), means, buffers, steps(), frozen(), lr(), None, None, 0.99, 1e-8, 0.01, momentum, centered, False)


def sgd(momentum=0.0, first=False, **how):
    p = params()
    return (p, like(p), like(p) if momentum else [], frozen(), lr(), how.get("scale"), how.get("inf"), momentum, 0.1, 0.01, False,
            False, first)  # fmt: skip


def restoring(*shapes):
    masks = [mask(*s) for s in shapes]
    values = [torch.randn(int(m.sum())) for m in masks]
    return [torch.randn(s) for s in shapes], [reference.pack(m) for m in masks], values


def refreshing(transposed=False):
    scores = [torch.randn(6, 4).t() if transposed else torch.randn(4, 6), torch.randn(530)]
    weights = [torch.randn(6, 4).t() if transposed else torch.randn(4, 6), torch.randn(530)]
    return scores, weights, [bits(4, 6), bits(530)], [torch.empty(4, 6), torch.empty(0)]


def refresh(transposed=False, *how):
    scores, weights, packed, w_eff = refreshing(transposed)
    return scores, weights, [7, 100], packed, w_eff, [torch.zeros(4, dtype=torch.float64) for _ in range(2)], *how


def ids(rows, tasks):
    return torch.randint(0, tasks, (rows,))


def compressed(outputs, inputs, form):
    """Always as many values, so that several can be stacked."""
    weight = torch.randn(outputs, inputs)
    return sk.compress(weight, sk.select(weight, outputs * inputs // 3), form)[:3]


def pooled(shape, window, split):
    """A gradient that lies otherwise than the places do."""
    y, places = reference.max_pool_relu(torch.randn(shape), window, split)
    return torch.randn_like(y).transpose(1, 2).contiguous().transpose(1, 2), places, window, split, *shape[1:3]


# For every op several ways to make its arguments: plain, strided as nobody expects, empty, optional arguments given or not.
INPUTS = {
    "pack": [lambda: (mask(4, 6),), lambda: (mask(30, 40).t(),), lambda: (mask(0),), lambda: (mask(3, 4, 5)[:, ::2],)],
    "unpack": [lambda: (bits(4, 6), [4, 6]), lambda: (bits(530), [530]), lambda: (bits(0), [0, 3]), lambda: (bits(1), [])],
    "count": [lambda: (bits(4, 6),), lambda: (bits(0),), lambda: (torch.stack([bits(530)] * 2, 1)[:, 0],)],
    "stats": [lambda: (bits(4, 6), bits(4, 6)), lambda: (bits(0), bits(0)), lambda: (torch.stack([bits(99)] * 2, 1)[:, 0], bits(99))],
    "union_": [lambda: (bits(4, 6), bits(4, 6)), lambda: (bits(0), bits(0))],
    "overlap": [lambda: (bank(3, 4, 6),), lambda: (bank(70, 530),), lambda: ([block[:, :2] for block in bank(5, 530)],)],
    "select": [
        lambda: ([torch.randn(4, 6)], [7]),
        lambda: ([torch.randn(30, 40).t(), torch.randn(530), torch.randn(0)], [100, 0, 0], "value", "all"),
        lambda: ([torch.ones(4, 6).bfloat16()], [7], "magnitude", "first"),
    ],
    "refresh_": [lambda: refresh(), lambda: refresh(True, "value", "all")],
    "threshold": [
        lambda: ([torch.randn(4, 6)], 0.0),
        lambda: ([torch.randn(30, 40).t(), torch.randn(530), torch.randn(0)], 0.3, False),
    ],
    "refresh_threshold_": [
        lambda: (*refreshing()[:2], 0.0, True, *refreshing()[2:]),
        lambda: (*refreshing(True)[:2], 0.3, False, *refreshing()[2:]),
    ],
    "apply": [
        lambda: (torch.randn(4, 6), bits(4, 6)),
        lambda: (torch.randn(30, 40).t(), bits(40, 30)),
        lambda: (torch.randn(2, 5, 3, 3).to(memory_format=torch.channels_last).bfloat16(), bits(2, 5, 3, 3)),
        lambda: (torch.randn(0), bits(0)),
    ],
    "restore_": [lambda: restoring((4, 6), (530,)), lambda: restoring((0,), (3,))],
    "straight_through": [
        lambda: (torch.randn(4, 6), torch.randn(4, 6), torch.randn(4, 6), bits(4, 6), None),
        lambda: (torch.randn(6, 4).t(), torch.randn(4, 6), torch.randn(6, 4).t(), bits(4, 6), bits(4, 6), "value"),
        lambda: (torch.randn(4, 6), torch.randn(6, 4).t(), torch.randn(4, 6), bits(4, 6), None, "magnitude", True, False),
        lambda: (torch.randn(4, 6), torch.randn(4, 6), torch.randn(4, 6), bits(4, 6), bits(4, 6), "magnitude", False, True),
        lambda: (torch.randn(4, 6).bfloat16(), torch.randn(4, 6).bfloat16(), torch.randn(4, 6), bits(4, 6), None),
    ],
    "masked_linear": [
        lambda: (torch.randn(3, 6), torch.randn(4, 6), bits(4, 6)),
        lambda: (torch.randn(6, 3).t(), torch.randn(6, 4).t(), bits(4, 6), torch.randn(4)),
        lambda: (torch.randn(2, 3, 6), torch.randn(4, 6), bits(4, 6), torch.randn(4)),
        lambda: (torch.randn(6), torch.randn(4, 6), bits(4, 6), None),
        lambda: (torch.randn(0, 6), torch.randn(4, 6), bits(4, 6), None),
        lambda: (torch.randn(3, 6), torch.randn(4, 6), None, torch.randn(4)),
        lambda: (torch.randn(3, 6).double(), torch.randn(4, 6).double(), bits(4, 6), None),
    ],
    "masked_linear_grad_input": [
        lambda: (torch.randn(3, 4), torch.randn(4, 6), bits(4, 6)),
        lambda: (torch.randn(2, 4, 3).transpose(1, 2), torch.randn(6, 4).t(), None),
        lambda: (torch.randn(3, 4).bfloat16(), torch.randn(4, 6).bfloat16(), bits(4, 6)),
    ],
    "masked_linear_grad_weight": [
        lambda: (torch.randn(3, 4), torch.randn(3, 6)),
        lambda: (torch.randn(4, 3).t(), torch.randn(3, 6), None, None, bits(4, 6)),
        lambda: (torch.randn(2, 3, 4), torch.randn(2, 3, 6), torch.randn(4, 6), torch.randn(4, 6), bits(4, 6), bits(4, 6), "value"),
        lambda: (torch.randn(3, 4), torch.randn(3, 6), torch.randn(6, 4).t(), torch.randn(4, 6), bits(4, 6), None, "magnitude", False),
        lambda: (torch.randn(3, 4).double(), torch.randn(3, 6).double(), None, None, bits(4, 6), bits(4, 6)),
    ],
    "masked_conv": [
        lambda: (torch.randn(2, 3, 9), torch.randn(4, 3, 3), bits(4, 3, 3), None, [1], [0], [1], 1),
        lambda: (torch.randn(2, 4, 7, 8), torch.randn(6, 2, 3, 3), bits(6, 2, 3, 3), torch.randn(6), [2, 1], [0, 2], [1, 2], 2),
        lambda: (torch.randn(2, 7, 8, 3).permute(0, 3, 1, 2), torch.randn(4, 3, 3, 3), bits(4, 3, 3, 3), None, [1, 1], [1, 1], [1, 1], 1),
        lambda: (torch.randn(1, 2, 4, 4, 4), torch.randn(2, 2, 2, 2, 2), bits(2, 2, 2, 2, 2), None, [1] * 3, [0] * 3, [1] * 3, 1),
    ],
    "superpose": [
        lambda: (torch.randn(4, 6), bank(3, 4, 6), torch.randn(3)),
        lambda: (torch.randn(6, 4).t(), bank(70, 4, 6), torch.randn(70)),
        lambda: (torch.randn(6, 4).t(), bank(3, 4, 6), torch.randn(2, 3)),
        lambda: (torch.randn(4, 6), bank(3, 4, 6), None),
    ],
    "superpose_counts": [
        lambda: (torch.randn(4, 6), torch.randint(0, 4, (4, 6), dtype=torch.int32), 3),
        lambda: (torch.randn(6, 4).t(), torch.randint(0, 4, (6, 4), dtype=torch.int32).t(), 3),
    ],
    "superpose_grad": [
        lambda: (torch.randn(4, 6), torch.randn(4, 6), bank(3, 4, 6)),
        lambda: (torch.randn(6, 4).t(), torch.randn(4, 6), bank(70, 4, 6)),
        lambda: (torch.randn(2, 4, 6), torch.randn(4, 6), bank(3, 4, 6)),
    ],
    "alpha_grad": [
        lambda: (torch.randn(5, 6), torch.randn(5, 4), torch.randn(4, 6), bank(3, 4, 6)),
        lambda: (torch.randn(6, 5).t(), torch.randn(4, 5).t(), torch.randn(6, 4).t(), bank(70, 4, 6)),
    ],
    "mixed_linear": [
        lambda: (torch.randn(5, 6), torch.randn(4, 6), bank(3, 4, 6), ids(5, 3)),
        lambda: (torch.randn(6, 70).t(), torch.randn(6, 4).t(), bank(66, 4, 6), ids(140, 2)[::2], torch.randn(4)),
        lambda: (torch.randn(0, 6), torch.randn(4, 6), bank(3, 4, 6), ids(0, 3), torch.randn(4)),
    ],
    "mixed_linear_grad_input": [
        lambda: (torch.randn(5, 4), torch.randn(4, 6), bank(3, 4, 6), ids(5, 3)),
        lambda: (torch.randn(4, 70).t(), torch.randn(6, 4).t(), bank(66, 4, 6), ids(140, 2)[::2]),
    ],
    "mixed_linear_grad_weight": [
        lambda: (torch.randn(5, 4), torch.randn(5, 6), bank(3, 4, 6), ids(5, 3)),
        lambda: (torch.randn(4, 70).t(), torch.randn(6, 70).t(), bank(66, 4, 6), ids(140, 2)[::2]),
    ],
    "compressed_linear": [
        lambda: (torch.randn(5, 6), *compressed(4, 6, "bitmap")),
        lambda: (torch.randn(6, 5).t(), *compressed(4, 6, "index"), torch.randn(4)),
        lambda: (torch.randn(2, 3, 70), *compressed(9, 70, "bitmap"), torch.randn(9)),
        lambda: (torch.randn(0, 6), *compressed(4, 6, "index"), None),
        lambda: (torch.randn(6), *compressed(4, 6, "index"), None),
    ],
    "max_pool_relu": [
        lambda: (torch.randn(2, 4, 6, 8), 2, True),
        lambda: (torch.randn(2, 8, 5, 7).permute(0, 3, 2, 1), 3, False),
        lambda: (torch.randn(0, 4, 6, 8), 1, True),
    ],
    "max_pool_relu_grad": [
        lambda: pooled((2, 4, 6, 8), 2, True),
        lambda: pooled((2, 7, 5, 3), 3, False),
        lambda: pooled((0, 4, 6, 8), 1, True),
    ],
    "decompress": [lambda: (*compressed(9, 70, "bitmap"), 70), lambda: (*compressed(9, 70, "index"), 70)],
    "update_sgd_": [lambda: sgd(), lambda: sgd(0.9), lambda: sgd(0.9, True, scale=torch.tensor(8.0), inf=torch.tensor(0.0))],
    "update_rmsprop_": [lambda: rmsprop(), lambda: rmsprop(True, 0.9)],
    "update_adam_": [
        lambda: adam(),
        lambda: adam(True, True, scale=torch.tensor(8.0), inf=torch.tensor(0.0)),
        lambda: adam(frozen=[None] * 3),
    ],
}  # fmt: skip
CASES = [pytest.param(name, make, id=f"{name}-{i}") for name, makes in INPUTS.items() for i, make in enumerate(makes)]


def test_every_op_has_inputs():
    """A new op brings its inputs."""
    assert sorted(INPUTS) == OPS


# ------------------------------------------------------------------------------------------------------------ registration


@pytest.mark.parametrize(("name", "make"), CASES)
def test_opcheck(name, make):
    torch.library.opcheck(op_of(name), make())


@pytest.mark.parametrize("name", OPS)
def test_registered_whole(name):
    """Reference, fake, and version bump or vmap rule, whatever compiled kernels there are; and the reference is the schema's."""
    assert has_kernel(name, "CompositeExplicitAutograd")
    assert torch._library.simple_registry.singleton.find(f"subnet_kernels::{name}").fake_impl.kernel is not None
    assert not has_kernel(name, "Autograd")  # forward only: gradients come from autograd Functions
    schema = op_of(name)._schema
    assert has_kernel(name, "ADInplaceOrView") == schema.is_mutable
    assert has_kernel(name, "FuncTorchBatched") != schema.is_mutable
    assert list(inspect.signature(getattr(reference, name)).parameters) == [a.name for a in schema.arguments]


@pytest.mark.parametrize("name", OPS)
def test_schema_says_what_is_written(name):
    schema = op_of(name)._schema
    assert schema.is_mutable == name.endswith("_")
    assert all(str(a.type) in SCHEMA_TO_CPP for a in schema.arguments)
    if schema.is_mutable:
        assert schema.returns == []
    else:
        assert schema.returns
        assert all(a.alias_info is None for a in [*schema.arguments, *schema.returns])


@pytest.mark.parametrize(("name", "make"), [c for c in CASES if c.values[0] in MUTATING])
def test_versions_move(name, make):
    """What the schema writes gets a new version, and nothing else does: else autograd would use overwritten tensors in silence."""
    args = make()
    tensors = lambda value: [t for t in (value if isinstance(value, list) else [value]) if isinstance(t, torch.Tensor)]  # noqa: E731
    before = [[t._version for t in tensors(a)] for a in args]
    assert op_of(name)(*args) is None
    for argument, value, versions in zip(op_of(name)._schema.arguments, args, before):
        written = argument.alias_info is not None and argument.alias_info.is_write
        for tensor, version in zip(tensors(value), versions):
            assert (tensor._version > version) == written, argument.name


@pytest.mark.parametrize(("name", "make"), [c for c in CASES if c.values[0] in MUTATING])
def test_overwritten_tensors_are_noticed(name, make):
    """Backward refuses a saved tensor that the op wrote meanwhile, also through a detached alias of it."""
    args = make()
    for i, argument in enumerate(op_of(name)._schema.arguments):
        if argument.alias_info is None:
            continue
        for j, tensor in enumerate(args[i] if isinstance(args[i], list) else [args[i]]):
            if not tensor.is_floating_point() or tensor.numel() == 0:
                continue
            factor = torch.ones((), dtype=tensor.dtype, requires_grad=True)
            y = (factor * tensor).sum()  # saves it
            fresh = list(make())
            if isinstance(args[i], list):
                fresh[i] = [t.detach() if k == j else t for k, t in enumerate(args[i])]
            else:
                fresh[i] = tensor.detach()
            op_of(name)(*fresh)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.backward()


def test_union_is_noticed():
    """Bits are saved for backward, so the union written into them is an error too."""
    weight, owned = torch.randn(4, 6, requires_grad=True), bits(4, 6)
    y = sk.apply(weight, owned).sum()
    sk.union_(owned, bits(4, 6))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


# --------------------------------------------------------------------------------------------------- schemas and C++ kernels

RIGHT = """
using Masks = std::vector<std::optional<Tensor>>;
// m.impl("old", TORCH_BOX(&old));
static Tensor helper(const Tensor& x) { return x; }
std::vector<Tensor> one(
    const Tensor& x_,  // a comment, with a comma
    std::vector<Tensor> list, const Masks& masks, std::optional<torch::stable::Tensor> bias, int64_t k,
    std::vector<int64_t> sizes, double lr, bool flag, const std::string& by) {
  if (helper(x_).numel()) { return {}; }
  return {};
}
static inline std::tuple<Tensor, Tensor> two(const Tensor& a, const Tensor& b) {
  return {one(a, {}, {}, {}, 0, {}, 0, true, ""), b};
}
void three_(Tensor a) { two(a, a); }
STABLE_TORCH_LIBRARY_IMPL(subnet_kernels, CPU, m) {
  m.impl("one", TORCH_BOX(&one));
  m.impl("two",
         TORCH_BOX(&two));
  m.impl("three_", TORCH_BOX(&three_));
}
"""
SCHEMAS = {
    "one": "one(Tensor x, Tensor[] list, Tensor?[] masks, Tensor? bias, int k, int[] sizes, float lr, bool flag, str by) -> Tensor[]",
    "two": "two(Tensor a, Tensor b) -> (Tensor, Tensor)",
    "three_": "three_(Tensor(a!) a) -> ()",
}  # fmt: skip


class TestSchemaComparison:
    """The comparison itself, on a source in which every kind of argument is right, and then one of them wrong."""

    def test_right(self):
        assert registrations(RIGHT) == [("one", "one"), ("two", "two"), ("three_", "three_")]
        for name, schema in SCHEMAS.items():
            assert disagreements(torch._C.parse_schema(schema), RIGHT, name) == []

    @pytest.mark.parametrize(
        ("function", "right", "wrong", "message"),
        [
            ("one", "int64_t k", "double k", "argument 4 of one, k, is double, in its schema int64_t"),
            ("one", "int64_t k", "int k", "argument 4 of one, k, is int, in its schema int64_t"),
            ("one", "double lr", "float lr", "argument 6 of one, lr, is float, in its schema double"),
            ("one", "std::vector<int64_t> sizes", "std::vector<int> sizes", "argument 5 of one, sizes, is std::vector<int>"),
            ("one", "const Masks&", "std::vector<Tensor>", "argument 2 of one, masks, is std::vector<Tensor>"),
            ("one", "std::optional<torch::stable::Tensor> bias", "const Tensor& bias", "argument 3 of one, bias, is Tensor"),
            ("one", "bool flag", "int64_t flag", "argument 7 of one, flag, is int64_t, in its schema bool"),
            ("one", "int64_t k,", "", "one takes 8 arguments, its schema 9"),
            ("one", "std::vector<Tensor> one", "Tensor one", "one returns Tensor, its schema std::vector<Tensor>"),
            ("two", "const Tensor& a, const Tensor& b", "const Tensor& b, const Tensor& a", "argument 0 of two is called b"),
            ("two", "std::tuple<Tensor, Tensor> two", "std::vector<Tensor> two", "two returns std::vector<Tensor>"),
            ("three_", "void three_", "Tensor three_", "three_ returns Tensor, its schema void"),
        ],
    )
    def test_wrong(self, function, right, wrong, message):
        assert right in RIGHT
        found = disagreements(torch._C.parse_schema(SCHEMAS[function]), RIGHT.replace(right, wrong), function)
        assert any(message in sentence for sentence in found), found

    def test_unread_forms_are_not_passed_over(self):
        with pytest.raises(AssertionError, match="a form that is not read"):
            registrations('m.impl("one", torch::CppFunction(&one));')
        with pytest.raises(AssertionError, match="0 definitions found"):
            signature(RIGHT, "absent")


REGISTERED = [(path, *pair) for path in SOURCES for pair in registrations(path.read_text())]


@pytest.mark.parametrize(("path", "name", "function"), [pytest.param(*row, id=f"{row[0].name}-{row[1]}") for row in REGISTERED])
def test_schema_against_cpp(path, name, function):
    assert name in OPS, f"{path.name} implements {name}, which has no schema"
    assert disagreements(op_of(name)._schema, path.read_text(), function) == []


@pytest.mark.parametrize("folder", ["cpu", "cuda"])
def test_one_kernel_an_op(folder):
    names = [name for path, name, _ in REGISTERED if path.parent.name == folder]
    assert len(names) == len(set(names))


def test_compiled_library_is_registered():
    """Where the compiled library is loaded, all that the sources register is there, and nothing else."""
    from subnet_kernels.ops._library import LOADED, MISSING

    if "_C_cpu" not in LOADED:
        pytest.skip(f"no compiled CPU ops: {MISSING['_C_cpu']}")
    assert [name for name in OPS if has_kernel(name, "CPU")] == sorted(
        name for path, name, _ in REGISTERED if path.parent.name == "cpu"
    )


# ----------------------------------------------------------------------------------------------- vmap and torch.func


def is_tensor(value):
    return isinstance(value, torch.Tensor)


@pytest.mark.parametrize(("name", "make"), [c for c in CASES if c.values[0] in FUNCTIONAL])
@pytest.mark.parametrize("which", ["all", "first"])
def test_vmap(name, make, which):
    """vmap of the op itself equals a loop: over every tensor it takes, and over the first alone."""
    runs = [make() for _ in range(3)]
    if which == "first":
        runs = [(run[0], *runs[0][1:]) for run in runs]
    flat = [torch.utils._pytree.tree_flatten(run, is_leaf=lambda v: v is None) for run in runs]
    spec = flat[0][1]
    columns = list(zip(*(leaves for leaves, _ in flat)))
    mapped = [is_tensor(c[0]) and (which == "all" or any(v is not c[0] for v in c)) for c in columns]
    stacked = torch.utils._pytree.tree_unflatten([torch.stack(c) if m else c[0] for c, m in zip(columns, mapped)], spec)
    dims = torch.utils._pytree.tree_unflatten([0 if m else None for m in mapped], spec)
    vectorised = torch.vmap(op_of(name), in_dims=tuple(dims))(*stacked)
    loop = [op_of(name)(*run) for run in runs]
    outputs = lambda r: [r] if is_tensor(r) else list(r)  # noqa: E731
    for got, *expected in zip(outputs(vectorised), *(outputs(r) for r in loop)):
        torch.testing.assert_close(got, torch.stack(expected), rtol=1e-5, atol=1e-5)


def where_open(weight, packed):
    return torch.where(reference.unpack(packed, weight.shape), weight, 0.0)


def functions():
    """Public functions of one float tensor, each beside plain PyTorch."""
    x, w, s, packed, blocks = torch.randn(3, 6), torch.randn(4, 6), torch.randn(4, 6), bits(4, 6), bank(3, 4, 6)
    image, kernel, kernel_bits = torch.randn(2, 3, 9), torch.randn(4, 3, 3), bits(4, 3, 3)
    masks = reference.unpack_bank(blocks, (4, 6)).float()
    kept = where_open(torch.ones(4, 6), reference.select([s], [9])[0])
    rows = torch.tensor([2, 0, 2])
    own = lambda x, w: torch.stack([torch.where(masks[t] > 0, w, 0.0) @ row for row, t in zip(x, rows.tolist())])  # noqa: E731
    dense = {form: sk.compress(w, packed, form) for form in ("bitmap", "index")}
    return {
        "mixed_linear x": (x, lambda x: sk.mixed_linear(x, w, blocks, rows), lambda x: own(x, w)),
        "mixed_linear w": (w, lambda w: sk.mixed_linear(x, w, blocks, rows), lambda w: own(x, w)),
        "compressed_linear bitmap": (
            x,
            lambda x: sk.compressed_linear(x, dense["bitmap"]),
            lambda x: F.linear(x, where_open(w, packed)),
        ),
        "compressed_linear index": (
            x,
            lambda x: sk.compressed_linear(x, dense["index"]),
            lambda x: F.linear(x, where_open(w, packed)),
        ),
        "apply": (w, lambda w: sk.apply(w, packed), lambda w: where_open(w, packed)),
        "masked_linear x": (x, lambda x: sk.masked_linear(x, w, packed), lambda x: F.linear(x, where_open(w, packed))),
        "masked_linear w": (w, lambda w: sk.masked_linear(x, w, packed), lambda w: F.linear(x, where_open(w, packed))),
        "masked_conv w": (
            kernel,
            lambda k: sk.masked_conv(image, k, kernel_bits, padding=1),
            lambda k: F.conv1d(image, where_open(k, kernel_bits), padding=1),
        ),
        "masked_conv x": (
            image,
            lambda x: sk.masked_conv(x, kernel, kernel_bits, stride=2),
            lambda x: F.conv1d(x, where_open(kernel, kernel_bits), stride=2),
        ),
        "subnet_linear w": (w, lambda w: sk.subnet_linear(x, w, s, 9), lambda w: F.linear(x, w * kept)),
        "subnet_linear s": (
            s,
            lambda s: sk.subnet_linear(x, w, s, 9),
            # straight through: as if the mask grew with |score|
            lambda s: F.linear(x, w * (kept + s.abs() - s.abs().detach())),
        ),
        "superpose w": (
            w,
            lambda w: sk.superpose(w, blocks, torch.tensor([0.2, 0.5, -1.0])),
            lambda w: w * torch.tensordot(torch.tensor([0.2, 0.5, -1.0]), masks, 1),
        ),
        "superpose alphas": (
            torch.randn(3),
            lambda a: sk.superpose(w, blocks, a),
            lambda a: w * torch.tensordot(a, masks, 1),
        ),
        "superpose rows": (
            torch.randn(2, 3),
            lambda a: sk.superpose(w, blocks, a),
            lambda a: w * torch.tensordot(a, masks, 1),
        ),
        "superpose w of rows": (
            w,
            lambda w: sk.superpose(w, blocks, torch.tensor([[0.2, 0.5, -1.0], [1.0, 0.0, 2.0]])),
            lambda w: w * torch.tensordot(torch.tensor([[0.2, 0.5, -1.0], [1.0, 0.0, 2.0]]), masks, 1),
        ),
    }


FUNCTIONS = list(functions())


@pytest.mark.parametrize("name", FUNCTIONS)
class TestFunc:
    def test_grad(self, name):
        at, ours, plain = functions()[name]
        value = lambda f: lambda v: f(v).pow(2).sum()  # noqa: E731
        torch.testing.assert_close(torch.func.grad(value(ours))(at), torch.func.grad(value(plain))(at))

    def test_jacrev(self, name):
        at, ours, plain = functions()[name]
        torch.testing.assert_close(torch.func.jacrev(ours)(at), torch.func.jacrev(plain)(at))

    def test_vjp(self, name):
        at, ours, plain = functions()[name]
        y, pull = torch.func.vjp(ours, at)
        y0, pull0 = torch.func.vjp(plain, at)
        g = torch.randn_like(y)
        torch.testing.assert_close((y, *pull(g)), (y0, *pull0(g)))

    def test_second_derivatives(self, name):
        at, ours, plain = functions()[name]
        twice = lambda f: torch.func.jacrev(torch.func.grad(lambda v: f(v).pow(2).sum()))(at)  # noqa: E731
        torch.testing.assert_close(twice(ours), twice(plain), rtol=1e-4, atol=1e-4)

    def test_vmap_of_grad(self, name):
        at, ours, plain = functions()[name]
        points = torch.stack([at, at * 1.5, at * 0.5])  # scaled, so that a selection from them is the same
        each = lambda f: torch.vmap(torch.func.grad(lambda v: f(v).pow(2).sum()))(points)  # noqa: E731
        torch.testing.assert_close(each(ours), each(plain))


# -------------------------------------------------------------------------------------------------------- compile, export


class Net(torch.nn.Module):
    """Every differentiable op in one forward."""

    def __init__(self):
        super().__init__()
        self.kernel = torch.nn.Parameter(torch.randn(5, 2, 3, 3))
        self.hidden = torch.nn.Parameter(torch.randn(8, 20))
        self.scores = torch.nn.Parameter(torch.randn(8, 20))
        self.mixed = torch.nn.Parameter(torch.randn(6, 8))
        self.alphas = torch.nn.Parameter(torch.rand(3))
        self.last = torch.nn.Parameter(torch.randn(4, 6))
        self.bias = torch.nn.Parameter(torch.randn(4))
        self.register_buffer("kernel_bits", bits(5, 2, 3, 3))
        self.register_buffer("last_bits", bits(4, 6))
        self.register_buffer("block", bank(3, 6, 8)[0])
        self.register_buffer("other", bank(2, 6, 4)[0])
        self.small = sk.compress(torch.randn(5, 6), bits(5, 6), "index")

    def forward(self, x):
        x = sk.masked_conv(x, self.kernel, self.kernel_bits, stride=2, padding=1).relu()
        x = sk.subnet_linear(x.flatten(1), self.hidden, self.scores, 60).relu()
        x = F.linear(x, sk.superpose(self.mixed, [self.block], self.alphas)).relu()
        x = sk.masked_linear(x, self.last, self.last_bits, self.bias)
        z = sk.mixed_linear(x, self.last.t(), [self.other], torch.arange(x.shape[0], device=x.device) % 2)
        return x, F.linear(x, sk.apply(self.last, self.last_bits).t()), z, sk.compressed_linear(z, self.small)


def run(net, forward, x):
    net.zero_grad()
    x = x.clone().requires_grad_()
    outputs = forward(x)
    sum(y.pow(2).sum() for y in outputs).backward()
    return [*(y.detach() for y in outputs), x.grad, *(p.grad.clone() for p in net.parameters())]


def compilers():
    missing = None if shutil.which("g++") or shutil.which("clang++") else "inductor needs a C++ compiler"
    return ["aot_eager", pytest.param("inductor", marks=pytest.mark.skipif(missing is not None, reason=str(missing)))]


@pytest.mark.parametrize("backend", compilers())
def test_compile(backend):
    """One graph, forward and backward, and no new one for another batch size once sizes are dynamic."""
    torch._dynamo.reset()
    net, counter = Net(), torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(net, fullgraph=True, backend=counter, dynamic=True)
    for rows in (3, 5, 8):
        x = torch.randn(rows, 2, 4, 4)
        torch.testing.assert_close(run(net, compiled, x), run(net, net, x), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


def test_compile_without_gradients():
    torch._dynamo.reset()
    net = Net()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 2, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), net(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "make"), [c for c in CASES if c.values[0] in MUTATING])
def test_compile_mutation(name, make):
    """What an op writes inside a compiled function is written for the caller."""
    torch._dynamo.reset()
    args = make()
    copies = tree_map(lambda v: v.clone() if is_tensor(v) else v, args)
    op_of(name)(*args)
    torch.compile(lambda *a: op_of(name)(*a), fullgraph=True, backend="aot_eager")(*copies)
    flat, flat_copies = (torch.utils._pytree.tree_leaves(a) for a in (args, copies))
    torch.testing.assert_close(
        [t for t in flat_copies if is_tensor(t)], [t for t in flat if is_tensor(t)], rtol=0, atol=0, equal_nan=True
    )


def test_compile_selection():
    """Selection and what is counted on bits, in one graph."""
    torch._dynamo.reset()

    def summary(scores, owned):
        packed = sk.select(scores, 9)
        return sk.unpack(packed, (4, 6)), sk.threshold(scores, 0.1), sk.stats(packed, owned), sk.count(sk.pack(scores > 0))

    scores, owned = torch.randn(4, 6), bits(4, 6)
    compiled = torch.compile(summary, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(scores, owned), summary(scores, owned)):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    torch._dynamo.reset()
    net = Net().eval()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(net, (torch.randn(3, 2, 4, 4),), dynamic_shapes=({0: batch},), strict=strict)
    x = torch.randn(7, 2, 4, 4)
    torch.testing.assert_close(program.module()(x), net(x), rtol=1e-5, atol=1e-5)
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]  # strict: one a Function
    targets = {str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function"}
    assert {
        "subnet_kernels.masked_linear.default",
        "subnet_kernels.superpose.default",
        "subnet_kernels.select.default",
    } <= targets
