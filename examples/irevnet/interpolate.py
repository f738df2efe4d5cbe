"""Decodes straight lines between the features of two images.

For instance::

    python examples/irevnet/interpolate.py --weights runs/irevnet/1

Section 4.2 and Figure 5 of the paper (https://arxiv.org/abs/1802.07088): what is decoded from
``t Phi(x0) + (1 - t) Phi(x1)`` leads from ``x1`` to ``x0``. Below each such curve is the straight
line in pixel space. Steps are even in ``t``, or in pixels along the curve, which the paper did by
hand.

The weights compute in float64 and without a grid: between two images the features are on no grid,
and rounding them would add noise that the inverse amplifies. The features of an injective network
(a, cifar10) do not fill space: halfway between two images nothing has quite these features, and
what is decoded there looks like noise. The table says how far off they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from analyses.analysis import (
    Settings,
    few_images,
    in_arithmetic,
    normaliser,
    progress,
    provenance,
    save,
)
from analyses.decoding import draw_rows, relative_error
from errors import RunError, at_least
from images.batches import Normalise
from networks.irevnet import IRevNet
from scripts import run_script

BATCH = 32  # images decoded at once
Spacing = Literal["t", "pixels"]
Curve = Callable[[Tensor], Tensor]  # from K numbers 0 to 1 to K images
COLUMNS = {
    "length, decoded": lambda line: f"{line['distance_to_next'].sum():.1f}",
    "length, straight": lambda line: f"{line['distance_to_next_in_pixel_space'].sum():.1f}",
    "features are off by": lambda line: f"{line['relative_distance_of_features'].max():.1e}",
    "error at the ends": lambda line: f"{line['relative_error_at_ends'].max():.1e}",
    "wrong 8-bit values there": lambda line: str(line["wrong_8_bit_values_at_ends"]),
}


@dataclass(frozen=True)
class InterpolateSettings(Settings):
    """Decodes straight lines between the features of two images."""

    pairs: int = 6  # Pairs of test images, evenly spread and then paired at random
    steps: int = 11  # Images of a line, both ends included
    # Whether steps are even in t, or in the length of the curve in pixel space
    spacing: Spacing = "t"
    dense: int = 256  # Points at which --spacing pixels measures a curve


@dataclass(frozen=True)
class Line:
    """What is decoded between two images."""

    t: Tensor  # where, from 0 (the second image) to 1 (the first)
    decoded: Tensor  # the images there, normalised
    straight: Tensor  # the straight line in pixel space at the same ``t``
    # relative distance of the features that the decoded images have to those they were decoded from
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
    """As many numbers as ``t`` has, at which the curve has travelled equal lengths."""
    points = torch.linspace(0, 1, dense, dtype=t.dtype, device=t.device)
    travelled = F.pad(distances(curve(points)).cumsum(0), (1, 0))
    if not travelled.isfinite().all():
        raise RunError("what is decoded between two images is not finite: take --spacing t.")
    found = np.interp((t * travelled[-1]).cpu(), travelled.cpu(), points.cpu())
    return torch.from_numpy(found).to(t)


def distances(images: Tensor) -> Tensor:
    """Euclidean distance from each image to the next."""
    return images.diff(dim=0).flatten(1).norm(dim=1)


def run(settings: InterpolateSettings, console: Console) -> None:
    """Decodes, and writes the results."""
    at_least(1, pairs=settings.pairs)
    at_least(2, steps=settings.steps, dense=settings.dense)
    settings.check()
    network = settings.load()
    console.print(f"Decoding from the last layer of {network.origin}.")
    model = in_arithmetic(network, dtype=torch.float64, quantum=None)
    normalise = normaliser(network)
    pairs = _pairs(few_images(network, 2 * settings.pairs), settings.seed)
    steps, spacing, dense = settings.steps, settings.spacing, settings.dense
    lines = [
        decode_line(model, *pair, steps=steps, spacing=spacing, dense=dense)
        for pair in progress(pairs, "pairs", console)
    ]
    found = [numbers(line, normalise) for line in lines]
    console.print(table(found))
    about = provenance(settings, network)
    save(settings.out, "interpolate", draw(lines, normalise), about | {"lines": found}, console)


def _pairs(found: Tensor, seed: int) -> list[Tensor]:
    """Pairs of images, each as one tensor."""
    if len(found) < 2:
        raise RunError(f"a line needs two test images, got {len(found)}.")
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
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
    for heading in ("line", *COLUMNS):
        rows.add_column(heading, justify="right")
    for number, line in enumerate(found, 1):
        rows.add_row(str(number), *(show(line) for show in COLUMNS.values()))
    return rows


def draw(lines: Sequence[Line], normalise: Normalise) -> Figure:
    """Each decoded line above the straight one in pixel space."""
    steps = len(lines[0].t)
    figure = Figure(figsize=(steps, 2.4 * len(lines)), layout="constrained")
    parts = figure.subfigures(len(lines), 1, squeeze=False)[:, 0]
    for part, line in zip(parts, lines, strict=True):
        rows = {"decoded": line.decoded, "pixel space": line.straight}
        draw_rows(part, {title: normalise.undo(images) for title, images in rows.items()})
        part.axes[0].set_title("decoded", loc="left", fontsize=14)
        for place, t in zip(part.axes[1:], line.t[1:], strict=False):
            place.set_title(f"t = {t:.2g}", fontsize=14)
    return figure


main = partial(run_script, InterpolateSettings, run)

if __name__ == "__main__":
    sys.exit(main())
