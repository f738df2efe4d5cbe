"""Fixed maps between the real line and a part of it."""

from __future__ import annotations

from abc import abstractmethod
from math import log

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from .._support.checks import check_context, expect_real, expect_tensor
from .._support.memory_format import in_format_of
from ..module import InvertibleModule
from ..state import Context
from .mapping import total, wide


class _Squashing(InvertibleModule):
    """A fixed map of each value, written as functions of values in float32 or wider."""

    # Where it is flat, the output has forgotten the input, which is stored rather than rebuilt.
    stores_input = True

    @override
    def forward(self, x: Tensor) -> Tensor:
        return in_format_of(x, self._forward(self._enter(x)).to(x.dtype))

    @override
    def inverse(self, y: Tensor) -> Tensor:
        return in_format_of(y, self._inverse(self._enter(y, inverse=True)).to(y.dtype))

    @override
    def forward_and_log_det(self, x: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        check_context(self, context)
        values = self._enter(x)
        y = in_format_of(x, self._forward(values).to(x.dtype))
        return y, total(self._log_slope(values), x)

    @override
    def inverse_and_log_det(self, y: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        check_context(self, context)
        values = self._inverse(self._enter(y, inverse=True))
        x = in_format_of(y, values.to(y.dtype))
        return x, -total(self._log_slope(values), y)

    def _enter(self, x: Tensor, inverse: bool = False) -> Tensor:
        expect_real(self, expect_tensor(self, x, inverse=inverse), inverse=inverse)
        return x.to(wide(x.dtype))

    @abstractmethod
    def _forward(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _inverse(self, y: Tensor) -> Tensor: ...

    @abstractmethod
    def _log_slope(self, x: Tensor) -> Tensor:
        """The logarithm of the derivative of forward."""


class Sigmoid(_Squashing):
    r"""Maps numbers to those between 0 and 1.

    .. math:: y = \sigma(x) = \frac{1}{1 + e^{-x}}

    The output stays within the smallest normal number and :math:`1 - \epsilon`, and the inverse
    takes what is beyond for these, so that all values, log-determinants and gradients are finite.
    Numbers beyond :math:`\pm 16` in float32 can't come back: their outputs are equal. Reversible
    checkpointing therefore stores the input.

    Shape:
        - Input: :math:`(N, C, *)`.
        - Output: :math:`(N, C, *)`.

    Raises:
        TypeError: When called on anything but a tensor of floating-point numbers.

    Example:
        >>> y, log_det = Sigmoid().forward_and_log_det(torch.zeros(1, 1))
        >>> y, log_det.exp()
        (tensor([[0.5000]]), tensor([0.2500]))
    """

    @override
    def _forward(self, x: Tensor) -> Tensor:
        return _in_unit_interval(x.sigmoid())

    @override
    def _inverse(self, y: Tensor) -> Tensor:
        return _in_unit_interval(y).logit()

    @override
    def _log_slope(self, x: Tensor) -> Tensor:
        return _log_slope_of_sigmoid(x)


class Logit(_Squashing):
    r"""Maps numbers between 0 and 1 to all numbers: the inverse of :class:`Sigmoid`.

    .. math:: y = \log \frac{x}{1 - x}

    Numbers at the ends or beyond are taken for the nearest within, as in :class:`Sigmoid`: in
    float32 those from 0 to 1 become numbers between -87 and 16.

    Shape:
        - Input: :math:`(N, C, *)`.
        - Output: :math:`(N, C, *)`.

    Raises:
        TypeError: When called on anything but a tensor of floating-point numbers.

    Example:
        >>> Logit()(torch.full((1, 1), 0.5))
        tensor([[0.]])
    """

    @override
    def _forward(self, x: Tensor) -> Tensor:
        return _in_unit_interval(x).logit()

    @override
    def _inverse(self, y: Tensor) -> Tensor:
        return _in_unit_interval(y.sigmoid())

    @override
    def _log_slope(self, x: Tensor) -> Tensor:
        return -_log_slope_of_sigmoid(_in_unit_interval(x).logit())


class Tanh(_Squashing):
    r"""Maps numbers to those between -1 and 1.

    .. math:: y = \tanh x

    The output stays :math:`\epsilon` away from the ends, and the inverse takes what is beyond for
    that, as in :class:`Sigmoid`; numbers beyond :math:`\pm 8` in float32 can't come back.

    Shape:
        - Input: :math:`(N, C, *)`.
        - Output: :math:`(N, C, *)`.

    Raises:
        TypeError: When called on anything but a tensor of floating-point numbers.

    Example:
        >>> x = torch.randn(4, 3)
        >>> torch.testing.assert_close(Tanh().inverse(Tanh()(x)), x, rtol=1e-3, atol=1e-4)
    """

    @override
    def _forward(self, x: Tensor) -> Tensor:
        return _within_one(x.tanh())

    @override
    def _inverse(self, y: Tensor) -> Tensor:
        return _within_one(y).atanh()

    @override
    def _log_slope(self, x: Tensor) -> Tensor:
        return 2 * log(2) + _log_slope_of_sigmoid(2 * x)


class Softplus(_Squashing):
    r"""Maps numbers to positive ones.

    .. math:: y = \log(1 + e^x)

    The output is the smallest normal number at least, and the inverse takes what is below for that,
    as in :class:`Sigmoid`; numbers below -87 in float32 can't come back.

    Shape:
        - Input: :math:`(N, C, *)`.
        - Output: :math:`(N, C, *)`.

    Raises:
        TypeError: When called on anything but a tensor of floating-point numbers.

    Example:
        >>> x = torch.randn(4, 3)
        >>> torch.testing.assert_close(Softplus().inverse(Softplus()(x)), x, rtol=1e-3, atol=1e-4)
    """

    @override
    def _forward(self, x: Tensor) -> Tensor:
        # Not F.softplus, which is x itself from 20 on: wrong in float64.
        return _positive(-F.logsigmoid(-x))

    @override
    def _inverse(self, y: Tensor) -> Tensor:
        y = _positive(y)
        return y + (-(-y).expm1()).log()

    @override
    def _log_slope(self, x: Tensor) -> Tensor:
        return F.logsigmoid(x)


def _log_slope_of_sigmoid(x: Tensor) -> Tensor:
    return F.logsigmoid(x) + F.logsigmoid(-x)


def _in_unit_interval(x: Tensor) -> Tensor:
    found = torch.finfo(x.dtype)
    return x.clamp(found.tiny, 1 - found.eps)


def _within_one(x: Tensor) -> Tensor:
    most = 1 - torch.finfo(x.dtype).eps
    return x.clamp(-most, most)


def _positive(x: Tensor) -> Tensor:
    return x.clamp(min=torch.finfo(x.dtype).tiny)
