"""Every Triton kernel that a launch can choose, compiled ahead of time for every target, within its budget; no GPU is needed.

A row of figures is kept under ``build/triton/rows`` by a hash of source and configuration, so only what changed is compiled again. All
rows are in ``build/triton/resources.json``; the register budgets are in ``triton_registers.json``, by build without its dtype.
"""

import hashlib
import importlib
import json
import os
import re
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch
from interpreter import INTERPRETED
from recording import NoWaiting

from subnet_kernels import reference
from subnet_kernels import triton as launches

triton = pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from subnet_kernels.triton import _build  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "triton"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # target -> bytes of shared memory that a block may have
BUDGETS = json.loads((Path(__file__).parent / "triton_registers.json").read_text())
BUILDS = [build for module in launches.modules() for build in importlib.import_module(module).builds()]


def key(build):
    """The name that a build's budget has: all dtypes share one."""
    return re.sub(r"-(fp32|fp16|bf16|i8|i16|i32|i64)\b", "", build.name)


def source(build):
    function = build.function
    signature = {name: build.signature.get(name, "constexpr") for name in function.arg_names}
    aligned = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name, t in signature.items() if t.startswith("*")}
    return ASTSource(function, signature, build.constants, aligned)


def compile(build, target):
    with mock.patch.dict(os.environ, TRITON_CACHE_DIR=str(OUT / "compiled")):
        options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
        return triton.compile(source(build), target=GPUTarget("cuda", target, 32), options=options)


def figures(build, target):
    """Registers a thread, bytes of shared memory a block, spilled bytes and stack a thread, of a build compiled for a target."""
    what = (
        build.function.cache_key,
        build.signature,
        build.constants,
        build.num_warps,
        build.num_stages,
        target,
        triton.__version__,
    )
    kept = OUT / "rows" / f"{hashlib.sha256(repr(what).encode()).hexdigest()}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    kept.parent.mkdir(parents=True, exist_ok=True)
    compiled = compile(build, target)
    cubin = kept.with_suffix(".cubin")
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True)
    cubin.unlink()
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr).groups()
    row = {
        "kernel": build.name,
        "target": f"sm_{target}",
        "registers": int(registers),
        "shared": compiled.metadata.shared,
        "spill_bytes": spilled(compiled.asm["ptx"], kept.with_suffix(".ptx"), target) if int(stack) else 0,
        "stack": int(stack),
    }
    kept.write_text(json.dumps(row))
    return row


def spilled(ptx, path, target):
    """Bytes that a thread stores because registers run out."""
    path.write_text(ptx)
    tool = TOOLS / ("ptxas-blackwell" if target >= 100 else "ptxas")
    architecture = re.search(r"^\.target (\w+)", ptx, re.MULTILINE).group(1)
    command = [tool, "-v", f"--gpu-name={architecture}", path, "-o", "/dev/null"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    path.unlink()
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", said))


@pytest.mark.parametrize("target", SHARED)
@pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.name)
def test_compiles_within_budget(build, target):
    row = figures(build, target)
    assert row["shared"] <= SHARED[target]
    assert row["registers"] <= BUDGETS[key(build)], f"{key(build)} in triton_registers.json"
    assert row["spill_bytes"] == 0 or not build.hot


@pytest.mark.parametrize("target", SHARED)
def test_counts_are_read_before_they_are_zeroed(target):
    """Every warp reads what one warp then zeroes: a barrier is in between, which the interpreter would not miss."""
    from subnet_kernels.triton import select

    found = re.findall(r"\b(ld\.global|st\.global|bar\.sync)", compile(select._DECIDE, target).asm["ptx"])
    last_load = len(found) - found[::-1].index("ld.global")
    first_store = found.index("st.global")
    assert "bar.sync" in found[last_load:first_store]


def test_resources_are_listed():
    """All rows, in one file for whoever makes a table of them."""
    rows = [figures(build, target) for build in BUILDS for target in SHARED]
    (OUT / "resources.json").write_text(json.dumps(rows, indent=1))
    assert len({(row["kernel"], row["target"]) for row in rows}) == len(rows) == len(BUILDS) * len(SHARED)


