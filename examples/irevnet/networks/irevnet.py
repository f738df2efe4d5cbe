"""i-RevNet, assembled from the blocks of ``invertible``.

Jacobsen, Smeulders, Oyallon, *i-RevNet: Deep Invertible Networks* (ICLR 2018),
https://arxiv.org/abs/1802.07088. Where the paper and the authors' released code disagree, the
networks follow the code, since the published weights do.
"""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from invertible import (
    AdditiveCoupling,
    InjectivePad,
    InvertibleModule,
    InvertibleSequential,
    Merge,
    Parallel,
    PixelShuffle,
    PixelUnshuffle,
    Quantize,
    Split,
    Swap,
)
from networks.checks import check_images, check_stages
from networks.convolution import convolution


class IRevNet(nn.Module):
    r"""A classifier whose features can be decoded back to the image.

    .. math:: x_{j+1} = S \tilde x_j, \qquad \tilde x_{j+1} = S x_j + F_j \tilde x_j

    is block :math:`j` on the pair of streams (equation 1 of the paper), where :math:`S` is a
    pixel unshuffle by 2 if the block has stride 2, else the identity, and :math:`F_j` a
    bottleneck. :meth:`features` is :math:`\Phi`, all blocks and nothing lost; only the
    classifier behind it averages and projects.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the images.
        blocks: Number of blocks of each stage, at least 1.
        strides: 1 or 2 for each stage: that of its first block.
        widths: Channels of one stream in each stage. A stage of stride 2 has 4 times the width
            of the one before it, one of stride 1 the same. If the first stage has stride 1 and
            more channels than the image, zeros are appended: the network is then injective.
        downsampling: Factor of the pixel unshuffle before the first block; 1 for none.
        kernel_sizes: Sizes of the three convolutions in each bottleneck, odd.
        inner_widths: Channels between the convolutions of a bottleneck in each stage, by default a
            quarter of the stage's width.
        dropout: Probability of dropout behind the second convolution of each bottleneck.
        checkpoint: Whether training rebuilds the activations instead of storing them.
        quantum: The grid of the states, a power of two; images and residuals are rounded to it.
            Training without stored activations then has the very gradients of ordinary training,
            and an image comes back from its features bit for bit as the network read it.
            None computes in floating point.

    Shape:
        - Input: :math:`(N, C, H, W)` with sides that are multiples of ``stride``, the product
          of ``downsampling`` and all ``strides``.
        - Output: :math:`(N, K)` logits; of :meth:`features`, :math:`(N, 2 w, H/s, W/s)` with
          the last width :math:`w` and ``stride`` :math:`s`, the first stream first.

    Raises:
        ValueError: If the settings do not fit together; when called, on images of another
            shape or type.

    Example:
        >>> settings = {"blocks": (2, 2), "strides": (2, 2), "widths": (24, 96), "downsampling": 2}
        >>> network = IRevNet(10, **settings).eval()
        >>> x = torch.rand(4, 3, 16, 16)
        >>> network(x).shape
        torch.Size([4, 10])
        >>> torch.equal(network.inverse(network.features(x)), network.as_read(x))
        True
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
        kernel_sizes: tuple[int, int, int] = (1, 3, 1),
        inner_widths: Sequence[int] | None = None,
        dropout: float = 0.0,
        checkpoint: bool = True,
        quantum: float | None = 2**-16,
    ) -> None:
        super().__init__()
        check_stages("IRevNet", blocks, strides, widths)
        if inner_widths is None:
            inner_widths = [max(1, width // 4) for width in widths]
        padding = _check_widths(in_channels, downsampling, strides, widths)
        self.in_channels = in_channels
        self.out_channels = 2 * widths[-1]
        self.stride = downsampling * prod(strides)

        layers: list[InvertibleModule] = []
        if quantum is not None:
            layers.append(Quantize(quantum))
        if downsampling > 1:
            layers.append(_unshuffle(downsampling))
        if padding:
            layers.append(InjectivePad(padding))
        layers.append(Split())
        stages = zip(blocks, strides, widths, inner_widths, strict=True)
        for stage, (count, stage_stride, width, inner) in enumerate(stages):
            for block in range(count):
                stride = stage_stride if block == 0 else 1
                bottleneck = Bottleneck(
                    width // stride**2,
                    width,
                    inner,
                    stride=stride,
                    first=stage == block == 0,
                    kernel_sizes=kernel_sizes,
                    dropout=dropout,
                )
                layers += _block(bottleneck, stride, quantum)
        layers.append(Merge())
        self.body = InvertibleSequential(*layers, checkpoint=checkpoint)
        self.norm = nn.BatchNorm2d(self.out_channels, momentum=0.9)
        self.classifier = nn.Linear(self.out_channels, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """The image in other coordinates, the two streams merged."""
        check_images("i-RevNet", x, self.in_channels, self.stride)
        return self.body(x)

    def each_block(self, x: Tensor) -> Iterator[Tensor]:
        """The state behind each block in turn; without grad only the latest is held."""
        check_images("i-RevNet", x, self.in_channels, self.stride)
        state: Any = x  # from Split to Merge a pair
        for layer in self.body:
            state = layer(state)
            if isinstance(layer, Swap):
                yield torch.cat(state, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x))

    def classify(self, phi: Tensor) -> Tensor:
        """The logits of what :meth:`features` returned."""
        return self.classifier(self.norm(phi).relu().mean((2, 3)))

    def as_read(self, x: Tensor) -> Tensor:
        """The image that :meth:`inverse` gives back: rounded to the quantum, if there is one."""
        first = self.body[0]
        return first(x) if isinstance(first, Quantize) else x

    def inverse(self, phi: Tensor) -> Tensor:
        """The image that has these features."""
        if phi.dim() != 4 or phi.shape[1] != self.out_channels:
            raise ValueError(
                f"This i-RevNet decodes features of shape (N, {self.out_channels}, H, W), got "
                f"{tuple(phi.shape)}."
            )
        return self.body.inverse(phi)


class Bottleneck(nn.Sequential):
    """The residual of a block: three times BatchNorm, ReLU, convolution; the first has the stride.

    The layers stand in the order of the released code, so that its weights find their place.
    ``inner`` channels are between the convolutions. Before the first one of the ``first`` block
    are no BatchNorm and no ReLU.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        inner: int,
        *,
        stride: int,
        first: bool = False,
        kernel_sizes: tuple[int, int, int] = (1, 3, 1),
        dropout: float = 0.0,
    ) -> None:
        k1, k2, k3 = kernel_sizes
        super().__init__(
            *([] if first else _norm_relu(in_channels)),
            convolution(in_channels, inner, k1, stride),
            *_norm_relu(inner),
            convolution(inner, inner, k2),
            nn.Dropout(dropout),
            *_norm_relu(inner),
            convolution(inner, out_channels, k3),
        )


