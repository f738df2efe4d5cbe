"""Trains a reversible network whose parameters are sharded over the processes of torchrun.

torchrun --nproc-per-node 2 fsdp.py
"""

import gc

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

from invertible import InvertibleSequential, Merge, ReversibleBlock, Split


def residual() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 4, 1))


blocks = [ReversibleBlock(residual(), residual()) for _ in range(2)]
network = InvertibleSequential(Split(), *blocks, Merge(), checkpoint=True)

distributed.init_process_group("gloo")  # "nccl" on GPUs
for block in blocks:
    fully_shard(block.f)
    fully_shard(block.g)
fully_shard(network)
optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
for step in range(3):
    images = torch.randn(2, 8, 8, 8)  # this process's part of the batch
    loss = network(images).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if distributed.get_rank() == 0:
        print(f"step {step}, loss {loss.item():.3f}")

del network, optimizer, loss
gc.collect()  # otherwise a process may abort at exit
distributed.destroy_process_group()
