"""Maps of each value by itself, with parameters of their own or from the context."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from .._support.checks import (
    check_context,
    describe,
    expect_channels,
    expect_real,
    expect_tensor,
    rank_for,
)
from .._support.no_trace import inverting
from ..checkpointing.replay import Replay
from ..module import InvertibleModule
from ..state import Context
from .mapping import (
    apply_map,
    at_all_places,
    expect_dim,
    expect_map,
    in_blocks,
    require_narrow,
    total,
)
from .maps import ElementwiseMap
from .subnetwork import expect_module, name_of_f


class Elementwise(InvertibleModule):
    r"""Changes each value by itself, with parameters for its channel or from the context.

    .. math:: y_{n, c, *} = m(x_{n, c, *};\, \theta_c) \qquad\text{or}\qquad
        y = m(x;\, f(\text{context}))

    Without ``f`` the parameters :math:`\theta` are learned, zeros at the beginning, where most maps
    are the identity. With ``f`` the layer is conditional: as the parameters come from the context
    alone, it changes all channels at once.

    Args:
        map: What is done to each value, such as :class:`Affine`.
        f: Any module from the context to the parameters.
        channels: :math:`C`, how many channels there are, if there is no ``f``.
        dim: The dimension of the channels, not 0; -1 for tokens.

    Shape:
        - Input: :math:`(N, C, *)`.
        - Output: :math:`(N, C, *)`.
        - ``f``: from the context to :math:`(N, P\, C, *)`, with :math:`P` parameters a value in
          blocks as :class:`Coupling` has them, or to :math:`(N, P\, C)` for the same ones at all
          places.

    Raises:
        TypeError: If ``map`` is no :class:`ElementwiseMap`, or ``f`` no module; when called on
            anything but a tensor of floating-point numbers, or with a missing or a superfluous
            context.
        ValueError: If neither ``f`` nor ``channels`` is given, or both are; if ``dim`` is 0; when
            called, if the channels are others, or what ``f`` returns has another shape.

    References:
        Lugmayr et al., *SRFlow* (2020), section 3.3, the affine injector,
        https://arxiv.org/abs/2006.14200.

    Example:
        >>> layer = Elementwise(Affine(), channels=3)
        >>> x = torch.randn(5, 3, 8, 8)
        >>> torch.testing.assert_close(layer(x), x)
        >>> injector = Elementwise(Affine(), nn.Linear(10, 2 * 3))
        >>> y = injector(x, torch.randn(5, 10))
    """

    weight: nn.Parameter | None
    f: nn.Module | None

    def __init__(
        self,
        map: ElementwiseMap,  # noqa: A002 - it is one
        f: nn.Module | None = None,
        *,
        channels: int | None = None,
        dim: int = 1,
    ) -> None:
        super().__init__()
        self.map = expect_map(self, map)
        if (f is None) is (channels is None):
            raise ValueError(
                "Elementwise takes either channels, for parameters of its own, or f, which returns "
                f"them for a context; got f={describe(f)} and channels={channels}."
            )
        self.f = None if f is None else expect_module(self, f)
        self.channels = channels
        self.dim = expect_dim(self, dim)
        shape = None if channels is None else (map.parameters_per_value, channels)
        self.weight = None if shape is None else nn.Parameter(torch.zeros(shape))

    @property
    @override
    def volume_preserving(self) -> bool:
        return self.map.volume_preserving

    @property
    @override
    def conditional(self) -> bool:
        return self.f is not None

    @override
    def extra_repr(self) -> str:
        options = {"channels": self.channels, "dim": None if self.dim == 1 else self.dim}
        return ", ".join(f"{name}={value}" for name, value in options.items() if value is not None)

    @override
    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        return self._run(x, context, inverse=False)[0]

    @override
    def inverse(self, y: Tensor, context: Context = None) -> Tensor:
        return self._run(y, context, inverse=True)[0]

    @override
    def forward_and_log_det(self, x: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        y, log_slope = self._run(x, context, inverse=False)
        return y, total(log_slope, y)

    @override
    def inverse_and_log_det(self, y: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        x, log_slope = self._run(y, context, inverse=True)
        return x, total(log_slope, x)

    @override
    def rebuild(self, y: Tensor, replay: Replay) -> Tensor:
        parameters = self._parameters_for(y, replay.context)
        with torch.no_grad():
            x, _ = apply_map(self.map, y, parameters, inverse=not replay.inverted)
        x = replay.restore(x)
        found, log_slope = apply_map(self.map, x, parameters, inverse=replay.inverted)
        if replay.wants_result:
            replay.returned(found, total(log_slope, x) if replay.log_det else None)
        return x

    def _run(self, x: Tensor, context: Context, inverse: bool) -> tuple[Tensor, Tensor]:
        check_context(self, context)
        if inverse and self.f is not None:
            with inverting(self.f, (x, context)):
                parameters = self._parameters_for(x, context)
        else:
            parameters = self._parameters_for(x, context)
        return apply_map(self.map, x, parameters, inverse)

    def _parameters_for(self, x: Tensor, context: Context) -> Tensor:
        if self.weight is not None:
            expect_channels(self, x, self.weight.shape[1], self.dim)
            return at_all_places(self.map, self.weight.flatten()[None], x, self.dim)
        x = expect_tensor(self, x, min_dim=rank_for(self.dim))
        expect_real(self, x)
        assert self.f is not None
        found = self._from_context(self.f, context)
        flat = x.shape[0], self.map.parameters_per_value * x.shape[self.dim]
        if isinstance(found, Tensor) and found.shape == flat and x.dim() > 2:
            require_narrow(self, self.f, found, x)
            return at_all_places(self.map, found, x, self.dim)
        return in_blocks(self, self.f, self.map, found, x, self.dim, f" or {flat}")

    def _from_context(self, f: nn.Module, context: Context) -> Any:
        try:
            return f(context)
        except Exception as error:
            error.add_note(f"In {name_of_f(self, f)}, given the context ({describe(context)}).")
            raise
