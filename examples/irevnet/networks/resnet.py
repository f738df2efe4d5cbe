"""ResNet-50 and small relatives, to set i-RevNets beside.

He, Zhang, Ren, Sun, *Deep Residual Learning for Image Recognition* (2015), section 3.3 and table 1,
https://arxiv.org/abs/1512.03385. As in torchvision ("v1.5"), the stride of a block is that of its
3x3 convolution, not of the 1x1 convolution before it. Parameters and buffers bear torchvision's
names, so that its weights load.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

from torch import Tensor, nn

from networks.convolution import convolution
from networks.irevnet import check_images


class ResNet(nn.Module):
    r"""A classifier made of residual blocks.

    .. math:: x_{j+1} = \operatorname{ReLU}(P_j x_j + F_j x_j)

    is block :math:`j` (equation 2 of the paper): :math:`F_j` a bottleneck, :math:`P_j` the
    identity, or a 1x1 convolution where the stride or the width changes.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the images.
        blocks: Number of blocks of each stage, at least 1.
        strides: 1 or 2 for each stage: that of its first block.
        widths: Channels of the 3x3 convolutions in each stage; its output has 4 times as many.
        stem_width: Channels in front of the first stage.
        downsampling: 4 for ImageNet's stem, a 7x7 convolution and max-pooling, both of stride 2;
            1 for a 3x3 convolution.

    Shape:
        - Input: :math:`(N, C, H, W)` with sides that are multiples of ``stride``, the product
          of ``downsampling`` and all ``strides``.
        - Output: :math:`(N, K)` logits; of :meth:`features`, :math:`(N, 4 w, H/s, W/s)` with
          the last width :math:`w` and ``stride`` :math:`s`.

    Raises:
        ValueError: If the settings do not fit together; when called, on images of another
            shape or type.

    Example:
        >>> settings = {"blocks": (1, 1), "strides": (1, 2), "widths": (8, 16)}
        >>> network = ResNet(10, **settings, stem_width=8, downsampling=1)
        >>> network(torch.rand(4, 3, 16, 16)).shape
        torch.Size([4, 10])
    """

    def __init__(
        self,
        num_classes: int,
        *,
        in_channels: int = 3,
        blocks: Sequence[int],
        strides: Sequence[int],
        widths: Sequence[int],
        stem_width: int,
        downsampling: int,
    ) -> None:
        super().__init__()
        check_settings("ResNet", num_classes, in_channels, blocks, strides, widths)
        self.in_channels = in_channels
        self.stride = downsampling * prod(strides)
        for name, layer in stem(in_channels, stem_width, downsampling).items():
            self.add_module(name, layer)
        channels = stem_width
        for stage, (count, stride, width) in enumerate(
            zip(blocks, strides, widths, strict=True), start=1
        ):
            layers = [Bottleneck(channels, width, stride)]
            channels = 4 * width
            layers += [Bottleneck(channels, width, stride=1) for _ in range(count - 1)]
            self.add_module(f"layer{stage}", nn.Sequential(*layers))
        self.fc = nn.Linear(channels, num_classes)
        initialise(self)

    def features(self, x: Tensor) -> Tensor:
        """The state behind the last block."""
        for phi in self.each_block(x):
            x = phi
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x))

    def classify(self, phi: Tensor) -> Tensor:
        """The logits of what :meth:`features` returned."""
        return self.fc(phi.mean((2, 3)))

    def each_block(self, x: Tensor) -> Iterator[Tensor]:
        """The state behind each block in turn; the last is the features.

        Without grad only the latest is held.
        """
        check_images("ResNet", x, self.in_channels, self.stride)
        parts = dict(self.named_children())
        for name in ("conv1", "bn1", "relu", "maxpool"):
            x = parts[name](x)
        for stage in self.children():
            if isinstance(stage, nn.Sequential):
                for block in stage:
                    x = block(x)
                    yield x


class Bottleneck(nn.Module):
    """A block: 1x1, 3x3 and 1x1 convolutions beside a shortcut.

    Args:
        in_channels: Channels of the input.
        width: Channels of the 3x3 convolution; the output has 4 times as many.
        stride: Of the 3x3 convolution.
    """

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = convolution(in_channels, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = convolution(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = convolution(width, 4 * width, 1)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = (
            nn.Sequential(
                convolution(in_channels, 4 * width, 1, stride),
                nn.BatchNorm2d(4 * width),
            )
            if stride > 1 or in_channels != 4 * width
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + shortcut)


def stem(in_channels: int, width: int, downsampling: int) -> dict[str, nn.Module]:
    """What stands before the first stage, under torchvision's names."""
    if downsampling not in (1, 4):
        raise ValueError(
            "The stem has a downsampling of 4, as for ImageNet, or 1, as for small images, got "
            f"{downsampling}."
        )
    small = downsampling == 1
    size, stride = (3, 1) if small else (7, 2)
    return {
        "conv1": convolution(in_channels, width, size, stride),
        "bn1": nn.BatchNorm2d(width),
        "relu": nn.ReLU(inplace=True),
        "maxpool": nn.Identity() if small else nn.MaxPool2d(3, stride=2, padding=1),
    }


def initialise(network: nn.Module) -> None:
    """Draws the convolutions from the normal distribution of He et al., *Delving Deep* (2015)."""
    for part in network.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")


def check_settings(
    network: str,
    num_classes: int,
    in_channels: int,
    blocks: Sequence[int],
    strides: Sequence[int],
    widths: Sequence[int],
) -> None:
    """Raises unless a network can be built of these."""
    if min(num_classes, in_channels) < 1:
        raise ValueError(
            f"{network} takes num_classes and in_channels of at least 1, got {num_classes} and "
            f"{in_channels}."
        )
    if not len(blocks) == len(strides) == len(widths) > 0:
        raise ValueError(
            f"{network} takes one number of blocks, one stride and one width for each stage, got "
            f"{blocks=}, {strides=}, {widths=}."
        )
    if min(blocks) < 1 or min(widths) < 1 or not set(strides) <= {1, 2}:
        raise ValueError(
            f"{network} takes blocks and widths of at least 1 and strides of 1 or 2, got "
            f"{blocks=}, {strides=}, {widths=}."
        )
