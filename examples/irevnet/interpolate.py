"""Decodes straight lines between the features of two images.

    python examples/irevnet/interpolate.py --weights runs/irevnet/1

Section 4.2 and Figure 5 of the paper (https://arxiv.org/abs/1802.07088): what is decoded from
``t Phi(x0) + (1 - t) Phi(x1)`` leads from ``x1`` to ``x0``. Below each such curve is the straight
line in pixel space. Steps are even in ``t``, or in pixels along the curve, as in the paper.

The weights compute in float64 and without a grid: between two images the features are on no grid,
and rounding them would add noise that the inverse amplifies. The features of an injective network
(a, cifar10) do not fill space: halfway between two images nothing has quite these features, and
what is decoded there looks like noise. The table says how far off they are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import analysis
from errors import RunError, at_least
from invert import draw, relative_error
from networks.irevnet import IRevNet
from scripts import script

BATCH = 32  # images decoded at once


@dataclass(frozen=True)
class Settings(analysis.Settings):
    """Decodes straight lines between the features of two images."""

    pairs: int = 6  # Pairs of test images, evenly spread and then paired at random
    steps: int = 11  # Images of a line, both ends included
    # Whether steps are even in t, or in the length of the curve in pixel space
    spacing: Literal["t", "pixels"] = "t"
    dense: int = 256  # Points at which --spacing pixels measures a curve


@torch.no_grad()
def decode_line(
    model: IRevNet, first: Tensor, second: Tensor, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Decodes the straight line between the features of two normalised images.

    Returns:
        Where, ``t`` from 0 (the second image) to 1 (the first). The images decoded there, those on
        the straight line in pixel space, and the relative distances of the features that the
        decoded images have to those they were decoded from.
    """
    ends = torch.stack([second, first])
    phi = model.features(ends)

    def curve(t: Tensor) -> Tensor:
        return torch.cat([model.inverse(part) for part in mix(phi, t).split(BATCH)])

    t = torch.linspace(0, 1, settings.steps, dtype=first.dtype, device=first.device)
    if settings.spacing == "pixels":
        t = evenly_along(curve, t, settings.dense)
    decoded = curve(t)
    return t, decoded, mix(ends, t), relative_error(mix(phi, t), model.features(decoded))


def mix(ends: Tensor, t: Tensor) -> Tensor:
    """``t ends[1] + (1 - t) ends[0]`` for each ``t``, and the very ends at 0 and 1."""
    t = t[:, None, None, None]
    return t * ends[1] + (1 - t) * ends[0]


def evenly_along(curve: Callable[[Tensor], Tensor], t: Tensor, dense: int) -> Tensor:
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


@script
def main(settings: Settings) -> None:
    """Decodes, and writes the results."""
    at_least(1, pairs=settings.pairs)
    at_least(2, steps=settings.steps, dense=settings.dense)
    network = settings.begin()
    model = analysis.in_mode(network, "float64")
    test = analysis.images(network, "test")
    images = test.at_most(2 * settings.pairs).joined().double()
    if len(images) < 2:
        raise RunError(f"a line needs two test images, got {len(images)}.")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(settings.seed))
    pairs = list(images[order[: len(images) // 2 * 2]].unflatten(0, (-1, 2)))
    lines, pictures = [], []
    for x1, x2 in analysis.progress(pairs, "pairs"):
        t, decoded, straight, off = decode_line(model, x1, x2, settings)
        line = {
            "t": t,
            "distance_to_next": distances(decoded),
            "distance_to_next_in_pixel_space": distances(straight),
            "relative_distance_of_features": off,
            "relative_error_at_ends": relative_error(straight[[0, -1]], decoded[[0, -1]]),
        }
        lines.append(line)
        pictures.append({"decoded": test.undo(decoded), "pixel space": test.undo(straight)})
    figure = draw(pictures)
    for part, line in zip(figure.subfigs, lines, strict=True):
        for place, at in zip(part.axes[1:], line["t"][1:], strict=False):
            place.set_title(f"t = {at:.2g}", fontsize=14)
    analysis.print_table(lines)
    about = analysis.provenance(settings, network) | {"lines": lines}
    analysis.save(settings.out, "interpolate", figure, about)


if __name__ == "__main__":
    raise SystemExit(main())
