"""Tells how well the classes are separated behind each block of a network, or of several.

    python examples/irevnet/separation.py --weights runs/irevnet/1 runs/irevnet/2

Figure 6 of the paper (https://arxiv.org/abs/1802.07088): a linear support vector machine and the
nearest neighbour classify the test images by the features behind each block, averaged over space
and standardised with the training images.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from rich.console import Console

from analyses.probing import Features, Point, ProbeSettings, run_probes, standardised
from errors import at_least
from scripts import run_script

PASSED = "share of the blocks passed"


@dataclass(frozen=True)
class SeparationSettings(ProbeSettings):
    """Tells how well the classes are separated behind each block of a network."""

    # Blocks behind which features are read, evenly spread, the last included; None takes all
    depths: int | None = 12


def points(train: Features, test: Features) -> Iterator[Point]:
    """The features behind each chosen block."""
    for block, x in train.blocks.items():
        facts = {"block": block, PASSED: block / train.count, "channels": x.shape[1]}
        yield facts, *standardised(train, test, block)


def run(settings: SeparationSettings, console: Console) -> None:
    """Probes each network, and writes the results."""
    at_least(1, depths=settings.depths)
    title = "Classes read from each block"
    run_probes(settings, console, "separation", settings.depths, points, title=title, x=PASSED)


main = partial(run_script, SeparationSettings, run)

if __name__ == "__main__":
    sys.exit(main())
