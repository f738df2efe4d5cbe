"""``Rebuild(debug=True)``: which operation of a layer did not compute the same twice."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from typing_extensions import override

from .samples import difference, tolerance_for


class Operations(TorchFunctionMode):
    """Copies of all that autograd saves in a layer, with the operations that made it do so."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self._modules = modules
        self._running: list[str] = []
        self._saved: list[_Saved | None] = []

    @override
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self._running.append(resolve_name(func) or repr(func))
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._running.pop()

    def note(self, tensor: Tensor) -> None:
        """Keeps what autograd saves for the operation that is running, but for buffers.

        A second run of BatchNorm has others, whose values nobody reads.
        """
        if any(tensor is buffer for part in self._modules for buffer in part._buffers.values()):
            self._saved.append(None)
            return
        name = self._running[-1] if self._running else "an operation"
        self._saved.append(_Saved(tensor.detach().clone(), f"{name} ({_place()})"))

    def first_difference(self, found: Sequence[Tensor], tolerance: float | None) -> str | None:
        """Says which of the tensors that were saved again is not what it was."""
        for number, (saved, other) in enumerate(zip(self._saved, found, strict=True), start=1):
            if saved is None:
                continue
            true, name = saved
            bound = tolerance_for({true.dtype}, true.is_cpu) if tolerance is None else tolerance
            if true.numel() and true.isfinite().all():
                off = difference(true, other.detach())
                if not off <= bound:
                    return (
                        f"tensor {number} of {len(found)} that autograd saved, of shape "
                        f"{tuple(true.shape)}, is off by {off:.2g} of its norm: {name}."
                    )
        return None


class _Saved(NamedTuple):
    value: Tensor
    operation: str


_OWN = str(Path(__file__).parents[1]), str(Path(torch.__file__).parent)


def _place() -> str:
    """The line of somebody's code that is running, neither torch's nor ours."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OWN):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}, line {frame.f_lineno}"
