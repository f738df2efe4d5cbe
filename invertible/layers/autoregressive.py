"""Autoregressive layers: each value is changed with parameters from those before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from .._support.checks import check_context, expect_real, expect_tensor, name_of
from .._support.no_trace import inverting
from ..module import InvertibleModule
from ..state import Context
from .mapping import apply_map, can_look, expect_map, in_blocks, require_finite, total
from .maps import ElementwiseMap
from .subnetwork import evaluate, expect_module, may_lack_context, name_of_f

Order = Literal["natural", "reversed"] | Sequence[int]


class MaskedAutoregressive(InvertibleModule):
    r"""Changes each value, or token, with parameters that are a function of those before it.

    .. math:: y_i = m(x_i;\, f(x)_i), \qquad f(x)_i \text{ depends on } x_1, \dots, x_{i - 1} \text{
        only}

    The Jacobian is triangular, so the log-determinant is the sum of the map's. The two directions
    differ in cost:

    - ``forward`` is parallel: one evaluation of :math:`f`.
    - ``inverse`` is sequential: an evaluation for each of the :math:`D` values or :math:`T` tokens,
      each of the whole state. With grad, autograd stores all of them. Rounding errors of a value
      reach all later ones.

    So a density is trained fast by a flow that runs this layer forward on data, and sampled
    slowly (MAF); with :class:`Inverse` around the layer it is the other way round (IAF).

    :math:`f` is any module that is *causal*: :class:`MADE` for vectors, :class:`CausalTransformer`
    for tokens, or one of your own. It returns ``map.parameters_per_value`` numbers for each
    value, in blocks along the last dimension as :class:`Coupling` has them. Whether one of your own
    is causal :func:`invertible.testing.inversecheck` tells. The sequential direction looks, too: in
    its last evaluation parameters must be those found before. (On a CPU and without grad; nothing
    looks while a network is trained forward.)

    Reversible checkpointing stores the input of this layer, one state, and runs it again from that:
    the sequential direction is slow and would amplify rounding.

    Args:
        f: Any causal module, from the state to parameters.
        map: What is done to each value, such as :class:`Affine`.
        order: In which order the values or tokens come: ``"natural"``, ``"reversed"``, or the
            numbers from 0 in any order, for instance ``torch.randperm(channels).tolist()``, kept as
            a buffer. :math:`f` is given the state in this order, and need not know. Let it differ
            from layer to layer.
        conditional: Whether ``f`` takes a context, ``f(x, context)``.

    Shape:
        - Input: vectors :math:`(N, D)`, or tokens :math:`(N, T, C)`.
        - Output: the same.
        - ``f``: from the input to :math:`(N, P\, D)` or :math:`(N, T, P\, C)`, with :math:`P`
          parameters a value.

    Raises:
        TypeError: If ``f`` is no module or ``map`` no :class:`ElementwiseMap`; when called on
            anything but a tensor of floating-point numbers, or with a missing or a superfluous
            context.
        ValueError: If ``order`` is none; when called on another number of dimensions, of values
            than ``order`` has, or if what ``f`` returns has another shape; when inverted, if ``f``
            is found not to be causal.
        RuntimeError: When called, if ``f`` changes its input in place.
        OverflowError: When inverted on a CPU without grad, if values overflow or become NaN.

    References:
        Papamakarios et al., *Masked Autoregressive Flow for Density Estimation* (2017), section 3,
        https://arxiv.org/abs/1705.07057; Kingma et al., *Improving Variational Inference with
        Inverse Autoregressive Flow* (2016), https://arxiv.org/abs/1606.04934; Zhai et al.,
        *Normalizing Flows are Capable Generative Models* (2024), https://arxiv.org/abs/2412.06329.

    Example:
        >>> bijection = RationalQuadraticSpline()
        >>> f = MADE(4, bijection.parameters_per_value)
        >>> layer = MaskedAutoregressive(f, bijection, order="reversed")
        >>> y, log_det = layer.forward_and_log_det(torch.randn(8, 4))
        >>> log_det.shape
        torch.Size([8])
        >>> x = layer.inverse(y)  # 4 evaluations of f
    """

    stores_input = True
    permutation: Tensor

    def __init__(
        self,
        f: nn.Module,
        map: ElementwiseMap,  # noqa: A002 - it is one
        *,
        order: Order = "natural",
        conditional: bool = False,
    ) -> None:
        super().__init__()
        self.f = expect_module(self, f)
        self.map = expect_map(self, map)
        self._conditional = conditional
        if isinstance(order, str):
            if order not in ("natural", "reversed"):
                raise ValueError(f"MaskedAutoregressive takes {_ORDERS}, got {order!r}.")
            self._order: str = order
        else:
            self._order = "permuted"
            self.register_buffer("permutation", torch.tensor(_expect_permutation(order)))

    @property
    @override
    def volume_preserving(self) -> bool:
        return self.map.volume_preserving

    @property
    @override
    def conditional(self) -> bool:
        return self._conditional

    @property
    @override
    def requires_context(self) -> bool:
        return self.conditional and not may_lack_context(self.f)

    @override
    def extra_repr(self) -> str:
        return f"order={self._order}" + (", conditional=True" if self.conditional else "")

    @override
    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        return apply_map(self.map, x, self._parameters_for(x, context))[0]

    @override
    def inverse(self, y: Tensor, context: Context = None) -> Tensor:
        return self._solve(y, context)[0]

    @override
    def forward_and_log_det(self, x: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        y, log_slope = apply_map(self.map, x, self._parameters_for(x, context))
        return y, total(log_slope, y)

    @override
    def inverse_and_log_det(self, y: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        x, log_slope = self._solve(y, context)
        return x, total(log_slope, x)

    def _solve(self, y: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Inverts value by value; places that are not known yet are zeros."""
        self._expect(y, inverse=True)
        order = self._in_order(torch.arange(y.shape[1], device=y.device), 0)
        places = torch.arange(y.shape[1], device=y.device)
        places = places if y.dim() == 2 else places[:, None]
        known = torch.zeros_like(y)
        for step in range(y.shape[1] - 1):
            found, _ = self._invert(y, known, context, order[step : step + 1])
            known = torch.where(places == order[step], found, known)
        # Only the last place is missing, on which no parameters depend: all are right.
        x, log_slope = self._invert(y, known, context)
        require_finite(self, x, y)
        self._require_causal(x, torch.where(places == order[-1:], x, known))
        return x, log_slope

    def _invert(
        self, y: Tensor, known: Tensor, context: Context, place: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Inverts the map with the parameters for what is known; at a single place, if it can."""
        with inverting(self.f, y):  # each time from the same random state
            parameters = self._parameters_for(known, context)
        if place is not None and not self._has_channels():
            y, parameters = y.index_select(1, place), parameters.index_select(2, place)
        return apply_map(self.map, y, parameters, inverse=True)

    def _has_channels(self) -> bool:
        """Whether the map may have numbers for each channel, as ScaledShift."""
        return any(True for _ in (*self.map.parameters(), *self.map.buffers()))

    def _parameters_for(self, x: Tensor, context: Context) -> Tensor:
        if (context is None) is self._conditional:
            check_context(self, context)
        self._expect(x)
        found = evaluate(self, self.f, self._in_order(x, 1), context, "a state")
        return self._out_of_order(in_blocks(self, self.f, self.map, found, x, -1), 2)

    def _in_order(self, x: Tensor, dim: int) -> Tensor:
        if self._order == "permuted":
            return x.index_select(dim, self.permutation)
        return x.flip(dim) if self._order == "reversed" else x

    def _out_of_order(self, x: Tensor, dim: int) -> Tensor:
        if self._order == "permuted":
            return x.index_select(dim, self.permutation.argsort())
        return x.flip(dim) if self._order == "reversed" else x

    def _expect(self, x: Tensor, inverse: bool = False) -> None:
        name = name_of(self, inverse)
        if expect_tensor(self, x, inverse=inverse).dim() > 3:
            raise ValueError(
                f"{name} takes vectors (N, D) or tokens (N, T, C), got a tensor of shape "
                f"{tuple(x.shape)}. Put Flatten or Reshape before it."
            )
        if self._order == "permuted" and len(self.permutation) != x.shape[1]:
            raise ValueError(
                f"{name} has an order of {len(self.permutation)} along dimension 1, got "
                f"{x.shape[1]} (input shape {tuple(x.shape)})."
            )
        expect_real(self, x, inverse=inverse)

    def _require_causal(self, x: Tensor, known: Tensor) -> None:
        if not can_look(x) or not x.numel():
            return
        error = (x - known).abs()
        if (error > torch.finfo(x.dtype).eps ** 0.5 * (1 + x.abs().max())).any():
            raise ValueError(
                f"{name_of_f(self, self.f)} is not causal: what it returned for a value or token "
                f"changed when later ones did, and the inverse is off by {error.max():.3g}. Mask "
                "what it sees of them, and of the value itself (MADE and CausalTransformer do). "
                "It must also return the same when it is called again."
            )


_ORDERS = 'an order of "natural", "reversed" or the numbers 0 to D - 1'


def _expect_permutation(order: Sequence[int]) -> list[int]:
    given = list(order)
    numbers = [int(i) for i in given]
    if not numbers or numbers != given or sorted(numbers) != list(range(len(numbers))):
        raise ValueError(f"MaskedAutoregressive takes {_ORDERS}, got {given}.")
    return numbers
