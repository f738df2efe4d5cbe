"""Mixtures of logistic distributions as elementwise maps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from .maps import ElementwiseMap


class LogisticMixture(ElementwiseMap):
    r"""The distribution function of a mixture of logistics, through a logit.

    .. math::

        y = e^{\tanh r} \left( (1 - \epsilon)\, \operatorname{logit}
        \Bigl( \sum_{k=1}^K \pi_k\, \sigma\bigl((x - \mu_k) / s_k\bigr) \Bigr) + \epsilon\, x
        \right) + t

    :math:`3 K + 2` parameters: :math:`K` for the weights :math:`\pi`, through a softmax; the means
    :math:`\mu`; :math:`K` for the scales, :math:`s = \exp(3 \tanh(a / 3))`, within 0.05 and 20;
    the shift :math:`t`, and :math:`r`. Where all are 0 the map is the identity.

    Between components that lie far apart the distribution function is flat, and an inverse would be
    lost. So :math:`\epsilon = 0.01` of :math:`x` itself is mixed in, which the paper does not do:
    before the last scale no slope is below that, whatever the parameters.

    The inverse is found by bisection, to the resolution of the dtype: 32 evaluations of the sum in
    float32, 61 in float64. Two steps of Newton's method follow, which add the last digits, and
    through which derivatives flow: to the third order they are those of the implicit function.

    Args:
        components: :math:`K`, at least 1.

    Raises:
        ValueError: If ``components`` is less than 1.

    References:
        Ho et al., *Flow++* (2019), section 3.2, https://arxiv.org/abs/1902.00275.

    Example:
        >>> mixture = LogisticMixture(components=4)
        >>> x = torch.linspace(-5, 5, 100)
        >>> parameters = torch.randn(mixture.parameters_per_value, 100)
        >>> y, _ = mixture.forward_and_log_det(x, parameters)
        >>> back, _ = mixture.inverse_and_log_det(y, parameters)
        >>> torch.testing.assert_close(back, x, atol=1e-3, rtol=0)
    """

    least_slope = 0.01

    def __init__(self, components: int = 8) -> None:
        super().__init__()
        if components < 1:
            raise ValueError(f"LogisticMixture takes components of at least 1, got {components}.")
        self.components = components
        self.parameters_per_value = 3 * components + 2

    @override
    def extra_repr(self) -> str:
        return f"components={self.components}"

    @override
    def forward_and_log_det(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        *mixture, shift, raw = self._parts(parameters)
        y, slope = self._bend(x, *mixture)
        log_scale = raw.tanh()
        return y * log_scale.exp() + shift, slope.log() + log_scale

    @override
    def inverse_and_log_det(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        *mixture, shift, raw = self._parts(parameters)
        log_scale = raw.tanh()
        y = (y - shift) * (-log_scale).exp()
        x = self._bisect(y.detach(), *(part.detach() for part in mixture))
        for _ in range(2):
            found, slope = self._bend(x, *mixture)
            x = x - (found - y) / slope
        _, slope = self._bend(x, *mixture)
        return x, -slope.log() - log_scale

    def _parts(self, parameters: Tensor) -> tuple[Tensor, ...]:
        """Logarithms of the weights, means, inverse scales; the shift and the raw scale."""
        shape = 3, self.components, *parameters.shape[1:]
        weights, means, raw_scales = parameters[:-2].view(shape)
        rates = (-3 * (raw_scales / 3).tanh()).exp()
        return weights.log_softmax(0), means, rates, parameters[-2], parameters[-1]

    def _bend(
        self, x: Tensor, weights: Tensor, means: Tensor, rates: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the mixture makes of values, and the slopes there."""
        z = (x - means) * rates
        below, above = weights + F.logsigmoid(z), weights + F.logsigmoid(-z)
        # The derivatives of both logarithms: sums of what is positive.
        parts = below.softmax(0) * (-z).sigmoid() + above.softmax(0) * z.sigmoid()
        slope = (rates * parts).sum(0)
        y = below.logsumexp(0) - above.logsumexp(0)
        return self._mix(y, x), (1 - self.least_slope) * slope + self.least_slope

    def _mix(self, y: Tensor, x: Tensor) -> Tensor:
        return (1 - self.least_slope) * y + self.least_slope * x

    def _bisect(self, y: Tensor, weights: Tensor, means: Tensor, rates: Tensor) -> Tensor:
        """Where the mixture is y, between the places where all of its components would be."""
        share = (1 - self.least_slope) * rates
        alone = (y + share * means) / (share + self.least_slope)
        low, high = alone.amin(0), alone.amax(0)
        bits = 53 if y.dtype == torch.float64 else 24
        for _ in range(bits + 8):
            middle = low + (high - low) / 2
            z = (middle - means) * rates
            below, above = weights + F.logsigmoid(z), weights + F.logsigmoid(-z)
            is_low = self._mix(below.logsumexp(0) - above.logsumexp(0), middle) < y
            low, high = middle.where(is_low, low), high.where(is_low, middle)
        return low + (high - low) / 2
