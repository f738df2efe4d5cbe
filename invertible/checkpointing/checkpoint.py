"""Reversible checkpointing: activations are rebuilt by inversion instead of being stored."""

from __future__ import annotations

from typing import Any

from .._support.checks import check_context
from ..direction import Direction
from ..module import InvertibleModule
from ..state import Context
from .follow import asking
from .run import run
from .settings import Rebuild


def reversible_checkpoint(
    module: InvertibleModule,
    x: Any,
    context: Context = None,
    *,
    log_det: bool = False,
    rebuild: Rebuild = Rebuild(),  # noqa: B008, it is immutable
) -> Any:
    r"""Runs an invertible module without storing its activations.

    Like ``torch.utils.checkpoint.checkpoint``, but not even the inputs of the layers are kept:
    the backward pass rebuilds them from the output, layer by layer. The result is
    ``module(x)``, and the graph is the ordinary one: gradients, hooks, frozen parameters,
    double backward and distributed wrappers work as they do without it, up to the rounding of
    the inversion.

    A composition, however nested, is taken apart into its layers; any other module counts as one
    layer, all of whose activations are rebuilt at once. Without grad it is the plain call, and
    with a warning also under ``torch.func`` transforms, where autograd allows no such hooks, and
    under forward-mode derivatives.

    Args:
        module: The module; ``Inverse(module)`` for the other direction.
        x: Its input state.
        context: Its context, if it is conditional. Contexts are kept, not rebuilt.
        log_det: Whether the log-determinant is computed, too.
        rebuild: How activations are rebuilt.

    Returns:
        ``module(x)``, or with ``log_det`` what ``module.forward_and_log_det(x)`` returns. Changing
        it in place makes the backward pass raise an error.

    Raises:
        TypeError: If ``module`` is not an :class:`InvertibleModule`.
        RuntimeError: In the backward pass, if a parameter, the context or the output was changed
            in place since.
        RebuildError: In the backward pass, if what a layer computes when it is rebuilt is not what
            it was (see :class:`Rebuild`).

    References:
        Gomez et al., *The Reversible Residual Network* (2017), section 3.2,
        https://arxiv.org/abs/1707.04585.

    Example:
        >>> block = [AdditiveCoupling(nn.Linear(2, 2)), Swap()]
        >>> network = InvertibleSequential(Split(), *(4 * block), Merge())
        >>> y = reversible_checkpoint(network, torch.randn(8, 4))
        >>> y.sum().backward()
    """
    if not isinstance(module, InvertibleModule):
        raise TypeError(
            f"reversible_checkpoint takes an InvertibleModule, got a {type(module).__name__}."
        )
    direction = Direction(log_det=log_det)
    with asking(rebuild):
        if module.members() is None:
            y, log_dets = run(module, direction, x, context)
            return (y, log_dets[0]) if log_det else y
        check_context(module, context)
        y, total = direction.apply(module, x, context)
        return (y, total) if log_det else y
