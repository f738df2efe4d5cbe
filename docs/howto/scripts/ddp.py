"""Trains a reversible network on all processes that torchrun starts.

torchrun --nproc-per-node 2 ddp.py
"""

import gc

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from invertible import InvertibleSequential, Merge, ReversibleBlock, Split


def residual() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 4, 1))


blocks = [ReversibleBlock(residual(), residual()) for _ in range(2)]
network = InvertibleSequential(Split(), *blocks, Merge(), checkpoint=True)

distributed.init_process_group("gloo")  # "nccl" on GPUs
model = DistributedDataParallel(network)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(3):
    images = torch.randn(2, 8, 8, 8)  # this process's part of the batch
    loss = model(images).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if distributed.get_rank() == 0:
        print(f"step {step}, loss {loss.item():.3f}")

del network, model, optimizer, loss
gc.collect()  # otherwise a process may abort at exit
distributed.destroy_process_group()
