"""Every layer of the library, a line each: a new layer joins the laws here."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import nn

from invertible import (
    AdditiveCoupling,
    Flatten,
    HaarWavelet,
    Identity,
    InjectivePad,
    Inverse,
    InvertibleModule,
    InvertibleSequential,
    Merge,
    PairRotation,
    PairScaling,
    Parallel,
    Permute,
    PixelShuffle,
    PixelUnshuffle,
    Quantize,
    Reshape,
    Split,
    State,
    Swap,
)
from invertible.testing.strategies import image_shapes, pairs, tensors


class Case(NamedTuple):
    """A layer made for a state, and the states that it takes."""

    make: Callable[[State], InvertibleModule]
    states: Callable[..., st.SearchStrategy[State]]


def network(x: torch.Tensor, dropout: float = 0.0) -> nn.Module:
    """A sub-network from a stream to one like it, with batch statistics."""
    c = x.shape[1]
    return nn.Sequential(
        nn.BatchNorm2d(c),
        nn.Conv2d(c, 4, 3, padding=1),
        nn.Tanh(),
        nn.Dropout(dropout),
        nn.Conv2d(4, c, 1),
    )


def block(x: State) -> InvertibleSequential:
    return InvertibleSequential(
        AdditiveCoupling(network(x[1])), Swap(), AdditiveCoupling(network(x[0])), Swap()
    )


def fours(**options) -> st.SearchStrategy[State]:
    return tensors(image_shapes(multiple=4), **options)


def signals(**options) -> st.SearchStrategy[State]:
    return tensors(image_shapes(rank=1), **options)


def volumes(**options) -> st.SearchStrategy[State]:
    return tensors(image_shapes(rank=3, max_batch=1), **options)


def randomized(layer: InvertibleModule) -> InvertibleModule:
    """A layer that does something from the beginning."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


LAYERS = {
    "AdditiveCoupling": Case(lambda x: AdditiveCoupling(network(x[1], dropout=0.3)), pairs),
    "Flatten": Case(lambda x: Flatten(x.shape[1:]), tensors),
    "HaarWavelet": Case(lambda _: HaarWavelet(), tensors),
    "HaarWavelet of offsets": Case(lambda _: HaarWavelet(order="offset-major"), tensors),
    "HaarWavelet of signals": Case(lambda _: HaarWavelet(), signals),
    "HaarWavelet of volumes": Case(lambda _: HaarWavelet(), volumes),
    "HaarWavelet orthonormal": Case(lambda _: HaarWavelet(orthonormal=True), tensors),
    "HaarWavelet orthonormal of offsets": Case(
        lambda _: HaarWavelet(orthonormal=True, order="offset-major"), tensors
    ),
    "HaarWavelet orthonormal of volumes": Case(lambda _: HaarWavelet(orthonormal=True), volumes),
    "Identity": Case(lambda _: Identity(), tensors),
    "Identity of pairs": Case(lambda _: Identity(), pairs),
    "InjectivePad": Case(lambda _: InjectivePad(3), tensors),
    "InjectivePad of width": Case(lambda _: InjectivePad(1, dim=-1, tolerance=1e-3), tensors),
    "Inverse": Case(lambda x: Inverse(block(x)), pairs),
    "InvertibleSequential": Case(block, pairs),
    "Merge": Case(lambda _: Merge(), pairs),
    "Merge of width": Case(lambda _: Merge(dim=-1), pairs),
    "PairRotation": Case(lambda x: randomized(PairRotation(x.shape[1])), tensors),
    "PairScaling": Case(lambda x: randomized(PairScaling(x.shape[1])), tensors),
    "Parallel": Case(lambda _: Parallel(PixelUnshuffle(2), PixelUnshuffle(1)), pairs),
    "Permute": Case(lambda x: Permute.random(x.shape[1], seed=0), tensors),
    "PixelShuffle": Case(lambda _: PixelShuffle(2), fours),
    "PixelShuffle of factors": Case(lambda _: PixelShuffle((1, 2)), fours),
    "PixelShuffle of offsets": Case(lambda _: PixelShuffle(2, order="offset-major"), fours),
    "PixelUnshuffle": Case(lambda _: PixelUnshuffle(2), tensors),
    "PixelUnshuffle of factors": Case(lambda _: PixelUnshuffle((2, 1)), tensors),
    "PixelUnshuffle of offsets": Case(lambda _: PixelUnshuffle(2, order="offset-major"), tensors),
    "PixelUnshuffle of signals": Case(lambda _: PixelUnshuffle(2), signals),
    "PixelUnshuffle of volumes": Case(lambda _: PixelUnshuffle(2), volumes),
    "Reshape": Case(lambda x: Reshape(x.shape[1:], x.shape[:0:-1]), tensors),
    "Split": Case(lambda _: Split(), tensors),
    "Split in sizes": Case(lambda x: Split((1, x.shape[1] - 1)), tensors),
    "Swap": Case(lambda _: Swap(), pairs),
}


QUANTUM = 2**-10


def rounding(x: torch.Tensor) -> AdditiveCoupling:
    return AdditiveCoupling(network(x[1], dropout=0.3), quantum=QUANTUM)


# With a quantum: exact on the grid, and for float32 and float64 only.
EXACT_LAYERS = {
    "AdditiveCoupling": Case(rounding, pairs),
    "HaarWavelet": Case(lambda _: HaarWavelet(quantum=QUANTUM), tensors),
    "HaarWavelet of offsets": Case(
        lambda _: HaarWavelet(order="offset-major", quantum=QUANTUM), tensors
    ),
    "HaarWavelet of volumes": Case(lambda _: HaarWavelet(quantum=QUANTUM), volumes),
    "HaarWavelet orthonormal": Case(
        lambda _: HaarWavelet(orthonormal=True, quantum=QUANTUM), tensors
    ),
    "HaarWavelet orthonormal of offsets": Case(
        lambda _: HaarWavelet(orthonormal=True, order="offset-major", quantum=QUANTUM), tensors
    ),
    "HaarWavelet orthonormal of volumes": Case(
        lambda _: HaarWavelet(orthonormal=True, quantum=QUANTUM), volumes
    ),
    "PairRotation": Case(lambda x: randomized(PairRotation(x.shape[1], quantum=QUANTUM)), tensors),
    "PairScaling": Case(lambda x: randomized(PairScaling(x.shape[1], quantum=QUANTUM)), tensors),
    "Quantize": Case(lambda _: Quantize(QUANTUM), tensors),
}
