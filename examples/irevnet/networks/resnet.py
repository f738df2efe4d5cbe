"""ResNet-50 and small relatives, to set i-RevNets beside.

He, Zhang, Ren, Sun, *Deep Residual Learning for Image Recognition* (2015), section 3.3 and table 1,
https://arxiv.org/abs/1512.03385. As in torchvision ("v1.5"), the stride of a block is that of its
3x3 convolution, not of the 1x1 convolution before it. Parameters and buffers bear torchvision's
names, so that its weights load.
"""

from collections.abc import Iterator, Sequence
from math import prod

from torch import Tensor, nn

from networks.checks import check_images, check_stages
from networks.convolution import convolution


class ResNet(nn.Module):
    r"""A classifier made of residual blocks.

    .. math:: x_{j+1} = \operatorname{ReLU}(P_j x_j + F_j x_j)

    is block :math:`j` (equation 2 of the paper): :math:`F_j` a bottleneck, :math:`P_j` the
    identity, or a 1x1 convolution where the stride or the width changes. Shapes and errors are
    those of :class:`IRevNet`, and so are arguments, but for

    Args:
        widths: Channels of the 3x3 convolutions in each stage, and of the stem; the output of a
            stage has 4 times as many.
        downsampling: 4 for ImageNet's stem, a 7x7 convolution and max-pooling, both of stride 2;
            1 for a 3x3 convolution.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        in_channels: int = 3,
        blocks: Sequence[int],
        strides: Sequence[int],
        widths: Sequence[int],
        downsampling: int,
    ) -> None:
        super().__init__()
        check_stages("ResNet", blocks, strides, widths)
        self.in_channels = in_channels
        self.stride = downsampling * prod(strides)
        self.conv1, self.bn1, self.relu, self.maxpool = stem(in_channels, widths[0], downsampling)
        channels = widths[0]
        for stage, (count, stride, width) in enumerate(zip(blocks, strides, widths, strict=True)):
            first = Bottleneck(channels, width, stride)
            channels = 4 * width
            others = (Bottleneck(channels, width, stride=1) for _ in range(count - 1))
            self.add_module(f"layer{stage + 1}", nn.Sequential(first, *others))
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
        """The state behind each block in turn; without grad only the latest is held."""
        check_images("ResNet", x, self.in_channels, self.stride)
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in self.children():
            if isinstance(stage, nn.Sequential):
                for block in stage:
                    x = block(x)
                    yield x


class Bottleneck(nn.Module):
    """A block: 1x1, 3x3 and 1x1 convolutions beside a shortcut."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = convolution(in_channels, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = convolution(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = convolution(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or in_channels != 4 * width:
            self.downsample = nn.Sequential(
                convolution(in_channels, 4 * width, 1, stride), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + shortcut)


def stem(
    in_channels: int, width: int, downsampling: int
) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
    """What stands before the first stage: convolution, BatchNorm, ReLU and pooling."""
    if downsampling not in (1, 4):
        raise ValueError(f"The stem has a downsampling of 4 or 1, got {downsampling}.")
    small = downsampling == 1
    first = convolution(in_channels, width, *((3, 1) if small else (7, 2)))
    pool = nn.Identity() if small else nn.MaxPool2d(3, stride=2, padding=1)
    return first, nn.BatchNorm2d(width), nn.ReLU(inplace=True), pool


def initialise(network: nn.Module) -> None:
    """Draws the convolutions from the normal distribution of He et al., *Delving Deep* (2015)."""
    for part in network.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
