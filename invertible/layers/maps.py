"""Elementwise maps: what a coupling does to each value, given parameters."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override


class ElementwiseMap(nn.Module, ABC):
    r"""A bijection of the real line for each value, told by parameters: what couplings apply.

    .. math:: y_i = m(x_i; \theta_i)

    :class:`Coupling`, :class:`Elementwise` and layers of your own hand it parameters, sum its
    log-derivatives and rebuild it; a map knows nothing of networks. Subclasses define two methods
    and a number. Where all parameters are 0, a map should be the identity, so that a network whose
    last layers are zero starts as one. The layers call a map in float32 or wider.

    Example:
        >>> class Cubic(ElementwiseMap):
        ...     parameters_per_value = 1
        ...
        ...     def forward_and_log_det(self, x, parameters):
        ...         (shift,) = parameters
        ...         z = x + shift
        ...         return z + z**3, (1 + 3 * z**2).log()
        ...
        ...     def inverse_and_log_det(self, y, parameters):
        ...         (shift,) = parameters
        ...         z = (2 / 3**0.5) * ((1.5 * 3**0.5 * y).asinh() / 3).sinh()
        ...         return z - shift, -(1 + 3 * z**2).log()
        >>> layer = Coupling(nn.Linear(2, 2), Cubic())
        >>> x = torch.randn(4, 2), torch.randn(4, 2)
        >>> torch.testing.assert_close(layer.inverse(layer(x)), x, atol=1e-4, rtol=1e-4)
    """

    parameters_per_value: int
    """How many parameters a value takes."""

    volume_preserving: bool = False
    """Whether the derivative is 1 or -1 everywhere."""

    @abstractmethod
    def forward_and_log_det(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        r"""Maps values, and returns :math:`\log |\partial y / \partial x|` of each.

        Args:
            x: Values of any shape.
            parameters: As many tensors as :attr:`parameters_per_value`, stacked along a first
                dimension; each has the shape of ``x``, or one that broadcasts to it.

        Returns:
            The values, and their log-derivatives, which may broadcast to them.
        """

    @abstractmethod
    def inverse_and_log_det(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        r"""Maps values back, and returns :math:`\log |\partial x / \partial y|` of each."""


class Shift(ElementwiseMap):
    r"""Adds a number.

    .. math:: y = x + t

    One parameter: :math:`t`.

    Example:
        >>> y, _ = Shift().forward_and_log_det(torch.zeros(2), torch.ones(1, 2))
        >>> y
        tensor([1., 1.])
    """

    parameters_per_value = 1
    volume_preserving = True

    @override
    def forward_and_log_det(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return x + parameters[0], x.new_zeros(())

    @override
    def inverse_and_log_det(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return y - parameters[0], y.new_zeros(())


class ScaledShift(ElementwiseMap):
    r"""Scales by a factor of its own, and adds a number.

    .. math:: y = a\, x + t

    One parameter: :math:`t`. The factor is part of the map, fixed or learned, one for all values or
    one a channel: the step of a network with momentum, or of RevCol.

    A learned factor keeps its sign and stays away from 0,
    :math:`a = \pm (10^{-3} + \operatorname{softplus}(r))` with the parameter :math:`r`.

    Args:
        factor: :math:`a`, or what it is at the beginning; a number, or one for each channel.
        learned: Whether it is learned.
        dim: The dimension of the channels, where there is one for each.

    Raises:
        ValueError: If a factor is not finite, or nearer to 0 than 0.001.

    References:
        Cai et al., *Reversible Column Networks* (2023), section 3.1,
        https://arxiv.org/abs/2212.11696; Sander et al., *Momentum Residual Neural Networks* (2021),
        section 3, https://arxiv.org/abs/2102.07870.

    Example:
        >>> y, log_slope = ScaledShift(0.5).forward_and_log_det(torch.ones(2), torch.ones(1, 2))
        >>> y, log_slope.exp()
        (tensor([1.5000, 1.5000]), tensor(0.5000))
    """

    parameters_per_value = 1
    least_factor = 1e-3

    sign: Tensor

    def __init__(
        self, factor: float | Sequence[float] | Tensor, *, learned: bool = False, dim: int = 1
    ) -> None:
        super().__init__()
        # Looked at as numbers: a tensor has none on the meta device.
        given = factor.tolist() if isinstance(factor, Tensor) else factor
        numbers = [given] if isinstance(given, int | float) else list(given)
        if not all(
            isinstance(number, int | float) and self.least_factor <= abs(number) < math.inf
            for number in numbers
        ):
            raise ValueError(
                "ScaledShift takes a finite factor at least 0.001 away from 0, or one for each "
                f"channel, got {factor}."
            )
        value = torch.tensor(given, dtype=torch.get_default_dtype())
        size = value.abs()
        self.dim = dim
        self.register_buffer("sign", value.sign())
        if learned:
            rest = (size - self.least_factor).clamp(min=1e-6)
            self.raw_factor = nn.Parameter(rest + (-(-rest).expm1()).log())
        else:
            self.register_buffer("fixed_size", size)

    @property
    def factor(self) -> Tensor:
        """The factor as it is now."""
        return self.sign * self._size()

    @override
    def extra_repr(self) -> str:
        which = self.sign.numel() if self.sign.dim() else self.factor.item()
        what = f"channels={which}" if self.sign.dim() else f"factor={which:.4g}"
        return f"{what}, learned={'raw_factor' in self._parameters}"

    @override
    def forward_and_log_det(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        size = self._for(x)
        return x * (size * self._broadcast(self.sign, x)) + parameters[0], size.log()

    @override
    def inverse_and_log_det(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        size = self._for(y)
        return (y - parameters[0]) / (size * self._broadcast(self.sign, y)), -size.log()

    def _size(self) -> Tensor:
        raw = self._parameters.get("raw_factor")
        if raw is None:
            return self.fixed_size  # type: ignore[return-value]
        return self.least_factor + F.softplus(raw)

    def _for(self, x: Tensor) -> Tensor:
        return self._broadcast(self._size().to(x.dtype), x)

    def _broadcast(self, factor: Tensor, x: Tensor) -> Tensor:
        if factor.dim() == 0:
            return factor
        shape = [1] * x.dim()
        shape[self.dim] = len(factor)
        if x.shape[self.dim] != len(factor):
            raise ValueError(
                f"ScaledShift has factors for {len(factor)} channels along dimension {self.dim}, "
                f"got {x.shape[self.dim]} (input shape {tuple(x.shape)})."
            )
        return factor.view(shape)


ScaleName = Literal["soft-clamp", "glow", "jet", "irn"]

# Sigmoids are cut off where they come so near to 0 that an inverse would overflow.
_LEAST_RAW = -8.0

# The logarithm of the scale, from what f returns.
_LOG_SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "soft-clamp": torch.tanh,
    "glow": lambda raw: F.logsigmoid((raw + 2).clamp(min=_LEAST_RAW)),
    "jet": lambda raw: F.logsigmoid(raw.clamp(min=_LEAST_RAW)) + _LOG_2,
    "irn": lambda raw: (raw / 2).tanh(),
}
_LOG_2 = 0.6931471805599453


class Affine(ElementwiseMap):
    r"""Scales and shifts, by a scale that is bounded.

    .. math:: y = s(r)\, x + t \qquad\text{or, with the shift first,}\qquad y = s(r)\, (x + t)

    Two parameters: the shift :math:`t` and the raw scale :math:`r`. The scales by name:

    ============== ===================================== =========================================
    ``soft-clamp`` :math:`\exp \tanh r`                  within 0.368 and 2.72; 1 at 0, slope 1
    ``irn``        :math:`\exp(2\,\sigma(r) - 1)`        the same; 1 at 0, slope 1/2
    ``jet``        :math:`2\,\sigma(r)`                  up to 2; 1 at 0
    ``glow``       :math:`\sigma(r + 2)`                 up to 1; 0.88 at 0, as in Glow's code
    ============== ===================================== =========================================

    Of the last two, a sigmoid of less than :math:`\sigma(-8) = 0.0003` is taken for that. With an
    unbounded scale, such as :math:`e^r`, values explode after a few couplings, and the inverse is
    lost.

    Args:
        scale: Name of the scale.
        shift_first: Whether the shift comes before the scale, as in Glow.

    Raises:
        ValueError: If there is no such scale.

    References:
        Dinh et al., *Density Estimation using Real NVP* (2017), section 3.2,
        https://arxiv.org/abs/1605.08803; Kingma and Dhariwal, *Glow* (2018), and its code; Xiao et
        al., *Invertible Image Rescaling* (2020), section 3.2, https://arxiv.org/abs/2005.05650;
        Kolesnikov et al., *Jet* (2024), section 3, https://arxiv.org/abs/2412.15129.

    Example:
        >>> shift_and_raw = torch.tensor([[1.0], [0.0]])
        >>> Affine().forward_and_log_det(torch.ones(1), shift_and_raw)
        (tensor([2.]), tensor([0.]))
    """

    parameters_per_value = 2

    def __init__(self, scale: ScaleName = "soft-clamp", *, shift_first: bool = False) -> None:
        super().__init__()
        if scale not in _LOG_SCALES:
            raise ValueError(
                f"Affine takes a scale of {', '.join(map(repr, _LOG_SCALES))}, got {scale!r}. For "
                "another, subclass ElementwiseMap."
            )
        self.scale = scale
        self.shift_first = shift_first

    @override
    def extra_repr(self) -> str:
        return f"scale={self.scale!r}, shift_first={self.shift_first}"

    @override
    def forward_and_log_det(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = parameters
        log_scale = _LOG_SCALES[self.scale](raw)
        scale = log_scale.exp()
        if self.shift_first:
            return (x + shift) * scale, log_scale
        return x * scale + shift, log_scale

    @override
    def inverse_and_log_det(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = parameters
        log_scale = -_LOG_SCALES[self.scale](raw)
        scale = log_scale.exp()
        if self.shift_first:
            return y * scale - shift, log_scale
        return (y - shift) * scale, log_scale