def _norm_relu(channels: int) -> list[nn.Module]:
    # In place on what BatchNorm made anew, never on the stream itself.
    return [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]


# The released code has the block offset slowest, the channel fastest.
def _unshuffle(factor: int) -> PixelUnshuffle:
    return PixelUnshuffle(factor, order="offset-major")


def _block(bottleneck: Bottleneck, stride: int, quantum: float | None) -> list[InvertibleModule]:
    """Equation 1 of the paper, on the pair of streams."""
    if stride == 1:
        return [AdditiveCoupling(bottleneck, quantum=quantum), Swap()]
    # F reads the stream before S. Behind S that is the stream shuffled back: the same numbers.
    f = nn.Sequential(PixelShuffle(stride, order="offset-major"), bottleneck)
    both = Parallel(_unshuffle(stride), _unshuffle(stride))
    return [both, AdditiveCoupling(f, quantum=quantum), Swap()]


def _check_widths(
    in_channels: int, downsampling: int, strides: Sequence[int], widths: Sequence[int]
) -> int:
    """How many zero channels make the image as wide as the two streams of the first stage."""
    if downsampling < 1:
        raise ValueError(f"IRevNet takes downsampling of at least 1 (none), got {downsampling}.")
    channels = in_channels * (downsampling * strides[0]) ** 2
    padding = 2 * widths[0] - channels
    if padding < 0 or (padding and strides[0] > 1):
        raise ValueError(
            f"The first stage of this i-RevNet gets {channels} channels, from {in_channels} with "
            f"{downsampling=} and a stride of {strides[0]}: its two streams must share them evenly "
            f"or, with stride 1, may have more, padded with zeros. Got widths[0]={widths[0]}."
        )
    for stage in range(1, len(widths)):
        expected = widths[stage - 1] * strides[stage] ** 2
        if widths[stage] != expected:
            raise ValueError(
                f"Stage {stage} of this i-RevNet has stride {strides[stage]} behind a width of "
                f"{widths[stage - 1]}, so its width must be {expected}, got {widths[stage]}."
            )
    return padding
