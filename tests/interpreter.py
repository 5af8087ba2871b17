"""Where the tests of Triton kernels run: on a GPU for real, without one in Triton's interpreter.

The interpreter is chosen by a variable that Triton reads when a kernel is decorated, its own library's included. So those tests have
a process of their own, which `test_triton_interpreter.py` starts; everywhere else they compile, and say why they do not run.
"""

import os

import pytest

DEVICE = os.environ.get("SUBNET_TEST_DEVICE", "cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def only_where_kernels_run() -> None:
    """Skips the calling test module where its kernels could not run."""
    pytest.importorskip("triton")
    if DEVICE == "cpu" and not INTERPRETED:
        pytest.skip("runs in the interpreter, from test_triton_interpreter.py", allow_module_level=True)
