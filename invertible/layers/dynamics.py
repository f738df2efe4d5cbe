"""Residual networks as steps in time that remember where they came from."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Generic, TypeVar

from torch import Tensor, nn
from typing_extensions import override

from ..composition.composite import Composite
from ..module import Member
from .coupling import AdditiveCoupling, Coupling
from .maps import ElementwiseMap
from .streams import Swap
from .subnetwork import expect_module

Changing = TypeVar("Changing", AdditiveCoupling, Coupling)


class _Step(Composite, Generic[Changing]):
    """A step by one function."""

    def __init__(self, f: nn.Module, conditional: bool) -> None:
        super().__init__()
        self.f = expect_module(self, f)
        self._conditional = conditional
        # Not registered: parameters are named f.…, and each is there once.
        self._couplings: list[Changing] = [self._coupling_of(f)]

    @abstractmethod
    def _coupling_of(self, f: nn.Module) -> Changing:
        """The member that evaluates the function."""

    @property
    def _coupling(self) -> Changing:
        if self._couplings[0].f is not self.f:  # replaced by another since
            self._couplings = [self._coupling_of(self.f)]
        return self._couplings[0]


class Momentum(_Step[Coupling]):
    r"""Moves a place by a velocity, into which a function of the place is mixed.

    .. math:: v' = \gamma v + (1 - \gamma) f(x), \qquad x' = x + v'

    A residual network with momentum: any module will do as :math:`f`, of the full width, and
    :math:`\gamma \to 0` is the ordinary step :math:`x' = x + f(x)`. Start at rest, from the pair
    ``(x, torch.zeros_like(x))``, and go on with the first stream of what comes out.

    The inverse divides by :math:`\gamma`, and so magnifies rounding errors by :math:`1 / \gamma` a
    layer: 850 times over 64 layers with :math:`\gamma = 0.9`. In float32 on a CPU, the worst state
    of 16, 64 and 144 such layers was rebuilt with relative errors of 3e-7, 1e-4 and 0.6, in float64
    of 6e-16, 2e-13 and 1e-9; with :math:`\gamma = 0.5` and 16 layers of 2e-3 and 4e-12.
    :func:`measure_drift` tells what they are in your network. Where they are too large, let the
    state be float64 or store some: with ``Rebuild(anchor_every=20)``, for which each of these
    layers counts as two, the 144 were off by 1e-7.

    There is no exact mode, as :math:`\gamma v` rounds: :class:`Leapfrog` has one.

    Args:
        f: Any module whose output has the shape of its input.
        gamma: :math:`\gamma`, between 0 and 1, without these.
        conditional: Whether ``f`` takes a context, ``f(x, context)``, as in
            :class:`AdditiveCoupling`.

    Shape:
        - Input: a pair :math:`x`, :math:`v`, both :math:`(N, *)`.
        - Output: a pair of the same shapes.

    Raises:
        TypeError: If ``f`` is no module; when called, as :class:`Coupling`.
        ValueError: If ``gamma`` is not between 0 and 1; when called, as :class:`Coupling`.
        OverflowError: When inverted on a CPU without grad, if values overflow or become NaN.

    References:
        Sander et al., *Momentum Residual Neural Networks* (2021), section 3,
        https://arxiv.org/abs/2102.07870.

    Example:
        >>> layers = [Momentum(nn.Linear(4, 4)) for _ in range(8)]
        >>> network = InvertibleSequential(*layers, checkpoint=True)
        >>> x = torch.randn(8, 4)
        >>> place, velocity = network((x, torch.zeros_like(x)))
        >>> place.sum().backward()
    """

    def __init__(self, f: nn.Module, gamma: float = 0.9, *, conditional: bool = False) -> None:
        if not (isinstance(gamma, int | float) and 0 < gamma < 1):
            raise ValueError(f"Momentum takes a gamma between 0 and 1, without these, got {gamma}.")
        self._gamma = float(gamma)
        super().__init__(f, conditional)

    @property
    def gamma(self) -> float:
        """What is kept of the velocity."""
        return self._gamma

    @override
    def extra_repr(self) -> str:
        return f"gamma={self.gamma}"

    @override
    def members(self) -> list[Member]:
        return [Member("f", self._coupling, streams=(1, 0)), Member("move", _MOVE)]

    @override
    def _coupling_of(self, f: nn.Module) -> Coupling:
        return Coupling(f, _Mix(self._gamma), conditional=self._conditional)


class Leapfrog(_Step[AdditiveCoupling]):
    r"""Steps from the place before last, by a function of the last.

    .. math:: (x_{k-1}, x_k) \mapsto (x_k, x_{k+1}), \qquad x_{k+1} = x_{k-1} + 2 h f(x_k)

    The explicit midpoint rule for :math:`\dot x = f(x)`, also called leapfrog: a residual network
    of the full width, in which any module will do as :math:`f`. Start from the pair ``(x, x)``, and
    go on with the second stream of what comes out. Rounding errors are not magnified, unlike with
    :class:`Momentum`, and with a ``quantum`` the inverse is bit for bit.

    It is not the ordinary residual step: places of even and of odd number are two sequences, which
    go apart where :math:`f` damps, as when :math:`f(x) = -x`.

    Args:
        f: Any module whose output has the shape of its input.
        step: :math:`h`, not 0.
        quantum: The grid to stay on, as in :class:`AdditiveCoupling`.
        conditional: Whether ``f`` takes a context, ``f(x, context)``, as in
            :class:`AdditiveCoupling`.

    Shape:
        - Input: a pair :math:`x_{k-1}`, :math:`x_k`, both :math:`(N, *)`.
        - Output: a pair of the same shapes.

    Raises:
        TypeError: If ``f`` is no module; when called, as :class:`AdditiveCoupling`.
        ValueError: If ``step`` is 0 or not finite; when called, as :class:`AdditiveCoupling`.

    References:
        Chang et al., *Reversible Architectures for Arbitrarily Deep Residual Neural Networks*
        (2018), https://arxiv.org/abs/1709.03698; Gal et al., *Reversing Large Language Models for
        Efficient Training and Fine-Tuning* (2025), https://arxiv.org/abs/2512.02056.

    Example:
        >>> layers = [Leapfrog(nn.Linear(4, 4), step=0.1) for _ in range(8)]
        >>> network = InvertibleSequential(*layers, checkpoint=True)
        >>> x = torch.randn(8, 4)
        >>> _, last = network((x, x))
        >>> last.sum().backward()
    """

    def __init__(
        self,
        f: nn.Module,
        step: float = 1.0,
        *,
        conditional: bool = False,
        quantum: float | None = None,
    ) -> None:
        if not (isinstance(step, int | float) and math.isfinite(step) and step):
            raise ValueError(f"Leapfrog takes a finite step, not 0, got {step}.")
        self._step = float(step)
        self._quantum = quantum
        super().__init__(f, conditional)

    @property
    def step(self) -> float:
        """The size of the step, h."""
        return self._step

    @override
    def extra_repr(self) -> str:
        return f"step={self.step}" + ("" if self._quantum is None else f", quantum={self._quantum}")

    @override
    def members(self) -> list[Member]:
        return [Member("f", self._coupling), Member("swap", _SWAP)]

    @override
    def _coupling_of(self, f: nn.Module) -> AdditiveCoupling:
        coupling = AdditiveCoupling(f, conditional=self._conditional, quantum=self._quantum)
        coupling._factor = 2 * self._step
        return coupling


class _Mix(ElementwiseMap):
    """Mixes a number with what there is."""

    parameters_per_value = 1

    def __init__(self, kept: float) -> None:
        super().__init__()
        self.kept = kept

    @override
    def forward_and_log_det(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        y = self.kept * x + (1 - self.kept) * parameters[0]
        return y, x.new_full((), math.log(self.kept))

    @override
    def inverse_and_log_det(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        x = (y - (1 - self.kept) * parameters[0]) / self.kept
        return x, y.new_full((), -math.log(self.kept))


_MOVE = AdditiveCoupling(nn.Identity())
_SWAP = Swap()
