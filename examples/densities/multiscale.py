"""The flow of glow.py."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from invertible import (
    ActNorm,
    AffineCoupling,
    Dequantize,
    FactorOut,
    Flow,
    Inverse,
    InvertibleLinear,
    InvertibleModule,
    InvertibleSequential,
    Merge,
    OnStreams,
    PixelUnshuffle,
    Split,
)


def network(channels: int, width: int, out: int) -> nn.Module:
    """Three convolutions, the last of zeros."""
    last = nn.Conv2d(width, out, 3, padding=1)
    nn.init.zeros_(last.weight)
    assert last.bias is not None
    nn.init.zeros_(last.bias)
    first, second = nn.Conv2d(channels, width, 3, padding=1), nn.Conv2d(width, width, 1)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)


def level(channels: int, depth: int, width: int) -> InvertibleModule:
    """Steps of ActNorm, 1x1 convolution and affine coupling, at half the size."""
    layers: list[InvertibleModule] = [PixelUnshuffle(2)]
    for _ in range(depth):
        f = network(channels // 2, width, channels)
        layers += [ActNorm(channels), InvertibleLinear(channels), Split()]
        layers += [AffineCoupling(f, scale="glow", shift_first=True), Merge()]
    return InvertibleSequential(*layers)


def make_flow(
    shape: Sequence[int], shades: int, levels: int, depth: int, width: int, checkpoint: bool
) -> Flow:
    """Levels, and behind each but the last half of the channels under a learned prior."""
    channels = shape[0] * 4
    layers: list[InvertibleModule] = [Dequantize(shades), level(channels, depth, width)]
    for _ in range(levels - 1):
        half = channels // 2
        prior = Inverse(AffineCoupling(network(half, width, channels)))
        channels = half * 4
        layers += [
            FactorOut(),
            OnStreams((-1, 0), prior),
            OnStreams(0, level(channels, depth, width)),
        ]
    return Flow(InvertibleSequential(*layers, checkpoint=checkpoint), event_shape=shape)
