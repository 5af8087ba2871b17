"""Starts a script in two processes that talk by gloo."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def launch(script: Path, *arguments: str, log: Path) -> None:
    """Run `script arguments...` as two ranks; fails with the end of what they printed."""
    # three processes import torch, on a machine that may be busy: patience, and no name of a host or of an interface to look up
    patience = "read_timeout=300,keep_alive_interval=30,keep_alive_max_attempt=20"
    launcher = [
        "torch.distributed.run",
        "--standalone",
        "--local-addr=127.0.0.1",
        f"--rdzv-conf={patience}",
        "--nproc-per-node=2",
    ]
    path = os.pathsep.join([str(ROOT), str(ROOT / "python_api"), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with open(log, "w") as file:
        command = [sys.executable, "-m", *launcher, str(script), *arguments]
        with subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT) as process:
            try:
                code = process.wait(600)
            except subprocess.TimeoutExpired:
                process.terminate()  # and with it, its workers
                code = "no end after 600 s"
    assert code == 0, f"{code}:\n{log.read_text()[-8000:]}"
