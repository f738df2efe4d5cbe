"""``measure_memory``: what training takes, layer by layer, before it begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import LBFGS, Optimizer
from typing_extensions import override

from .._support.checks import describe
from .._support.fakes import NEED_VALUES, copy_with, fake_mode
from .._support.generators import accelerators
from ..state import Context, State, tensors
from .allocations import Allocations
from .replay import storing


class LayerMemory(NamedTuple):
    """One row of a :class:`Memory`: bytes that a layer holds between forward and backward."""

    layer: str
    stored: int
    as_set: int


class StepMemory(NamedTuple):
    """Bytes that a training step takes.

    ``held`` are those of activations and outputs between forward and backward, ``peak`` the most at
    any time, with the input, parameters, buffers, gradients and the optimizer's state.
    """

    held: int
    peak: int


class Memory(NamedTuple):
    """What :func:`measure_memory` found, in bytes; printed, it is a table in MiB."""

    rows: list[LayerMemory]
    """One for each layer that holds anything, in the order in which they ran."""
    stored: StepMemory
    """What a step takes if all activations are stored."""
    as_set: StepMemory
    """What it takes as the network is set, with ``checkpoint=True`` in places."""
    input: int
    """What the input takes, and so on."""
    parameters: int
    """With buffers."""
    gradients: int
    optimizer: int
    """What it keeps from step to step."""

    @override
    def __str__(self) -> str:
        both = [
            ("input", self.input),
            ("parameters, buffers", self.parameters),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
        ]
        lines = [
            *self.rows,
            ("held in all", self.stored.held, self.as_set.held),
            *((name, size, size) for name, size in both),
            ("peak of all", self.stored.peak, self.as_set.peak),
        ]
        width = max(len(name) for name, *_ in lines)
        return "\n".join(
            [
                f"{'MiB':<{width}}  {'stored':>9}  {'as set':>9}",
                *(
                    f"{name:<{width}}  {stored / 2**20:>9.2f}  {as_set / 2**20:>9.2f}"
                    for name, stored, as_set in lines
                ),
            ]
        )


def measure_memory(
    network: nn.Module,
    x: State,
    optimizer: Optimizer | None = None,
    *,
    context: Context = None,
) -> Memory:
    """Measures what a training step takes in memory, as it is set and with stored activations.

    The step runs on a copy of the network and on tensors without values
    (``torch._subclasses.FakeTensorMode``), so that it takes no memory itself: a network for a GPU
    needs none, and may be on the meta device. Where what happens depends on values, as in
    :class:`ActNorm` before its first batch, the step runs in earnest, where the network is, and on
    the values of ``x``. The network, the optimizer and the random generators stay as they are. The
    loss is the sum of all that the network returns.

    Counted are the tensors that operations return. The workspace of a kernel and what an allocator
    adds are not: on a GPU that of convolutions can be more than the state.

    Args:
        network: Any module, with compositions of this library in it.
        x: Its input, a tensor or a tuple of such, of which mostly shapes and dtypes count.
        optimizer: That of its parameters, whose state and update then count as well.
        context: What the network takes as its second argument, if it takes one.

    Returns:
        A :class:`Memory`, to be printed.

    Raises:
        TypeError: If ``network`` is no module, or ``optimizer`` no optimizer.
        ValueError: If the network has parameters that its first run will make, or the optimizer
            others than the network's; if it is LBFGS.

    Example:
        >>> blocks = [ReversibleBlock(nn.Linear(64, 64), nn.Linear(64, 64)) for _ in range(4)]
        >>> network = InvertibleSequential(Split(), *blocks, Merge(), checkpoint=True)
        >>> memory = measure_memory(network, torch.empty(256, 128))
        >>> memory.as_set.held < memory.stored.held / 4
        True
        >>> memory.parameters == 8 * (64 * 64 + 64) * 4
        True
    """
    _check(network, optimizer)
    with torch.inference_mode(False), torch.enable_grad():  # wherever one asks from
        return _measure(network, x, optimizer, context)


def _measure(network: nn.Module, x: State, optimizer: Optimizer | None, context: Context) -> Memory:
    fake = fake_mode()
    try:
        trial = _Trial(network, x, optimizer, context, fake.from_tensor)
        with fake:
            return trial.measure()
    except NEED_VALUES:
        devices = accelerators((*network.parameters(), x))
        with torch.random.fork_rng([d for d in devices if d.type == "cuda"]):
            return _Trial(network, x, optimizer, context, torch.clone).measure()


def _check(network: nn.Module, optimizer: Optimizer | None) -> None:
    if not isinstance(network, nn.Module):
        raise TypeError(f"measure_memory takes a module, got {describe(network)}.")
    if not isinstance(optimizer, Optimizer | None):
        raise TypeError(
            f"measure_memory takes a torch.optim.Optimizer, made for the network's parameters, got "
            f"{describe(optimizer)}."
        )
    own = set(map(id, network.parameters()))
    groups = optimizer.param_groups if optimizer else []
    others = sum(id(p) not in own for group in groups for p in group["params"])
    if others:
        raise ValueError(
            f"measure_memory takes an optimizer of the network's parameters, got {others} in "
            f"{type(optimizer).__name__} that are not among them."
        )
    if isinstance(optimizer, LBFGS):
        raise ValueError(
            "measure_memory can't count LBFGS, whose steps run the network themselves."
        )
    for name, parameter in network.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"measure_memory can't count {name}, which the first run of the network will make: "
                "run it once before."
            )


class _Trial:
    """A copy of a network, its input and its optimizer, of tensors that ``make`` makes."""

    def __init__(
        self,
        network: nn.Module,
        x: State,
        optimizer: Optimizer | None,
        context: Context,
        make: Callable[[Tensor], Tensor],
    ) -> None:
        self.network, self.x, self.optimizer, self.context = copy_with(
            make, network, x, optimizer, context
        )

    def measure(self) -> Memory:
        """Runs steps, the first of them for what is made but once, such as an optimizer's state."""
        self._step(stores=True)
        stored, layers = self._step(stores=True)
        as_set, fewer = self._step(stores=False)
        rows = (
            LayerMemory(name, layers.get(name, 0), fewer.get(name, 0))
            for name in dict.fromkeys([*layers, *fewer])
        )
        parameters = list(self.network.parameters())
        return Memory(
            [row for row in rows if row.stored or row.as_set],
            stored,
            as_set,
            _size(tensors(self.x)),
            _size([*parameters, *self.network.buffers()]),
            _size([p.grad for p in parameters if p.grad is not None]),
            _size(self._optimizer_state()),
        )

    def _step(self, stores: bool) -> tuple[StepMemory, dict[str, int]]:
        """A step of training, and what each layer held between forward and backward."""
        self.network.zero_grad()
        there = [*self.network.parameters(), *self.network.buffers(), *self._optimizer_state()]
        with Allocations(self.network, [*there, *tensors(self.x)]) as allocations:
            with allocations.following(), storing() if stores else nullcontext():
                outputs = [y for y in tensors(self._forward()) if y.requires_grad]
            held, layers = allocations.new, allocations.by_layer()
            torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
            del outputs
            if self.optimizer is not None:
                self.optimizer.step()
        return StepMemory(held, allocations.peak), layers

    def _forward(self) -> Any:
        return self.network(self.x) if self.context is None else self.network(self.x, self.context)

    def _optimizer_state(self) -> list[Tensor]:
        return [*tensors(list(self.optimizer.state.values()))] if self.optimizer else []


def _size(found: Iterable[Tensor]) -> int:
    """The memory of some tensors, which may share it."""
    storages = {x.untyped_storage()._cdata: x.untyped_storage() for x in found}
    return sum(storage.nbytes() for storage in storages.values())
