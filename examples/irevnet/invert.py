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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from analyses.analysis import (
    Images,
    Settings,
    images,
    in_arithmetic,
    progress,
    provenance,
    run_script,
    save,
)
from analyses.report import Decoded, decode, draw_rows, show
from experiment.folder import RunError
from networks.irevnet import IRevNet
from trainer.weights import Network, load_network

Mode = Literal["float32", "float64", "exact"]


@dataclass(frozen=True)
class InvertSettings(Settings):
    """Decodes images and noise from the last layer, and measures the error."""

    limit: int | None = None
    """Test images to decode, evenly spread; all by default."""

    noises: int = 10_000
    """Images of uniform noise to decode."""

    float64_limit: int = 500
    """Most images and noises to decode in float64, which takes a CPU up to ten times as long."""

    modes: tuple[Mode, ...] = ("float32", "float64", "exact")
    """How to compute. Exact is float32 on the grid that the network was trained on, else 2**-16."""


@dataclass(frozen=True)
class Noise:
    """Images of uniform noise, the same each time.

    Args:
        images: How many.
        shape: Of each.
        batch_size: How many at once.
        seed: What they depend on.
        device: Where they are given.
    """

    images: int
    shape: tuple[int, ...]
    batch_size: int
    seed: int
    device: torch.device

    def __len__(self) -> int:
        return math.ceil(self.images / self.batch_size)

    def few(self, images: int) -> Noise:
        """So many of the images."""
        return replace(self, images=images)

    def epoch(self, number: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of uint8 noise, all labelled 0."""
        for step in range(start, len(self)):
            rng = np.random.default_rng([self.seed, number, step])
            count = min(self.batch_size, self.images - step * self.batch_size)
            pixels = rng.integers(256, size=(count, *self.shape), dtype=np.uint8)
            labels = torch.zeros(count, dtype=torch.long, device=self.device)
            yield torch.from_numpy(pixels).to(self.device), labels


def run(settings: InvertSettings, device: torch.device, console: Console) -> None:
    """Decodes, and writes the results."""
    for name in ("noises", "float64_limit"):
        if getattr(settings, name) < 1:
            flag = name.replace("_", "-")
            raise RunError(f"--{flag} must be at least 1, got {getattr(settings, name)}.")
    network = load_network(settings.weights, device)
    console.print(f"Decoding from the last layer of {network.origin}.")
    models = {mode: in_mode(network, mode) for mode in settings.modes}
    results: dict[str, dict[Mode, Decoded]] = {}
    for name, source in _sources(settings, network, device).items():
        results[name] = {}
        for mode, model in models.items():
            some = source.at_most(settings.float64_limit) if mode == "float64" else source
            results[name][mode] = _decode(model, some, f"{name}, {mode}", console)
    console.print(table(results))
    numbers = {
        name: {mode: decoded.numbers() for mode, decoded in modes.items()}
        for name, modes in results.items()
    }
    paths = save(settings.out, "invert", draw(results), provenance(settings, network) | numbers)
    console.print(f"Written: {', '.join(map(str, paths))}")


def in_mode(network: Network, mode: Mode) -> IRevNet:
    """The network, computing in this way."""
    quantum = (network.config.quantum or 2**-16) if mode == "exact" else None
    dtype = torch.float64 if mode == "float64" else torch.float32
    return in_arithmetic(network, dtype=dtype, quantum=quantum)


def _sources(settings: InvertSettings, network: Network, device: torch.device) -> dict[str, Images]:
    test = images(network, settings.data, "test", device, settings.limit)
    side = network.config.image_size
    shape = (len(network.config.mean), side, side)
    noise = Noise(settings.noises, shape, network.config.batch_size, settings.seed, device)
    return {"test images": test, "noises": replace(test, source=noise)}


def _decode(model: IRevNet, source: Images, description: str, console: Console) -> Decoded:
    batches = progress(source, description, console, len(source))
    try:
        return decode(model, (x for x, _ in batches), source.count, source.normalise)
    except ValueError as error:  # features beyond the range of exact sums
        raise RunError(f"{error} Leave the exact mode out: --modes float32 float64") from error


def table(results: Mapping[str, Mapping[Mode, Decoded]]) -> Table:
    """The errors, a row for each way to compute."""
    rows = Table()
    rows.add_column("‖x - Φ⁻¹Φx‖ / ‖x‖ of")
    for heading in ("in", "mean", "worst", "worst pixel", "bit for bit, as read"):
        rows.add_column(heading, justify="right")
    for name, modes in results.items():
        for mode, decoded in modes.items():
            errors = (decoded.relative_error, decoded.worst_error, decoded.worst_pixel)
            count = f"{decoded.bit_for_bit:,} of {decoded.images:,}"
            rows.add_row(name, mode, *(f"{error:.1e}" for error in errors), count)
    return rows


def draw(results: Mapping[str, Mapping[Mode, Decoded]]) -> Figure:
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


def _draw_worst(figure: Any, found: Mapping[Mode, Decoded]) -> None:
    figure.suptitle("largest relative errors", fontsize=10)
    axes = figure.subplots(3, len(found), squeeze=False)
    for column, (mode, decoded) in zip(axes.T, found.items(), strict=True):
        original, image = decoded.worst
        difference = (image - original).abs()
        largest = difference.nan_to_num(math.inf, math.inf).max().item()
        column[0].set_title(f"{mode}: {decoded.worst_error:.1e}", fontsize=9)
        column[1].set_title("decoded", fontsize=9)
        column[2].set_title(f"difference,\nwhite is {largest:.1e}", fontsize=9)
        show(column[0], original)
        show(column[1], image)
        show(column[2], difference / (largest or 1))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script with these flags, or the command line's; returns the exit status."""
    return run_script(InvertSettings, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