def test_budgets_are_of_builds():
    assert set(BUDGETS) == {key(build) for build in BUILDS}


@pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.name)
def test_nothing_is_specialised_unlisted(build):
    """A build is one binary: integers have fixed types and are not specialised, and every argument is in the signature."""
    parameters = {p.name: p for p in build.function.params}
    assert list(parameters) == build.function.arg_names == [*build.signature, *build.constants]
    for name, kind in build.signature.items():
        assert not parameters[name].is_constexpr
        if not kind.startswith("*"):
            assert parameters[name].annotation_type == kind
            assert parameters[name].do_not_specialize
    assert all(parameters[name].is_constexpr for name in build.constants)


class Driver:
    """Stands for a GPU up to the point where a kernel would be compiled."""

    get_current_device = staticmethod(lambda: -1)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))


@pytest.fixture
def asked(monkeypatch):
    """What launches ask the compiler for, instead of compiling and running it."""
    found = []

    def hook(key, repr, fn, compile, **_):  # named as Triton names them
        options = compile["num_warps"], compile["num_stages"]
        found.append(form(fn.jit_function, compile["signature"], compile["constants"], compile["configs"][0], *options))
        return True

    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", hook)
    monkeypatch.setattr(_build, "_compiled", {})  # as before the first launch
    triton.runtime.driver.set_active(Driver())
    yield found
    triton.runtime.driver.set_active(None)  # the next launch looks for a GPU again


def form(function, signature, constants, attributes, warps, stages):
    attributes = [item for item in sorted(attributes.items()) if item[1]]
    return function.fn.__name__, repr(dict(signature)), repr(sorted(constants.items())), repr(attributes), warps, stages


def listed(builds):
    sources = [(build, source(build)) for build in builds]
    return {form(b.function, s.signature, s.constants, s.attrs, b.num_warps, b.num_stages) for b, s in sources}


def test_masked_launches_choose_what_is_listed(asked):
    """Launches of all sizes, dtypes and optional arguments ask for exactly the builds, as they are compiled here."""
    from subnet_kernels.triton import masked

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for rows in (1, 2, 3, 4, 5, 16, 17, 64, 65, 200, 513):
            for outputs, inputs in ((1, 1), (16, 32), (33, 64), (16, 48), (32, 8224), (5, 16), (160, 33)):
                x, grad = torch.zeros(rows, inputs, dtype=dtype), torch.zeros(rows, outputs, dtype=dtype)
                weight, bits = torch.zeros(outputs, inputs, dtype=dtype), reference.pack(torch.zeros(outputs, inputs) > 0)
                masked.masked_linear(x, weight, bits)
                masked.masked_linear(x, weight, bits, weight[:, 0])
                masked.masked_linear_grad_input(grad, weight, bits)
                masked.masked_linear_grad_weight(grad, x, None, None, bits, bits)
                masked.masked_linear_grad_weight(grad, x, weight, weight, bits, None, "value", False)
    assert set(asked) == listed(masked.builds())


def bits_of(n):
    return torch.zeros(reference.nbytes(n), dtype=torch.uint8)


def test_apply_launches_choose_what_is_listed(asked):
    from subnet_kernels.triton import apply

    for n in (1, 5000):
        for dtype in (torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.float64):
            weight = torch.zeros(n, dtype=dtype)
            apply.apply(weight, bits_of(n))
            apply.restore_([weight], [bits_of(n)], [weight])
            for shut, by, *needed in ((None, "value", True, True), (bits_of(n), "magnitude", True, False)):
                apply.straight_through(weight, weight, weight, bits_of(n), shut, by, *needed)
    assert set(asked) == listed(apply.builds())


def test_bits_launches_choose_what_is_listed(asked):
    from subnet_kernels.triton import bits

    for n in (1, 5000):
        bits.unpack(bits.pack(torch.zeros(n) > 0), [n])
        bits.stats(bits_of(n), bits_of(n))
        bits.count(bits_of(n))
    assert set(asked) == listed(bits.builds())


def test_pool_launches_choose_what_is_listed(asked):
    from subnet_kernels.triton import pool

    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        pool.max_pool_relu_grad(*pool.max_pool_relu(torch.zeros(2, 5, 5, 6, dtype=dtype), 2, True), 2, True, 5, 5)
    assert set(asked) == listed(pool.builds())


