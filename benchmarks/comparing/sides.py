"""The sides of the comparison: one stack of reversible blocks, trained in many ways.

A side takes the residual functions ``f`` of the blocks and returns the network

    (x1, x2) -> (x2, x1 + f(x2)), once for each f,

as a function of one tensor that holds ``x1`` and ``x2`` along its channels, since that is what the
peers take. All sides get the same ``f``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import isqrt

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from invertible import AdditiveCoupling, InvertibleModule, InvertibleSequential, Merge, Split, Swap

Network = Callable[[Tensor], Tensor]
Side = Callable[[Sequence[nn.Module]], Network]

PLAIN = "plain"
OURS = "invertible"


def bottleneck(width: int) -> nn.Sequential:
    """The residual of an i-RevNet block, as in the released code: inner width a quarter."""
    inner = max(1, width // 4)
    return nn.Sequential(
        *(nn.BatchNorm2d(width), nn.ReLU(inplace=True), _conv(width, inner)),
        *(nn.BatchNorm2d(inner), nn.ReLU(inplace=True), _conv(inner, inner)),
        *(nn.BatchNorm2d(inner), nn.ReLU(inplace=True), _conv(inner, width)),
    )


def _conv(channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, kernel_size=3, padding=1, bias=False)


def plain(fs: Sequence[nn.Module]) -> Network:
    """Stores all activations; a loop by hand, without this library."""

    def run(x: Tensor) -> Tensor:
        return torch.cat(_blocks(fs, *x.chunk(2, dim=1)), dim=1)

    return run


def _blocks(fs: Sequence[nn.Module], x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    for f in fs:
        x1, x2 = x2, x1 + f(x2)
    return x1, x2


def checkpointed(fs: Sequence[nn.Module], blocks_per_segment: int) -> Network:
    """``torch.utils.checkpoint``: stores the state between segments, and runs each twice."""
    segments = [fs[i : i + blocks_per_segment] for i in range(0, len(fs), blocks_per_segment)]

    def run(x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=1)
        for segment in segments:
            x1, x2 = checkpoint(_blocks, segment, x1, x2, use_reentrant=False)
        return torch.cat((x1, x2), dim=1)

    return run


def checkpoint_each_block(fs: Sequence[nn.Module]) -> Network:
    """A segment for each block: the least work in one piece."""
    return checkpointed(fs, 1)


def checkpoint_segments(fs: Sequence[nn.Module]) -> Network:
    """Segments of about the square root of the depth: the least memory."""
    return checkpointed(fs, max(1, isqrt(len(fs))))


def layers(fs: Sequence[nn.Module]) -> list[InvertibleModule]:
    """The same stack in layers of this library."""
    blocks = [layer for f in fs for layer in (AdditiveCoupling(f), Swap())]
    return [Split(), *blocks, Merge()]


def ours(fs: Sequence[nn.Module]) -> Network:
    """Reversible checkpointing of this library."""
    return InvertibleSequential(*layers(fs), checkpoint=True)


def memcnn(fs: Sequence[nn.Module]) -> Network:
    """MemCNN's wrapper around each pair of blocks."""
    from memcnn import AdditiveCoupling, InvertibleModuleWrapper

    pairs = [AdditiveCoupling(f, g) for f, g in _pairs(fs)]
    # The first must keep its input, or MemCNN frees the memory of the caller's tensor.
    wrapped = [InvertibleModuleWrapper(pair, keep_input=i == 0) for i, pair in enumerate(pairs)]
    return nn.Sequential(*wrapped)


def revtorch(fs: Sequence[nn.Module]) -> Network:
    """RevTorch's sequence: one autograd function over all blocks."""
    from revtorch import ReversibleBlock, ReversibleSequence

    return ReversibleSequence(nn.ModuleList(ReversibleBlock(f, g) for f, g in _pairs(fs)))


def revlib_function(fs: Sequence[nn.Module]) -> Network:
    """The default of revlib: one autograd function for each block."""
    from revlib import ReversibleSequential

    return ReversibleSequential(*fs)


def revlib_graph(fs: Sequence[nn.Module]) -> Network:
    """The other mode of revlib: hooks on saved tensors, as in this library."""
    from revlib import MemoryModes, ReversibleSequential

    return ReversibleSequential(*fs, memory_mode=MemoryModes.autograd_graph)


def _pairs(fs: Sequence[nn.Module]) -> list[tuple[nn.Module, nn.Module]]:
    if len(fs) % 2:
        raise ValueError(f"MemCNN and RevTorch pair the blocks: take an even depth, not {len(fs)}.")
    return list(zip(fs[::2], fs[1::2], strict=True))


SIDES: dict[str, Side] = {
    PLAIN: plain,
    "checkpoint, blocks": checkpoint_each_block,
    "checkpoint, segments": checkpoint_segments,
    OURS: ours,
}
PEERS: dict[str, Side] = {
    "MemCNN": memcnn,
    "RevTorch": revtorch,
    "revlib, function": revlib_function,
    "revlib, graph": revlib_graph,
}
# One evaluation more and flat memory, as we have: the better of them is what to keep up with.
FAST_PEERS = ("RevTorch", "revlib, function")


def importable_sides() -> tuple[dict[str, Side], dict[str, str]]:
    """The sides that can run here, and why each other peer cannot."""
    sides, skipped = dict(SIDES), {}
    for name, side in PEERS.items():
        try:
            with quiet_peers():
                side([nn.Identity(), nn.Identity()])
        except Exception as error:  # not installed, or too old for this torch
            skipped[name] = f"{type(error).__name__}: {error}"
        else:
            sides[name] = side
    return sides, skipped


@contextmanager
def quiet_peers() -> Iterator[None]:
    """Without warnings that a peer uses what PyTorch has deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="memcnn|revlib|revtorch")
        yield
