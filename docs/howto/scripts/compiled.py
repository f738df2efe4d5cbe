"""Trains a reversible network that is compiled, as a whole and in parts."""

import torch
from torch import nn

from invertible import InvertibleSequential, Merge, ReversibleBlock, Split


def residual() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 4, 1))


blocks = [ReversibleBlock(residual(), residual()) for _ in range(2)]
network = InvertibleSequential(Split(), *blocks, Merge(), checkpoint=True)
backend = "aot_eager"  # "inductor" generates fast code

images = torch.randn(2, 8, 8, 8)
network(images).square().mean().backward()
expected = [parameter.grad for parameter in network.parameters()]

# The whole network, rebuilding included.
network.zero_grad()
compiled = torch.compile(network, backend=backend, fullgraph=torch.__version__ >= (2, 13))
compiled(images).square().mean().backward()
found = [parameter.grad for parameter in network.parameters()]
torch.testing.assert_close(found, expected)

# Its sub-networks alone.
network.compile_subnetworks(backend=backend)
network.zero_grad()
network(images).square().mean().backward()
found = [parameter.grad for parameter in network.parameters()]
torch.testing.assert_close(found, expected)
