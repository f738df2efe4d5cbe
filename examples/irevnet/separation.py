"""Tells how well the classes are separated behind each block of a network.

For instance, an i-RevNet and a ResNet in one figure::

    python examples/irevnet/separation.py --weights runs/irevnet/1 runs/irevnet/2

Figure 6 of the paper (https://arxiv.org/abs/1802.07088): a linear support vector machine and the
nearest neighbour classify the test images by the features behind each block, averaged over space
and standardised with the training images. Both get better with depth, of an i-RevNet as of a
ResNet, though the i-RevNet has discarded nothing. The paper measured it on ImageNet.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from analyses.accuracy_curves import Curve, draw, numbers, show
from analyses.analysis import progress, run_script, save
from analyses.block_features import ProbeSettings, read_features
from analyses.probes import probe
from experiment.folder import RunError
from trainer.weights import load_network


@dataclass(frozen=True)
class SeparationSettings(ProbeSettings):
    """Tells how well the classes are separated behind each block of a network."""

    depths: int | None = 12
    """Blocks behind which features are read, evenly spread, the last included; None takes all."""


def separate(
    weights: Path | None, settings: SeparationSettings, device: torch.device, console: Console
) -> Curve:
    """Probes one network."""
    network = load_network(weights, device)
    console.print(f"Probing {network.origin}.")
    features = read_features(network, settings, device, console, settings.depths)
    probes = [
        probe(*features.samples(index), seed=settings.seed)
        for index in progress(range(len(features.numbers)), "probing", console)
    ]
    facts = [
        {"block": number, "channels": x.shape[1]}
        for number, x in zip(features.numbers, features.train.blocks, strict=True)
    ]
    depths = [number / features.count for number in features.numbers]
    return Curve(network, features, depths, facts, probes)


def run(settings: SeparationSettings, device: torch.device, console: Console) -> None:
    """Probes each network, and writes the results."""
    settings.check()
    if settings.depths is not None and settings.depths < 1:
        raise RunError(f"--depths must be at least 1, got {settings.depths}.")
    curves = [separate(path, settings, device, console) for path in settings.each_weights()]
    show(curves, console)
    figure = draw(curves, "Classes read from each block", "blocks passed, share of the network")
    paths = save(settings.out, "separation", figure, numbers(curves, settings))
    console.print(f"Written: {', '.join(map(str, paths))}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script with these flags, or the command line's; returns the exit status."""
    return run_script(SeparationSettings, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
