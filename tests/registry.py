"""Every layer of the library, a line each: a new layer joins the laws here."""

from collections.abc import Callable
from inspect import isabstract
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import AffineTransform
from toys import block, bottleneck

import invertible
from invertible import (
    MADE,
    ActNorm,
    AdditiveCoupling,
    Affine,
    AffineCoupling,
    CausalTransformer,
    CheckerboardSplit,
    Coupling,
    Elementwise,
    ElementwiseMap,
    FactorOut,
    Flatten,
    FromTransform,
    HaarWavelet,
    Identity,
    InjectivePad,
    Inverse,
    InvertibleLinear,
    InvertibleModule,
    Leapfrog,
    LogisticMixture,
    Logit,
    Masked,
    MaskedAutoregressive,
    Merge,
    Momentum,
    OnStreams,
    PairRotation,
    PairScaling,
    Parallel,
    Permute,
    PixelShuffle,
    PixelUnshuffle,
    Quantize,
    RationalQuadraticSpline,
    Reshape,
    ReversibleBlock,
    Scale,
    ScaledShift,
    Shift,
    Sigmoid,
    Softplus,
    SplineCoupling,
    Split,
    State,
    StripeSplit,
    Swap,
    Tanh,
)
from invertible.state import Context
from invertible.testing.strategies import image_shapes, pairs, tensors

# The names of what must be registered.
EXPORTED = {
    name
    for name, thing in vars(invertible).items()
    if isinstance(thing, type) and issubclass(thing, InvertibleModule) and not isabstract(thing)
}


class Case(NamedTuple):
    """A layer made for a state, and the states that it takes."""

    make: Callable[[State], InvertibleModule]
    states: Callable[..., st.SearchStrategy[State]]


class ConditionalCase(NamedTuple):
    """A layer made for a state, the states that it takes, and a context for one."""

    make: Callable[[State], InvertibleModule]
    states: Callable[..., st.SearchStrategy[State]]
    context: Callable[[State], Context]


def fours(**options) -> st.SearchStrategy[State]:
    return tensors(image_shapes(multiple=4), **options)


def signals(**options) -> st.SearchStrategy[State]:
    return tensors(image_shapes(rank=1), **options)


def volumes(**options) -> st.SearchStrategy[State]:
    return tensors(image_shapes(rank=3, max_batch=1), **options)


def vectors(**options) -> st.SearchStrategy[State]:
    return tensors(image_shapes(rank=0), **options)


def moderate(**options) -> st.SearchStrategy[State]:
    """Numbers that a sigmoid does not make the same."""
    return tensors(**options).map(lambda x: x.clamp(-3, 3))


def probabilities(**options) -> st.SearchStrategy[State]:
    return moderate(**options).map(lambda x: x.sigmoid())


def randomized(layer: InvertibleModule) -> InvertibleModule:
    """A layer that does something from the beginning."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def coupling(x: State, quantum: float | None = None) -> AdditiveCoupling:
    return AdditiveCoupling(bottleneck(x[1].shape[1], dropout=0.3), quantum=quantum)


def parameters_for(bijection: ElementwiseMap, x: State) -> nn.Module:
    """A sub-network from the second stream of a pair to a map's parameters for the first."""
    channels, count = x[0].shape[1], bijection.parameters_per_value
    return nn.Sequential(bottleneck(channels), nn.Conv2d(channels, count * channels, 1))


def mapped(bijection: ElementwiseMap) -> Case:
    """A coupling of pairs with a map."""
    return Case(lambda x: Coupling(parameters_for(bijection, x), bijection), pairs)


def scaled_shift(x: State) -> Coupling:
    bijection = ScaledShift(-0.7, learned=True)  # a tensor of its own, on the device of the moment
    return Coupling(parameters_for(bijection, x), bijection)


def reversible_block(x: State, quantum: float | None = None) -> ReversibleBlock:
    f, g = (bottleneck(stream.shape[1]) for stream in (x[1], x[0]))
    return ReversibleBlock(f, g, quantum=quantum)


def autoregressive(bijection: ElementwiseMap, x: State, **options) -> MaskedAutoregressive:
    """Of vectors: smooth, and moderate, as errors add up from value to value."""
    count = bijection.parameters_per_value
    f = randomized(MADE(x.shape[1], count, hidden=(8, 8), activation=nn.Tanh))
    nn.init.normal_(f.layers[-1].weight, std=0.1)
    return MaskedAutoregressive(f, bijection, **options)


def of_tokens(x: State, **options) -> MaskedAutoregressive:
    f = CausalTransformer(x.shape[2], 2, x.shape[1], width=8, depth=1, heads=2)
    return MaskedAutoregressive(randomized(f), Affine(), **options)


def momentum(x: State) -> Momentum:
    return Momentum(bottleneck(x[0].shape[1], dropout=0.3), gamma=0.8)


def leapfrog(x: State, quantum: float | None = None) -> Leapfrog:
    return Leapfrog(bottleneck(x[1].shape[1], dropout=0.3), step=0.3, quantum=quantum)


def sequence(x: State) -> InvertibleModule:
    return block(lambda: bottleneck(x[1].shape[1]))


