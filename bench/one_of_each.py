"""Calls every op on every input of the tests once and waits for it: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck python bench/one_of_each.py [OP ...]

Inputs are made on the CPU and moved as they are, offsets and strides too, so that few kernels but ours run. Prints a line an op; exits
with 1 where one raises. No results are compared: that is what the tests do.
"""

import itertools
import os
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from cases import cases  # noqa: E402
from test_dispatch import op_of  # noqa: E402
from torch.utils._pytree import tree_map  # noqa: E402

DEVICE = os.environ.get("SUBNET_TEST_DEVICE", "cuda")


def moved(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the device, in a storage that is neither longer nor shorter than its own."""
    storage = tensor.untyped_storage()
    there = torch.empty(storage.nbytes(), dtype=torch.uint8, device=DEVICE)
    there.copy_(torch.empty(0, dtype=torch.uint8).set_(storage))
    empty = torch.empty(0, dtype=tensor.dtype, device=DEVICE)
    return empty.set_(there.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def main(wanted: list[str]) -> int:
    """Runs the ops named, or all; the exit status."""
    failed = 0
    for name, inputs in itertools.groupby(cases(), key=lambda case: case[1]):
        if wanted and name not in wanted:
            continue
        done = 0
        for label, _, make in inputs:
            torch.manual_seed(0)
            try:
                op_of(name)(*tree_map(lambda v: moved(v) if isinstance(v, torch.Tensor) else v, make()))
                if DEVICE == "cuda":
                    torch.cuda.synchronize()
                done += 1
            except Exception:
                failed += 1
                print(f"{label}: {traceback.format_exc(limit=-3)}", file=sys.stderr)
        print(f"{name}: {done} calls", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
