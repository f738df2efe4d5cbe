"""Zero channels, appended."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from .._support.checks import FROM_FORWARD, expect_tensor, rank_for
from ..module import InvertibleModule
from ..state import gathered, has_values


class InjectivePad(InvertibleModule):
    r"""Appends zeros along one dimension; the inverse crops them.

    .. math:: x \mapsto [x | 0]

    Not bijective: an output whose last part is not zero has no pre-image, and :meth:`inverse`
    crops it all the same unless a ``tolerance`` is given.

    In a composition with reversible checkpointing and without a quantum, the one or two states are
    stored in which layers behind it first make something else of the zeros: rounding errors in
    their place would spoil gradients where BatchNorm meets them.

    Args:
        channels: How many zeros are appended, at least 1.
        dim: Dimension that grows, not 0; counted from the end if negative.
        tolerance: Largest magnitude that :meth:`inverse` crops without an error; ``None``
            crops anything. With floating-point couplings behind the pad, rounding alone leaves
            about 1e-6 times the scale of the features in float32.

    Shape:
        - Input: :math:`(N, C, *)`.
        - Output: :math:`(N, C + \text{channels}, *)`.

    Raises:
        TypeError: When called on anything but a tensor.
        ValueError: If an argument is out of range; when inverted, if there are too few
            channels to crop, or what would be cropped exceeds ``tolerance``.

    References:
        Jacobsen et al., *i-RevNet* (2018), section 3.1, https://arxiv.org/abs/1802.07088.

    Example:
        >>> layer = InjectivePad(13)
        >>> layer(torch.randn(4, 3, 8, 8)).shape
        torch.Size([4, 16, 8, 8])
        >>> layer.bijective
        False
    """

    bijective = False
    moves_only = True

    def __init__(self, channels: int, dim: int = 1, *, tolerance: float | None = None) -> None:
        super().__init__()
        if not isinstance(channels, int) or channels < 1:
            raise ValueError(
                f"InjectivePad takes a whole number of channels, at least 1, got {channels!r}."
            )
        if dim == 0:
            raise ValueError("InjectivePad cannot take dim=0, the batch; channels are dim=1.")
        if tolerance is not None and not tolerance >= 0:
            raise ValueError(f"InjectivePad takes a tolerance of at least 0, got {tolerance}.")
        self.channels = channels
        self.dim = dim
        self.tolerance = tolerance

    @override
    def extra_repr(self) -> str:
        return f"channels={self.channels}, dim={self.dim}, tolerance={self.tolerance}"

    @override
    def forward(self, x: Tensor) -> Tensor:
        x = expect_tensor(self, x, min_dim=rank_for(self.dim))
        dims_behind = -1 - self.dim if self.dim < 0 else x.dim() - 1 - self.dim
        return F.pad(x, (0, 0) * dims_behind + (0, self.channels))

    @override
    def inverse(self, y: Tensor) -> Tensor:
        y = expect_tensor(self, y, min_dim=rank_for(self.dim), inverse=True)
        kept = y.shape[self.dim] - self.channels
        if kept < 1:
            raise ValueError(
                f"InjectivePad's inverse crops {self.channels} of dimension {self.dim}, got only "
                f"{y.shape[self.dim]} (shape {tuple(y.shape)}). {FROM_FORWARD}"
            )
        if self.tolerance is not None:
            self._require_zero(y.narrow(self.dim, kept, self.channels), self.tolerance)
        return y.narrow(self.dim, 0, kept)

    def _require_zero(self, cropped: Tensor, tolerance: float) -> None:
        if cropped.numel() == 0 or not has_values(cropped):
            return
        if not (cropped.is_floating_point() or cropped.is_complex()):
            cropped = cropped.float()  # bools have no abs, and that of int8's -128 is negative
        largest = gathered(cropped.detach().abs().max())
        # Not "largest > tolerance", which NaN would pass.
        if not bool(largest <= tolerance):
            raise ValueError(
                f"InjectivePad's inverse would crop values up to {largest.item():.3g}, more than "
                f"tolerance={tolerance:g}: no input has this output. Features that were "
                "edited must keep the padded part at zero."
            )
