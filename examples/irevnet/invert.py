"""Decodes images and noises from the last layer of an i-RevNet, and measures the error.

    python examples/irevnet/invert.py --weights runs/irevnet/1

The error is that of section 4.2 of the paper (https://arxiv.org/abs/1802.07088),
``||x - inverse(features(x))|| / ||x||`` of normalised images. The same weights compute in float32,
in float64 and exactly, on a grid. Exact decoding gives back, bit for bit, the image as the network
read it, rounded to the grid: that rounding is all its error.

An injective network (a, cifar10) that was trained on the grid may decode badly without it. Some of
its channels are zero throughout training; their running variances decay, and BatchNorm then
amplifies what rounding leaves in them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from analyses import analysis
from analyses.decoding import CAPTION, decode, draw_rows, some_decoded
from errors import RunError, at_least
from images.batches import plain
from images.dataset import Images
from networks.irevnet import IRevNet
from scripts import run_script
from trainer.weights import Network

Mode = Literal["float32", "float64", "exact"]


@dataclass(frozen=True)
class InvertSettings(analysis.Settings):
    """Decodes images and noise from the last layer, and measures the error."""

    limit: int | None = None  # Test images to decode, evenly spread; all by default
    noises: int = 10_000  # Images of uniform noise to decode
    # Most images and noises to decode in float64, which takes a CPU up to ten times as long
    float64_limit: int = 500
    # How to compute. Exact is float32 on the grid that the network was trained on, else 2**-16
    modes: tuple[Mode, ...] = ("float32", "float64", "exact")


def noise(count: int, side: int, seed: int) -> Images:
    """Images of uniform noise, the same each time, all labelled 0."""
    return Images(partial(_read_noise, side, seed), np.zeros(count, np.int64), ("noise",))


def _read_noise(side: int, seed: int, index: int, mode: str) -> Image.Image:
    shape = (side, side) if mode == "L" else (side, side, 3)
    pixels = np.random.default_rng([seed, index]).integers(256, size=shape, dtype=np.uint8)
    return Image.fromarray(pixels)


def run(settings: InvertSettings, console: Console) -> None:
    """Decodes, and writes the results."""
    at_least(1, noises=settings.noises, float64_limit=settings.float64_limit, limit=settings.limit)
    network = settings.begin(console)
    normalise = analysis.normaliser(network)
    models = {mode: in_mode(network, mode) for mode in settings.modes}
    test = analysis.images(network, "test", settings.limit).images
    noises = noise(settings.noises, network.config.image_size, settings.seed)
    figure = Figure((12, 2.8 + 2.4 * len(models)), layout="constrained")
    parts = figure.subfigures(2, 1, squeeze=False)[:, 0]
    whole = replace(network.config, augmentation="shift")  # not cropped
    sources = {"test images": (test, network.config), "noises": (noises, whole)}
    numbers: dict[str, dict[str, Any]] = {name: {} for name in sources}
    for part, (name, (images, config)) in zip(parts, sources.items(), strict=True):
        decoded = {}
        for mode, model in models.items():
            source = images.at_most(settings.float64_limit if mode == "float64" else None)
            batches = plain(source, config, analysis.device_of(network))
            epoch = analysis.progress(batches.epoch(), f"{name}, {mode}", console, len(batches))
            try:
                numbers[name][mode] = decode(model, epoch, normalise)
            except ValueError as error:  # features beyond the range of exact sums
                hint = "Leave the exact mode out: --modes float32 float64"
                raise RunError(f"{error} {hint}") from error
            originals, decoded[f"decoded, {mode}"] = some_decoded(model, images, config, normalise)
        draw_rows(part, {name: originals} | decoded)
    rows = [{"": n, "in": mode} | e for n, modes in numbers.items() for mode, e in modes.items()]
    console.print(analysis.table(rows, CAPTION))
    about = analysis.provenance(settings, network)
    analysis.save(settings.out, "invert", figure, about | numbers, console)


def in_mode(network: Network, mode: Mode) -> IRevNet:
    """The network, computing in this way."""
    quantum = (network.config.quantum or 2**-16) if mode == "exact" else None
    dtype = torch.float64 if mode == "float64" else torch.float32
    return analysis.in_arithmetic(network, dtype=dtype, quantum=quantum)


main = partial(run_script, InvertSettings, run)

if __name__ == "__main__":
    sys.exit(main())
