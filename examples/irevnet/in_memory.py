"""Small data: all images in one tensor on the device, batches augmented there."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F


class TensorBatches:
    """Batches of images that are kept decoded, as uint8.

    Args:
        images: uint8 of shape :math:`(N, C, H, W)`, on the device.
        labels: :math:`(N,)`, on the device.
        batch_size: Images in a batch.
        train: Whether the images are shuffled and augmented and an incomplete last batch is left
            out, or all are given in their order.
        padding: Pixels by which augmentation shifts an image at most, black moving in.
        flip: Whether augmentation mirrors every other image.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        train: bool,
        padding: int = 0,
        flip: bool = False,
    ) -> None:
        self.data = images, labels
        self.images = len(images)
        self.batch_size = batch_size
        self.train = train
        self.padding = padding
        self.flip = flip

    def __len__(self) -> int:
        full, rest = divmod(self.images, self.batch_size)
        return full if self.train else full + bool(rest)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.data
        order = torch.randperm(self.images) if self.train else torch.arange(self.images)
        for indices in order.to(images.device).split(self.batch_size)[: len(self)]:
            batch = images[indices]
            yield (self._augmented(batch) if self.train else batch), labels[indices]

    def _augmented(self, images: Tensor) -> Tensor:
        images = shifted(images, self.padding)
        if not self.flip:
            return images
        mirrored = torch.rand(len(images)).to(images.device) < 0.5
        return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


def shifted(images: Tensor, limit: int) -> Tensor:
    """Moves each image by up to ``limit`` pixels in both directions, black moving in."""
    n, c, h, w = images.shape
    top, left = torch.randint(2 * limit + 1, (2, n)).to(images.device)
    rows = torch.arange(h, device=images.device) + top[:, None]
    columns = torch.arange(w, device=images.device) + left[:, None]
    padded = F.pad(images, (limit,) * 4)
    padded = padded.gather(2, rows[:, None, :, None].expand(n, c, h, padded.shape[3]))
    return padded.gather(3, columns[:, None, None, :].expand(n, c, h, w))
