"""What each process of a run of two does: every model of the zoo under DDP and under FSDP2. `test_compatibility.py` starts it.

torchrun --nproc-per-node=2 tests/ranks.py FOLDER MODEL ...
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from zoo import CASES, Case, output

import subnet_kernels as sk
from subnet_kernels import reference

STEPS, HALF = 3, 4


def start(case: Case) -> nn.Module:
    """The converted model that every process begins with; its norms take their running statistics, which half a batch has too."""
    return sk.convert(case.model(), sk.SubnetConfig(density=0.4, train_weights=True)).eval()


def loss(model: nn.Module, case: Case, step: int, rank: int) -> Tensor:
    return output(model(**case.inputs(HALF, 2 * HALF * step + HALF * rank))).square().mean()


def whole(model: nn.Module) -> dict[str, Tensor]:
    """The state, put together from its parts, and the masks that follow from its scores."""
    state = {key: (v.full_tensor() if isinstance(v, DTensor) else v).detach().clone() for key, v in model.state_dict().items()}
    for name, layer in model.named_modules():
        if isinstance(layer, sk.SubnetLayer):
            rule = layer.rule
            (state[f"bits of {name}"],) = reference.select([state[f"{name}.scores"]], [layer.k], rule.by, rule.ties)
    return state


def learn(model: nn.Module, case: Case, rank: int | None) -> None:
    """Some steps on this process's half of every batch, or, as one process, on both halves in turn."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        if rank is not None:
            loss(model, case, step, rank).backward()
        else:
            for half in range(2):
                (loss(model, case, step, half) / 2).backward()
        optimizer.step()


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (2,))
    for name in sys.argv[2:]:
        case, found = CASES[name], {}
        for how in ("DDP", "FSDP2"):
            model = start(case)
            if how == "DDP":
                wrapped = DistributedDataParallel(model)
            else:
                for layer in [m for m in model.modules() if isinstance(m, sk.SubnetLayer)][::2]:
                    fully_shard(layer, mesh=mesh)
                wrapped = fully_shard(model, mesh=mesh)
            try:
                learn(wrapped, case, rank)
                found[how] = whole(model)
            except Exception as error:
                found[how] = f"{type(error).__name__}: {error}"
        torch.save(found, folder / f"{name}.{rank}.pt")
    dist.barrier()  # whoever leaves first takes its connections along
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
