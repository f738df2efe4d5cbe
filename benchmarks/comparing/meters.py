"""What is measured on one training step: time, memory, gradients, statistics, evaluations."""

from __future__ import annotations

import copy
import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from .setting import Setting
from .sides import Network, Side


@dataclass(frozen=True)
class Step:
    """A training step without an optimizer: forward, and backward from a given gradient."""

    x: Tensor
    grad: Tensor  # of the loss, with respect to the network's output
    parameters: Sequence[Tensor]
    setting: Setting

    def forward(self, network: Network) -> Tensor:
        """Runs the network."""
        # A view stands for the output of a stem: MemCNN counts the gradient of a leaf twice.
        x = self.x.view_as(self.x)
        dtype = self.setting.autocast
        with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
            return network(x)

    def backward(self, y: Tensor) -> None:
        """Adds to the gradients of the input and the parameters."""
        y.backward(self.grad)

    def clear(self) -> None:
        """Frees the gradients."""
        for x in (self.x, *self.parameters):
            x.grad = None


class Times(NamedTuple):
    """Seconds that one step took."""

    forward: float
    backward: float

    @property
    def step(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


def time_step(step: Step, network: Network) -> Times:
    """Times forward and backward of a step that finds no gradients."""
    step.clear()
    gc.collect()  # nobody pays for the garbage of another side
    start = _now(step)
    y = step.forward(network)
    middle = _now(step)
    step.backward(y)
    return Times(middle - start, _now(step) - middle)


def time_forward(step: Step, network: Network) -> float:
    """Seconds that a pass without grad takes."""
    start = _now(step)
    with torch.no_grad():
        step.forward(network)
    return _now(step) - start


def _now(step: Step) -> float:
    step.setting.wait()
    return step.setting.now()


def interleave(
    tasks: Mapping[str, Callable[[], Any]], seconds: float, *, min_rounds: int = 3
) -> dict[str, list[Any]]:
    """Runs all tasks in turn, in a new order each round, until the time is spent.

    What slows the machine for a while slows all of them, so that results of one round can be
    compared. Everything runs once before, to warm up.
    """
    order = list(tasks)
    shuffle = random.Random(0).shuffle
    results: dict[str, list[Any]] = {name: [] for name in tasks}
    with old_objects_frozen():
        for task in tasks.values():
            task()
        gc.freeze()  # what the first runs left for later ones is old, too
        end = time.perf_counter() + seconds
        while len(results[order[0]]) < min_rounds or time.perf_counter() < end:
            shuffle(order)
            for name in order:
                results[name].append(tasks[name]())
    return results


@contextmanager
def old_objects_frozen() -> Iterator[None]:
    """Lets ``gc.collect`` look at what was made within alone: among all of torch it takes 0.1 s."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least two values."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


class Memory(NamedTuple):
    """Bytes allocated since before the step, not counting the gradients themselves."""

    held: int  # between forward and backward, by the graph and the output
    peak: int  # at any time, with gradients that wait to be accumulated
    left: int  # after the step


def measure_memory(step: Step, network: Network) -> Memory:
    """Asks the allocator: it does not matter by what mechanism memory is held."""
    step.backward(step.forward(network))  # the gradients are there, and accumulated in place
    gc.collect()
    return (_cuda_memory if step.x.device.type == "cuda" else _cpu_memory)(step, network)


def _cuda_memory(step: Step, network: Network) -> Memory:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = step.forward(network)
    held = torch.cuda.memory_allocated()
    step.backward(y)
    del y
    peak, left = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    return Memory(held - before, peak - before, left - before)


def _cpu_memory(step: Step, network: Network) -> Memory:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself otherwise
    # It is told of every allocation, and of the release of all that it saw allocated.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        y = step.forward(network)
        with record_function("between"):
            pass
        step.backward(y)
        del y
    assert profiler.profiler is not None
    allocated = held = peak = 0
    for event in profiler.profiler.kineto_results.events():  # in the order of time
        if event.name() == "between":
            held = allocated
        elif event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return Memory(held, peak, allocated)


class Outcome(NamedTuple):
    """What a step leaves behind."""

    gradients: list[Tensor]  # of the input and all parameters
    statistics: list[Tensor]  # running means and variances
    batches: int  # that BatchNorm has counted
    evaluations: float  # of a residual function, on average


def outcome(side: Side, fs: nn.ModuleList, step: Step) -> Outcome:
    """Runs one step on copies of the residual functions, in their precision."""
    fs = copy.deepcopy(fs)
    parameters = list(fs.parameters())
    dtype = parameters[0].dtype
    x = step.x.detach().to(dtype).requires_grad_()
    step = replace(step, x=x, grad=step.grad.to(dtype), parameters=parameters)
    counted = [_Counted(f) for f in fs]
    step.backward(step.forward(side(counted)))
    norms = [part for part in fs.modules() if isinstance(part, nn.BatchNorm2d)]
    return Outcome(
        [torch.zeros_like(p) if p.grad is None else p.grad for p in (x, *parameters)],
        [s for norm in norms for s in (norm.running_mean, norm.running_var) if s is not None],
        max(int(norm.num_batches_tracked or 0) for norm in norms),
        sum(f.evaluations for f in counted) / len(fs),
    )


class _Counted(nn.Module):
    """Counts in ``forward``: MemCNN calls that method itself, so that hooks would miss it."""

    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f = f
        self.evaluations = 0

    def forward(self, x: Tensor) -> Tensor:
        self.evaluations += 1
        return self.f(x)


def worst_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative L2 error of a tensor."""
    return max(total_error([a], [b]) for a, b in zip(found, expected, strict=True))


def total_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The relative L2 error of all tensors together."""
    a, b = (torch.cat([x.flatten().double() for x in xs]) for xs in (found, expected))
    return ((a - b).norm() / b.norm()).item()
