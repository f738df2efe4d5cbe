"""Batches of images on the device, in the order of training or of a test."""

import random
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_convert

from errors import RunError
from experiment.settings import Config
from images.augmentation import prepare
from images.dataset import Images
from images.readers import open_images

Batch = tuple[Tensor, Tensor]
Key = tuple[int, str | None]  # index of an image, seed of its augmentation
GRACE = 30  # seconds for which a worker goes on behind SIGTERM


@dataclass(frozen=True)
class Squares(Dataset[Batch]):
    """Batches by the index and the seed of each image.

    With a seed the image is augmented, the same in whichever process. What is wrong with an
    unreadable image is returned in place of the batch: raised in a worker it would come back as a
    traceback.
    """

    images: Images
    config: Config

    def __getitems__(self, keys: Sequence[Key]) -> Batch | str:
        size, mode = self.config.image_size, "L" if len(self.config.mean) == 1 else "RGB"
        pixels = torch.empty(len(keys), size, size, len(mode), dtype=torch.uint8)
        try:
            for square, (index, seed) in zip(pixels.numpy(), keys, strict=True):
                rng = None if seed is None else random.Random(seed)
                found = prepare(self.images.read(index, mode), self.config, rng)
                square[:] = np.asarray(found).reshape(square.shape)
        except RunError as error:
            return str(error)
        labels = torch.from_numpy(self.images.labels[[index for index, _ in keys]])
        return pixels.permute(0, 3, 1, 2).contiguous(), labels


@dataclass
class Order:
    """The keys of the batches of an epoch, for this process: a function of the seed and the epoch.

    No generator moves on. So a run can be resumed in the middle of an epoch, and the processes of a
    distributed run together read what one process alone would have read: each its part of every
    batch, of no image where fewer are left than there are processes.
    """

    indices: np.ndarray  # of the images
    config: Config
    train: bool  # shuffled, augmented, without an incomplete last batch; or as they are
    rank: int = 0  # this process
    ranks: int = 1  # how many processes there are
    epoch: int = 0
    start: int = 0  # the step of the epoch to begin with

    def __len__(self) -> int:
        full, rest = divmod(len(self.indices), self.config.batch_size)
        return full + bool(rest and not self.train)

    def __iter__(self) -> Iterator[list[Key]]:
        seed, size = self.config.seed, self.config.batch_size
        order = self.indices.copy()
        if self.train:
            np.random.default_rng([seed, self.epoch]).shuffle(order)
        for first in range(self.start * size, len(self) * size, size):
            batch = order[first : first + size].tolist()
            begin, end = (len(batch) * rank // self.ranks for rank in (self.rank, self.rank + 1))
            keys = [(i, f"{seed} {self.epoch} {i}" if self.train else None) for i in batch]
            yield keys[begin:end]


class Batches:
    """Pairs of normalised images :math:`(N, C, H, W)` and labels on the device."""

    def __init__(self, images: Images, order: Order, device: torch.device) -> None:
        self.images = images
        self.order = order
        self.device = device
        mean, std = torch.tensor([order.config.mean, order.config.std], device=device)
        self.mean, self.std = mean[:, None, None], std[:, None, None]

    def __len__(self) -> int:
        return len(self.order)

    @cached_property
    def _loader(self) -> DataLoader[Batch]:
        config = self.order.config
        return DataLoader(
            Squares(self.images, config),
            batch_sampler=self.order,
            num_workers=config.workers,
            collate_fn=default_convert,  # nothing to join
            worker_init_fn=_outlive_signals,
            pin_memory=self.device.type == "cuda",
            persistent_workers=config.workers > 0,
            # Its own, or reading images would move torch's generator on.
            generator=torch.Generator(),
        )

    def epoch(self, number: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from its step ``start`` on, the same at each call."""
        self.order.epoch, self.order.start = number, start
        for batch in self._loader:
            if isinstance(batch, str):
                raise RunError(batch)
            pixels, labels = (part.to(self.device, non_blocking=True) for part in batch)
            yield (pixels.float() / 255 - self.mean) / self.std, labels

    def undo(self, x: Tensor) -> Tensor:
        """The image that was normalised, white being 1."""
        return x * self.std + self.mean

    def at_most(self, count: int | None) -> "Batches":
        """So many of the images, evenly spread, or all if there are no more."""
        every = self.order.indices
        count = min(len(every), count or len(every))
        chosen = every[np.arange(count) * len(every) // count]
        return Batches(self.images, replace(self.order, indices=chosen), self.device)

    def joined(self) -> Tensor:
        """All images in one batch."""
        return torch.cat([x for x, _ in self.epoch()])


def _outlive_signals(_: int) -> None:
    """Lets a worker serve the step in progress when a signal reaches all processes at once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # not on Windows
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: signal.alarm(GRACE))


def load_training(
    config: Config, device: torch.device, rank: int = 0, ranks: int = 1
) -> tuple[Batches, Batches]:
    """The images of ``--data`` for training and for the test; the ranks as in :class:`Order`."""
    if config.batch_size % (ranks * config.accumulate):
        raise RunError(
            f"--batch-size must be a multiple of {ranks} processes times --accumulate "
            f"{config.accumulate}, got {config.batch_size}."
        )
    train, test = (open_images(config, part) for part in ("train", "test"))
    if config.batch_size > len(train):
        raise RunError(
            f"--batch-size {config.batch_size} is above the {len(train)} training images."
        )
    return (
        Batches(train, Order(np.arange(len(train)), config, True, rank, ranks), device),
        Batches(test, Order(np.arange(len(test)), config, False, rank, ranks), device),
    )


def plain(images: Images, config: Config, device: torch.device) -> Batches:
    """Images in order, as a test shows them to the network."""
    return Batches(images, Order(np.arange(len(images)), config, train=False), device)
