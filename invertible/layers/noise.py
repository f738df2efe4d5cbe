"""Layers that add noise to data, and with it a term to the likelihood."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from typing_extensions import override

from .._support.checks import (
    check_context,
    describe,
    expect_real,
    expect_streams,
    expect_tensor,
    name_of,
    rank_for,
)
from .._support.compiling import can_raise
from ..module import InvertibleModule
from ..state import Context, Pair, has_values
from .mapping import expect_dim, wide


class _AddsNoise(InvertibleModule):
    """Draws in forward, and forgets what was drawn in inverse."""

    bijective = False

    def __init__(self, flow: nn.Module | None) -> None:
        super().__init__()
        if flow is not None and not (
            isinstance(flow, nn.Module) and hasattr(flow, "rsample_and_log_prob")
        ):
            raise TypeError(
                f"{type(self).__name__} takes a conditional Flow, got {describe(flow)}."
            )
        self.flow = flow

    @override
    def inverse_and_log_det(self, y: Any, context: Context = None) -> NoReturn:
        raise NotImplementedError(
            f"{type(self).__name__}'s inverse forgets the noise, so that the density of what it "
            "returns is not known. Sample without log_prob, and ask for log_prob of data."
        )

    def _draw(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Noise from the flow, given what it is added to, and the logarithm of its density."""
        flow: Any = self.flow
        return flow.rsample_and_log_prob((), context)  # type: ignore[no-any-return]