def test_selection_launches_choose_what_is_listed(asked):
    from subnet_kernels.triton import select

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        scores = [torch.zeros(n, dtype=dtype) for n in (1, 8192, 8193, 70_000)]
        for k, by, ties in ((1, "magnitude", "last"), (1, "value", "all"), (0, "value", "first")):
            select.select(scores, [k] * 4, by, ties)
        select.threshold(scores, 0.1, False)
    assert set(asked) == listed(select.builds())


def test_superposition_launches_choose_what_is_listed(asked):
    from subnet_kernels.triton import superpose

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for tasks, n in ((1, 1), (300, 5000)):
            weight, bank = torch.zeros(n, dtype=dtype), reference.pack_bank(torch.zeros(tasks, n) > 0)
            superpose.superpose(weight, bank, None)
            superpose.superpose(weight, bank, torch.zeros(2, tasks))
            superpose.superpose_counts(weight, torch.zeros(n, dtype=torch.int32), tasks)
            superpose.superpose_grad(weight[None], weight, bank)
    assert set(asked) == listed(superpose.builds())


def test_update_launches_choose_what_is_listed(asked):
    from subnet_kernels.triton import update

    rate = torch.tensor(0.1, dtype=torch.float64)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        params, frozen = [torch.zeros(n, dtype=dtype) for n in (1, 5000)], [None, bits_of(5000)]
        steps = [torch.zeros(()) for _ in params]
        for on, found in ((False, None), (True, torch.zeros(()))):
            end, lists = (frozen, rate, found, found), (params, params)
            update.update_sgd_(*lists, params, *end, 0.9 * on, 0.0, 0.1 * on, on, on, not on)
            update.update_rmsprop_(*lists, params, params, params, steps, *end, 0.9, 1e-8, 0.1 * on, 0.9 * on, on, on)
            update.update_adam_(*lists, params, params, params, steps, *end, 0.9, 0.99, 1e-8, 0.1 * on, on, on, on)
    assert set(asked) == listed(update.builds())


def test_launches_wait_for_nothing(asked):
    """Whatever PyTorch does around the kernels leaves the device alone, so that a step can be captured."""
    from subnet_kernels.triton import apply, bits, pool, select, superpose, update

    n, tasks = 9000, 300
    weight, scores, grad, w_eff = (torch.zeros(n) for _ in range(4))
    own, shut, hints, bank = bits_of(n), bits_of(n), torch.zeros(4).double(), reference.pack_bank(torch.zeros(tasks, n) > 0)
    rate, found, step = torch.tensor(0.1, dtype=torch.float64), torch.zeros(()), [torch.zeros(()), torch.zeros(())]
    two, state, pairs = [weight, scores], [grad, w_eff], ([1, 0, 1], [own])
    with NoWaiting():
        for by, ties in (("magnitude", "last"), ("value", "all")):
            select.refresh_([scores], [weight], [100], [own], [w_eff], [hints], by, ties)
        select.refresh_threshold_([scores], [weight], 0.1, True, [own], [w_eff])
        apply.restore_([weight], [own], [weight[:9]])
        apply.straight_through(grad, weight, scores, own, shut)
        bits.stats(bits.pack(bits.unpack(own, [n])), shut)
        bits.count(own)
        pool.max_pool_relu_grad(*pool.max_pool_relu(weight.view(1, 30, 30, 10), 2, True), 2, True, 30, 30)
        superpose.superpose(weight, bank, torch.ones(2, tasks))
        superpose.superpose_grad(grad, weight, bank)
        end = [shut, None], rate, found, found
        update.update_sgd_(two, [grad, grad], state, *end, 0.9, 0.0, 0.1, True, False, False, *pairs)
        update.update_rmsprop_(two, [grad, grad], state, state, state, step, *end, 0.9, 1e-8, 0.1, 0.9, True, False, *pairs)
        update.update_adam_(two, [grad, grad], state, state, state, step, *end, 0.9, 0.99, 1e-8, 0.1, True, False, True, *pairs)
    assert len(set(asked)) > 15
