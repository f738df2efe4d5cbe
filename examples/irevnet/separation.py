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
from dataclasses import dataclass
from functools import partial

from rich.console import Console

from analyses.analysis import progress
from analyses.probing import Curve, ProbeSettings, finish, probe, read_features, standardised
from errors import at_least
from scripts import run_script
from trainer.weights import Network


@dataclass(frozen=True)
class SeparationSettings(ProbeSettings):
    """Tells how well the classes are separated behind each block of a network."""

    # Blocks behind which features are read, evenly spread, the last included; None takes all
    depths: int | None = 12


def separate(network: Network, settings: SeparationSettings, console: Console) -> Curve:
    """Probes one network."""
    numbers, count, train, test = read_features(network, settings, console, settings.depths)
    probes = [
        probe(*standardised(train, test, index), seed=settings.seed)
        for index in progress(range(len(numbers)), "probing", console)
    ]
    facts = [
        {"block": number, "channels": x.shape[1]}
        for number, x in zip(numbers, train.blocks, strict=True)
    ]
    about = {"blocks": count, "train_images": len(train.labels)}
    return Curve(network, test, [number / count for number in numbers], facts, probes, about)


def run(settings: SeparationSettings, console: Console) -> None:
    """Probes each network, and writes the results."""
    at_least(1, depths=settings.depths)
    curves = [separate(network, settings, console) for network in settings.networks(console)]
    label = "blocks passed, share of the network"
    finish(
        curves, settings, console, "separation", title="Classes read from each block", label=label
    )


main = partial(run_script, SeparationSettings, run)

if __name__ == "__main__":
    sys.exit(main())
