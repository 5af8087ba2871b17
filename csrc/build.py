"""Builds the libraries that setuptools cannot: `python csrc/build.py cuda`, `emulated` or `sanitized`, each object cached by the hash of
its sources.

cuda      subnet_kernels/_C_cuda.so by nvcc, on any machine that has nvcc: neither a GPU nor a PyTorch with CUDA is needed. For the
          targets in SUBNET_KERNELS_CUDA_ARCHS (default "80;90;100"). What ptxas says of every kernel, registers, shared memory and
          spills, is in build/cuda/resources.json.
emulated  build/emulated/_C_emulated.so: the same kernels for the processor (csrc/cuda/simt.h), for tests. With `--address`, also
          under sanitizers, which find what a kernel reads or writes out of bounds or unaligned.
sanitized build/sanitized/_C_cpu.so and _codec.so: the CPU kernels and the codec under the sanitizers of addresses and of undefined
          behaviour, for tests/sanitize.py.

MAX_JOBS bounds how many compilers run at a time.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc" / "cuda"
STABLE_ABI = ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020b000000000000"]  # torch 2.11 and later, any Python


def torch_folder() -> Path:
    """Where PyTorch lies; it is not imported, which would take seconds."""
    from importlib.util import find_spec

    spec = find_spec("torch")
    if spec is None:
        raise SystemExit("csrc/build.py: PyTorch's headers are needed, and torch is not installed")
    return Path(spec.origin).parent


def run(command: list[str]) -> str:
    """What a compiler prints; SystemExit with all of it where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def compile_all(folder: Path, jobs: list[tuple[Path, list[str]]], version: str) -> list[Path]:
    """Objects of (source, command) pairs; the command without -o. One with the same sources, headers and command is taken as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    headers = b"".join(p.read_bytes() for p in sorted((ROOT / "csrc").rglob("*.h")))

    def one(job: tuple[Path, list[str]]) -> Path:
        source, command = job
        content = hashlib.sha256(headers + source.read_bytes() + "\0".join([*command, version]).replace(str(ROOT), "").encode())
        target = folder / f"{source.stem}-{content.hexdigest()[:16]}.o"
        if not target.exists():
            print(f"compiling {source.relative_to(ROOT)}", flush=True)
            temporary = target.with_suffix(".tmp.o")
            target.with_suffix(".log").write_text(run([*command, "-c", str(source), "-o", str(temporary)]))
            os.replace(temporary, target)
        return target

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        objects = list(pool.map(one, jobs))
    for old in folder.glob("*.o"):
        if old not in objects:
            old.unlink()
            old.with_suffix(".log").unlink(missing_ok=True)
    return objects


def link(objects: list[Path], library: Path, command: list[str]) -> Path:
    """Link unless the library is newer than all of its objects."""
    names = " ".join(p.name for p in objects)
    stamp = objects[0].parent / f"{library.name}.objects"
    if not library.exists() or not stamp.exists() or stamp.read_text() != names:
        temporary = library.with_suffix(".tmp")
        run([command[0], *map(str, objects), *command[1:], "-o", str(temporary)])
        os.replace(temporary, library)
        stamp.write_text(names)
    return library


def cuda(library: Path | None = None) -> Path:
    """The CUDA library, and the table of what its kernels take."""
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        raise SystemExit(
            "csrc/build.py: nvcc is needed to build the CUDA library, and there is none on PATH nor in /usr/local/cuda"
        )
    targets = os.environ.get("SUBNET_KERNELS_CUDA_ARCHS", "80;90;100").split(";")
    torch = torch_folder()
    flags = [
        "-std=c++20",
        "-O3",
        "-lineinfo",
        "-Xcompiler",
        "-fPIC,-fvisibility=hidden",
        "-Werror",
        "all-warnings",
        "-Xptxas",
        "-v",
    ]
    flags += ["-DUSE_CUDA", *STABLE_ABI, "-isystem", f"{torch}/include"]
    flags += [f"-gencode=arch=compute_{t},code=sm_{t}" for t in targets]
    folder = ROOT / "build" / "cuda"
    objects = compile_all(folder, [(p, [nvcc, *flags]) for p in sorted(SOURCES.glob("*.cu"))], run([nvcc, "--version"]))
    rows = [row for o in objects for row in resources(o.stem.rsplit("-", 1)[0], o.with_suffix(".log").read_text())]
    (folder / "resources.json").write_text(json.dumps(rows, indent=1) + "\n")
    where = library or ROOT / "subnet_kernels" / "_C_cuda.so"
    return link(objects, where, [nvcc, "-shared", "-cudart", "static", f"-L{torch}/lib", "-ltorch_cpu", "-lc10"])


def resources(op: str, log: str) -> list[dict[str, object]]:
    """A row a kernel and target of ptxas's report on one source."""
    report = re.compile(
        r"Compiling entry function '(?P<kernel>\w+)' for 'sm_(?P<target>\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
        r"[^\n]*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    found = [m.groupdict() for m in report.finditer(log)]
    names = run(["c++filt", *(f["kernel"] for f in found)]).splitlines() if found else []
    rows = []
    for f, name in zip(found, names):
        shared = re.search(r"(\d+) bytes smem", f["rest"])
        rows.append(
            {
                "kernel": f"{op}: {without_arguments(name)}",
                "target": int(f["target"].rstrip("a")),
                "registers": int(f["registers"]),
                "shared": int(shared.group(1)) if shared else 0,
                "spill_bytes": int(f["stores"]) + int(f["loads"]),
                "stack": int(f["stack"]),
            }
        )
    return sorted(rows, key=lambda row: (row["kernel"], row["target"]))


def without_arguments(name: str) -> str:
    """A demangled kernel's name and template arguments: void (anonymous namespace)::f<(Rule)2>(int*) -> f<(Rule)2>."""
    depth = at = 0
    for at in range(len(name) - 1, -1, -1):
        depth += {")": 1, "(": -1}.get(name[at], 0)
        if depth == 0:
            break
    return re.sub(r"(\w+::)*\(anonymous namespace\)::|^void |torch::headeronly::|c10::", "", name[:at])


def emulated(address: bool = False) -> Path:
    """The CUDA kernels for the processor."""
    torch = torch_folder()
    compiler = os.environ.get("CXX", "g++")
    flags = ["-std=c++20", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-Werror=return-type"]
    flags += ["-DSUBNET_KERNELS_EMULATED", *STABLE_ABI, "-isystem", f"{torch}/include"]
    flags += ["-fsanitize=address,alignment", "-fno-sanitize-recover=alignment"] if address else []
    folder = ROOT / "build" / ("emulated-address" if address else "emulated")
    sources = [*sorted(SOURCES.glob("*.cu")), *sorted(SOURCES.glob("*.cpp"))]
    objects = compile_all(folder, [(p, [compiler, *flags, "-x", "c++"]) for p in sources], run([compiler, "--version"]))
    ends = ["-fsanitize=address,alignment"] if address else []
    return link(objects, folder / "_C_emulated.so", [compiler, "-shared", *ends, f"-L{torch}/lib", "-ltorch_cpu", "-lc10"])


def sanitized() -> Path:
    """The CPU kernels and the codec under sanitizers; the folder of both."""
    import sysconfig

    import pybind11

    compiler, torch, folder = os.environ.get("CXX", "g++"), torch_folder(), ROOT / "build" / "sanitized"
    # of the virtual function tables of PyTorch's classes the sanitizer would need names that PyTorch does not export
    checks = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
    flags = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-w", *checks]
    torch_flags = [*STABLE_ABI, "-isystem", f"{torch}/include"]
    python_flags = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    jobs = [(p, [compiler, *flags, *torch_flags]) for p in sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
    objects = compile_all(folder, [*jobs, (ROOT / "csrc" / "host" / "codec.cpp", [compiler, *flags, *python_flags])], compiler)
    kernels, codec = objects[:-1], objects[-1:]
    link(kernels, folder / "_C_cpu.so", [compiler, "-shared", *checks, f"-L{torch}/lib", "-ltorch_cpu", "-lc10"])
    link(codec, folder / "_codec.so", [compiler, "-shared", *checks])
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cuda", "emulated", "sanitized"))
    parser.add_argument("--address", action="store_true", help="emulated: under sanitizers of addresses")
    given = parser.parse_args()
    print(cuda() if given.what == "cuda" else sanitized() if given.what == "sanitized" else emulated(given.address))
    sys.exit()
