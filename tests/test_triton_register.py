"""How Triton's kernels enter the dispatcher, and what is said where they do not."""

import importlib
import subprocess
import sys

import pytest
import torch

from subnet_kernels import info
from subnet_kernels import triton as launches
from subnet_kernels.ops import _library


def has_cuda(op):
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"subnet_kernels::{op}", "CUDA")


def test_every_launch_has_an_op_and_a_function():
    pytest.importorskip("triton")
    for op, place in launches.LAUNCHES.items():
        module, function = place.split(".")
        found = getattr(importlib.import_module(f"subnet_kernels.triton.{module}"), function)
        schema = getattr(torch.ops.subnet_kernels, op).default._schema
        parameters = found.__code__.co_varnames[: found.__code__.co_argcount]
        assert list(parameters) == [a.name for a in schema.arguments]
        defaults = [a.default_value for a in schema.arguments if a.has_default_value()]
        assert list(found.__defaults__ or ()) == defaults  # a call of the op leaves out what equals its default


def test_registered_where_nothing_else_serves():
    pytest.importorskip("triton")
    for op in launches.LAUNCHES:
        assert has_cuda(op)
        assert info.ops()[op]["cuda"] == ("triton" if op in launches.REGISTERED else "compiled")
    assert f"triton: {launches.installed()}" in info.report() or not launches.REGISTERED
    before = set(launches.REGISTERED)
    launches.register()  # again: what has a kernel keeps it
    assert before == launches.REGISTERED


def test_import_is_light():
    """Kernels are imported by the first launch, not by `import subnet_kernels`."""
    code = "import sys, subnet_kernels; sys.exit('subnet_kernels.triton.masked' in sys.modules)"
    path = {"PYTHONPATH": ":".join(p for p in sys.path if p)}
    assert subprocess.run([sys.executable, "-c", code], env=path, check=False).returncode == 0


def test_without_triton(monkeypatch):
    monkeypatch.setattr(launches, "find_spec", lambda name: None)
    monkeypatch.setattr(launches, "REGISTERED", set())
    monkeypatch.setattr(_library, "MISSING", dict(_library.MISSING))
    launches.register()
    assert not launches.REGISTERED
    assert "triton: off: it is not installed: pip install triton" in info.report()
