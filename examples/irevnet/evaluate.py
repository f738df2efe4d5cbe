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
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F

import analysis
from errors import try_writing, writing
from images.batches import Batches
from scripts import script
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
    network: Network, batches: Batches, precision: str
) -> tuple[dict[str, float], np.ndarray, list[float]]:
    """Mean loss and accuracy; and of each image the class found, and its probability."""
    tally = Tally(batches.device, len(network.classes))
    context = autocast(precision, batches.device)
    found, probabilities = [], []
    for x, labels in analysis.progress(batches.epoch(), "test images", len(batches)):
        with context:
            logits = network.model(x).float()
        tally.add(F.cross_entropy(logits, labels), logits, labels)
        highest = logits.softmax(1).max(1)
        found += highest.indices.tolist()
        probabilities += highest.values.tolist()
    return tally.read(), np.array(found), probabilities


@script
def main(settings: Settings) -> None:
    """Evaluates, prints and writes."""
    for path in filter(None, (settings.json, settings.predictions)):
        try_writing(path)
    network = settings.load(batch_size=settings.batch_size, workers=settings.workers)
    print(f"{network.origin}.")
    batches = analysis.images(network, "test", classified=True)
    means, found, probabilities = evaluate(network, batches, settings.precision)
    numbers = {"images": len(found), **means}
    for name, value in numbers.items():
        print(f"{name}: {round(value, 4)}")
    labels, files = batches.images.labels, batches.images.files
    if settings.predictions:
        names = np.array(network.classes)
        images = range(len(found)) if files is None else map(os.fsdecode, files)
        shown = map("{:.6f}".format, probabilities)
        lines = zip(images, names[labels], names[found], shown, strict=True)
        with writing(settings.predictions), settings.predictions.open("w", newline="") as file:
            csv.writer(file).writerows([("image", "class", "found", "probability"), *lines])
    if settings.json:
        classes = {name: labels == number for number, name in enumerate(network.classes)}
        right = found == labels
        about = analysis.provenance(settings, network) | {
            "device": str(batches.device),
            "accuracy_by_class": {n: right[c].mean() for n, c in classes.items() if c.any()},
        }
        analysis.write_json(settings.json, about | numbers)


if __name__ == "__main__":
    raise SystemExit(main())
