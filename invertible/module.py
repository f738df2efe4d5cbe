"""The contract that every layer keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from ._support.checks import check_context
from ._support.compiling import calling
from .state import Context, State, streams_of

if TYPE_CHECKING:
    from .checkpointing.replay import Replay


class InvertibleModule(nn.Module, ABC):
    r"""A layer that can be run backwards: the base class of all layers.

    A layer takes one *state*, a tensor or a tuple of tensors, and returns one state.
    Subclasses define :meth:`forward` and :meth:`inverse`; everything else is derived. The
    laws, which :func:`invertible.testing.inversecheck` checks:

    - ``inverse(forward(x))`` is ``x`` up to rounding, and ``forward(inverse(y))`` is ``y``. A
      layer of which only one of the two holds is not :attr:`bijective`.
    - ``inverse`` leaves no trace: buffers, random number generators and the mode are
      afterwards what they were, also in train mode (see :class:`invertible.no_trace`).
    - dtype, device and memory format go through, and both directions are differentiable.

    A layer that uses a context takes it as a second argument, ``forward(x, context)`` and
    ``inverse(y, context)``, and has :attr:`conditional` True; compositions hand their context
    to exactly those layers.

    Example:
        >>> class Negate(InvertibleModule):
        ...     volume_preserving = True
        ...
        ...     def forward(self, x):
        ...         return -x
        ...
        ...     def inverse(self, y):
        ...         return -y
        >>> x = torch.randn(2, 3)
        >>> torch.equal(Negate().inverse(Negate()(x)), x)
        True
    """

    @property
    def bijective(self) -> bool:
        """Whether each direction undoes the other, which is to be injective and surjective."""
        return True

    @property
    def injective(self) -> bool:
        """Whether ``inverse`` undoes ``forward`` whatever it is given, by default True.

        False for :class:`Quantize`, whose ``forward`` throws digits away: its ``inverse`` undoes
        it on the grid only.
        """
        return True

    @property
    def surjective(self) -> bool:
        """Whether every output has a pre-image, and ``forward`` undoes ``inverse``.

        By default what :attr:`bijective` says: False for a layer with a left inverse only, such as
        :class:`InjectivePad`, whose ``inverse`` throws numbers away. Outputs of :class:`Quantize`
        are states on the grid, and each of them has a pre-image.
        """
        return self.bijective

    @property
    def volume_preserving(self) -> bool:
        """Whether the Jacobian's determinant is 1 or -1 everywhere, and the log-determinant 0."""
        return False

    @property
    def conditional(self) -> bool:
        """Whether the layer takes a context as its second argument."""
        return False

    @property
    def requires_context(self) -> bool:
        """Whether a conditional layer can't do without its context."""
        return self.conditional

    stores_input: bool = False
    """Whether reversible checkpointing stores what enters the layer, instead of rebuilding it.

    For a layer whose inverse takes longer than its forward, or forgets digits: its input is then
    as good as an anchor of :class:`Rebuild`, at the price of one state.
    """

    @property
    def moves_only(self) -> bool:
        """Whether the layer only moves numbers, and neither computes nor draws.

        Such a layer is exact on every grid, and reversible checkpointing undoes it for nothing.
        """
        return False

    @property
    def quantum(self) -> float | None:
        """The grid that the layer keeps a state on, in both directions and bit for bit.

        A layer that rounds what it adds names its quantum :math:`q`: multiples of :math:`q`
        become multiples of :math:`q`. None, the default, promises nothing.
        """
        return None

    @property
    def exact(self) -> bool:
        """Whether states on the grid are inverted bit for bit, within its range."""
        return self.moves_only or self.quantum is not None

    @abstractmethod
    @override
    def forward(self, x: Any) -> Any:
        """Maps a state to a state."""

    @abstractmethod
    def inverse(self, y: Any) -> Any:
        """Maps an output of :meth:`forward` back to its input, and leaves no trace."""

    def forward_and_log_det(self, x: Any, context: Context = None) -> tuple[Any, Tensor]:
        r"""Returns the output and :math:`\log |\det \partial y / \partial x|`, in one pass.

        Shape:
            - Input: a state.
            - Output: a state, and a tensor :math:`(N,)`.

        Raises:
            NotImplementedError: If the layer defines no log-determinant.
        """
        self._require_volume_preserving()
        check_context(self, context)
        return self(x, context) if self.conditional else self(x), zeros_for(x)

    def inverse_and_log_det(self, y: Any, context: Context = None) -> tuple[Any, Tensor]:
        r"""Returns the pre-image and :math:`\log |\det \partial x / \partial y|`, in one pass.

        Shape:
            - Input: a state.
            - Output: a state, and a tensor :math:`(N,)`.

        Raises:
            NotImplementedError: If the layer defines no log-determinant.
        """
        self._require_volume_preserving()
        check_context(self, context)
        inverse: Any = self.inverse  # the abstract one takes no context
        return inverse(y, context) if self.conditional else inverse(y), zeros_for(y)

    def rebuild(self, y: Any, replay: Replay) -> Any:
        """Rebuilds the input of a run from its output, and runs it again for autograd.

        Reversible checkpointing calls this in the backward pass, for each of the layer's four
        methods alike: ``replay`` says which one ran. What autograd saves meanwhile stands in for
        what it saved in the forward pass, so the same operations must run in the same order, with
        grad, on inputs that passed through :meth:`Replay.restore`.

        By default the layer is inverted and then run, two evaluations of its sub-networks. A
        layer that can do with one overrides this method, as :class:`AdditiveCoupling` does.

        Args:
            y: The output, cut off from the graph.
            replay: What ran, and what it needs to run again: see :class:`Replay`.

        Returns:
            The input.
        """
        x = replay.undo(y)
        replay.rerun(x)
        return x

    def members(self) -> Sequence[Member] | None:
        """The layers that a composition runs, in the order of its ``forward``; None for a layer.

        See :class:`Composite`.
        """
        return None

    def compile_subnetworks(self, **options: Any) -> Self:
        """Compiles the sub-networks in place, each by itself, with ``torch.compile``.

        For what ``torch.compile(network)`` can't have in one graph while it rebuilds activations,
        such as dropout and exact mode: forward and rebuilding run the same compiled sub-networks.
        Parameter names stay as they are.

        Args:
            **options: Those of ``torch.compile``.

        Returns:
            The layer itself.
        """
        for part in self.modules():
            if isinstance(part, InvertibleModule):
                for child in part.children():
                    if not isinstance(child, InvertibleModule):
                        child._compiled_call_impl = torch.compile(calling(child), **options)
        return self

    @override
    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        state.pop("_plans", None)  # what plan_for keeps is of this very object
        return state

    # Whether forward and inverse return the tensors themselves that they are given, rearranged.
    _hands_through = False

    def _states_inside(self, x: Any, inverted: bool) -> Sequence[State]:  # noqa: ARG002
        """The states between the steps of an exact layer that takes several."""
        return ()

    def _require_volume_preserving(self) -> None:
        if not self.volume_preserving:
            raise NotImplementedError(
                f"{type(self).__name__} defines no log-determinant. A layer with a constant one "
                "of 0 sets volume_preserving = True; any other overrides forward_and_log_det and "
                "inverse_and_log_det."
            )


class Member(NamedTuple):
    """A layer of a composition, as :meth:`InvertibleModule.members` lists it."""

    name: str
    """Name of the layer in the composition, as in ``named_children``."""
    layer: InvertibleModule
    """The layer."""
    inverted: bool = False
    """Whether the composition's ``forward`` runs the layer's ``inverse``."""
    streams: int | tuple[int, ...] | None = None
    """Which streams of the state the layer gets, None for all; a number hands over a bare tensor, a
    tuple of numbers a tuple."""


def zeros_for(state: State) -> Tensor:
    """The log-determinant of a layer that preserves volume, one zero an example."""
    first = streams_of(state)[0]
    # Dynamo can't trace dtype.to_real().
    dtype = first.real.dtype if first.is_complex() else first.dtype
    if not dtype.is_floating_point:
        dtype = torch.get_default_dtype()
    return first.new_zeros(first.shape[0], dtype=dtype)
