"""Which image comes when: a function of the seed, the epoch and the step alone.

No generator moves on from step to step. So a run can be resumed in the middle of an epoch, and the
processes of a distributed run together read what one process alone would have read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

ORDER, CROP, COLOUR = range(3)  # what random numbers are for: no two uses share them


@dataclass(frozen=True)
class Share:
    """The part of each batch that this process reads.

    Args:
        rank: This process, 0 to ``ranks - 1``.
        ranks: How many processes share the batches.
    """

    rank: int = 0
    ranks: int = 1

    def of(self, batch: np.ndarray) -> np.ndarray:
        """This process's part of what there is one of for each image of a whole batch.

        The parts follow one another and differ by one image at most. A batch of fewer images than
        processes leaves some without any.
        """
        first, last = (len(batch) * rank // self.ranks for rank in (self.rank, self.rank + 1))
        return batch[first:last]


WHOLE = Share()


@dataclass(frozen=True)
class Epochs:
    """The steps of each epoch over ``images`` images.

    Args:
        images: How many there are.
        batch_size: Images in a step, those of all processes together.
        train: Whether the images are shuffled and an incomplete last batch is left out, or all
            are given in their order.
        seed: All random numbers depend on it.
        share: The part of each batch that this process reads.
    """

    images: int
    batch_size: int
    train: bool
    seed: int = 0
    share: Share = WHOLE

    def __len__(self) -> int:
        full, rest = divmod(self.images, self.batch_size)
        return full + bool(rest and not self.train)

    def steps(self, number: int, start: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """The steps of an epoch from ``start`` on: its number, and this process's images."""
        order = np.arange(self.images)
        if self.train:
            self.generator(ORDER, number).shuffle(order)
        for step in range(start, len(self)):
            first = step * self.batch_size
            yield step, self.share.of(order[first : first + self.batch_size])

    def generator(self, purpose: int, number: int, step: int = 0) -> np.random.Generator:
        """Random numbers for an epoch, or a step of it.

        What is drawn for a step is drawn for the whole batch, of which :attr:`share` takes a part.
        """
        seed = np.random.SeedSequence(self.seed % 2**64, spawn_key=(purpose, number, step))
        return np.random.default_rng(seed)


def sent(drawn: np.ndarray, device: torch.device) -> Tensor:
    """What was drawn, on the device, which need not be waited for."""
    tensor = torch.from_numpy(drawn)
    # From other memory, CUDA first finishes what it is at.
    tensor = tensor.pin_memory() if device.type == "cuda" else tensor
    return tensor.to(device, non_blocking=True)


class Batches(Protocol):
    """Pairs of uint8 images and labels on the device."""

    images: int  # in the whole set

    def __len__(self) -> int:
        """How many batches an epoch has."""

    def epoch(self, number: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from its step ``start`` on, the same at each call.

        They depend on the seed, the epoch and the step alone.
        """
