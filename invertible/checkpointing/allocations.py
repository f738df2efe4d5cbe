"""Which tensors live, and which layers made them."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from ..module import InvertibleModule
from ..state import tensors

_current: ContextVar[Allocations | None] = ContextVar("allocations", default=None)


def current_allocations() -> Allocations | None:
    """Those that are being counted, if any."""
    if torch.compiler.is_dynamo_compiling():  # which can't trace a ContextVar
        return None
    return _current.get()


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that operations inside return, as long as they live.

    Args:
        network: Whose modules are named.
        there: Tensors that are there before.
    """

    def __init__(self, network: nn.Module, there: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layer = _BEFORE
        self._names = {part: name for name, part in network.named_modules()}
        self._live: dict[int, _Block] = {}
        self.now = self.peak = 0
        self._note(there)
        self._before = self.now
        self.layer = "elsewhere"

    @property
    def new(self) -> int:
        """Bytes that live, and were not there before."""
        return self.now - self._before

    def by_layer(self) -> dict[str, int]:
        """Bytes that live, by the layer that made them, in the order in which they did."""
        found = Counter[str]()
        for block in self._live.values():
            if block.layer != _BEFORE:
                found[block.layer] += block.size
        return found

    @contextmanager
    def following(self) -> Iterator[None]:
        """Lets layers of compositions, and modules outside of any, say that they run."""
        token = _current.set(self)
        hooks = [part.register_forward_pre_hook(self._enter_alone) for part in self._outside()]
        try:
            yield
        finally:
            _current.reset(token)
            for hook in hooks:
                hook.remove()

    def _outside(self) -> list[nn.Module]:
        """Modules without parts that are in no layer of this library."""
        inside = {
            part
            for layer in self._names
            if isinstance(layer, InvertibleModule)
            for part in layer.modules()
        }
        return [part for part in self._names if part not in inside and not [*part.children()]]

    def _enter_alone(self, part: nn.Module, _: Any) -> None:
        self.enter(part)

    def enter(self, part: nn.Module, owner: nn.Module | None = None, name: str = "") -> None:
        """What is allocated from now on is a module's, whose place is that in another if given."""
        path = [] if owner is None else [self._names.get(owner, ""), name]
        place = ".".join(filter(None, path or [self._names.get(part, "")]))
        self.layer = f"{place} ({type(part).__name__})"

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._note(tensors(result))
        return result

    def _note(self, found: Iterable[Tensor]) -> None:
        for x in found:
            storage = x.untyped_storage()
            key = storage._cdata
            if key not in self._live:
                size, gone = storage.nbytes(), weakref.ref(storage, partial(self._free, key))
                self._live[key] = _Block(size, self.layer, gone)
                self.now += size
        self.peak = max(self.peak, self.now)

    def _free(self, key: int, _: Any) -> None:
        self.now -= self._live.pop(key).size


_BEFORE = "before"


class _Block(NamedTuple):
    """Memory of a tensor, and whoever shares it."""

    size: int
    layer: str
    gone: weakref.ref[torch.UntypedStorage]
