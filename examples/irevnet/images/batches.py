"""The images that a run trains on and is tested on, whichever they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from experiment.folder import RunError
from experiment.settings import Config
from images.cifar10 import is_cifar10, read_cifar10
from images.colour_jitter import ColourJitter, JitteredBatches
from images.digits import read_digits
from images.epochs import WHOLE, Batches, Epochs, Share
from images.image_folder import read_folders
from images.in_memory import TensorBatches
from images.loading import Arrays, LoadedBatches, Source, Squares
from images.shards import is_hub_name, is_shards, read_hub, read_shards

__all__ = ["Batches", "Data", "Normalise", "Share", "load_data", "load_plain"]


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


def load_data(config: Config, device: torch.device, share: Share = WHOLE) -> Data:
    """The images of ``--data``, or the digits if there is none.

    Args:
        config: The settings of the run; ``batch_size`` counts the images of all processes.
        device: Where the batches go.
        share: The part of each batch that this process reads. Near the end of the test it may be
            of no image, where fewer are left than there are processes.
    """
    if config.batch_size % share.ranks:
        raise RunError(
            f"--batch-size must be a multiple of the {share.ranks} processes, got "
            f"{config.batch_size}."
        )
    train, test, classes, name = _open(config)
    data = Data(
        _training(train, config, device, share),
        _in_order(test, config, device, share),
        classes,
        f"{name}: {len(train.labels):,} images of {classes:,} classes, tested on "
        f"{len(test.labels):,}",
    )
    if len(data.train) == 0:
        raise RunError(
            f"--batch-size {config.batch_size} is above the {data.train.images} training images."
        )
    return data


def load_plain(
    config: Config,
    device: torch.device,
    part: Literal["train", "test"],
    classes: int | None = None,
) -> LoadedBatches:
    """All images of a part in order, as a test shows them to the network; read as they are needed.

    Args:
        config: The settings of the run, of which those of training are ignored.
        device: Where the batches go.
        part: Which images.
        classes: How many there must be; None takes any number.
    """
    train, test, found, name = _open(config)
    if classes not in (None, found):
        raise RunError(
            f"the network tells {classes:,} classes apart, and {name} has {found:,}: give the "
            "--data that it was trained on."
        )
    source = train if part == "train" else test
    epochs = Epochs(len(source.labels), config.batch_size, train=False)
    return _loaded(source, epochs, config, device)


def _open(config: Config) -> tuple[Source, Source, int, str]:
    """Training images, test images, number of classes and a name, whatever ``--data`` is."""
    if config.data is None:
        return _open_digits(config)
    path = Path(config.data)
    if not path.exists() and is_hub_name(config.data):
        return *read_hub(config.data), config.data
    if not path.exists():
        raise RunError(
            f"there is no {path}: --data takes a folder with train/<class>/<image> and "
            "val/<class>/<image>, a folder of train*.parquet and val*.parquet, "
            "cifar-10-python.tar.gz, or owner/name of a data set on the hub."
        )
    if is_cifar10(path):
        return *read_cifar10(path), config.data
    if is_shards(path):
        return *read_shards(path), config.data
    return *read_folders(path), config.data


def _open_digits(config: Config) -> tuple[Source, Source, int, str]:
    if "digits" not in config.preset:
        raise RunError(
            f"--preset {config.preset} trains on images of your own: give --data. Without it only "
            "the presets for digits run."
        )
    name = f"scikit-learn's handwritten digits (8x8, grey), enlarged to {config.image_size} pixels"
    return *read_digits(config.image_size), name


def _training(source: Source, config: Config, device: torch.device, share: Share) -> Batches:
    epochs = Epochs(len(source.labels), config.batch_size, True, config.seed, share)
    if config.augmentation == "shift":
        held = _decoded(source, config, device)
        batches: Batches = TensorBatches(*held, epochs, padding=config.padding, flip=config.flip)
    else:
        batches = _loaded(source, epochs, config, device)
    if any(config.jitter):
        return JitteredBatches(batches, ColourJitter(*config.jitter), epochs)
    return batches


def _in_order(source: Source, config: Config, device: torch.device, share: Share) -> Batches:
    epochs = Epochs(len(source.labels), config.batch_size, train=False, share=share)
    if config.augmentation == "shift":
        return TensorBatches(*_decoded(source, config, device), epochs)
    return _loaded(source, epochs, config, device)


def _decoded(source: Source, config: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    epochs = Epochs(len(source.labels), batch_size=256, train=False)
    images, labels = zip(*_loaded(source, epochs, config, device).epoch(), strict=True)
    return torch.cat(images), torch.cat(labels)


def _loaded(source: Source, epochs: Epochs, config: Config, device: torch.device) -> LoadedBatches:
    size = config.image_size
    # The usual 256 for 224; small images are taken whole.
    resize = size if config.augmentation == "shift" else size * 256 // 224
    squares = Squares(source, size, resize, grey=len(config.mean) == 1, flip=config.flip)
    workers = 0 if isinstance(source, Arrays) else config.workers
    return LoadedBatches(squares, epochs, workers=workers, device=device)
