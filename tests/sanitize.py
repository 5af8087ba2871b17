"""The codec and the CPU kernels under the address and undefined-behaviour sanitizers: `python tests/sanitize.py [pytest's arguments]`
(make sanitize). A report ends the test run that made it.

Without arguments it runs what reaches every line that reads or writes memory: the tests of the codec, its sizes and hostile input, and
of each kernel's tests those that go through the instruction sets, with shapes around a tile and views that lie anywhere. Not what the
same kernels do within layers, training and banks. As a plugin of pytest (`-p sanitize`) it puts the sanitized codec in the place of the
installed one.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ["codec", "bits", "apply", "threshold", "select", "mixed", "compressed", "pool", "superpose", "update", "masked"]

if "SUBNET_SANITIZED_CODEC" in os.environ:
    spec = importlib.util.spec_from_file_location("subnet_kernels._codec", os.environ["SUBNET_SANITIZED_CODEC"])
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])


def main() -> None:
    began = time.monotonic()
    done = subprocess.run([sys.executable, ROOT / "csrc" / "build.py", "sanitized"], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    folder = Path(done.stdout.splitlines()[-1])
    print(f"built in {time.monotonic() - began:.0f} s", flush=True)
    find = lambda name: subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()  # noqa: E731
    environment = {
        **os.environ,
        "SUBNET_KERNELS_CPU_LIBRARY": str(folder / "_C_cpu.so"),
        "SUBNET_SANITIZED_CODEC": str(folder / "_codec.so"),
        "LD_PRELOAD": f"{find('libasan.so')} {find('libubsan.so')} {find('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and PyTorch leave much at their end
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    tests = sys.argv[1:] or [*(f"tests/test_{name}.py" for name in TESTS), "-k", "test_codec or portable or avx2 or avx512"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "--capture=sys",
        "-p",
        "sanitize",
        "-p",
        "no:cacheprovider",
        "--durations=8",
        *tests,
    ]
    code = subprocess.run(command, cwd=ROOT, env=environment).returncode
    print(f"{time.monotonic() - began:.0f} s in all", flush=True)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