LAYERS = {
    "ActNorm": Case(lambda x: randomized(ActNorm(x.shape[1], initialised=True)), tensors),
    "AdditiveCoupling": Case(coupling, pairs),
    "AffineCoupling": Case(lambda x: AffineCoupling(parameters_for(Affine(), x)), pairs),
    "CheckerboardSplit": Case(lambda _: CheckerboardSplit(), tensors),
    "Coupling that shifts": mapped(Shift()),
    "Coupling that scales and shifts": Case(scaled_shift, pairs),
    "Coupling as in Glow": mapped(Affine("glow", shift_first=True)),
    "Coupling as in Jet": mapped(Affine("jet")),
    "Coupling as in IRN": mapped(Affine("irn")),
    "Coupling of mixtures": mapped(LogisticMixture(2)),
    "Coupling on a circle": mapped(RationalQuadraticSpline(4, circular=True)),
    "Elementwise": Case(lambda x: randomized(Elementwise(Affine(), channels=x.shape[1])), tensors),
    "Elementwise spline": Case(
        lambda x: randomized(Elementwise(RationalQuadraticSpline(), channels=x.shape[1])), tensors
    ),
    "FactorOut": Case(lambda _: FactorOut(), tensors),
    "FactorOut in sizes": Case(lambda x: FactorOut((1, x.shape[1] - 1)), tensors),
    "FactorOut behind others": Case(lambda _: FactorOut(dim=-1), pairs),
    "Flatten": Case(lambda x: Flatten(x.shape[1:]), tensors),
    "FromTransform": Case(
        lambda _: FromTransform(AffineTransform(torch.tensor(0.5), 2.0)), tensors
    ),
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
    "Inverse": Case(lambda x: Inverse(sequence(x)), pairs),
    "InvertibleLinear": Case(lambda x: InvertibleLinear(x.shape[1]), tensors),
    "InvertibleLinear orthogonal": Case(
        lambda x: InvertibleLinear(x.shape[1], "orthogonal"), tensors
    ),
    "InvertibleLinear of signals": Case(lambda x: InvertibleLinear(x.shape[1]), signals),
    "InvertibleLinear of volumes": Case(lambda x: InvertibleLinear(x.shape[1]), volumes),
    "InvertibleLinear of width": Case(lambda x: InvertibleLinear(x.shape[-1], dim=-1), tensors),
    "InvertibleSequential": Case(sequence, pairs),
    "Leapfrog": Case(leapfrog, pairs),
    "Logit": Case(lambda _: Logit(), probabilities),
    "MaskedAutoregressive": Case(lambda x: autoregressive(Affine(), x), vectors),
    "MaskedAutoregressive spline": Case(
        lambda x: autoregressive(RationalQuadraticSpline(4), x, order="reversed"), vectors
    ),
    "MaskedAutoregressive permuted": Case(
        lambda x: autoregressive(Shift(), x, order=[*range(1, x.shape[1]), 0]), vectors
    ),
    "MaskedAutoregressive of tokens": Case(of_tokens, signals),
    "Merge": Case(lambda _: Merge(), pairs),
    "Merge of width": Case(lambda _: Merge(dim=-1), pairs),
    "Momentum": Case(momentum, pairs),
    "PairRotation": Case(lambda x: randomized(PairRotation(x.shape[1])), tensors),
    "PairScaling": Case(lambda x: randomized(PairScaling(x.shape[1])), tensors),
    "OnStreams": Case(lambda _: OnStreams(-1, PixelUnshuffle(2)), pairs),
    "OnStreams of both": Case(lambda x: OnStreams((1, 0), sequence(x[::-1])), pairs),
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
    "ReversibleBlock": Case(reversible_block, pairs),
    "Scale": Case(lambda x: randomized(Scale(x.shape[1])), tensors),
    "Sigmoid": Case(lambda _: Sigmoid(), moderate),
    "Softplus": Case(lambda _: Softplus(), moderate),
    "Split": Case(lambda _: Split(), tensors),
    "Split in sizes": Case(lambda x: Split((1, x.shape[1] - 1)), tensors),
    "SplineCoupling": Case(
        lambda x: SplineCoupling(parameters_for(RationalQuadraticSpline(), x)), pairs
    ),
    "StripeSplit": Case(lambda _: StripeSplit(), tensors),
    "StripeSplit of width": Case(lambda _: StripeSplit(dim=-1), tensors),
    "Swap": Case(lambda _: Swap(), pairs),
    "Tanh": Case(lambda _: Tanh(), moderate),
}


def places(x: State) -> Tensor:
    """Half of the places of a tensor, those with a positive first channel."""
    return x[:, 0] > 0


def injector(x: State) -> Elementwise:
    return Elementwise(Affine(), nn.Conv2d(x.shape[1], 2 * x.shape[1], 1))


# Layers that can't do without a context.
CONDITIONAL_LAYERS = {
    "Elementwise of the context": ConditionalCase(injector, tensors, lambda x: x.sin()),
    "Masked": ConditionalCase(
        lambda x: Masked(randomized(Elementwise(Affine(), channels=x.shape[1]))), tensors, places
    ),
}


# Layers that draw in forward and forget it in inverse; tests/layers/test_noise.py has their laws.
NOISY_LAYERS = {"Augment", "Dequantize"}


QUANTUM = 2**-10

# With a quantum: exact on the grid, and for float32 and float64 only.
EXACT_LAYERS = {
    "AdditiveCoupling": Case(lambda x: coupling(x, QUANTUM), pairs),
    "ReversibleBlock": Case(lambda x: reversible_block(x, QUANTUM), pairs),
    "Leapfrog": Case(lambda x: leapfrog(x, QUANTUM), pairs),
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
