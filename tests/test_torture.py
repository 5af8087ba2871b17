"""A point of `make torture` of each kind, and that it notices what it is there for."""

import random

import pytest
import torture
from device import cpu_only

pytestmark = cpu_only


@pytest.mark.parametrize("name", torture.TORTURES)
def test_killed_processes_go_on(name, tmp_path):
    assert torture.TORTURES[name](1, random.Random(3), tmp_path) in (0, 1)


def test_a_lost_task_is_noticed(tmp_path):
    torture.in_child(lambda said: torture.append(tmp_path / "bank", said))
    torture.in_child(lambda _: torture.look(tmp_path / "bank", torture.APPENDS))
    with pytest.raises(RuntimeError, match="failed by itself"):
        torture.in_child(lambda _: torture.look(tmp_path / "bank", torture.APPENDS + 1))
    with pytest.raises(RuntimeError, match="failed by itself"):
        torture.in_child(lambda _: torture.look(tmp_path / "nothing", 1))


def test_a_killed_process_is_killed():
    said, killed = torture.in_child(lambda said: (torture.os.write(said, b"begun"), torture.time.sleep(60)), 0.5)
    assert (said, killed) == (b"begun", True)
