"""How images come back from the last layer of an i-RevNet: numbers and pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from errors import writing
from experiment.settings import Config
from images.batches import Normalise, plain
from images.dataset import Images
from networks.irevnet import IRevNet

SHOWN = 12  # images in the picture
CAPTION = "Relative errors ‖x - Φ⁻¹Φx‖ / ‖x‖, and what comes back bit for bit as read"


@torch.no_grad()
def decode(
    model: IRevNet, batches: Iterable[tuple[Tensor, Tensor]], normalise: Normalise
) -> dict[str, int | float]:
    r"""Encodes images, and decodes them from the last layer, in evaluation mode.

    ``relative_error`` is the mean of :math:`\|x - \Phi^{-1} \Phi x\| / \|x\|` of normalised images,
    as in section 4.2 of the paper, and ``worst_error`` the largest; ``worst_pixel`` is the largest
    difference in a pixel, white being 1. ``bit_for_bit`` are the images that come back as the
    network read them, rounded to its quantum if it has one. ``accuracy`` is the share of the images
    whose class is found.
    """
    dtype = next(model.parameters()).dtype
    found = []
    for pixels, labels in batches:
        x = normalise(pixels).to(dtype)
        phi = model.features(x)
        decoded = model.inverse(phi)
        error = relative_error(x, decoded)
        pixel = (normalise.undo(decoded) - normalise.undo(x)).abs().flatten(1).amax(1)
        exact = (decoded == model.as_read(x)).flatten(1).all(1)
        right = model.classify(phi).argmax(1) == labels
        found.append([each.cpu() for each in (error, pixel, exact, right)])
    errors, pixels, exacts, rights = (torch.cat(each).double() for each in zip(*found, strict=True))
    return {
        "images": len(errors),
        "relative_error": errors.mean().item(),
        "worst_error": errors.max().item(),
        "worst_pixel": pixels.nan_to_num(math.inf, math.inf).max().item(),
        "bit_for_bit": int(exacts.sum()),
        "accuracy": rights.mean().item(),
    }


def relative_error(x: Tensor, decoded: Tensor) -> Tensor:
    """``||x - decoded|| / ||x||`` of each image, infinite where nothing finite was decoded."""
    difference = (x - decoded).flatten(1).norm(dim=1)
    errors = difference / x.flatten(1).norm(dim=1)
    # An image of zeros comes back right, too.
    return errors.nan_to_num(math.inf, math.inf).where(difference != 0, 0.0)


@torch.no_grad()
def some_decoded(
    model: IRevNet, images: Images, config: Config, normalise: Normalise
) -> tuple[Tensor, Tensor]:
    """Some images, evenly spread, and what is decoded of them, white being 1."""
    dtype = next(model.parameters()).dtype
    batches = plain(images.at_most(SHOWN), config, normalise.mean.device)
    x = torch.cat([normalise(pixels).to(dtype) for pixels, _ in batches.epoch()])
    return normalise.undo(x), normalise.undo(model.inverse(model.features(x)))


def draw_pairs(path: Path, originals: Tensor, decoded: Tensor) -> None:
    """Saves a picture of the originals above their reconstructions."""
    figure = Figure(figsize=(len(originals), 2.4), layout="constrained")
    draw_rows(figure, {"original": originals, "decoded": decoded})
    with writing(path):
        figure.savefig(path, dpi=150)


def draw_rows(figure: Any, rows: Mapping[str, Iterable[Tensor]]) -> None:
    """Draws rows of images, white being 1, below their titles into a figure or subfigure."""
    columns = max(len(list(images)) for images in rows.values())
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for places, (title, images) in zip(axes, rows.items(), strict=True):
        places[0].set_title(title, loc="left", fontsize=14)
        for place in places:
            place.set_axis_off()
        for place, image in zip(places, images, strict=False):
            shown = image.float().nan_to_num(0).clamp(0, 1).movedim(0, -1)
            place.imshow(shown.cpu().numpy(), cmap="gray", vmin=0, vmax=1)
