"""Trains a reversible network whose sub-networks are compiled."""

import torch
from torch import nn

from invertible import InvertibleSequential, Merge, ReversibleBlock, Split


def residual() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 4, 1))


blocks = [ReversibleBlock(residual(), residual()) for _ in range(2)]
network = InvertibleSequential(Split(), *blocks, Merge(), checkpoint=True)

images = torch.randn(2, 8, 8, 8)
network(images).square().mean().backward()
expected = [parameter.grad for parameter in network.parameters()]

network.compile_subnetworks(backend="aot_eager")  # leave the backend out for fast code
network.zero_grad()
network(images).square().mean().backward()
found = [parameter.grad for parameter in network.parameters()]
torch.testing.assert_close(found, expected)
