"""RevNet-56 and small relatives, assembled from the blocks of ``invertible``.

Gomez, Ren, Urtasun, Grosse, *The Reversible Residual Network* (2017), sections 3.1 and 3.2,
https://arxiv.org/abs/1707.04585. Residuals are preactivated bottlenecks, as in the authors' code,
where the network that the i-RevNet paper calls RevNet-56 is ``revnet-54``.
"""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from invertible import InvertibleSequential, Merge, Quantize, ReversibleBlock, Split
from networks.checks import check_images, check_stages
from networks.convolution import convolution
from networks.irevnet import Bottleneck
from networks.resnet import initialise, stem


class RevNet(nn.Module):
    r"""A classifier of reversible units, with a stored one wherever the stride or width changes.

    .. math:: y_1 = x_1 + F x_2, \qquad y_2 = x_2 + G y_1

    is a unit (equation 6 of the paper) on the two halves of the channels, :math:`F` and :math:`G`
    bottlenecks. The first unit of each stage maps the halves by 1x1 convolutions before it adds:
    it cannot be inverted, and its activations are stored. Shapes and errors are those of
    :class:`IRevNet`, and so are arguments, but for

    Args:
        widths: Channels of both halves in each stage, multiples of 8; the stem has a quarter of
            the first.
        downsampling: 4 or 1, as of :class:`ResNet`.
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
        checkpoint: bool = True,
        quantum: float | None = 2**-16,
    ) -> None:
        super().__init__()
        check_stages("RevNet", blocks, strides, widths)
        if any(width % 8 for width in widths):
            raise ValueError(f"RevNet takes widths that are multiples of 8, got {widths=}.")
        self.in_channels = in_channels
        self.stride = downsampling * prod(strides)
        channels = widths[0] // 4
        self.stem = nn.Sequential(*stem(in_channels, channels, downsampling))
        self.stored, self.reversible = nn.ModuleList(), nn.ModuleList()
        for stage, (count, stride, width) in enumerate(zip(blocks, strides, widths, strict=True)):
            self.stored.append(StoredUnit(channels, width, stride, first=stage == 0))
            grid = [] if quantum is None else [Quantize(quantum)]
            units = (
                ReversibleBlock(_residual(width), _residual(width), quantum=quantum)
                for _ in range(count - 1)
            )
            self.reversible.append(
                InvertibleSequential(*grid, Split(), *units, Merge(), checkpoint=checkpoint)
            )
            channels = width
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, num_classes)
        initialise(self)

    def features(self, x: Tensor) -> Tensor:
        """The state behind the last unit, its halves merged."""
        check_images("RevNet", x, self.in_channels, self.stride)
        dtype = x.dtype  # that of all states: autocast is for the functions between them
        x = self.stem(x)
        for stored, reversible in zip(self.stored, self.reversible, strict=True):
            x = reversible(stored(x).to(dtype))
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x))

    def classify(self, phi: Tensor) -> Tensor:
        """The logits of what :meth:`features` returned."""
        return self.classifier(self.norm(phi).relu().mean((2, 3)))

    def each_block(self, x: Tensor) -> Iterator[Tensor]:
        """The state behind each unit in turn; without grad only the latest is held."""
        check_images("RevNet", x, self.in_channels, self.stride)
        dtype = x.dtype
        state: Any = self.stem(x)  # from Split to Merge a pair
        for stored, reversible in zip(self.stored, self.reversible, strict=True):
            state = stored(state).to(dtype)
            assert isinstance(reversible, InvertibleSequential)
            for layer in reversible:
                state = layer(state)
                if isinstance(layer, Split | ReversibleBlock):
                    yield torch.cat(state, 1)


class StoredUnit(nn.Module):
    """The unit that begins a stage, where stride or width change: both halves are mapped.

    The ``first`` one stands behind the stem's ReLU and needs none of its own.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, *, first: bool) -> None:
        super().__init__()
        channels, width = in_channels // 2, out_channels // 2
        self.f = Bottleneck(channels, width, width // 4, stride=stride, first=first)
        self.g = _residual(out_channels)
        self.project1 = convolution(channels, width, 1, stride)
        self.project2 = convolution(channels, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, 1)
        y1 = self.project1(x1) + self.f(x2)
        return torch.cat((y1, self.project2(x2) + self.g(y1)), 1)


def _residual(width: int) -> Bottleneck:
    """F or G where nothing changes, on one half of so many channels."""
    return Bottleneck(width // 2, width // 2, width // 8, stride=1)
