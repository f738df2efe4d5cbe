"""Decodes images and noises from the last layer of an i-RevNet, and measures the error.

For instance::

    python examples/irevnet/invert.py --weights runs/irevnet/1

The error is that of section 4.2 of the paper (https://arxiv.org/abs/1802.07088),
``||x - inverse(features(x))|| / ||x||`` of normalised images, where it was 5e-6 for uniform noises
and 3e-6 for the validation images of ImageNet. The same weights compute in float32, in float64
and exactly, on a grid. Exact decoding gives back, bit for bit, the image as the network read it,
rounded to the grid. Its error is measured against the image before that: it is that rounding alone.

An injective network (a, cifar10) that was trained on the grid may decode badly without it. Some of
its channels are zero throughout training; their running variances decay, and BatchNorm then
amplifies what rounding leaves in them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from analyses.analysis import (
    Settings,
    device_of,
    images,
    in_arithmetic,
    normaliser,
    progress,
    provenance,
    save,
)
from analyses.decoding import Decoded, decode, draw_rows, show, table
from errors import RunError, at_least
from images.batches import Batches, plain
from images.dataset import Images
from networks.irevnet import IRevNet
from scripts import run_script
from trainer.weights import Network

Mode = Literal["float32", "float64", "exact"]


@dataclass(frozen=True)
class InvertSettings(Settings):
    """Decodes images and noise from the last layer, and measures the error."""

    limit: int | None = None  # Test images to decode, evenly spread; all by default
    noises: int = 10_000  # Images of uniform noise to decode
    # Most images and noises to decode in float64, which takes a CPU up to ten times as long
    float64_limit: int = 500
    # How to compute. Exact is float32 on the grid that the network was trained on, else 2**-16
    modes: tuple[Mode, ...] = ("float32", "float64", "exact")


def noise(count: int, mode: str, side: int, seed: int) -> Images:
    """Images of uniform noise, the same each time, all labelled 0."""
    read = partial(_read_noise, side, seed)
    labels = np.zeros(count, np.int64)
    return Images(read, labels, ("noise",), size=side, resize=side, mode=mode)


def _read_noise(side: int, seed: int, index: int, mode: str) -> Image.Image:
    shape = (side, side) if mode == "L" else (side, side, 3)
    pixels = np.random.default_rng([seed, index]).integers(256, size=shape, dtype=np.uint8)
    return Image.fromarray(pixels)


def run(settings: InvertSettings, console: Console) -> None:
    """Decodes, and writes the results."""
    settings.check()
    at_least(1, noises=settings.noises, float64_limit=settings.float64_limit, limit=settings.limit)
    network = settings.load()
    console.print(f"Decoding from the last layer of {network.origin}.")
    models = {mode: in_mode(network, mode) for mode in settings.modes}
    results: dict[str, dict[str, Decoded]] = {}
    for name, every in _sources(settings, network).items():
        results[name] = {}
        for mode, model in models.items():
            source = every.at_most(settings.float64_limit if mode == "float64" else None)
            batches = plain(source, network.config, device_of(network))
            results[name][mode] = _decode(network, model, batches, f"{name}, {mode}", console)
    console.print(table(results))
    numbers = {
        name: {mode: decoded.numbers() for mode, decoded in modes.items()}
        for name, modes in results.items()
    }
    about = provenance(settings, network)
    save(settings.out, "invert", draw(results), about | numbers, console)


def in_mode(network: Network, mode: Mode) -> IRevNet:
    """The network, computing in this way."""
    quantum = (network.config.quantum or 2**-16) if mode == "exact" else None
    dtype = torch.float64 if mode == "float64" else torch.float32
    return in_arithmetic(network, dtype=dtype, quantum=quantum)


def _sources(settings: InvertSettings, network: Network) -> dict[str, Images]:
    test = images(network, "test", settings.limit).images
    noises = noise(settings.noises, test.mode, test.size, settings.seed)
    return {"test images": test, "noises": noises}


def _decode(
    network: Network, model: IRevNet, batches: Batches, description: str, console: Console
) -> Decoded:
    shown = progress(batches.epoch(), description, console, len(batches))
    try:
        return decode(model, shown, len(batches.images), normaliser(network))
    except ValueError as error:  # features beyond the range of exact sums
        raise RunError(f"{error} Leave the exact mode out: --modes float32 float64") from error


def draw(results: Mapping[str, Mapping[str, Decoded]]) -> Figure:
    """Originals above their reconstructions, and beside them those of the largest errors."""
    modes = max(map(len, results.values()))
    figure = Figure(
        figsize=(14 + 1.6 * modes, len(results) * (1.4 + 1.2 * modes)), layout="constrained"
    )
    parts = figure.subfigures(len(results), 2, squeeze=False, width_ratios=(12, 2 + 1.6 * modes))
    for (left, right), (name, found) in zip(parts, results.items(), strict=True):
        first = next(iter(found.values()))
        # Fewer images are spread otherwise, and so are others.
        same = {mode: decoded for mode, decoded in found.items() if decoded.images == first.images}
        decoded = {f"decoded, {mode}": each.reconstructions for mode, each in same.items()}
        draw_rows(left, {name: first.originals} | decoded)
        _draw_worst(right, found)
    return figure


def _draw_worst(figure: Any, found: Mapping[str, Decoded]) -> None:
    figure.suptitle("largest relative errors", fontsize=14)
    axes = figure.subplots(3, len(found), squeeze=False)
    for column, (mode, decoded) in zip(axes.T, found.items(), strict=True):
        original, image = decoded.worst
        difference = (image - original).abs()
        largest = difference.nan_to_num(math.inf, math.inf).max().item()
        titles = (
            f"{mode}: {decoded.worst_error:.1e}",
            "decoded",
            f"difference,\nwhite is {largest:.1e}",
        )
        for place, title, shown in zip(
            column, titles, (original, image, difference / (largest or 1)), strict=True
        ):
            place.set_title(title, fontsize=13)
            show(place, shown)


main = partial(run_script, InvertSettings, run)

if __name__ == "__main__":
    sys.exit(main())
