"""How images come back from the last layer of an i-RevNet: numbers and pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from errors import writing
from images.batches import Normalise
from networks.irevnet import IRevNet

SHOWN = 12  # images in the picture
CAPTION = "‖x - Φ⁻¹Φx‖ / ‖x‖, and what comes back bit for bit as read"  # of a table of numbers


@dataclass(frozen=True)
class Decoded:
    """How images come back from the last layer, in evaluation mode."""

    numbers: dict[str, int | float]
    originals: Tensor  # some of the images, evenly spread, white being 1
    reconstructions: Tensor  # the same, decoded from the last layer
    worst: Tensor  # the image of the largest relative error, and what is decoded of it


@torch.no_grad()
def decode(
    model: IRevNet, batches: Iterable[tuple[Tensor, Tensor]], images: int, normalise: Normalise
) -> Decoded:
    r"""Encodes so many images, and decodes them from the last layer.

    Of the numbers, ``relative_error`` is the mean of :math:`\|x - \Phi^{-1} \Phi x\| / \|x\|` of
    normalised images, as in section 4.2 of the paper, and ``worst_error`` the largest;
    ``worst_pixel`` is the largest difference in a pixel, white being 1. ``bit_for_bit`` are the
    images that come back as the network read them, rounded to its quantum if it has one.
    ``accuracy`` is the share of the images whose class is found.
    """
    dtype = next(model.parameters()).dtype
    shown = {i * images // SHOWN for i in range(SHOWN)}
    found, pairs = [], []
    worst, worst_error, seen = torch.empty(0), -math.inf, 0
    for pixels, labels in batches:
        x = normalise(pixels).to(dtype)
        phi = model.features(x)
        decoded = model.inverse(phi)
        pair = torch.stack([normalise.undo(x), normalise.undo(decoded)])
        error = relative_error(x, decoded)
        pixel = (pair[0] - pair[1]).abs().flatten(1).amax(1).nan_to_num(math.inf, math.inf)
        exact = (decoded == model.as_read(x)).flatten(1).all(1)
        right = model.classify(phi).argmax(1) == labels
        found.append([each.cpu() for each in (error, pixel, exact, right)])
        pairs.append(pair[:, [i for i in range(len(x)) if seen + i in shown]].cpu())
        seen += len(x)
        if error.max() > worst_error:
            worst_error, worst = error.max().item(), pair[:, error.argmax()].cpu()
    errors, differences, exacts, rights = (torch.cat(e).double() for e in zip(*found, strict=True))
    numbers = {
        "images": seen,
        "relative_error": errors.mean().item(),
        "worst_error": worst_error,
        "worst_pixel": differences.max().item(),
        "bit_for_bit": int(exacts.sum()),
        "accuracy": rights.mean().item(),
    }
    originals, reconstructions = torch.cat(pairs, 1)
    return Decoded(numbers, originals, reconstructions, worst)


def relative_error(x: Tensor, decoded: Tensor) -> Tensor:
    """``||x - decoded|| / ||x||`` of each image, infinite where nothing finite was decoded."""
    difference = (x - decoded).flatten(1).norm(dim=1)
    errors = difference / x.flatten(1).norm(dim=1)
    # An image of zeros comes back right, too.
    return errors.nan_to_num(math.inf, math.inf).where(difference != 0, 0.0)


def draw_pairs(decoded: Decoded, path: Path) -> None:
    """Saves a picture of the originals above their reconstructions."""
    figure = Figure(figsize=(len(decoded.originals), 2.4), layout="constrained")
    draw_rows(figure, {"original": decoded.originals, "decoded": decoded.reconstructions})
    with writing(path):
        figure.savefig(path, dpi=150)


def draw_rows(figure: Any, rows: Mapping[str, Iterable[Tensor]]) -> None:
    """Draws rows of images, each below its title.

    Args:
        figure: A matplotlib figure or subfigure.
        rows: Images of each row, :math:`(C, H, W)`, white being 1.
    """
    columns = max(len(list(images)) for images in rows.values())
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for places, (title, images) in zip(axes, rows.items(), strict=True):
        places[0].set_title(title, loc="left", fontsize=14)
        for place in places:
            place.set_axis_off()
        for place, image in zip(places, images, strict=False):
            shown = image.float().nan_to_num(0).clamp(0, 1).movedim(0, -1)
            place.imshow(shown.cpu().numpy(), cmap="gray", vmin=0, vmax=1)
