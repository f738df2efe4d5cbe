"""Memory of a Glow of three levels."""

from __future__ import annotations

from typing import Any

import torch
from comparing.meters import Memory, Step, measure_memory
from comparing.setting import Setting
from flows import Density, convolutions
from torch import Tensor

from invertible import (
    ActNorm,
    AffineCoupling,
    FactorOut,
    InvertibleLinear,
    InvertibleModule,
    InvertibleSequential,
    Merge,
    OnStreams,
    PixelUnshuffle,
    Split,
)


def glow(depth: int, config: Any, checkpoint: bool) -> Density:
    """Three levels of so many steps; half of the channels is factored out behind each."""
    channels = 12
    layers: list[InvertibleModule] = []
    for level in range(3):
        steps: list[InvertibleModule] = [PixelUnshuffle(2)]
        for _ in range(depth):
            f = convolutions(channels // 2, channels, config.hidden)
            steps += [ActNorm(channels, initialised=True), InvertibleLinear(channels), Split()]
            steps += [AffineCoupling(f), Merge()]
        inner = InvertibleSequential(*steps)
        layers += [inner] if level == 0 else [FactorOut(), OnStreams(0, inner)]
        channels *= 2
    flow = InvertibleSequential(*layers, checkpoint=checkpoint).to(config.device)

    def run(flow: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = flow.forward_and_log_det(x)
        return torch.cat([part.flatten(1) for part in z], 1), log_det

    return Density(flow, run, lambda flow, z: flow.inverse(z))


def memory(config: Any) -> dict[int, dict[str, Memory | str]]:
    """Of each depth, stored and rebuilt; what does not fit says so."""
    x = torch.randn(config.images, 3, config.size, config.size, device=config.device)
    grad = torch.full((config.images,), 1 / config.images, device=config.device)
    found: dict[int, dict[str, Memory | str]] = {}
    for depth in config.depths:
        found[depth] = {}
        for name, checkpoint in {"stored": False, "rebuilt": True}.items():
            density = glow(depth, config, checkpoint)
            setting = Setting(device=config.device)
            leaf = x.clone().requires_grad_()
            step = Step(leaf, grad, list(density.parameters()), setting)
            try:
                found[depth][name] = measure_memory(step, density)
            except torch.OutOfMemoryError:
                found[depth][name] = "out of memory"
    return found
