"""Random changes of brightness, contrast, saturation and hue, in batch on the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from images.epochs import COLOUR, Batches, Epochs, sent


class Changes(NamedTuple):
    """What is done to each of N images.

    Args:
        factors: Of brightness, contrast and saturation, 1 changing nothing, and the turn of the
            hue, 1 being the whole circle; float of shape :math:`(N, 4)`.
        order: The order of the four, each row a permutation of 0 to 3; integers of shape
            :math:`(N, 4)`.
    """

    factors: np.ndarray
    order: np.ndarray


@dataclass(frozen=True)
class ColourJitter:
    """Torchvision's ``ColorJitter``: factors and order are drawn anew for each image.

    Args:
        brightness: Factors are drawn from ``1 - brightness`` to ``1 + brightness``, but not below
            0. They multiply the image.
        contrast: Likewise for the distance from the image's mean grey.
        saturation: Likewise for the distance of each pixel from its own grey.
        hue: The largest turn of the hue either way, 0 to 0.5, half of the colour circle.
    """

    brightness: float
    contrast: float
    saturation: float
    hue: float

    def draw(self, images: int, rng: np.random.Generator) -> Changes:
        """Draws the changes of so many images."""
        spread = np.array([self.brightness, self.contrast, self.saturation])
        factors = rng.uniform(np.maximum(1 - spread, 0), 1 + spread, (images, 3))
        turns = rng.uniform(-self.hue, self.hue, (images, 1))
        order = rng.permuted(np.tile(np.arange(4), (images, 1)), axis=1)
        return Changes(np.hstack([factors, turns]).astype(np.float32), order)


def change_colours(images: Tensor, changes: Changes) -> Tensor:
    """Applies the changes to uint8 images of shape :math:`(N, C, H, W)` on any device.

    After each of the four, what leaves the range from black to white is clamped. Torchvision also
    rounds to whole levels each time, its hue to 256 of them; here only the result is rounded.
    Grey images, of one channel, keep saturation and hue.
    """
    x = images.float() / 255
    factors = sent(changes.factors, x.device)[:, :, None, None, None]
    # The images by what is done to them first, then by what is done second, and so on.
    images_by_change = sent(np.argsort(changes.order, axis=0), x.device)
    for turn in range(4):
        counts = np.bincount(changes.order[:, turn], minlength=4).tolist()
        for number, chosen in enumerate(images_by_change[:, turn].split(counts)):
            if number in (0, 1) or x.shape[1] == 3:
                x[chosen] = CHANGES[number](x[chosen], factors[chosen, number])
    return (x * 255).round().byte()


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    mean = _grey(x).mean((1, 2, 3), keepdim=True)
    return torch.lerp(mean, x, factor).clamp(0, 1)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(_grey(x), x, factor).clamp(0, 1)


def _hue(x: Tensor, turn: Tensor) -> Tensor:
    r, g, b = x.unbind(1)
    value, chroma = x.amax(1), x.amax(1) - x.amin(1)
    divisor = chroma.where(chroma > 0, 1)
    # In sixths of the circle: red 0, yellow 1, green 2, cyan 3, blue 4, magenta 5.
    hue = torch.where(
        value == r,
        (g - b) / divisor,
        torch.where(value == g, 2 + (b - r) / divisor, 4 + (r - g) / divisor),
    )
    hue = hue + 6 * turn[:, 0]
    channels = [(hue + offset) % 6 for offset in (5, 3, 1)]
    return torch.stack([value - chroma * torch.minimum(k, 4 - k).clamp(0, 1) for k in channels], 1)


def _grey(x: Tensor) -> Tensor:
    """The brightness of each pixel by ITU-R BT.601, as Pillow has it."""
    if x.shape[1] == 1:
        return x
    r, g, b = x.split(1, dim=1)
    return 0.299 * r + 0.587 * g + 0.114 * b


class JitteredBatches:
    """Batches with their colours changed.

    Args:
        batches: The batches.
        jitter: How much.
        epochs: Which image comes when in them.
    """

    def __init__(self, batches: Batches, jitter: ColourJitter, epochs: Epochs) -> None:
        self.batches = batches
        self.jitter = jitter
        self.epochs = epochs
        self.images = batches.images

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, number: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The images and labels of an epoch from its step ``start`` on."""
        for step, (images, labels) in enumerate(self.batches.epoch(number, start), start):
            rng = self.epochs.generator(COLOUR, number, step)
            changes = self.jitter.draw(self.epochs.batch_size, rng)
            ours = Changes(*(self.epochs.share.of(drawn) for drawn in changes))
            yield change_colours(images, ours), labels


CHANGES = _brightness, _contrast, _saturation, _hue
