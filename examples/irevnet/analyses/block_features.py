"""Features of images at several depths of a network, averaged over space."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from analyses.analysis import Settings, images, progress
from analyses.probes import FOLDS, Accuracy, Samples, accuracy
from experiment.folder import RunError
from networks.presets import Classifier
from trainer.weights import Network


@dataclass(frozen=True)
class ProbeSettings(Settings):
    """Flags of what probes the features of one network or several."""

    weights: tuple[Path, ...] = ()  # type: ignore[assignment]
    """One network or several, for one figure: each a run's folder, its checkpoint.pt, a
    .safetensors file or the released .pth.tar; by default the latest run under runs/irevnet."""

    train_limit: int | None = 20_000
    """Training images for both classifiers, evenly spread; None takes all."""

    test_limit: int | None = 10_000
    """Test images, evenly spread; None takes all."""

    def check(self) -> None:
        """Raises :class:`RunError` for numbers that are too small."""
        for name, limit, least in (
            ("train", self.train_limit, FOLDS),
            ("test", self.test_limit, 1),
        ):
            if limit is not None and limit < least:
                raise RunError(f"--{name}-limit must be at least {least}, got {limit}.")

    def each_weights(self) -> Sequence[Path | None]:
        """The networks, None being the latest run."""
        return self.weights or (None,)


@dataclass(frozen=True)
class BlockFeatures:
    """What a network makes of images.

    Args:
        blocks: The spatial average behind each chosen block, :math:`(N, C)` of its channels.
        labels: Classes of the images, :math:`(N,)`.
        accuracy: The network's own.
    """

    blocks: list[np.ndarray]
    labels: np.ndarray
    accuracy: Accuracy


@dataclass(frozen=True)
class Features:
    """Of training and test images, at the same depths.

    Args:
        numbers: Of the chosen blocks, from 1.
        count: How many blocks the network has.
        train: Of the training images.
        test: Of the test images.
    """

    numbers: list[int]
    count: int
    train: BlockFeatures
    test: BlockFeatures

    def samples(self, index: int) -> tuple[Samples, Samples]:
        """Training and test samples behind a chosen block, standardised by the training images."""
        parts = self.train, self.test
        scaler = StandardScaler().fit(self.train.blocks[index])
        train, test = (Samples(scaler.transform(part.blocks[index]), part.labels) for part in parts)
        return train, test


def read_features(
    network: Network,
    settings: ProbeSettings,
    device: torch.device,
    console: Console,
    depths: int | None,
) -> Features:
    """Reads the training and the test images.

    Args:
        network: Of which features are wanted.
        settings: Say which images.
        device: Where the network is.
        console: Shows the progress.
        depths: Behind how many blocks, evenly spread, the last included; None takes all.
    """
    of = partial(images, network, settings.data, device=device, classified=True)
    train = of("train", limit=settings.train_limit)
    test = of("test", limit=settings.test_limit)
    count = count_blocks(network.model, next(iter(test))[0])
    numbers = spread_blocks(count, depths)
    return Features(
        numbers,
        count,
        gather(network.model, progress(train, "training images", console), numbers),
        gather(network.model, progress(test, "test images", console), numbers),
    )


@torch.no_grad()
def gather(
    model: Classifier, images: Iterable[tuple[Tensor, Tensor]], chosen: Sequence[int]
) -> BlockFeatures:
    """Reads the images once; only averages are kept, and in main memory.

    Args:
        model: In evaluation mode.
        images: Batches of normalised images and labels.
        chosen: Numbers of blocks from 1, rising.

    Raises:
        RunError: If a feature is not finite.
    """
    averages: dict[int, list[Tensor]] = {block: [] for block in chosen}
    labels, predicted = [], []
    for x, classes in images:
        for block, phi in enumerate(model.each_block(x), 1):
            if block in averages:
                averages[block].append(phi.mean((2, 3)).cpu())
        labels.append(classes.cpu())
        predicted.append(model.classify(phi).argmax(1).cpu())
    found = [torch.cat(averages.pop(block)).numpy() for block in chosen]
    _check_finite(found, chosen)
    truth = torch.cat(labels).numpy()
    return BlockFeatures(found, truth, accuracy(torch.cat(predicted).numpy(), truth))


@torch.no_grad()
def count_blocks(model: Classifier, x: Tensor) -> int:
    """How many blocks the network has, seen on an image."""
    return sum(1 for _ in model.each_block(x[:1]))


def spread_blocks(count: int, wanted: int | None) -> list[int]:
    """Numbers from 1 of as many blocks as wanted, evenly spread, the last included."""
    wanted = count if wanted is None else min(wanted, count)
    return [count * step // wanted for step in range(1, wanted + 1)]


def _check_finite(features: Sequence[np.ndarray], blocks: Sequence[int]) -> None:
    for block, x in zip(blocks, features, strict=True):
        if not np.isfinite(x).all():
            raise RunError(
                f"the features behind block {block} are not finite: the network has diverged, or "
                "its images are not normalised as in its training."
            )
