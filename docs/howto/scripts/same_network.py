"""One network in the words of several libraries: (x1, x2) -> (x2, x1 + f(x2)) for each f.

``fs`` are the sub-networks, an even number of them, each from 8 channels to 8.
"""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn


def invertible(fs: Sequence[nn.Module]) -> nn.Module:
    from invertible import InvertibleSequential, Merge, ReversibleBlock, Split

    pairs = zip(fs[::2], fs[1::2], strict=True)
    blocks = [ReversibleBlock(f, g) for f, g in pairs]
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


def freia(fs: Sequence[nn.Module], channels: int = 16) -> nn.Module:
    from FrEIA.framework import SequenceINN
    from FrEIA.modules import NICECouplingBlock

    remaining = iter(fs)
    network = SequenceINN(channels)
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


# What stands before the name that a parameter has in its sub-network: the number of the block, and
# which of its two functions it is.
PREFIXES = {
    "memcnn": r"(\d+)\._fn\.([FG])m\.",
    "revtorch": r"reversible_blocks\.(\d+)\.([fg])_block\.",
    "revlib": r"(\d+)-(\d)\.wrapped_module\.wrapped_module\.",
    "freia": r"module_list\.(\d+)\.([FG])\.",
}


def renamed(state_dict: Mapping[str, Tensor], library: str) -> dict[str, Tensor]:
    """The state_dict of the network of another library, with the names of ``invertible``."""

    def here(match: re.Match[str]) -> str:
        which = "f" if match[2] in "Ff0" else "g"
        return f"{int(match[1]) + 1}.{which}."  # behind Split, which is layer 0

    return {re.sub(PREFIXES[library], here, name): x for name, x in state_dict.items()}


def momentum_net(fs: Sequence[nn.Module], beta: float = 0.9) -> nn.Module:
    from invertible import InvertibleSequential, Merge, ReversibleBlock, Split

    class Scaled(nn.Module):
        def __init__(self, factor: float, f: nn.Module) -> None:
            super().__init__()
            self.factor = factor
            self.f = f

        def forward(self, x: Tensor) -> Tensor:
            return self.f(self.factor * x)

    blocks = [
        ReversibleBlock(
            Scaled(beta**i, f),
            Scaled((1 - beta) / beta ** (i + 1), nn.Identity()),
        )
        for i, f in enumerate(fs)
    ]
    return InvertibleSequential(Split(), *blocks, Merge(), checkpoint=True)
