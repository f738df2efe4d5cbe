"""Published systems, assembled small: they keep all laws, and evaluate each f once more."""

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from toys import Counting, assert_same_gradients, both, evaluations, images

from invertible import (
    ActNorm,
    AdditiveCoupling,
    Affine,
    AffineCoupling,
    CheckerboardSplit,
    Coupling,
    Elementwise,
    FactorOut,
    HaarWavelet,
    Inverse,
    InvertibleLinear,
    InvertibleModule,
    InvertibleSequential,
    Merge,
    OnStreams,
    Parallel,
    Permute,
    PixelUnshuffle,
    RationalQuadraticSpline,
    ScaledShift,
    SplineCoupling,
    Split,
    Swap,
)
from invertible.testing import inversecheck


class Assembly(NamedTuple):
    """A network, a state that it takes, and a context if it takes one."""

    make: Callable[[], InvertibleModule]
    x: Any
    context: Any = None


def convolutions(channels: int, out: int, **options: Any) -> nn.Module:
    first = nn.Conv2d(channels, 6, 3, padding=1, **options)
    return Counting(nn.Sequential(first, nn.Tanh(), nn.Conv2d(6, out, 1)))


def linear(channels: int, out: int) -> nn.Module:
    return Counting(nn.Sequential(nn.Linear(channels, 6), nn.Tanh(), nn.Linear(6, out)))


class WithContext(nn.Module):
    """A sub-network of a stream and of a part of the context in the same size."""

    def __init__(self, key: Any, f: nn.Module):
        super().__init__()
        self.key = key
        self.f = f

    def forward(self, x: Tensor, context: dict[Any, Tensor]) -> Tensor:
        return self.f(torch.cat([x, context[self.key]], 1))


class Part(nn.Module):
    """A sub-network of a part of the context."""

    def __init__(self, key: Any, f: nn.Module):
        super().__init__()
        self.key = key
        self.f = f

    def forward(self, context: dict[Any, Tensor]) -> Tensor:
        return self.f(context[self.key])


class Scaled(nn.Module):
    """What a sub-network returns, times a factor."""

    def __init__(self, factor: float, f: nn.Module):
        super().__init__()
        self.factor = factor
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.f(x)


def alternating(make: Callable[[], InvertibleModule], count: int = 2) -> list[InvertibleModule]:
    return [layer for _ in range(count) for layer in (make(), Swap())]


def real_nvp() -> InvertibleModule:
    """Checkerboards, then channels, then half of them factored out."""
    board = [
        CheckerboardSplit(),
        *alternating(lambda: AffineCoupling(convolutions(4, 8))),
        Inverse(CheckerboardSplit()),
    ]
    channels = [Split(), *alternating(lambda: AffineCoupling(convolutions(4, 8))), Merge()]
    deeper = [Split(), *alternating(lambda: AffineCoupling(convolutions(2, 4))), Merge()]
    return InvertibleSequential(
        *board,
        PixelUnshuffle(2),
        *channels,
        FactorOut(),
        OnStreams(0, InvertibleSequential(*deeper)),
    )


