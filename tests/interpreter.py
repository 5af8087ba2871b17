"""Where the tests of Triton kernels run: on a GPU for real, without one in Triton's interpreter.

The interpreter is chosen by a variable that Triton reads when a kernel is decorated, its own library's included. So those tests have
a process of their own, which `test_triton_interpreter.py` starts; everywhere else they compile, and say why they do not run.
"""

import os

import pytest
import torch

DEVICE = os.environ.get("SUBNET_TEST_DEVICE", "cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def only_where_kernels_run() -> None:
    """Skips the calling test module where its kernels could not run."""
    pytest.importorskip("triton")
    if DEVICE == "cpu" and not INTERPRETED:
        pytest.skip("runs in the interpreter, from test_triton_interpreter.py", allow_module_level=True)


def thinned(cases, step: int, first: int = 0) -> list:
    """All cases on a GPU; every step-th from the first on in the interpreter, which takes a thousand times as long."""
    return list(cases)[first % step if INTERPRETED else 0 :: step if INTERPRETED else 1]


def poison(monkeypatch) -> None:
    """Fresh memory is all ones, NaN where it is of floats, so that what a kernel leaves unwritten shows."""
    empty = torch.empty

    def filled(*size, **how):
        made = empty(*size, **how)
        made.untyped_storage().fill_(255)
        return made

    monkeypatch.setattr(torch, "empty", filled)


def note_launches(monkeypatch) -> list[str]:
    """The names of the builds that are launched from now on, as they are."""
    from subnet_kernels.triton import _build

    names, launch = [], _build.Build.launch

    def noted(build, *args):
        names.append(build.name)
        launch(build, *args)

    monkeypatch.setattr(_build.Build, "launch", noted)
    return names


def apart(t):
    """Ways to hold the same values: as they are, at an odd address, and with strides."""
    yield t
    wide = torch.zeros(t.numel() + 1, dtype=t.dtype, device=t.device)
    wide[1:] = t.reshape(-1)
    yield wide[1:].view(t.shape)
    yield torch.stack([t, t], -1)[..., 1]
