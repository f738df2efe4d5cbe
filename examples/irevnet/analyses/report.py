"""What a trained i-RevNet remembers of its images: the table and the picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from experiment.folder import writing
from images.batches import Batches, Normalise
from networks.irevnet import IRevNet

SHOWN = 12  # images in the picture


@dataclass(frozen=True)
class Decoded:
    r"""How images come back from the last layer, in evaluation mode.

    Args:
        images: How many there are.
        relative_error: Mean of ``||x - inverse(features(x))|| / ||x||``, where ``x`` is a
            normalised image: the measure of the paper's section 4.2.
        worst_error: The largest. Infinite if a decoded image is not finite.
        worst_pixel: Largest difference in any pixel, white being 1.
        bit_for_bit: How many images are decoded in every bit as the network read them, which is
            rounded to its quantum if it has one.
        predicted: The class that the network finds in each image.
        originals: Some of the images, evenly spread, white being 1.
        reconstructions: The same, decoded from the last layer.
        worst: The image of the largest relative error, and what is decoded of it.
    """

    images: int
    relative_error: float
    worst_error: float
    worst_pixel: float
    bit_for_bit: int
    predicted: Tensor
    originals: Tensor
    reconstructions: Tensor
    worst: tuple[Tensor, Tensor]

    def numbers(self) -> dict[str, Any]:
        """What can be written down."""
        names = ("images", "relative_error", "worst_error", "worst_pixel", "bit_for_bit")
        return {name: getattr(self, name) for name in names}


@torch.no_grad()
def decode(model: IRevNet, batches: Iterable[Tensor], images: int, normalise: Normalise) -> Decoded:
    """Encodes images, and decodes them from the last layer.

    Args:
        model: In evaluation mode. It computes in the dtype of its weights.
        batches: Normalised images.
        images: How many there are in all batches.
        normalise: Makes pixels of them again.
    """
    dtype = next(model.parameters()).dtype
    shown = {i * images // SHOWN for i in range(SHOWN)}
    errors, differences, exact, predicted, pairs = [], [], [], [], []
    worst = torch.empty(0)
    seen, worst_error = 0, -math.inf
    for batch in batches:
        x = batch.to(dtype)
        phi = model.features(x)
        decoded = model.inverse(phi)
        pair = torch.stack([normalise.undo(x), normalise.undo(decoded)])
        errors.append(relative_error(x, decoded))
        differences.append((pair[0] - pair[1]).abs().max())
        exact.append((decoded == model.as_read(x)).flatten(1).all(1))
        predicted.append(model.classify(phi).argmax(1))
        pairs.append(pair[:, [i for i in range(len(x)) if seen + i in shown]].cpu())
        seen += len(x)
        if errors[-1].max() > worst_error:
            worst_error = errors[-1].max().item()
            worst = pair[:, errors[-1].argmax()].cpu()
    originals, reconstructions = torch.cat(pairs, 1)
    return Decoded(
        images=seen,
        relative_error=torch.cat(errors).mean().item(),
        worst_error=worst_error,
        worst_pixel=torch.stack(differences).nan_to_num(math.inf, math.inf).max().item(),
        bit_for_bit=int(torch.cat(exact).sum()),
        predicted=torch.cat(predicted),
        originals=originals,
        reconstructions=reconstructions,
        worst=(worst[0], worst[1]),
    )


def relative_error(x: Tensor, decoded: Tensor) -> Tensor:
    """``||x - decoded|| / ||x||`` of each image, infinite where nothing finite was decoded."""
    difference = (x - decoded).flatten(1).norm(dim=1)
    errors = difference / x.flatten(1).norm(dim=1)
    # An image of zeros comes back right, too.
    return errors.nan_to_num(math.inf, math.inf).where(difference != 0, 0.0)


@dataclass(frozen=True)
class Report:
    """Measured over the test images.

    Args:
        accuracy: Share of the images whose class is found, 0 to 1.
        decoded: How they come back from the last layer.
    """

    accuracy: float
    decoded: Decoded


def measure(model: IRevNet, batches: Batches, normalise: Normalise) -> Report:
    """Classifies the images, and decodes them from the last layer."""
    labels = []

    def images() -> Iterator[Tensor]:
        for pixels, their_labels in batches.epoch():
            labels.append(their_labels)
            yield normalise(pixels)

    model.eval()
    decoded = decode(model, images(), batches.images, normalise)
    right = decoded.predicted == torch.cat(labels)
    return Report(right.float().mean().item(), decoded)


def table(report: Report) -> Table:
    """The numbers of a report."""
    decoded = report.decoded
    rows = Table(show_header=False)
    rows.add_row("test accuracy, top 1", f"{report.accuracy:.2%}")
    rows.add_row("reconstruction error, mean of ‖x - Φ⁻¹Φx‖ / ‖x‖", f"{decoded.relative_error:.1e}")
    rows.add_row("worst pixel difference, white being 1", f"{decoded.worst_pixel:.1e}")
    rows.add_row(
        "decoded bit for bit as the network read them",
        f"{decoded.bit_for_bit} of {decoded.images}",
    )
    return rows


def draw(report: Report, path: Path) -> None:
    """Saves a picture of the originals above their reconstructions."""
    decoded = report.decoded
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
        row[0].set_title(title, loc="left", fontsize=10)
        for place in row:
            place.set_axis_off()
        for place, image in zip(row, images, strict=False):
            show(place, image)


def show(place: Any, image: Tensor) -> None:
    """Draws an image :math:`(C, H, W)`, white being 1, into matplotlib axes."""
    shown = image.float().nan_to_num(0).clamp(0, 1).movedim(0, -1)
    place.imshow(shown.cpu().numpy(), cmap="gray", vmin=0, vmax=1)
    place.set_axis_off()
