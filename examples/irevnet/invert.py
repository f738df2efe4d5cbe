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

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

import analysis
from errors import RunError, at_least
from images.batches import Batches, plain
from images.dataset import Images, difference
from networks.irevnet import IRevNet
from scripts import script

SHOWN = 12  # images in the picture
CAPTION = "Relative errors ‖x - Φ⁻¹Φx‖ / ‖x‖, and what comes back bit for bit as read"


@dataclass(frozen=True)
class Settings(analysis.Settings):
    """Decodes images and noise from the last layer, and measures the error."""

    limit: int | None = None  # Test images to decode, evenly spread; all by default
    noises: int = 10_000  # Images of uniform noise to decode
    # Most images and noises to decode in float64, which takes a CPU up to ten times as long
    float64_limit: int = 500
    # How to compute. Exact is float32 on the grid that the network was trained on, else 2**-16
    modes: tuple[analysis.Mode, ...] = ("float32", "float64", "exact")


def noise(count: int, side: int, seed: int) -> Images:
    """Images of uniform noise, the same each time, all labelled 0."""
    return Images(partial(_read_noise, side, seed), np.zeros(count, np.int64), ("noise",))


def _read_noise(side: int, seed: int, index: int, mode: str) -> Image.Image:
    shape = (side, side) if mode == "L" else (side, side, 3)
    pixels = np.random.default_rng([seed, index]).integers(256, size=shape, dtype=np.uint8)
    return Image.fromarray(pixels)


@script
def main(settings: Settings) -> None:
    """Decodes, and writes the results."""
    at_least(1, noises=settings.noises, float64_limit=settings.float64_limit, limit=settings.limit)
    network = settings.begin()
    models = {mode: analysis.in_mode(network, mode) for mode in settings.modes}
    test = analysis.images(network, "test").at_most(settings.limit)
    noises = noise(settings.noises, network.config.image_size, settings.seed)
    whole = replace(network.config, augmentation="shift")  # not cropped
    sources = {"test images": test, "noises": plain(noises, whole, test.device)}
    numbers: dict[str, dict[str, Any]] = {name: {} for name in sources}
    pictures = []
    for name, every in sources.items():
        rows: dict[str, Tensor] = {}
        for mode, model in models.items():
            batches = every.at_most(settings.float64_limit if mode == "float64" else None)
            epoch = analysis.progress(batches.epoch(), f"{name}, {mode}", len(batches))
            try:
                numbers[name][mode] = decode(model, epoch, batches.undo)
            except ValueError as error:  # features beyond the range of exact sums
                hint = "Leave the exact mode out: --modes float32 float64"
                raise RunError(f"{error} {hint}") from error
            if difference(network.classes, every.images.classes):
                numbers[name][mode]["accuracy"] = None  # which would say nothing
            rows |= some_decoded(model, every, name, f"decoded, {mode}")
        pictures.append(rows)
    lines = [{"": n, "in": mode} | e for n, modes in numbers.items() for mode, e in modes.items()]
    analysis.print_table(lines, CAPTION)
    about = analysis.provenance(settings, network)
    analysis.save(settings.out, "invert", draw(pictures), about | numbers)


@torch.no_grad()
def decode(
    model: IRevNet, batches: Iterable[tuple[Tensor, Tensor]], undo: Callable[[Tensor], Tensor]
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
    for x, labels in batches:
        x = x.to(dtype)
        phi = model.features(x)
        decoded = model.inverse(phi)
        error = relative_error(x, decoded)
        pixel = (undo(decoded) - undo(x)).abs().flatten(1).amax(1)
        exact = (decoded == model.as_read(x)).flatten(1).all(1)
        right = model.classify(phi).argmax(1) == labels
        found.append(torch.stack([error, pixel, exact, right]).double().cpu())
    errors, pixels, exacts, rights = torch.cat(found, 1)
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
def some_decoded(model: IRevNet, batches: Batches, *titles: str) -> dict[str, Tensor]:
    """Some images, evenly spread, and what is decoded of them, white being 1, by two titles."""
    x = batches.at_most(SHOWN).joined().to(next(model.parameters()).dtype)
    pair = batches.undo(x), batches.undo(model.inverse(model.features(x)))
    return dict(zip(titles, pair, strict=True))


def draw(pictures: Sequence[Mapping[str, Tensor]]) -> Figure:
    """Draws rows of images, white being 1, below their titles; a subfigure for each picture."""
    columns = max(len(images) for rows in pictures for images in rows.values())
    figure = Figure(figsize=(columns, 1.2 * sum(map(len, pictures))), layout="constrained")
    parts = figure.subfigures(len(pictures), 1, squeeze=False)[:, 0]
    for part, rows in zip(parts, pictures, strict=True):
        axes = part.subplots(len(rows), columns, squeeze=False)
        for places, (title, images) in zip(axes, rows.items(), strict=True):
            places[0].set_title(title, loc="left", fontsize=14)
            for place in places:
                place.set_axis_off()
            for place, image in zip(places, images, strict=False):
                shown = image.float().nan_to_num(0).clamp(0, 1).movedim(0, -1)
                place.imshow(shown.cpu().numpy(), cmap="gray", vmin=0, vmax=1)
    return figure


if __name__ == "__main__":
    raise SystemExit(main())
