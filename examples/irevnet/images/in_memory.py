"""Small data: all images in one tensor on the device, batches augmented there."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from images.epochs import CROP, Epochs, sent


class TensorBatches:
    """Batches of images that are kept decoded, as uint8.

    Args:
        images: uint8 of shape :math:`(N, C, H, W)`, on the device.
        labels: :math:`(N,)`, on the device.
        epochs: Which image comes when. Those of a training are augmented, others are left as
            they are.
        padding: Pixels by which augmentation shifts an image at most, black moving in.
        flip: Whether augmentation mirrors every other image.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        epochs: Epochs,
        *,
        padding: int = 0,
        flip: bool = False,
    ) -> None:
        self.data = images, labels
        self.images = len(images)
        self.epochs = epochs
        self.padding = padding
        self.flip = flip

    def __len__(self) -> int:
        return len(self.epochs)

    def epoch(self, number: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The images and labels of an epoch from its step ``start`` on."""
        images, labels = self.data
        for step, indices in self.epochs.steps(number, start):
            chosen = sent(indices, images.device)
            batch = images[chosen]
            if self.epochs.train:
                batch = self._augmented(batch, number, step)
            yield batch, labels[chosen]

    def _augmented(self, images: Tensor, number: int, step: int) -> Tensor:
        rng = self.epochs.generator(CROP, number, step)
        size = self.epochs.batch_size
        corners = rng.integers(2 * self.padding + 1, size=(size, 2))
        mirrored = (rng.random(size) < 0.5) & self.flip
        ours = (sent(self.epochs.share.of(drawn), images.device) for drawn in (corners, mirrored))
        return shifted(images, self.padding, *ours)


def shifted(images: Tensor, padding: int, corners: Tensor, mirrored: Tensor) -> Tensor:
    """Cuts images of the same size out of images with a black frame, and mirrors some.

    Args:
        images: :math:`(N, C, H, W)`.
        padding: Width of the frame in pixels.
        corners: Row and column at which each cut starts in the framed image, integers from 0 to
            ``2 * padding`` of shape :math:`(N, 2)`.
        mirrored: Which of the cut images are mirrored, booleans of shape :math:`(N,)`.
    """
    n, c, h, w = images.shape
    framed = F.pad(images, (padding,) * 4)
    rows = torch.arange(h, device=images.device) + corners[:, :1]
    columns = torch.arange(w, device=images.device)
    columns = torch.where(mirrored[:, None], w - 1 - columns, columns) + corners[:, 1:]
    # All in one gather: 2.4 times as fast as rows, then columns, then the mirror.
    pixels = rows[:, :, None] * framed.shape[3] + columns[:, None]
    pixels = pixels.view(n, 1, h * w).expand(n, c, h * w)
    return framed.flatten(2).gather(2, pixels).view(n, c, h, w)
