"""How often a trained network is right on the test images.

    python examples/irevnet/evaluate.py
    python examples/irevnet/evaluate.py --weights ILSVRC_trained_irevnet.pth.tar --data DIR

The first evaluates the latest run on the data that it was trained on. ``DIR`` is any that
``train_imagenet.py`` takes; of a folder with ``train/<class>/<image>`` and ``val/<class>/<image>``,
the classes are numbered in the order of their names, as those of ImageNet's synsets are for
published weights, and must bear the names of the training. Images are resized, cropped and
normalised as in its tests.
"""

from __future__ import annotations

import csv
import os
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from analyses.analysis import (
    NetworkSettings,
    device_of,
    images,
    normalised,
    progress,
    provenance,
    write_json,
)
from errors import at_least, try_writing, writing
from images.batches import Batches
from scripts import run_script
from trainer.optimisation import Precision
from trainer.tally import Tally
from trainer.weights import Network


@dataclass(frozen=True)
class Settings(NetworkSettings):
    """One evaluation."""

    batch_size: int | None = None  # Images at once; by default as in training
    # Of convolutions, under autocast; auto is bfloat16 on a GPU, float32 on the CPU
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    workers: int = 2  # Processes that read image files; 0 reads them in the main one
    json: Path | None = None  # File for the numbers, with the accuracy of each class
    # CSV file with a line for each image: its class, that found, and the latter's probability
    predictions: Path | None = None


@torch.no_grad()
def evaluate(
    network: Network, batches: Batches, precision: Precision, console: Console
) -> tuple[dict[str, float], Tensor]:
    """Mean loss and accuracy; and of each image its label, the class found and its probability."""
    tally = Tally(precision.device, len(network.classes))
    lines = []
    for x, labels in progress(normalised(network, batches), "", console, len(batches)):
        with precision.autocast():
            logits = network.model(x).float()
        tally.add(F.cross_entropy(logits, labels), logits, labels)
        probability, found = logits.softmax(1).max(1)
        lines.append(torch.stack([labels, found, probability], 1).cpu())
    return tally.read(), torch.cat(lines)


def by_class(lines: Tensor, names: tuple[str, ...]) -> dict[str, float]:
    """The accuracy of each class of which there are images."""
    labels, found, _ = lines.unbind(1)
    right = (labels == found).double()
    return {names[int(label)]: right[labels == label].mean().item() for label in labels.unique()}


def write_predictions(path: Path, lines: Tensor, batches: Batches, names: tuple[str, ...]) -> None:
    """Writes a line for each image."""
    files = batches.images.files
    with writing(path), path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "class", "found", "probability"))
        for index, (label, found, probability) in enumerate(lines.tolist()):
            image = index if files is None else os.fsdecode(files[index])
            writer.writerow((image, names[int(label)], names[int(found)], f"{probability:.6f}"))


def run(settings: Settings, console: Console) -> None:
    """Evaluates, prints and writes."""
    at_least(1, batch_size=settings.batch_size)
    at_least(0, workers=settings.workers)
    for path in filter(None, (settings.json, settings.predictions)):
        try_writing(path)
    network = settings.load()
    console.print(f"{network.origin}.")
    batch_size = settings.batch_size or network.config.batch_size
    config = replace(network.config, batch_size=batch_size, workers=settings.workers)
    network = replace(network, config=config)
    batches = images(network, "test", classified=True)
    precision = Precision(settings.precision, device_of(network))
    means, lines = evaluate(network, batches, precision, console)
    found = {"images": len(lines), **means}
    for name, value in found.items():
        console.print(f"{name}: {round(value, 4)}")
    if settings.predictions:
        write_predictions(settings.predictions, lines, batches, network.classes)
    if settings.json:
        about: dict[str, Any] = provenance(settings, network) | {
            "precision": settings.precision,
            "device": str(device_of(network)),
            "accuracy_by_class": by_class(lines, network.classes),
        }
        write_json(settings.json, about | found)


main = partial(run_script, Settings, run)

if __name__ == "__main__":
    sys.exit(main())
