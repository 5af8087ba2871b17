"""max_pool_relu against PyTorch's pooling, ReLU and the copy that parts the channels, forward alone and with the gradient.

The layers of LASEM's tree on CIFAR-100, ten rows: what its convolutions make, channels last. Forward reads an input and writes a
quarter of it and a byte an output; backward reads those and writes the input's size. Expected before any measurement: a third of
the time of the three passes that it replaces, and of the four of their gradients; the target is half of it.
"""

import pytest
import torch
import torch.nn.functional as F
from measure import compiled, floor, measure, report, sizes, targets_on

import subnet_kernels as sk

TARGETS = {"three ops": 2.0}


def plain(x: torch.Tensor, window: int, split: bool = True) -> torch.Tensor:
    """`max_pool_relu` as one writes it; maxima come first, since ReLU is then less work."""
    y = F.max_pool2d(x, window, ceil_mode=True) if window > 1 else x
    return torch.cat(y.relu().chunk(2, 1)) if split else y.relu()


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("shape", "window"), [((80, 128, 16, 16), 2), ((40, 128, 16, 16), 1), *sizes([], [((1024, 128, 32, 32), 2)])], ids=str
)
def bench_pool(shape, window, dtype, gradient, thread_count):
    x = torch.randn(shape).to(dtype).to(memory_format=torch.channels_last).requires_grad_(gradient)
    y, expected = sk.max_pool_relu(x, window, split=True), plain(x, window)
    assert torch.equal(y, expected)
    grad = torch.randn(y.shape).to(dtype).to(memory_format=torch.channels_last)
    if gradient:
        assert torch.equal(*(torch.autograd.grad(made, x, grad)[0] for made in (y, expected)))

    def run(function):
        return lambda: torch.autograd.grad(function(), x, grad) if gradient else function()

    fast, notes = compiled(plain, x, window) if thread_count <= 1 and not gradient else ({}, {})
    times = measure(
        {
            "max_pool_relu": run(lambda: sk.max_pool_relu(x, window, split=True)),
            "three ops": run(lambda: plain(x, window)),
            **fast,
            "floor: copied once": lambda: x.detach().clone(),
        }
    )
    outputs = y.numel() * (y.element_size() + 1)
    times |= floor((1 + gradient) * (x.numel() * x.element_size() + outputs))
    case = f"{'forward and backward' if gradient else 'forward'}, {'x'.join(map(str, shape))} window={window} {str(dtype)[6:]}"
    report("max_pool_relu", case, times, "max_pool_relu", targets_on(thread_count, TARGETS), **notes)
