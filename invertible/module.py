"""The contract that every layer keeps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn

from ._support.checks import check_context
from ._support.generators import accelerators, get_rng_states, same_rng_states
from .state import tensors

Restore = Callable[[Tensor, int], Tensor]
# Its name, the layer, and whether it is run backwards.
Member = tuple[str, "InvertibleModule", bool]


def call(layer: InvertibleModule, x: Any, context: Any) -> Any:
    """Runs a layer, with the context if it takes one."""
    return layer(x, context) if layer.conditional else layer(x)


def call_inverse(layer: InvertibleModule, y: Any, context: Any) -> Any:
    """Runs a layer backwards, with the context if it takes one."""
    inverse: Any = layer.inverse  # the abstract one takes no context
    return inverse(y, context) if layer.conditional else inverse(y)


def _calling(module: nn.Module) -> Callable[..., Any]:
    """A function that calls a module.

    ``module.compile()`` does nothing, in silence, for modules whose forward is torch's own, such as
    ``nn.Sequential`` (torch 2.13): the compiler skips torch's files, but not this one.
    """

    def call_module(*args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    return call_module


def finest(layers: Iterable[InvertibleModule]) -> float | None:
    """The quantum of a composition: its layers' finest, or None if one has none."""
    quanta = [layer.quantum for layer in layers]
    known = [quantum for quantum in quanta if quantum is not None]
    return min(known, default=math.inf) if len(known) == len(quanta) else None


def located(name: str, layer: InvertibleModule) -> str:
    """The note on an error inside a layer of a composition."""
    return f"In layer {name} ({type(layer).__name__}) of an InvertibleSequential."


def restore_state(state: Any, restore: Restore) -> Any:
    """Restores every stream of a state."""
    if isinstance(state, tuple):
        return tuple(restore(stream, i) for i, stream in enumerate(state))
    return restore(state, 0)


def _require_undone(
    layer: InvertibleModule, again: Callable[..., Any], x: Any, y: Any, context: Any
) -> None:
    """Runs a layer on its rebuilt input, and sees whether random numbers led elsewhere.

    A layer that draws several times draws in another order when it is inverted, and what was
    rebuilt is then wrong. Where nothing is drawn, nothing is compared.
    """
    devices = accelerators((x, context))
    before = get_rng_states(devices)
    result = again(layer, x, context)
    if same_rng_states(before, get_rng_states(devices)):
        return
    for found, expected in zip(tensors(result), tensors(y), strict=True):
        error = (found.detach() - expected).norm() / expected.norm()
        if not error <= 0.1:
            raise RuntimeError(
                f"{type(layer).__name__} draws random numbers, and its inverse does not undo "
                f"what was drawn in the forward pass: the rebuilt state is wrong by {error:.2g} "
                "of its norm. Make it an InvertibleSequential of its parts, or override "
                "rebuild_forward and rebuild_inverse."
            )


def zero_log_det(state: Any) -> Tensor:
    """The log-determinant of a layer that preserves volume, one zero an example."""
    first = next(tensors(state))
    return first.new_zeros(first.shape[0])


