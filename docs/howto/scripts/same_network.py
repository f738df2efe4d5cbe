"""One network in the words of several libraries: (x1, x2) -> (x2, x1 + f(x2)) for each f.

``fs`` are the sub-networks, an even number of them, each from 8 channels to 8.
"""

from collections.abc import Sequence

from torch import nn


def invertible(fs: Sequence[nn.Module]) -> nn.Module:
    from invertible import AdditiveCoupling, InvertibleSequential, Merge, Split, Swap

    blocks = [layer for f in fs for layer in (AdditiveCoupling(f), Swap())]
    return InvertibleSequential(Split(), *blocks, Merge(), checkpoint=True)


def memcnn(fs: Sequence[nn.Module]) -> nn.Module:
    from memcnn import AdditiveCoupling, InvertibleModuleWrapper

    pairs = [AdditiveCoupling(Fm=f, Gm=g) for f, g in zip(fs[::2], fs[1::2], strict=True)]
    return nn.Sequential(
        *(InvertibleModuleWrapper(pair, keep_input=i == 0) for i, pair in enumerate(pairs))
    )


def revtorch(fs: Sequence[nn.Module]) -> nn.Module:
    from revtorch.revtorch import ReversibleBlock, ReversibleSequence

    pairs = zip(fs[::2], fs[1::2], strict=True)
    return ReversibleSequence(nn.ModuleList(ReversibleBlock(f, g) for f, g in pairs))


def revlib(fs: Sequence[nn.Module]) -> nn.Module:
    from revlib import ReversibleSequential

    return ReversibleSequential(*fs)


def freia(fs: Sequence[nn.Module]) -> nn.Module:
    from FrEIA.framework import SequenceINN
    from FrEIA.modules import NICECouplingBlock

    remaining = iter(fs)
    network = SequenceINN(16)
    for _ in range(len(fs) // 2):
        network.append(NICECouplingBlock, subnet_constructor=lambda *_: next(remaining))
    return network  # calling it returns the output and the log-determinant


def torch_checkpoint(fs: Sequence[nn.Module]) -> nn.Module:
    import torch
    from torch import Tensor
    from torch.utils.checkpoint import checkpoint

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fs = nn.ModuleList(fs)

        def forward(self, x: Tensor) -> Tensor:
            x1, x2 = x.chunk(2, dim=1)
            for f in self.fs:
                x1, x2 = x2, x1 + checkpoint(f, x2, use_reentrant=False)
            return torch.cat((x1, x2), dim=1)

    return Network()
