"""The convolutions of all networks."""

from torch import Tensor, nn
from torch.nn import functional as F


def convolution(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1
) -> nn.Conv2d:
    """A convolution without bias, its odd kernel padded so that the stride alone changes sizes."""
    kind = StridedPointwise if kernel_size == 1 and stride > 1 else nn.Conv2d
    return kind(
        in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False
    )


class StridedPointwise(nn.Conv2d):
    """A 1x1 convolution with a stride: of stride 1, on the pixels that the stride meets.

    With channels last and few channels, oneDNN's own writes past the end of its workspace on a CPU:
    torch 2.13 crashes, hangs or gives wrong gradients. See
    https://github.com/uxlfoundation/oneDNN/issues/6035.
    """

    def forward(self, x: Tensor) -> Tensor:
        down, right = self.stride
        return F.conv2d(x[..., ::down, ::right], self.weight, self.bias)