class InvertibleModule(nn.Module, ABC):
    r"""A layer that can be run backwards: the base class of all layers.

    A layer takes one *state*, a tensor or a tuple of tensors, and returns one state.
    Subclasses define :meth:`forward` and :meth:`inverse`; everything else is derived. The
    laws, which :func:`invertible.testing.inversecheck` checks:

    - ``inverse(forward(x))`` is ``x`` up to rounding; for a :attr:`bijective` layer also
      ``forward(inverse(y))`` is ``y``.
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
        """Whether every output has a pre-image; False for a layer with a left inverse only."""
        return True

    @property
    def volume_preserving(self) -> bool:
        """Whether the Jacobian's determinant is 1 or -1 everywhere, and the log-determinant 0."""
        return False

    @property
    def conditional(self) -> bool:
        """Whether the layer takes a context as its second argument."""
        return False

    @property
    def quantum(self) -> float | None:
        """The grid that the layer keeps a state on, in both directions and bit for bit.

        A layer that rounds what it adds names its quantum :math:`q`: multiples of :math:`q`
        become multiples of :math:`q`. A layer that only moves numbers keeps every grid, and has
        ``math.inf``. None, the default, promises nothing.
        """
        return None

    @property
    def exact(self) -> bool:
        """Whether states on the grid are inverted bit for bit, within its range."""
        return self.quantum is not None

    @abstractmethod
    def forward(self, x: Any) -> Any:
        """Maps a state to a state."""

    @abstractmethod
    def inverse(self, y: Any) -> Any:
        """Maps an output of :meth:`forward` back to its input, and leaves no trace."""

    def forward_and_log_det(self, x: Any, context: Any = None) -> tuple[Any, Tensor]:
        r"""Returns the output and :math:`\log |\det \partial y / \partial x|`, in one pass.

        Shape:
            - Input: a state.
            - Output: a state, and a tensor :math:`(N,)`.

        Raises:
            NotImplementedError: If the layer defines no log-determinant.
        """
        self._require_volume_preserving()
        check_context(self, self.conditional, context)
        return call(self, x, context), zero_log_det(x)

    def inverse_and_log_det(self, y: Any, context: Any = None) -> tuple[Any, Tensor]:
        r"""Returns the pre-image and :math:`\log |\det \partial x / \partial y|`, in one pass.

        Shape:
            - Input: a state.
            - Output: a state, and a tensor :math:`(N,)`.

        Raises:
            NotImplementedError: If the layer defines no log-determinant.
        """
        self._require_volume_preserving()
        check_context(self, self.conditional, context)
        return call_inverse(self, y, context), zero_log_det(y)

    def compile_subnetworks(self, **options: Any) -> Self:
        """Compiles the sub-networks in place, each by itself, with ``torch.compile``.

        This is the way to combine ``torch.compile`` with reversible checkpointing, whose forward
        and rebuilding then run one compiled graph. (A whole network under ``torch.compile`` gives
        right results too, but runs its layers without compiling them.) Parameter names stay as
        they are.

        Args:
            **options: Those of ``torch.compile``.

        Returns:
            The layer itself.
        """
        for part in self.modules():
            if isinstance(part, InvertibleModule):
                for child in part.children():
                    if not isinstance(child, InvertibleModule):
                        child._compiled_call_impl = torch.compile(_calling(child), **options)
        return self

    def rebuild_forward(self, y: Any, restore: Restore, context: Any = None) -> Any:
        """Rebuilds the input of :meth:`forward` from its output, and runs it again.

        Reversible checkpointing calls this in the backward pass, with grad enabled and with
        the buffers, the random state and the autocast setting that ``forward`` saw. What
        autograd saves meanwhile stands in for what it saved in ``forward``: the same operations
        must run in the same order, on inputs that passed through ``restore``.

        By default the layer is inverted and then run. A layer that can do with one evaluation
        of its sub-network overrides this method, as :class:`AdditiveCoupling` does, together with
        :meth:`rebuild_inverse`.

        Args:
            y: The output, cut off from the graph.
            restore: Gives a rebuilt tensor the strides and the ``requires_grad`` that stream
                ``i`` of the input had: ``restore(x, i)``.
            context: The context, for a conditional layer.

        Returns:
            The input, all of it restored.
        """
        with torch.no_grad():
            x = restore_state(call_inverse(self, y, context), restore)
        _require_undone(self, call, x, y, context)
        return x

    def rebuild_inverse(self, x: Any, restore: Restore, context: Any = None) -> Any:
        """Rebuilds the input of :meth:`inverse` from its output, and runs it again.

        The mirror image of :meth:`rebuild_forward`.
        """
        with torch.no_grad():
            y = restore_state(call(self, x, context), restore)
        _require_undone(self, call_inverse, y, x, context)
        return y

    @property
    def _puts_on_grid(self) -> bool:
        """Whether an exact layer takes states beside the grid, and rounds them."""
        return False

    def _members(self, inverted: bool) -> list[Member] | None:  # noqa: ARG002
        """What a composition runs, in running order; None for a layer."""
        return None

    def _require_volume_preserving(self) -> None:
        if not self.volume_preserving:
            raise NotImplementedError(
                f"{type(self).__name__} defines no log-determinant. A layer with a constant one "
                "of 0 sets volume_preserving = True; any other overrides forward_and_log_det and "
                "inverse_and_log_det."
            )
