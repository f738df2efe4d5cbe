"""Scikit-learn's 1,797 handwritten digits, 8x8 pixels in 17 shades of grey."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from images.loading import Arrays


def read_digits(side: int) -> tuple[Arrays, Arrays, int]:
    """The training and the test images, enlarged to ``side`` pixels, and the number of classes.

    360 are for the test, always the same.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    grey = torch.from_numpy(found.images).float()[:, None] * (255 / 16)
    enlarged = F.interpolate(grey, size=(side, side), mode="bilinear").round().byte()
    images = enlarged[:, 0].numpy()
    train, test = train_test_split(
        range(len(images)), test_size=360, stratify=found.target, random_state=0
    )
    train, test = (Arrays(images[part], found.target[part]) for part in (train, test))
    return train, test, 10
