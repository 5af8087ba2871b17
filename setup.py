"""Builds the compiled libraries. Everything else about the package is in pyproject.toml.

SUBNET_KERNELS_BUILD=auto  (default) the CPU library where torch and a C++ compiler are there, and the CUDA library where torch has
                           CUDA and nvcc is there; else a pure Python package
                     none  nothing compiled
                     cpu   the CPU library, or fail
                     cuda  the CPU and the CUDA library, or fail; torch need not have CUDA, nor the machine a GPU

The mask codec goes with the CPU library where pybind11 is importable; it is for one version of Python, which the others are not.
The environment is read, never the hardware. torch must be importable to compile: ``pip install --no-build-isolation .``
"""

import os
import sys
import warnings
from pathlib import Path

from setuptools import Extension, setup

sys.path.insert(0, str(Path(__file__).parent / "csrc"))
import build as csrc_build

CHOICES = ("auto", "none", "cpu", "cuda")
BUILD = os.environ.get("SUBNET_KERNELS_BUILD", "auto")
if BUILD not in CHOICES:
    raise SystemExit(f"SUBNET_KERNELS_BUILD must be one of {', '.join(CHOICES)}, got {BUILD!r}")

CPU_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # the same bits on every instruction set
    "-fno-math-errno",  # so that loops with a square root are vectorised
    "-Wall",
    "-Wextra",
    "-Wno-uninitialized",  # GCC 12 says it of its own AVX-512 header, hundreds of times
    "-Wno-maybe-uninitialized",
    "-Werror=return-type",
    *csrc_build.STABLE_ABI,
]
CODEC_FLAGS = ["-std=c++20", "-O3", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror=return-type"]


def extensions():
    """The extensions to build and the command that builds them; empty for a pure Python package."""
    if BUILD == "none":
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        if BUILD != "auto":
            raise SystemExit(
                f"SUBNET_KERNELS_BUILD={BUILD} needs torch at build time ({error}): add --no-build-isolation"
            ) from None
        return {}

    class OptionalBuild(BuildExtension):
        """Building is best effort under `auto`: what cannot be compiled leaves a package that runs on the reference."""

        def run(self):
            try:
                super().run()
            except Exception as error:
                if BUILD != "auto":
                    raise
                warnings.warn(f"subnet-kernels is installed without compiled kernels: {error}", stacklevel=1)
                self.extensions = []
            if BUILD == "cuda" or (BUILD == "auto" and torch.version.cuda is not None):
                self.build_cuda()

        def build_cuda(self):
            """By nvcc and not by PyTorch's own extension class, which refuses where torch has no CUDA."""
            try:
                library = csrc_build.cuda()
            except SystemExit as error:
                if BUILD != "auto":
                    raise
                warnings.warn(f"subnet-kernels is installed without compiled CUDA kernels: {error}", stacklevel=1)
                return
            if not self.inplace and not self.editable_mode:
                self.copy_file(str(library), str(Path(self.build_lib, "subnet_kernels", library.name)))

        def copy_extensions_to_source(self):
            self.extensions = [e for e in self.extensions if Path(self.build_lib, self.get_ext_filename(e.name)).exists()]
            super().copy_extensions_to_source()

    cpu = CppExtension(
        "subnet_kernels._C_cpu",
        sorted(str(p) for p in Path("csrc/cpu").glob("*.cpp")),
        depends=sorted(str(p) for p in Path("csrc").rglob("*.h")),
        extra_compile_args={"cxx": CPU_FLAGS},
        py_limited_api=True,
    )
    made = {"ext_modules": [cpu], "cmdclass": {"build_ext": OptionalBuild}}
    try:
        import pybind11
    except ImportError:
        return {**made, "options": {"bdist_wheel": {"py_limited_api": "cp310"}}}
    codec = Extension(
        "subnet_kernels._codec",
        ["csrc/host/codec.cpp"],
        include_dirs=[pybind11.get_include()],
        extra_compile_args={"cxx": CODEC_FLAGS},
        language="c++",
    )
    return {**made, "ext_modules": [cpu, codec]}


setup(**extensions())
