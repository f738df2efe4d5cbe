"""Two types for all data: the images of a part, and which of them comes when."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from errors import RunError
from images.files import augmented, centre_crop

ORDER, CROP, COLOUR, MIX = range(4)  # what random numbers are for: no two uses share them
Key = tuple[int, int | None]  # index of an image, seed of its augmentation


@dataclass(frozen=True)
class Images(Dataset[tuple[Tensor, Tensor]]):
    """The images of one part of a data set, read and cut to squares one by one.

    A batch is asked for by the index and the seed of each image: with a seed the image is augmented
    by a random resized crop and a flip, the same for the same seed in whichever worker; with None
    it is resized and cropped in the centre. It comes as uint8 of shape :math:`(N, H, W, C)`, with
    the labels. What is wrong with an unreadable image is returned in its stead, for
    :class:`Batches` to raise: raised in a worker it would come back as a traceback.
    """

    # the image of an index in a mode of Pillow's, ``"RGB"`` or ``"L"``
    read: Callable[[int, str], Image.Image]
    labels: np.ndarray  # their classes, integers of shape :math:`(N,)`
    classes: tuple[str, ...]  # the classes' names
    files: np.ndarray | None = None  # the images' names in bytes, where they have some
    note: str = ""  # what else there is to say of them
    size: int = 224  # side of the squares in pixels
    resize: int = 256  # side in pixels that the shorter side gets before the central crop
    mode: str = "RGB"  # what the images are read as
    flip: bool = True  # whether augmentation mirrors every other image

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, keys: Sequence[Key]) -> tuple[Tensor, Tensor] | str:
        shape = (len(keys), self.size, self.size, len(self.mode))
        pixels = torch.empty(shape, dtype=torch.uint8)
        try:
            for square, key in zip(pixels.numpy(), keys, strict=True):
                square[:] = np.asarray(self._square(*key)).reshape(square.shape)
        except RunError as error:
            return str(error)
        return pixels, torch.from_numpy(self.labels[[index for index, _ in keys]])

    def _square(self, index: int, seed: int | None) -> Image.Image:
        image = self.read(index, self.mode)
        if seed is None:
            return centre_crop(image, self.size, self.resize)
        return augmented(image, self.size, random.Random(seed), flip=self.flip)

    def at_most(self, count: int | None) -> Images:
        """So many of the images, evenly spread, or all if there are no more."""
        if count is None or count >= len(self):
            return self
        chosen = np.arange(count) * len(self) // count
        return replace(
            self,
            read=partial(_read_chosen, self.read, chosen),
            labels=self.labels[chosen],
            files=None if self.files is None else self.files[chosen],
        )

    def fingerprint(self) -> int:
        """Changes if an image is added, removed, renamed or given another class."""
        found = zlib.crc32(np.asarray(self.labels, np.int64).tobytes())
        return found if self.files is None else zlib.crc32(self.files.tobytes(), found)


def _read_chosen(
    read: Callable[[int, str], Image.Image], chosen: np.ndarray, index: int, mode: str
) -> Image.Image:
    return read(int(chosen[index]), mode)


def of_array(images: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> Images:
    """Images that are in memory: uint8 of shape :math:`(N, H, W)` or :math:`(N, H, W, 3)`."""
    return Images(partial(_from_array, images), labels, tuple(classes))


def _from_array(images: np.ndarray, index: int, mode: str) -> Image.Image:
    return Image.fromarray(images[index]).convert(mode)


def numbered(classes: int) -> tuple[str, ...]:
    """The names of classes that have none."""
    return tuple(map(str, range(classes)))


@dataclass(frozen=True)
class Order:
    """Which image comes when: a function of the seed, the epoch and the step alone.

    No generator moves on from step to step. So a run can be resumed in the middle of an epoch, and
    the processes of a distributed run together read what one process alone would have read.
    """

    images: int  # how many there are
    batch_size: int  # images in a step, those of all processes together
    # whether the images are shuffled and an incomplete last batch is left out, or all are given in
    # their order
    train: bool
    seed: int = 0  # all random numbers depend on it
    rank: int = 0  # this process, 0 to ``ranks - 1``, which reads a part of each batch
    ranks: int = 1  # how many processes share the batches

    def __len__(self) -> int:
        full, rest = divmod(self.images, self.batch_size)
        return full + bool(rest and not self.train)

    def steps(self, epoch: int, start: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """The steps of an epoch from ``start`` on: its number, and this process's images."""
        order = np.arange(self.images)
        if self.train:
            self.generator(ORDER, epoch).shuffle(order)
        for step in range(start, len(self)):
            first = step * self.batch_size
            yield step, self.share(order[first : first + self.batch_size])

    def share(self, batch: np.ndarray) -> np.ndarray:
        """This process's part of what there is one of for each image of a whole batch.

        The parts follow one another and differ by one image at most. A batch of fewer images than
        processes leaves some without any.
        """
        first, last = (len(batch) * rank // self.ranks for rank in (self.rank, self.rank + 1))
        return batch[first:last]

    def generator(self, purpose: int, epoch: int, step: int = 0) -> np.random.Generator:
        """Random numbers for an epoch, or a step of it.

        What is drawn for a step is drawn for the whole batch, of which :meth:`share` takes a part.
        """
        seed = np.random.SeedSequence(self.seed % 2**64, spawn_key=(purpose, epoch, step))
        return np.random.default_rng(seed)


def sent(drawn: np.ndarray, device: torch.device) -> Tensor:
    """What was drawn, on the device, which need not be waited for."""
    tensor = torch.from_numpy(drawn)
    # From other memory, CUDA first finishes what it is at.
    tensor = tensor.pin_memory() if device.type == "cuda" else tensor
    return tensor.to(device, non_blocking=True)
