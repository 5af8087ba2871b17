"""Calls every op on every input of the tests once and waits for it: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck python bench/one_of_each.py [OP ...]

Prints a line an op; exits with 1 where one raises. No results are compared: that is what the tests do.
"""

import os
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEVICE = os.environ.setdefault("SUBNET_TEST_DEVICE", "cuda")
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402

torch.set_default_device(DEVICE)

from cases import cases  # noqa: E402
from test_dispatch import op_of  # noqa: E402


def main(wanted: list[str]) -> int:
    """Runs the ops named, or all; the exit status."""
    failed = 0
    calls: dict[str, int] = {}
    for label, name, make in cases():
        if wanted and name not in wanted:
            continue
        torch.manual_seed(0)
        try:
            op_of(name)(*make())
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            calls[name] = calls.get(name, 0) + 1
        except Exception:
            failed += 1
            print(f"{label}: {traceback.format_exc(limit=-3)}", file=sys.stderr)
    print("\n".join(f"{name}: {count} calls" for name, count in calls.items()))
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
