"""How images come back from the last layer of an i-RevNet: numbers, table and picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from errors import writing
from images.batches import Normalise
from networks.irevnet import IRevNet

SHOWN = 12  # images in the picture


@dataclass(frozen=True)
class Decoded:
    r"""How images come back from the last layer, in evaluation mode."""

    images: int  # how many there are
    # mean of ``||x - inverse(features(x))|| / ||x||``, where ``x`` is a normalised image: the
    # measure of the paper's section 4.2
    relative_error: float
    worst_error: float  # the largest. Infinite if a decoded image is not finite
    worst_pixel: float  # largest difference in any pixel, white being 1
    # how many images are decoded in every bit as the network read them, which is rounded to its
    # quantum if it has one
    bit_for_bit: int
    accuracy: float  # share of the images whose class is found, 0 to 1
    originals: Tensor  # some of the images, evenly spread, white being 1
    reconstructions: Tensor  # the same, decoded from the last layer
    worst: Tensor  # the image of the largest relative error, and what is decoded of it

    def numbers(self) -> dict[str, Any]:
        """What can be written down."""
        return {name: value for name, value in vars(self).items() if not torch.is_tensor(value)}


@torch.no_grad()
def decode(
    model: IRevNet, batches: Iterable[tuple[Tensor, Tensor]], images: int, normalise: Normalise
) -> Decoded:
    """Encodes images, and decodes them from the last layer."""
    dtype = next(model.parameters()).dtype
    shown = {i * images // SHOWN for i in range(SHOWN)}
    errors, differences, exact, right, pairs = [], [], [], [], []
    worst, worst_error, seen = torch.empty(0), -math.inf, 0
    for pixels, labels in batches:
        x = normalise(pixels).to(dtype)
        phi = model.features(x)
        decoded = model.inverse(phi)
        pair = torch.stack([normalise.undo(x), normalise.undo(decoded)])
        error = relative_error(x, decoded)
        errors.append(error)
        differences.append((pair[0] - pair[1]).abs().max())
        exact.append((decoded == model.as_read(x)).flatten(1).all(1))
        right.append(model.classify(phi).argmax(1) == labels)
        pairs.append(pair[:, [i for i in range(len(x)) if seen + i in shown]].cpu())
        seen += len(x)
        if error.max() > worst_error:
            worst_error, worst = error.max().item(), pair[:, error.argmax()].cpu()
    originals, reconstructions = torch.cat(pairs, 1)
    return Decoded(
        images=seen,
        relative_error=torch.cat(errors).mean().item(),
        worst_error=worst_error,
        worst_pixel=torch.stack(differences).nan_to_num(math.inf, math.inf).max().item(),
        bit_for_bit=int(torch.cat(exact).sum()),
        accuracy=torch.cat(right).float().mean().item(),
        originals=originals,
        reconstructions=reconstructions,
        worst=worst,
    )


def relative_error(x: Tensor, decoded: Tensor) -> Tensor:
    """``||x - decoded|| / ||x||`` of each image, infinite where nothing finite was decoded."""
    difference = (x - decoded).flatten(1).norm(dim=1)
    errors = difference / x.flatten(1).norm(dim=1)
    # An image of zeros comes back right, too.
    return errors.nan_to_num(math.inf, math.inf).where(difference != 0, 0.0)


def table(results: Mapping[str, Mapping[str, Decoded]]) -> Table:
    """A row for each way to compute: results by the images' name and that of the way."""
    rows = Table("", "", title="‖x - Φ⁻¹Φx‖ / ‖x‖, and what comes back bit for bit as read")
    for heading in ("mean", "worst", "pixel", "bit for bit", "accuracy"):
        rows.add_column(heading, justify="right")
    for name, ways in results.items():
        for way, found in ways.items():
            errors = (found.relative_error, found.worst_error, found.worst_pixel)
            exact = f"{found.bit_for_bit:,} of {found.images:,}"
            rows.add_row(name, way, *(f"{e:.1e}" for e in errors), exact, f"{found.accuracy:.2%}")
    return rows


def draw_pairs(decoded: Decoded, path: Path) -> None:
    """Saves a picture of the originals above their reconstructions."""
    figure = Figure(figsize=(len(decoded.originals), 2.4), layout="constrained")
    draw_rows(figure, {"original": decoded.originals, "decoded": decoded.reconstructions})
    with writing(path):
        figure.savefig(path, dpi=150)


def draw_rows(figure: Any, rows: Mapping[str, Tensor]) -> None:
    """Draws rows of images, each below its title.

    Args:
        figure: A matplotlib figure or subfigure.
        rows: Images of each row, :math:`(N, C, H, W)`, white being 1.
    """
    columns = max(map(len, rows.values()))
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (title, images) in zip(axes, rows.items(), strict=True):
        row[0].set_title(title, loc="left", fontsize=14)
        for place in row:
            place.set_axis_off()
        for place, image in zip(row, images, strict=False):
            show(place, image)


def show(place: Any, image: Tensor) -> None:
    """Draws an image :math:`(C, H, W)`, white being 1, into matplotlib axes."""
    shown = image.float().nan_to_num(0).clamp(0, 1).movedim(0, -1)
    place.imshow(shown.cpu().numpy(), cmap="gray", vmin=0, vmax=1)
    place.set_axis_off()
