"""Random changes of brightness, contrast, saturation and hue, in batch on the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from images.dataset import sent


def draw_changes(
    jitter: Sequence[float], images: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draws factors and order for each image by itself, as torchvision's ``ColorJitter`` does.

    Args:
        jitter: Brightness, contrast, saturation and hue. Factors of the first three are drawn from
            ``1 - jitter`` to ``1 + jitter``, but not below 0: of the image, of the distance from
            its mean grey, and of that of each pixel from its own grey. The fourth is the largest
            turn of the hue either way, 0 to 0.5, half of the colour circle.
        images: How many.
        rng: Draws.

    Returns:
        Factors and turn, float of shape :math:`(N, 4)`, and the order of the four, each row a
        permutation of 0 to 3.
    """
    spread, hue = np.array(jitter[:3]), jitter[3]
    factors = rng.uniform(np.maximum(1 - spread, 0), 1 + spread, (images, 3))
    turns = rng.uniform(-hue, hue, (images, 1))
    order = rng.permuted(np.tile(np.arange(4), (images, 1)), axis=1)
    return np.hstack([factors, turns]).astype(np.float32), order


def change_colours(images: Tensor, factors: np.ndarray, order: np.ndarray) -> Tensor:
    """Applies what was drawn to uint8 images of shape :math:`(N, C, H, W)` on any device.

    After each of the four, what leaves the range from black to white is clamped. Torchvision also
    rounds to whole levels each time, its hue to 256 of them; here only the result is rounded.
    Grey images, of one channel, keep saturation and hue.
    """
    x = images.float() / 255
    amounts = sent(factors, x.device)[:, :, None, None, None]
    # The images by what is done to them first, then by what is done second, and so on.
    images_by_change = sent(np.argsort(order, axis=0), x.device)
    for turn in range(4):
        counts = np.bincount(order[:, turn], minlength=4).tolist()
        for number, chosen in enumerate(images_by_change[:, turn].split(counts)):
            if number in (0, 1) or x.shape[1] == 3:
                x[chosen] = CHANGES[number](x[chosen], amounts[chosen, number])
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


CHANGES = _brightness, _contrast, _saturation, _hue