def glow() -> InvertibleModule:
    """Two levels, and between them a learned prior of the half that is factored out."""

    def level(channels: int) -> InvertibleModule:
        """ActNorm, 1x1 convolution and coupling."""
        coupling = convolutions(channels // 2, channels)
        return InvertibleSequential(
            PixelUnshuffle(2),
            ActNorm(channels, initialised=True),
            InvertibleLinear(channels),
            Split(),
            AffineCoupling(coupling, scale="glow", shift_first=True),
            Merge(),
        )

    prior = Inverse(AffineCoupling(convolutions(4, 8)))
    return InvertibleSequential(
        level(8), FactorOut(), OnStreams((-1, 0), prior), OnStreams(0, level(16))
    )


def nsf() -> InvertibleModule:
    def step() -> list[InvertibleModule]:
        f = linear(2, 2 * 11)
        return [InvertibleLinear(4), Split(), SplineCoupling(f, bins=4), Swap(), Merge()]

    return InvertibleSequential(ActNorm(4, initialised=True), *step(), *step())


def jet() -> InvertibleModule:
    """Couplings of tokens (N, T, C), split by channels and by tokens, each at random."""

    def coupling(channels: int) -> AffineCoupling:
        return AffineCoupling(linear(channels, 2 * channels), scale="jet", dim=-1)

    by_channels = [Permute.random(4, dim=-1), Split(dim=-1), coupling(2), Merge(dim=-1)]
    by_tokens = [Permute.random(6, dim=1), Split(dim=1), coupling(4), Merge(dim=1)]
    return InvertibleSequential(*by_channels, *by_tokens)


def irn() -> InvertibleModule:
    """Low frequencies against all others: an unequal split."""
    return InvertibleSequential(
        HaarWavelet(),
        Split((3, 9)),
        AdditiveCoupling(convolutions(9, 3)),
        Swap(),
        AffineCoupling(convolutions(3, 18), scale="irn"),
        Swap(),
    )


def hinet() -> InvertibleModule:
    """A secret image hidden in a cover image."""
    return InvertibleSequential(
        Parallel(HaarWavelet(), HaarWavelet()),
        AdditiveCoupling(convolutions(8, 8)),
        Swap(),
        AffineCoupling(convolutions(8, 16), scale="irn"),
        Swap(),
    )


def cinn() -> InvertibleModule:
    """Couplings that see features in their own size."""

    def coupling(channels: int, size: int) -> InvertibleModule:
        f = WithContext(size, convolutions(channels + 2, 2 * channels))
        return AffineCoupling(f, conditional=True)

    return InvertibleSequential(
        Split(),
        *alternating(lambda: coupling(2, 4)),
        Merge(),
        PixelUnshuffle(2),
        Split(),
        *alternating(lambda: coupling(8, 2)),
        Merge(),
    )


def srflow() -> InvertibleModule:
    """A flow step whose injector changes all channels by the context alone."""
    injector = Elementwise(Affine(), Part(4, convolutions(2, 8)))
    coupling = AffineCoupling(WithContext(4, convolutions(4, 4)), conditional=True)
    return InvertibleSequential(
        ActNorm(4, initialised=True), InvertibleLinear(4), injector, Split(), coupling, Merge()
    )


def waveglow() -> InvertibleModule:
    """Samples in groups of 4, and a spectrogram beside them."""
    f = nn.Sequential(nn.Conv1d(2 + 3, 6, 3, padding=1), nn.Tanh(), nn.Conv1d(6, 4, 1))
    coupling = AffineCoupling(WithContext("mel", Counting(f)), conditional=True)
    return InvertibleSequential(
        PixelUnshuffle(4), InvertibleLinear(4), Split(dim=1), coupling, Merge(dim=1)
    )


def lattice() -> InvertibleModule:
    """A field on a torus, whose black and white sites change by turns."""
    return InvertibleSequential(
        CheckerboardSplit(),
        *alternating(lambda: AffineCoupling(convolutions(2, 4, padding_mode="circular")), 4),
        Inverse(CheckerboardSplit()),
    )


def angles() -> InvertibleModule:
    """Angles on a circle."""
    circle = RationalQuadraticSpline(4, math.pi, circular=True)
    return InvertibleSequential(
        Split(), *alternating(lambda: Coupling(linear(2, 24), circle)), Merge()
    )


class Down(nn.Sequential):
    def __init__(self, channels: int, out: int):
        super().__init__(nn.Conv2d(channels, out, 2, stride=2), nn.Tanh(), nn.Conv2d(out, out, 1))


class Up(nn.Sequential):
    def __init__(self, channels: int, out: int):
        super().__init__(nn.Conv2d(channels, out, 1), nn.Tanh(), nn.Upsample(scale_factor=2))


def revcol() -> InvertibleModule:
    """A column: each level is scaled, and gets something of the levels beside it."""

    def level(i: int, *couplings: tuple[int, nn.Module]) -> list[InvertibleModule]:
        (j, f), *others = couplings
        gamma = ScaledShift([0.5] * (2 * 2**i), learned=True)
        first = OnStreams((i, j), Coupling(Counting(f), gamma))
        rest = [OnStreams((i, k), AdditiveCoupling(Counting(g))) for k, g in others]
        return [first, *rest]

    return InvertibleSequential(
        *level(0, (1, Up(4, 2))),
        *level(1, (0, Down(2, 4)), (2, Up(8, 4))),
        *level(2, (1, Down(4, 8))),
    )


def revbifpn() -> InvertibleModule:
    """A silo: to each resolution something of the others is added, up and then down."""

    def add(i: int, j: int, f: nn.Module) -> InvertibleModule:
        return OnStreams((i, j), AdditiveCoupling(Counting(f)))

    up = [add(0, 1, Up(4, 2)), add(1, 2, Up(8, 4))]
    down = [add(2, 1, Down(4, 8)), add(1, 0, Down(2, 4))]
    return InvertibleSequential(*up, *down)


def momentum() -> InvertibleModule:
    """Steps of a velocity and a place: v <- 0.9 v + 0.1 f(x), x <- x + v."""

    def step() -> list[InvertibleModule]:
        velocity = Coupling(Scaled(0.1, linear(3, 3)), ScaledShift(0.9))
        return [velocity, Swap(), AdditiveCoupling(nn.Identity()), Swap()]

    return InvertibleSequential(*step(), *step(), *step())


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    x = images(2 * shape[0], *shape[1:])
    return x[: shape[0]], x[shape[0] :]


FEATURES = {4: images(2, 2, 4, 4), 2: images(2, 2, 2, 2)}
LEVELS = images(2, 2, 8, 8), images(2, 4, 4, 4), images(2, 8, 2, 2)
ASSEMBLIES = {
    "RealNVP": Assembly(real_nvp, images(2, 2, 4, 4)),
    "Glow": Assembly(glow, images(2, 2, 4, 4)),
    "NSF-C": Assembly(nsf, images(5, 4)),
    "Jet": Assembly(jet, images(2, 6, 4)),
    "IRN": Assembly(irn, images(2, 3, 4, 4)),
    "HiNet": Assembly(hinet, pair(2, 2, 4, 4)),
    "cINN": Assembly(cinn, images(2, 4, 4, 4), FEATURES),
    "SRFlow": Assembly(srflow, images(2, 4, 4, 4), FEATURES),
    "WaveGlow": Assembly(waveglow, images(2, 1, 16), {"mel": images(2, 3, 4)}),
    "lattice": Assembly(lattice, images(2, 1, 8, 8)),
    "angles": Assembly(angles, images(3, 4)),
    "RevCol": Assembly(revcol, LEVELS),
    "RevBiFPN": Assembly(revbifpn, LEVELS),
    "momentum": Assembly(momentum, pair(4, 3)),
}
every_assembly = pytest.mark.parametrize("name", ASSEMBLIES)


@every_assembly
def test_an_assembly_keeps_the_laws(name):
    make, x, context = ASSEMBLIES[name]
    inversecheck(make().double(), x, context)


@every_assembly
@pytest.mark.parametrize("inverse", [False, True])
def test_an_assembly_is_rebuilt_with_one_evaluation_more_of_each_sub_network(name, inverse):
    make, x, context = ASSEMBLIES[name]
    inputs = [] if context is None else [context]
    if inverse:
        x = make().double()(x, *inputs)
    x = tuple(part.detach().requires_grad_() for part in (x if isinstance(x, tuple) else (x,)))
    state = x if len(x) > 1 else x[0]

    def loss(network):
        way = network.inverse_and_log_det if inverse else network.forward_and_log_det
        y, log_det = way(state, *inputs)
        parts = y if isinstance(y, tuple) else (y,)
        return sum((part.sin() * part).sum() for part in parts) + log_det.square().sum()

    networks = both(lambda: make().double())
    assert_same_gradients(networks, loss)
    counts = evaluations(networks[0])
    assert set(counts) <= {1}
    assert evaluations(networks[1]) == [2] * len(counts)


def test_both_directions_of_a_rescaling_network_go_into_one_loss():
    """As IRN is trained: downscaled like a picture, and upscaled from what is left and noise."""
    torch.manual_seed(0)
    stored = irn().double()
    rebuilt = copy.deepcopy(stored)
    rebuilt.checkpoint = True
    high = images(2, 3, 4, 4)
    low = nn.functional.avg_pool2d(high, 2)
    noise = images(2, 9, 2, 2)

    def loss(network):
        small, rest = network(high)
        large = network.inverse((small, noise))
        return (small - low).square().sum() + (large - high).abs().sum() + rest.square().sum()

    assert_same_gradients([stored, rebuilt], loss)
    assert evaluations(stored) == [2, 2]
    assert evaluations(rebuilt) == [4, 4]
