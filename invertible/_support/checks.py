"""Checks at the edge of every layer: what came, what is expected, what to try."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..state import Context

if TYPE_CHECKING:
    from ..module import InvertibleModule

FROM_FORWARD = "Pass what its forward returned."
AS_TENSOR = "Convert it with torch.as_tensor."


def describe(x: Any) -> str:
    """Says in a few words what a caller handed over."""
    if isinstance(x, Tensor):
        return f"a tensor of shape {tuple(x.shape)}"
    if isinstance(x, tuple | list):
        return f"a {type(x).__name__} of {len(x)} ({', '.join(map(describe, x))})"
    if isinstance(x, type):
        return f"the class {x.__name__}, not an instance of it"
    if x is None:
        return "None"
    name = type(x).__name__
    return f"an {name}" if name[0].lower() in "aeiou" else f"a {name}"


def name_of(layer: object, inverse: bool = False) -> str:
    """How a message calls a layer, which may be named by its class, or its inverse."""
    name = layer if isinstance(layer, str) else type(layer).__name__
    return name + ("'s inverse" if inverse else "")


def is_state(x: Any) -> bool:
    """Whether something is a tensor or a plain tuple of tensors."""
    if isinstance(x, Tensor):
        return True
    if type(x) is not tuple:
        return False
    for stream in x:
        if not isinstance(stream, Tensor):
            return False
    return len(x) > 0


def expect_returned(layer: object, y: Any) -> None:
    """Raises if what a layer returned is no state."""
    if not is_state(y):
        raise TypeError(
            f"{type(layer).__name__} must return a tensor or a plain tuple of tensors, got "
            f"{describe(y)}. {_as_state(y)}".rstrip()
        )


def expect_state(layer: object, x: Any, *, inverse: bool = False) -> Any:
    """Returns ``x`` if it is a state, and raises otherwise."""
    if not is_state(x):
        hint = _as_state(x) or (FROM_FORWARD if inverse else AS_TENSOR)
        raise TypeError(
            f"{name_of(layer, inverse)} takes a tensor or a plain tuple of tensors, got "
            f"{describe(x)}. {hint}"
        )
    return x


def expect_tensor(layer: object, x: Any, *, min_dim: int = 2, inverse: bool = False) -> Tensor:
    """Returns ``x`` if it is a tensor of at least ``min_dim`` dimensions, and raises otherwise."""
    name = name_of(layer, inverse)
    if not isinstance(x, Tensor):
        if inverse:
            hint = FROM_FORWARD
        elif is_state(x):
            hint = "Put Merge() before it to join the streams, or Parallel(...) to treat each."
        elif _as_state(x):
            hint = f"A state is a tensor or a plain tuple of tensors. {_as_state(x)}"
        else:
            hint = AS_TENSOR
        raise TypeError(f"{name} takes a tensor, got {describe(x)}. {hint}")
    if x.dim() < min_dim:
        raise ValueError(
            f"{name} takes a tensor of at least {min_dim} dimensions, batch and channels first, "
            f"got {describe(x)}. If it is a single example, give it a batch dimension: "
            "x.unsqueeze(0)."
        )
    return x


def expect_streams(
    layer: object, x: Any, count: int | None, *, inverse: bool = False
) -> tuple[Tensor, ...]:
    """Returns ``x`` if it is a tuple of ``count`` like tensors, and raises otherwise.

    None stands for any count.
    """
    if type(x) is tuple and (len(x) == count or count is None) and _are_alike(x):
        return x
    name = name_of(layer, inverse)
    split = "Split()" if count == 2 else "Split(sizes)"
    kind = "a pair of tensors" if count == 2 else f"a tuple of {_tensors(count)}"
    # A tuple with names would come out without them.
    if type(x) is not tuple:
        if not isinstance(x, Tensor):
            hint = _as_state(x) or "Hand the streams over as a tuple: (x1, x2)."
        else:
            hint = FROM_FORWARD if inverse else f"Put {split} before it to make them."
        raise TypeError(f"{name} takes {kind}, got {describe(x)}. {hint}")
    if not x or (count is not None and len(x) != count):
        raise ValueError(
            f"{name} takes {kind}, got {describe(x)}. "
            + (FROM_FORWARD if inverse else f"{split} makes as many as it takes.")
        )
    for stream in x:
        if not isinstance(stream, Tensor):
            raise TypeError(f"{name} takes {kind}, got {describe(x)}. Each must be a tensor.")
    for what in ("dtype", "device"):
        first, *others = (getattr(stream, what) for stream in x)
        if any(other != first for other in others):
            found = ", ".join(str(getattr(stream, what)) for stream in x)
            raise ValueError(
                f"{name} takes streams of one {what}, got {found}. Bring them together with .to()."
            )
    return x


def _are_alike(streams: tuple[Any, ...]) -> bool:
    """Whether all are tensors, of one dtype on one device."""
    first = streams[0] if streams else None
    if not isinstance(first, Tensor):
        return False
    dtype, device = first.dtype, first.device
    for stream in streams[1:]:
        if not isinstance(stream, Tensor) or stream.dtype != dtype or stream.device != device:
            return False
    return True


def expect_channels(
    layer: object, x: Any, channels: int, dim: int = 1, *, inverse: bool = False
) -> Tensor:
    """Returns ``x`` if it is a tensor of real numbers with so many channels, and raises if not."""
    tensor = expect_tensor(layer, x, min_dim=rank_for(dim), inverse=inverse)
    if tensor.shape[dim] != channels:
        raise ValueError(
            f"{name_of(layer, inverse)} takes {channels} channels along dimension {dim}, got "
            f"{tensor.shape[dim]} (input shape {tuple(tensor.shape)})."
        )
    return expect_real(layer, tensor, inverse=inverse)


def rank_for(dim: int) -> int:
    """The fewest dimensions in which ``dim`` exists and is not the batch."""
    return max(2, dim + 1 if dim > 0 else 1 - dim)


def expect_numbers(layer: object, x: Tensor, *, inverse: bool = False) -> Tensor:
    """Returns ``x`` if a layer can compute with it, and raises for whole numbers and bools.

    They would wrap around, or come back as another dtype.
    """
    if not (x.is_floating_point() or x.is_complex()):
        raise TypeError(
            f"{name_of(layer, inverse)} computes with its input and takes floating-point numbers, "
            f"got {x.dtype}. Convert it: x.float(), or x.float() / 256 for 8-bit images, which "
            "puts them on the grid of every quantum up to 2**-8."
        )
    return x


def expect_real(layer: object, x: Tensor, *, inverse: bool = False) -> Tensor:
    """:func:`expect_numbers` for a layer that computes with real numbers only."""
    if x.is_complex():
        raise TypeError(
            f"{name_of(layer, inverse)} computes with real numbers, got {x.dtype}. Convert it, for "
            "instance with torch.view_as_real."
        )
    return expect_numbers(layer, x, inverse=inverse)


def _as_state(x: Any) -> str:
    """How to make a plain tuple of tensors of something like one; nothing for other things."""
    if isinstance(x, dict) and x and is_state(tuple(x.values())):
        return "Hand the streams over as a plain tuple: tuple(x.values())."
    if isinstance(x, tuple | list) and is_state(tuple(x)):
        return "Hand the streams over as a plain tuple: tuple(x)."
    return ""


def _tensors(count: int | None) -> str:
    if count is None:
        return "tensors"
    return "1 tensor" if count == 1 else f"{count} tensors"


def check_context(layer: InvertibleModule, context: Context) -> None:
    """Raises when a context is missing, or given to a layer that would ignore it."""
    check_contexts(layer, [layer], context)


def check_contexts(
    module: InvertibleModule, layers: Iterable[InvertibleModule], context: Context
) -> None:
    """:func:`check_context` for a composition, of the layers that it runs."""
    if context is None:
        if any(layer.conditional and layer.requires_context for layer in layers):
            raise TypeError(
                f"{type(module).__name__} is conditional and got no context. Call it as "
                "layer(x, context)."
            )
    elif not any(layer.conditional for layer in layers):
        raise TypeError(
            f"{type(module).__name__} got a context ({describe(context)}) that nothing in it would "
            "use. Leave the context out, or make a coupling take it: AdditiveCoupling(f, "
            "conditional=True) calls f(x2, context)."
        )
