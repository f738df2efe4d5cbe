"""The images that a run trains on and is tested on, whichever they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from image_folder import FolderBatches, ImageFolder, find_classes
from in_memory import TensorBatches
from runs import RunError
from settings import Config


class Batches(Protocol):
    """Pairs of uint8 images and labels on the device, one epoch each time it is iterated over."""

    images: int

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...


@dataclass(frozen=True)
class Data:
    """Training and test images.

    Args:
        train: Shuffled and augmented.
        test: In order, as they are.
        classes: Number of classes.
        description: What it is, in one line.
    """

    train: Batches
    test: Batches
    classes: int
    description: str


class Normalise:
    """Turns uint8 images into what the network takes, on their device.

    Args:
        mean: Of each channel, white being 1.
        std: Of each channel, white being 1.
        device: Where the images are.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self.mean = torch.tensor(mean, device=device)[:, None, None]
        self.std = torch.tensor(std, device=device)[:, None, None]

    def __call__(self, pixels: Tensor) -> Tensor:
        return (pixels.float() / 255 - self.mean) / self.std

    def undo(self, x: Tensor) -> Tensor:
        """The image, white being 1."""
        return x * self.std + self.mean


def load_data(config: Config, device: torch.device) -> Data:
    """The images of ``--data``, or the digits if there is none."""
    data = digits(config, device) if config.data is None else _folders(config.data, config, device)
    if len(data.train) == 0:
        raise RunError(
            f"--batch-size {config.batch_size} is above the {data.train.images} training images."
        )
    return data


def digits(config: Config, device: torch.device) -> Data:
    """Scikit-learn's 1,797 handwritten digits, 360 of them for the test, always the same."""
    if config.preset != "digits":
        raise RunError(
            f"--preset {config.preset} trains on a folder of images: give --data. Without it only "
            "--preset digits runs."
        )
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    grey = torch.from_numpy(found.images).float()[:, None] * (255 / 16)
    images = F.interpolate(grey, size=(config.image_size,) * 2, mode="bilinear").round().byte()
    images = images.expand(-1, len(config.mean), -1, -1).to(device)
    labels = torch.from_numpy(found.target).to(device)
    train, test = train_test_split(
        range(len(labels)), test_size=360, stratify=found.target, random_state=0
    )
    return Data(
        _shifting(images[train], labels[train], config),
        TensorBatches(images[test], labels[test], config.batch_size, train=False),
        classes=10,
        description="scikit-learn's 1,797 handwritten digits (8x8, grey), enlarged to "
        f"{config.image_size}x{config.image_size}",
    )


def _folders(folder: Path, config: Config, device: torch.device) -> Data:
    classes = find_classes(folder / "train")
    in_memory = config.augmentation == "shift"
    sets = []
    for part in ("train", "val"):
        images = ImageFolder(
            folder / part,
            classes,
            size=config.image_size,
            # The usual 256 for 224; small images are taken whole.
            resize=config.image_size if in_memory else config.image_size * 256 // 224,
            grey=len(config.mean) == 1,
            flip=config.flip,
        )
        batches = FolderBatches(
            images,
            config.batch_size,
            train=part == "train" and not in_memory,
            workers=config.workers,
            device=device,
        )
        sets.append(_in_memory(batches, config, part == "train") if in_memory else batches)
    train, test = sets
    return Data(
        train,
        test,
        classes=len(classes),
        description=f"{train.images:,} images of {len(classes):,} classes in {folder}, tested on "
        f"{test.images:,}",
    )


def _in_memory(batches: Batches, config: Config, train: bool) -> TensorBatches:
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    if train:
        return _shifting(images, labels, config)
    return TensorBatches(images, labels, config.batch_size, train=False)


def _shifting(images: Tensor, labels: Tensor, config: Config) -> TensorBatches:
    return TensorBatches(
        images,
        labels,
        config.batch_size,
        train=True,
        padding=config.padding,
        flip=config.flip,
    )
