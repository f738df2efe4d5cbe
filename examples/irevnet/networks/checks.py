"""What every network asks of its stages and of the images."""

from collections.abc import Sequence

from torch import Tensor


def check_stages(
    network: str, blocks: Sequence[int], strides: Sequence[int], widths: Sequence[int]
) -> None:
    """Raises unless a network can be built of these."""
    known = len(blocks) == len(strides) == len(widths) > 0
    if not known or min(*blocks, *widths) < 1 or not set(strides) <= {1, 2}:
        raise ValueError(
            f"{network} takes at least 1 block, a stride of 1 or 2 and a width of at least 1 for "
            f"each stage, got {blocks=}, {strides=}, {widths=}."
        )


def check_images(network: str, x: Tensor, in_channels: int, stride: int) -> None:
    """Raises unless these are images that the network can take."""
    if x.dim() != 4 or x.shape[1] != in_channels:
        raise ValueError(
            f"This {network} takes images of shape (N, {in_channels}, H, W), got {tuple(x.shape)}."
        )
    if not x.is_floating_point():
        raise ValueError(
            f"This {network} takes images in floating point, got {x.dtype}. Convert and "
            "normalise them first, for instance x.float() / 255."
        )
    if any(side == 0 or side % stride for side in x.shape[2:]):
        raise ValueError(
            f"This {network} takes sides that are multiples of {stride}, got "
            f"{x.shape[2]}x{x.shape[3]}. Resize, crop or pad the images."
        )
