"""How often a trained network is right on the test images.

    python examples/irevnet/evaluate.py
    python examples/irevnet/evaluate.py --weights ILSVRC_trained_irevnet.pth.tar --data DIR

The first evaluates the latest run on the data that it was trained on. ``DIR`` is any that
``train_imagenet.py`` takes; of a folder with ``train/<class>/<image>`` and ``val/<class>/<image>``,
the classes are numbered in the order of their names, as those of ImageNet's synsets are for
published weights, and must bear the names of the training. Images are resized, cropped and
normalised as in its tests.
"""

import csv
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

import analysis
from errors import at_least, try_writing, writing
from images.batches import Batches
from scripts import run_script
from trainer.optimisation import autocast
from trainer.tally import Tally
from trainer.weights import Network


@dataclass(frozen=True)
class Settings(analysis.NetworkSettings):
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
    network: Network, batches: Batches, precision: str, console: Console
) -> tuple[dict[str, float], Tensor]:
    """Mean loss and accuracy; and of each image its label, the class found and its probability."""
    device = analysis.device_of(network)
    tally = Tally(device, len(network.classes))
    context = autocast(precision, device)
    lines = []
    for x, labels in analysis.progress(batches.epoch(), "", console, len(batches)):
        with context:
            logits = network.model(x).float()
        tally.add(F.cross_entropy(logits, labels), logits, labels)
        probability, found = logits.softmax(1).max(1)
        lines.append(torch.stack([labels, found, probability], 1).cpu())
    return tally.read(), torch.cat(lines)


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
    batches = analysis.images(network, "test", classified=True)
    means, lines = evaluate(network, batches, settings.precision, console)
    found = {"images": len(lines), **means}
    for name, value in found.items():
        console.print(f"{name}: {round(value, 4)}")
    if settings.predictions:
        write_predictions(settings.predictions, lines, batches, network.classes)
    if settings.json:
        labels, guesses, _ = lines.unbind(1)
        right = (labels == guesses).double()
        names = {network.classes[int(label)]: label for label in labels.unique()}
        about: dict[str, Any] = analysis.provenance(settings, network) | {
            "precision": settings.precision,
            "device": str(analysis.device_of(network)),
            "accuracy_by_class": {n: right[labels == i].mean().item() for n, i in names.items()},
        }
        analysis.write_json(settings.json, about | found)


if __name__ == "__main__":
    run_script(Settings, run)