class Dequantize(_AddsNoise):
    r"""Adds noise to whole numbers, so that they have a density, and scales them to :math:`[0, 1)`.

    .. math:: y = \frac{x + u}{L}, \qquad u \sim q(u | x) \text{ in } [0, 1)^D, \qquad
        x = \lfloor L y \rfloor

    The noise is uniform, or that of a conditional flow, whose context is :math:`x / L`:
    variational dequantisation. Neither bijective nor deterministic, the layer has no
    log-determinant. In its place ``forward_and_log_det`` returns a term of the likelihood,

    .. math:: -D \log L - \log q(u | x),

    with which the flow behind it tells a lower bound of the likelihood of the whole numbers, on
    average over the noise: bits per dimension are an upper bound. It is tight if :math:`q` is how
    the flow behind distributes the noise, given the whole numbers; for uniform noise, if its
    density is constant between them.

    The noise comes from torch's generator. Reversible checkpointing stores the input, since
    rounding errors can lead to the next whole number.

    Args:
        levels: :math:`L`, how many whole numbers there are, from 0 on; 256 for images of 8 bits.
        flow: A conditional :class:`Flow` of noise in the shape of the data, whose layer begins with
            :class:`Logit`, so that it is between 0 and 1; None for uniform noise.

    Shape:
        - Input: :math:`(N, *)`, whole numbers, as integers or in float32 or float64.
        - Output: :math:`(N, *)`, float32 or float64 as the input, or in the default dtype for
          uint8 and other integers.

    Raises:
        TypeError: If ``flow`` is no flow; when called on anything but a tensor, or on one in half
            precision or complex.
        ValueError: If ``levels`` is not a whole number from 2 to 65536; when called, if numbers are
            not whole or not within 0 and ``levels - 1``, or the flow's noise has another shape
            or is not between 0 and 1. What is compiled or transformed by ``torch.func`` can't
            raise, and such values become NaN.
        NotImplementedError: When a sample is to be given a density by ``inverse_and_log_det``.

    References:
        Theis et al., *A Note on the Evaluation of Generative Models* (2016), section 3.1,
        https://arxiv.org/abs/1511.01844; Ho et al., *Flow++* (2019), section 3.1,
        https://arxiv.org/abs/1902.00275.

    Example:
        >>> layer = Dequantize()
        >>> images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
        >>> y, term = layer.forward_and_log_det(images)
        >>> torch.equal(layer.inverse(y), images.float())
        True
        >>> (term / (3 * 8 * 8)).exp()
        tensor([0.0039, 0.0039])
    """

    stores_input = True

    def __init__(self, levels: int = 256, flow: nn.Module | None = None) -> None:
        super().__init__(flow)
        if not isinstance(levels, int) or not 2 <= levels <= 2**16:
            raise ValueError(
                f"Dequantize takes a whole number of levels, from 2 to 65536, got {levels!r}."
            )
        self.levels = levels

    @override
    def extra_repr(self) -> str:
        return f"levels={self.levels}"

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self._run(x)[0]

    @override
    def inverse(self, y: Tensor) -> Tensor:
        y = self._expect_precise(expect_tensor(self, y, min_dim=1, inverse=True), inverse=True)
        x = (y * self.levels).floor()
        # Where the product was rounded beyond the next whole number.
        x = x + (y >= (x + 1) / self.levels).to(x.dtype) - (y < x / self.levels).to(x.dtype)
        return x.clamp(0, self.levels - 1)

    @override
    def forward_and_log_det(self, x: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        check_context(self, context)
        return self._run(x)

    def _run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values = self._expect_whole(expect_tensor(self, x, min_dim=1))
        noise, log_q = self._noise(values)
        # Sums may round to the next whole number.
        low = values.detach() / self.levels
        high = ((values.detach() + 1) / self.levels).nextafter(low)
        y = ((values + noise) / self.levels).clamp(low, high)
        size = values.shape[1:].numel()
        return y, -(size * math.log(self.levels) + log_q)

    def _noise(self, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.flow is None:
            # Exactly 0, once in 2**24 times, would be far out behind a Logit.
            noise = torch.rand_like(values).clamp(min=torch.finfo(values.dtype).eps / 4)
            return noise, values.new_zeros(len(values))
        noise, log_q = self._draw(values / self.levels)
        if noise.shape != values.shape:
            raise ValueError(
                f"Dequantize's flow must return noise of the data's shape {tuple(values.shape)}, "
                f"got {describe(noise)}."
            )
        message = (
            "Dequantize's flow must return noise between 0 and 1, got {} among it. Let its layer "
            "begin with Logit()."
        )
        return _required((noise >= 0) & (noise <= 1), noise, message), log_q

    def _expect_whole(self, x: Tensor) -> Tensor:
        if x.is_complex() or x.dtype is torch.bool or x.is_floating_point():
            self._expect_precise(x)
        values = x if x.is_floating_point() else x.to(wide(torch.get_default_dtype()))
        if x.dtype is torch.uint8 and self.levels >= 256:
            return values
        fits = (values == values.round()) & (values >= 0) & (values < self.levels)
        message = (
            f"Dequantize takes whole numbers from 0 to {self.levels - 1}, got {{}} among them. "
            "Give images as they are stored, not scaled to 1, and as many levels as there are."
        )
        return _required(fits, values, message)

    def _expect_precise(self, x: Tensor, inverse: bool = False) -> Tensor:
        if x.dtype not in (torch.float32, torch.float64):
            what = "numbers" if inverse else "whole numbers, as integers or"
            raise TypeError(
                f"{name_of(self, inverse)} takes {what} in float32 or float64, in which there is "
                f"room for noise between whole numbers, got {x.dtype}."
            )
        return x


class Augment(_AddsNoise):
    r"""Puts noise beside the data, in dimensions of its own.

    .. math:: x \mapsto (x, e), \qquad e \sim q(e | x)

    The flow behind it has more dimensions to work in. The noise is normal, or that of a conditional
    flow, whose context is :math:`x`. The inverse drops it. The layer is not bijective and has no
    log-determinant; in its place ``forward_and_log_det`` returns a term of the likelihood,
    :math:`-\log q(e | x)`, with which the flow behind it tells a lower bound of the likelihood, on
    average over the noise: bits per dimension, counted in dimensions of the data, are an upper
    bound. It is tight if :math:`q` is how the flow behind distributes the noise, given the data.

    The noise comes from torch's generator.

    Args:
        flow: A conditional :class:`Flow` of the noise; None for standard normals.
        channels: How many channels of noise, if there is no flow, at least 1.
        dim: The dimension of the channels, not 0; -1 for tokens.

    Shape:
        - Input: :math:`(N, C, *)`.
        - Output: a pair of :math:`(N, C, *)` and :math:`(N, \text{channels}, *)`, or what the flow
          returns.

    Raises:
        TypeError: If ``flow`` is no flow; when called on anything but a tensor of floating-point
            numbers.
        ValueError: If neither ``flow`` nor ``channels`` is given, or both are; if ``channels`` is
            less than 1 or ``dim`` is 0.
        NotImplementedError: When a sample is to be given a density by ``inverse_and_log_det``.

    References:
        Huang et al., *Augmented Normalizing Flows* (2020), section 3,
        https://arxiv.org/abs/2002.07101; Chen et al., *VFlow* (2020), section 3,
        https://arxiv.org/abs/2002.09741.

    Example:
        >>> layer = Augment(channels=2)
        >>> x = torch.randn(5, 1)
        >>> (y, noise), term = layer.forward_and_log_det(x)
        >>> noise.shape, term.shape
        (torch.Size([5, 2]), torch.Size([5]))
        >>> torch.equal(layer.inverse((y, noise)), x)
        True
    """

    def __init__(
        self, flow: nn.Module | None = None, *, channels: int | None = None, dim: int = 1
    ) -> None:
        super().__init__(flow)
        if (flow is None) is (channels is None):
            raise ValueError(
                "Augment takes either channels, for standard normals, or a flow of the noise; got "
                f"flow={describe(flow)} and channels={channels}."
            )
        if channels is not None and channels < 1:
            raise ValueError(f"Augment takes channels of at least 1, got {channels}.")
        self.channels = channels
        self.dim = expect_dim(self, dim)

    @override
    def extra_repr(self) -> str:
        options = {"channels": self.channels, "dim": None if self.dim == 1 else self.dim}
        return ", ".join(f"{name}={value}" for name, value in options.items() if value is not None)

    @override
    def forward(self, x: Tensor) -> Pair:
        return self._run(x)[0]

    @override
    def inverse(self, y: Pair) -> Tensor:
        x, _ = expect_streams(self, y, 2, inverse=True)
        return x

    @override
    def forward_and_log_det(self, x: Tensor, context: Context = None) -> tuple[Pair, Tensor]:
        check_context(self, context)
        return self._run(x)

    def _run(self, x: Tensor) -> tuple[Pair, Tensor]:
        x = expect_real(self, expect_tensor(self, x, min_dim=rank_for(self.dim)))
        if self.flow is not None:
            noise, log_q = self._draw(x)
            return (x, noise), -log_q
        assert self.channels is not None
        shape = list(x.shape)
        shape[self.dim] = self.channels
        noise = torch.randn(shape, dtype=x.dtype, device=x.device)
        minus_log_q = (noise.to(wide(x.dtype)).square() + math.log(2 * math.pi)) / 2
        return (x, noise), minus_log_q.flatten(1).sum(1)


def _required(fits: Tensor, values: Tensor, message: str) -> Tensor:
    """The values if all fit. Others raise, or become NaN where nothing can be raised."""
    if not (can_raise() and has_values(fits)):
        return values.where(fits, math.nan)
    if not fits.all():
        raise ValueError(message.format(f"{values[~fits][0].item():.4g}"))
    return values
