"""Masked training on several processes: the same masks on each, though no process sends one.

torchrun --nproc-per-node=2 examples/ddp.py
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import subnet_kernels as sk
from subnet_pipelines.benchmarks.mnist import load


def main():
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)  # each draws other weights and scores: DDP sends those of the first to all
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 5))
    model = sk.convert(net, sk.SubnetConfig(density=0.1, train_weights=True, per_task=["3"]))
    bank = sk.MaskBank(model)
    x, y = load(None)[0]
    for task in range(2):
        bank.begin()
        wrapped = DistributedDataParallel(model)  # after begin, which makes a new head; its optimizer too
        optimizer = torch.optim.AdamW(wrapped.parameters(), 3e-3)
        mine = ((y // 5) == task).nonzero()[:, 0]
        for rows in mine[: len(mine) // 64 * 64].split(64):
            rows = rows[rank::world]
            optimizer.zero_grad()
            F.cross_entropy(wrapped(x[rows].float() / 255), y[rows] - 5 * task).backward()
            optimizer.step()
        bank.commit(f"digits {5 * task} to {5 * task + 4}")
    bank.verify()
    for name in bank.names:
        bits = torch.cat(list(bank.bits(name).values()))
        first = bits.clone()
        dist.broadcast(first, 0)
        same = torch.tensor(float(torch.equal(bits, first)))
        dist.all_reduce(same)
        if rank == 0:
            print(f"{name}: {sk.count(bits)} open weights, the same on {same:.0f} of {world} processes")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
