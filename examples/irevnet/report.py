"""What a trained i-RevNet remembers of its images: the table and the picture at the end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from batches import Batches, Normalise
from irevnet import IRevNet
from runs import writing

SHOWN = 12  # images in the picture


@dataclass(frozen=True)
class Report:
    """Measured over the test images, in evaluation mode.

    Args:
        accuracy: Share of the images whose class is found, 0 to 1.
        relative_error: Mean of ``||x - inverse(features(x))|| / ||x||``, where ``x`` is a
            normalised image: the measure of the paper's section 4.2.
        worst_pixel: Largest difference in any pixel, white being 1.
        images: How many images there are.
        bit_for_bit: How many of them are decoded in every bit as the network read them, which is
            rounded to its quantum.
        originals: Some of the images, evenly spread, white being 1.
        reconstructions: The same, decoded from the last layer.
    """

    accuracy: float
    relative_error: float
    worst_pixel: float
    images: int
    bit_for_bit: int
    originals: Tensor
    reconstructions: Tensor


@torch.no_grad()
def measure(model: IRevNet, batches: Batches, normalise: Normalise) -> Report:
    """Classifies the images, and decodes them from the last layer."""
    model.eval()
    shown = set(torch.linspace(0, batches.images - 1, SHOWN).long().tolist())
    correct, exact, errors, differences, pairs = [], [], [], [], []
    seen = 0
    for pixels, labels in batches:
        x = normalise(pixels)
        phi = model.features(x)
        decoded = model.inverse(phi)
        correct.append(model.classify(phi).argmax(1) == labels)
        exact.append((decoded == model.as_read(x)).flatten(1).all(1))
        errors.append((x - decoded).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1))
        pair = torch.stack([normalise.undo(x), normalise.undo(decoded)])
        differences.append((pair[0] - pair[1]).abs().max())
        pairs.append(pair[:, [i for i in range(len(x)) if seen + i in shown]].cpu())
        seen += len(x)
    originals, reconstructions = torch.cat(pairs, 1)
    return Report(
        accuracy=torch.cat(correct).float().mean().item(),
        relative_error=torch.cat(errors).mean().item(),
        worst_pixel=torch.stack(differences).max().item(),
        images=seen,
        bit_for_bit=int(torch.cat(exact).sum()),
        originals=originals,
        reconstructions=reconstructions,
    )


def table(report: Report) -> Table:
    """The numbers of a report."""
    rows = Table(show_header=False)
    rows.add_row("test accuracy, top 1", f"{report.accuracy:.2%}")
    rows.add_row("reconstruction error, mean of ‖x - Φ⁻¹Φx‖ / ‖x‖", f"{report.relative_error:.1e}")
    rows.add_row("worst pixel difference, white being 1", f"{report.worst_pixel:.1e}")
    rows.add_row(
        "decoded bit for bit as the network read them",
        f"{report.bit_for_bit} of {report.images}",
    )
    return rows


def draw(report: Report, path: Path) -> None:
    """Saves a picture of the originals above their reconstructions."""
    count = len(report.originals)
    figure = Figure(figsize=(count, 2.4), layout="constrained")
    axes = figure.subplots(2, count, squeeze=False)
    rows = {"original": report.originals, "decoded": report.reconstructions}
    for row, (title, images) in zip(axes, rows.items(), strict=True):
        row[0].set_title(title, loc="left", fontsize=10)
        for place, image in zip(row, images, strict=True):
            place.imshow(image.clamp(0, 1).movedim(0, -1).numpy(), cmap="gray", vmin=0, vmax=1)
            place.set_axis_off()
    with writing(path):
        figure.savefig(path, dpi=150)
