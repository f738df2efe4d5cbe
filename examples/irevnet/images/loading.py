"""Images read and cropped by the workers of a DataLoader, in batches on the device."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from experiment.folder import RunError
from images.epochs import CROP, Epochs
from images.image_files import augmented, centre_crop

Batch = tuple[Tensor, Tensor]
Key = tuple[int, int | None]  # index of an image, seed of its augmentation
GRACE = 30  # seconds for which a worker goes on behind SIGTERM


class Source(Protocol):
    """Images that are read one by one."""

    labels: np.ndarray

    def read(self, index: int, mode: str) -> Image.Image:
        """The image as ``"RGB"`` or ``"L"``."""


@dataclass(frozen=True)
class Arrays:
    """A source of images that are in memory.

    Args:
        images: uint8 of shape :math:`(N, H, W)` or :math:`(N, H, W, 3)`.
        labels: :math:`(N,)`.
    """

    images: np.ndarray
    labels: np.ndarray

    def read(self, index: int, mode: str) -> Image.Image:
        """The image as ``"RGB"`` or ``"L"``."""
        return Image.fromarray(self.images[index]).convert(mode)


class Some:
    """Some images of a source.

    Args:
        source: All of them.
        indices: Which are wanted.
    """

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.source = source
        self.indices = indices
        self.labels = source.labels[indices]

    def read(self, index: int, mode: str) -> Image.Image:
        """The image as ``"RGB"`` or ``"L"``."""
        return self.source.read(int(self.indices[index]), mode)


@dataclass(frozen=True)
class Squares(Dataset[Batch]):
    """Squares of the images of a source.

    A batch is asked for by the index and the seed of each image: with a seed the image is augmented
    by a random resized crop and a flip, the same for the same seed in whichever worker; with None
    it is resized and cropped in the centre. It comes as uint8 of shape :math:`(N, H, W, C)`, with
    the labels. What is wrong with an unreadable image is returned in its stead, for
    :class:`LoadedBatches` to raise: raised in a worker it would come back as a traceback.

    Args:
        source: The images.
        size: Side of the squares in pixels.
        resize: Side in pixels that the shorter side gets before the central crop.
        grey: Whether the images get one channel instead of three.
        flip: Whether augmentation mirrors every other image.
    """

    source: Source
    size: int
    resize: int
    grey: bool = False
    flip: bool = True

    def __getitems__(self, keys: Sequence[Key]) -> Batch | str:
        channels = 1 if self.grey else 3
        pixels = torch.empty(len(keys), self.size, self.size, channels, dtype=torch.uint8)
        try:
            for square, key in zip(pixels.numpy(), keys, strict=True):
                square[:] = np.asarray(self._square(*key)).reshape(square.shape)
        except RunError as error:
            return str(error)
        return pixels, torch.from_numpy(self.source.labels[[index for index, _ in keys]])

    def _square(self, index: int, seed: int | None) -> Image.Image:
        image = self.source.read(index, "L" if self.grey else "RGB")
        if seed is None:
            return centre_crop(image, self.size, self.resize)
        return augmented(image, self.size, random.Random(seed), flip=self.flip)


class LoadedBatches:
    """Batches of :class:`Squares` on the device, as uint8 of shape :math:`(N, C, H, W)`.

    Its workers live on from epoch to epoch, and read one at a time.

    Args:
        squares: The images.
        epochs: Which image comes when. Those of a training are augmented.
        workers: Processes that read and crop; 0 does so in this one.
        device: Where the batches go.
    """

    def __init__(
        self, squares: Squares, epochs: Epochs, *, workers: int, device: torch.device
    ) -> None:
        self.images = epochs.images
        self.squares = squares
        self.epochs = epochs
        self.device = device
        self.keys = _Keys(epochs)
        self.loader = DataLoader(
            squares,
            batch_sampler=self.keys,
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=_outlive_signals,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
            # Its own, or reading images would move torch's generator on.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self.epochs)

    def few(self, images: int) -> LoadedBatches:
        """Batches of so many of the images, evenly spread over all; others are not read."""
        some = Some(self.squares.source, np.arange(images) * self.images // images)
        return LoadedBatches(
            replace(self.squares, source=some),
            replace(self.epochs, images=images),
            workers=self.loader.num_workers,
            device=self.device,
        )

    def epoch(self, number: int = 0, start: int = 0) -> Iterator[Batch]:
        """The images and labels of an epoch from its step ``start`` on.

        Raises:
            RuntimeError: If another epoch was begun in between.
        """
        self.keys.wanted = wanted = number, start
        with explaining_dead_workers():
            for batch in self.loader:
                if self.keys.wanted is not wanted:
                    raise RuntimeError(f"epoch {number} ended when another one was begun.")
                if isinstance(batch, str):
                    raise RunError(batch)
                images, labels = (part.to(self.device, non_blocking=True) for part in batch)
                yield images.permute(0, 3, 1, 2).contiguous(), labels


class _Keys:
    """The keys of the batches of an epoch, which is set before the loader begins it."""

    def __init__(self, epochs: Epochs) -> None:
        self.epochs = epochs
        self.wanted = 0, 0  # number of the epoch, step to start from

    def __iter__(self) -> Iterator[list[Key]]:
        number, start = self.wanted
        for step, indices in self.epochs.steps(number, start):
            yield list(zip(indices.tolist(), self._seeds(number, step, len(indices)), strict=True))

    def _seeds(self, number: int, step: int, images: int) -> Sequence[int | None]:
        if not self.epochs.train:
            return [None] * images
        rng = self.epochs.generator(CROP, number, step)
        return self.epochs.share.of(rng.integers(2**62, size=self.epochs.batch_size)).tolist()


def _as_it_is(batch: Batch | str) -> Batch | str:
    return batch


def _outlive_signals(_: int) -> None:
    """Lets a worker serve the step in progress when a signal reaches all processes at once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # not on Windows
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))


@contextmanager
def explaining_dead_workers() -> Iterator[None]:
    """Says what to try when a process that reads images was killed."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise RunError(
            f"a process that reads images died, perhaps out of memory: {error} Try fewer --workers."
        ) from error
