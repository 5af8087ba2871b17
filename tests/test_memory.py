"""What a converted model takes: weights, scores, one effective weight, bits, and the values that are frozen; no mask of floats."""

import subprocess
import sys
from pathlib import Path

import pytest
from device import cpu_only
from launch import ROOT

SCRIPT = """
import sys, torch, subnet_kernels as sk
from torch import nn

def memory(what):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what)) * 1024

def build(layers, width):
    model = sk.convert(nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers))), config)
    bank = sk.MaskBank(model)
    bank.commit("a")
    bank.begin()
    model(torch.zeros(1, width)).sum().backward()
    sk.optim.SGD(model.parameters(), 0.1).step()
    return model, bank

torch.set_num_threads(1)
layers, width, density = 64, 640, 0.25
config = sk.SubnetConfig(density=density, train_weights=True)
build(2, 64)  # whatever a first call loads
before = memory("VmRSS")
model = sk.convert(nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers))), config)
bank = sk.MaskBank(model)
bank.commit("a")
with torch.no_grad():
    model(torch.zeros(1, width))
served = memory("VmHWM") - before
optimizer = sk.optim.SGD(model.parameters(), 0.1)
for _ in range(2):
    optimizer.zero_grad()
    model(torch.randn(1, width)).sum().backward()
    optimizer.step()
bank.verify()
print(layers * width * width, served, memory("VmHWM") - before)
"""


@cpu_only
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc/self/status, which this system has not")
def test_the_peak_is_what_is_listed(tmp_path):
    path = tmp_path / "peak.py"
    path.write_text(SCRIPT)
    # every tensor is a mapping of its own and gone when it is freed: the peak is of what is alive, and of no holes
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    out = subprocess.run([sys.executable, str(path)], env=environment, capture_output=True, text=True, check=True).stdout
    n, served, trained = map(int, out.split())
    bits = n // 8 * 4  # the live mask, the committed one, what is owned and what is frozen
    listed = 3 * 4 * n + bits + n  # weights, scores and effective weights; values of a quarter of them
    room = n  # a byte a weight, a quarter of a mask of floats: what one layer at a time needs, and the allocator
    assert listed <= served <= listed + room, f"{served / n:.2f} bytes a weight, listed {listed / n:.2f}"
    gradients = 2 * 4 * n
    assert listed + gradients <= trained <= listed + gradients + room, f"{trained / n:.2f} bytes a weight in training"
