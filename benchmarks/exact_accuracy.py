"""What rounding costs in accuracy: the same training with it and without, over several seeds.

Both sides store their activations. With rounding, rebuilding them gives the same bits, so that its
accuracy is the same number; without, rebuilding would add its own error to what is measured.
"""

from __future__ import annotations

import io
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

sys.path.append(str(Path(__file__).parents[1] / "examples" / "irevnet"))
from experiment.settings import Config
from experiment.settings import recipe as recipe_of
from images.batches import Batches, Order, load_training, plain
from images.dataset import Images, numbered
from images.readers import of_array
from presets import PRESETS

QUANTUM = 2**-16
SIDES = {"not rounded": None, "rounded": QUANTUM}


@dataclass(frozen=True)
class Task:
    """A data set, and how a network is trained on it."""

    name: str
    recipe: Config
    images: int = 0  # for training; 0 for all there are
    test_images: int = 0
    folder: Path | None = None  # of CIFAR-10's parquet files

    def data(self) -> tuple[Batches, Batches]:
        """The images for training and for the test, decoded."""
        cpu = torch.device("cpu")
        if self.folder is None:
            return load_training(self.recipe, cpu)
        parts = (("train", self.images), ("test", self.test_images))
        train, test = (read_parquet(self.folder / f"{part}.parquet", n) for part, n in parts)
        order = Order(np.arange(len(train)), self.recipe, train=True)
        return Batches(train, order, cpu), plain(test, self.recipe, cpu)


def digits_task(epochs: int = 40) -> Task:
    """The demo's network, for longer, with a tenth of the learning rate after two milestones."""
    steps = {"epochs": 30, "schedule": "steps", "milestones": (15, 25)}
    recipe = replace(recipe_of("digits"), **steps)
    return Task("digits", _shortened(recipe, epochs))


def cifar10_task(
    folder: Path, *, blocks: tuple[int, ...], images: int, test_images: int, epochs: int
) -> Task:
    """A small i-RevNet, the first images of each file, a few epochs."""
    recipe = replace(recipe_of("cifar10"), blocks=blocks, batch_size=64, workers=0)
    return Task("CIFAR-10", _shortened(recipe, epochs), images, test_images, folder)


def _shortened(recipe: Config, epochs: int) -> Config:
    milestones = [round(epochs * milestone / recipe.epochs) for milestone in recipe.milestones]
    return replace(recipe, epochs=epochs, milestones=tuple(milestones))


def read_parquet(path: Path, count: int) -> Images:
    """The first images of a file as the Hugging Face hub has them; 0 for all."""
    import numpy as np
    import pyarrow.parquet  # needed for this alone
    from PIL import Image

    table = pyarrow.parquet.read_table(path)
    rows = table.slice(0, count or table.num_rows).to_pydict()
    files = [image["bytes"] for image in rows["image"]]
    images = np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])
    return of_array(images, np.array(rows["label"]), numbered(10))


class Outcome(NamedTuple):
    """One training run."""

    side: str
    seed: int
    accuracy: float  # on the test images, 0 to 1
    losses: list[float]  # mean over the training images, by epoch


def train(task: Task, data: tuple[Batches, Batches], side: str, seed: int) -> Outcome:
    """Trains from scratch. Seeds are paired: weights, order and augmentation are the same."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    recipe = task.recipe
    options: dict[str, Any] = {} if recipe.blocks is None else {"blocks": recipe.blocks}
    model = PRESETS[recipe.preset].build(checkpoint=False, quantum=SIDES[side], **options)
    optimizer = torch.optim.SGD(
        model.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay
    )
    train_batches, test_batches = data
    train_batches.order.config = replace(recipe, seed=seed)
    steps = len(train_batches)
    losses = []
    for epoch in range(recipe.epochs):
        total = 0.0
        for step, (x, labels) in enumerate(train_batches.epoch(epoch), epoch * steps):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate(step, steps)
            loss = F.cross_entropy(model(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        losses.append(total / steps)
    model.eval()
    with torch.no_grad():
        right = sum(
            (model(x).argmax(1) == labels).sum().item() for x, labels in test_batches.epoch()
        )
    return Outcome(side, seed, right / len(test_batches.images), losses)


class Summary(NamedTuple):
    """All runs of one side."""

    runs: int
    mean: float
    deviation: float  # of the sample; of the mean it is this over the root of the runs
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Summary:
        """Of at least one value."""
        deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
        return cls(len(values), statistics.fmean(values), deviation, min(values), max(values))


def train_all(
    task: Task, seeds: int, processes: int, report: Callable[[Outcome], None]
) -> list[Outcome]:
    """All sides and seeds, several at a time; each is reported when it is done."""
    found = []
    for outcome in _each(task, [(side, s) for s in range(seeds) for side in SIDES], processes):
        report(outcome)
        found.append(outcome)
    return sorted(found, key=lambda outcome: (outcome.side, outcome.seed))


def _each(task: Task, runs: list[tuple[str, int]], processes: int) -> Iterator[Outcome]:
    data = task.data()
    if processes == 1:
        yield from (train(task, data, side, seed) for side, seed in runs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context) as pool:
        futures = [pool.submit(train, task, data, side, seed) for side, seed in runs]
        for future in as_completed(futures):
            yield future.result()


def summarise(outcomes: list[Outcome]) -> dict[str, Any]:
    """Accuracy by side, and the difference that rounding makes to runs of the same seed."""
    accuracy = {(o.side, o.seed): o.accuracy for o in outcomes}
    found: dict[str, Any] = {
        side: Summary.of([o.accuracy for o in outcomes if o.side == side]) for side in SIDES
    }
    seeds = sorted({o.seed for o in outcomes})
    plain, rounded = SIDES
    found["rounded - not rounded"] = Summary.of(
        [accuracy[rounded, seed] - accuracy[plain, seed] for seed in seeds]
    )
    return found
