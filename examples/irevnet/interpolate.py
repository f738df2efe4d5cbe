"""Decodes straight lines between the features of two images.

For instance::

    python examples/irevnet/interpolate.py --weights runs/irevnet/1

Section 4.2 and Figure 5 of the paper (https://arxiv.org/abs/1802.07088): what is decoded from
``t Phi(x0) + (1 - t) Phi(x1)`` leads from ``x1`` to ``x0``. Below each such curve is the straight
line in pixel space. Steps are even in ``t``, or in pixels along the curve, which the paper did by
hand.

The weights compute in float64 and without a grid: between two images the features are on no grid,
and rounding them would add noise that the inverse amplifies. At its ends a line has the very
features of the images, which come back up to the rounding of float64 and so in every 8-bit value;
the table says how many values did not.

The features of an injective network (a, cifar10) do not fill space: halfway between two images,
nothing has quite these features. What is decoded there has others, far off, and looks like noise.
The table says how far; for a bijective network it is rounding alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

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
from analyses.report import draw_rows, relative_error
from experiment.folder import RunError
from images.batches import Normalise
from networks.irevnet import IRevNet
from trainer.weights import load_network

BATCH = 32  # images decoded at once
Spacing = Literal["t", "pixels"]
Curve = Callable[[Tensor], Tensor]  # from K numbers 0 to 1 to K images


@dataclass(frozen=True)
class InterpolateSettings(Settings):
    """Decodes straight lines between the features of two images."""

    pairs: int = 6
    """Pairs of test images, evenly spread and then paired at random."""

    steps: int = 11
    """Images of a line, both ends included."""

    spacing: Spacing = "t"
    """Whether steps are even in t, or in the length of the curve in pixel space."""

    dense: int = 256
    """Points at which --spacing pixels measures a curve."""


@dataclass(frozen=True)
class Line:
    """What is decoded between two images.

    Args:
        t: Where, from 0 (the second image) to 1 (the first).
        decoded: The images there, normalised.
        straight: The straight line in pixel space at the same ``t``.
        off: Relative distance of the features that the decoded images have to those they were
            decoded from.
    """

    t: Tensor
    decoded: Tensor
    straight: Tensor
    off: Tensor


@torch.no_grad()
def decode_line(
    model: IRevNet, first: Tensor, second: Tensor, *, steps: int, spacing: Spacing, dense: int
) -> Line:
    """Decodes the straight line between the features of two images.

    Args:
        model: In evaluation mode.
        first: Normalised image :math:`(C, H, W)`, at ``t = 1``.
        second: Normalised image, at ``t = 0``.
        steps: Images, both ends included.
        spacing: Whether they are even in ``t`` or in pixels along the curve.
        dense: Points at which the curve is measured for the latter.
    """
    ends = torch.stack([second, first])
    phi = model.features(ends)

    def curve(t: Tensor) -> Tensor:
        parts = mix(phi, t).split(BATCH)
        return torch.cat([model.inverse(part) for part in parts])

    t = torch.linspace(0, 1, steps, dtype=first.dtype, device=first.device)
    if spacing == "pixels":
        t = evenly_along(curve, t, dense)
    decoded = curve(t)
    off = relative_error(mix(phi, t), model.features(decoded))
    return Line(t, decoded, mix(ends, t), off)


def mix(ends: Tensor, t: Tensor) -> Tensor:
    """``t ends[1] + (1 - t) ends[0]`` for each ``t``, and the very ends at 0 and 1."""
    t = t[(...,) + (None,) * (ends.dim() - 1)]
    return t * ends[1] + (1 - t) * ends[0]


def evenly_along(curve: Curve, t: Tensor, dense: int) -> Tensor:
    """As many numbers as ``t`` has, at which the curve has travelled equal lengths.

    Args:
        curve: What is travelled. Its length is that of a chain of straight lines.
        t: Evenly from 0 to 1.
        dense: How many points the chain has.
    """
    points = torch.linspace(0, 1, dense, dtype=t.dtype, device=t.device)
    travelled = F.pad(distances(curve(points)).cumsum(0), (1, 0))
    if not travelled.isfinite().all():
        raise RunError("what is decoded between two images is not finite: take --spacing t.")
    found = np.interp((t * travelled[-1]).cpu(), travelled.cpu(), points.cpu())
    return torch.from_numpy(found).to(t)


def distances(images: Tensor) -> Tensor:
    """Euclidean distance from each image to the next."""
    return images.diff(dim=0).flatten(1).norm(dim=1)


def run(settings: InterpolateSettings, device: torch.device, console: Console) -> None:
    """Decodes, and writes the results."""
    for name, least in {"pairs": 1, "steps": 2, "dense": 2}.items():
        if getattr(settings, name) < least:
            raise RunError(f"--{name} must be at least {least}, got {getattr(settings, name)}.")
    network = load_network(settings.weights, device)
    console.print(f"Decoding from the last layer of {network.origin}.")
    model = in_arithmetic(network, dtype=torch.float64, quantum=None)
    test = images(network, settings.data, "test", device, 2 * settings.pairs)
    lines = [
        decode_line(
            model, *pair, steps=settings.steps, spacing=settings.spacing, dense=settings.dense
        )
        for pair in progress(_pairs(test, settings), "pairs", console)
    ]
    found = [numbers(line, test.normalise) for line in lines]
    console.print(table(found))
    paths = save(
        settings.out,
        "interpolate",
        draw(lines, test.normalise),
        provenance(settings, network) | {"lines": found},
    )
    console.print(f"Written: {', '.join(map(str, paths))}")


def _pairs(test: Images, settings: InterpolateSettings) -> list[Tensor]:
    """Pairs of images, each as one tensor."""
    found, _ = test.together()
    if len(found) < 2:
        raise RunError(f"a line needs two test images, got {len(found)}.")
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(found), generator=generator)
    return list(found.double()[order[: len(found) // 2 * 2]].unflatten(0, (-1, 2)))


def numbers(line: Line, normalise: Normalise) -> dict[str, Any]:
    """What can be written down of a line."""
    ends = [0, -1]
    pixels = [as_pixels(images[ends], normalise) for images in (line.decoded, line.straight)]
    return {
        "t": line.t,
        "distance_to_next": distances(line.decoded),
        "distance_to_next_in_pixel_space": distances(line.straight),
        "relative_distance_of_features": line.off,
        "relative_error_at_ends": relative_error(line.straight[ends], line.decoded[ends]),
        "wrong_8_bit_values_at_ends": int((pixels[0] != pixels[1]).sum()),
    }


def as_pixels(x: Tensor, normalise: Normalise) -> Tensor:
    """Normalised images with 8 bits a channel, as whole numbers."""
    return (255 * normalise.undo(x)).round().clamp(0, 255)


def table(found: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each line."""
    rows = Table()
    for heading in (
        "line",
        "length, decoded",
        "length, straight",
        "features are off by",
        "error at the ends",
        "wrong 8-bit values there",
    ):
        rows.add_column(heading, justify="right")
    for number, line in enumerate(found, 1):
        rows.add_row(
            str(number),
            f"{line['distance_to_next'].sum():.1f}",
            f"{line['distance_to_next_in_pixel_space'].sum():.1f}",
            f"{line['relative_distance_of_features'].max():.1e}",
            f"{line['relative_error_at_ends'].max():.1e}",
            str(line["wrong_8_bit_values_at_ends"]),
        )
    return rows


def draw(lines: Sequence[Line], normalise: Normalise) -> Figure:
    """Each decoded line above the straight one in pixel space."""
    steps = len(lines[0].t)
    figure = Figure(figsize=(steps, 2.4 * len(lines)), layout="constrained")
    parts = figure.subfigures(len(lines), 1, squeeze=False)[:, 0]
    for part, line in zip(parts, lines, strict=True):
        rows = {"decoded": line.decoded, "pixel space": line.straight}
        draw_rows(part, {title: normalise.undo(images) for title, images in rows.items()})
        part.axes[0].set_title("decoded, t = 0", loc="left", fontsize=8)
        for place, t in zip(part.axes[1:], line.t[1:], strict=False):
            place.set_title(f"t = {t:.2f}", fontsize=8)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script with these flags, or the command line's; returns the exit status."""
    return run_script(InterpolateSettings, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
