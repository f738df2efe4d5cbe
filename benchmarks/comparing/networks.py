"""Whole i-RevNets, from the images to the loss: activations stored, checkpointed, rebuilt."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .meters import Step, time_step, total_error
from .setting import Setting
from .sides import OURS, PLAIN, Network
from .stacks import Comparison, compare, reason

sys.path.append(str(Path(__file__).parents[2] / "examples" / "irevnet"))
from networks.irevnet import Bottleneck, IRevNet
from presets import PRESETS


class Workload(NamedTuple):
    """A network and the images that it is trained on."""

    preset: str
    batch: int
    side: int  # height and width of the images

    def model(self, setting: Setting) -> IRevNet:
        """The network, the same at each call."""
        torch.manual_seed(0)
        model = setting.module(PRESETS[self.preset].build())
        setting.compile(part for part in model.modules() if isinstance(part, Bottleneck))
        return model

    def step(self, model: IRevNet, setting: Setting) -> tuple[Step, Tensor]:
        """A step on random images, and their labels."""
        torch.manual_seed(1)
        images = setting.images(self.batch, model.in_channels, self.side, self.side)
        labels = torch.randint(model.classifier.out_features, (self.batch,)).to(images.device)
        one = torch.ones((), device=images.device)
        return Step(images, one, list(model.parameters()), setting), labels


CPU_WORKLOADS = [Workload("cifar10", 16, 32), Workload("b", 2, 224)]
GPU_WORKLOADS = [Workload("cifar10", 128, 32), Workload("b", 32, 224)]


def losses(model: IRevNet, labels: Tensor) -> dict[str, Network]:
    """The loss of the images, with activations kept in each of three ways."""

    def stored(x: Tensor) -> Tensor:
        model.body.checkpoint = False
        return F.cross_entropy(model(x), labels)

    def each_layer(x: Tensor) -> Tensor:
        model.body.checkpoint = False
        for layer in model.body:
            x = checkpoint(layer, x, use_reentrant=False)
        return F.cross_entropy(model.classify(x), labels)

    def rebuilt(x: Tensor) -> Tensor:
        model.body.checkpoint = True
        return F.cross_entropy(model(x), labels)

    return {PLAIN: stored, "checkpoint, layers": each_layer, OURS: rebuilt}


class EndToEnd(NamedTuple):
    """One network, measured."""

    work: Workload
    comparison: Comparison
    errors: dict[str, float]  # relative L2 error of all gradients together, against plain's


def measure(work: Workload, setting: Setting, seconds: float) -> EndToEnd:
    """Memory, time and gradients of the three ways."""
    model = work.model(setting)
    step, labels = work.step(model, setting)
    networks = losses(model, labels)
    blocks = sum(isinstance(part, Bottleneck) for part in model.modules())
    comparison = compare(step, networks, blocks=blocks, seconds=seconds)
    expected = gradients(step, networks[PLAIN])
    errors = {
        name: total_error(gradients(step, networks[name]), expected) for name in comparison.rows
    }
    return EndToEnd(work, comparison, errors)


def gradients(step: Step, network: Network) -> list[Tensor]:
    """Gradients of all parameters, with the same dropout each time."""
    torch.manual_seed(2)
    step.clear()
    step.backward(step.forward(network))
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in step.parameters]


class Throughput(NamedTuple):
    """What a GPU achieves with activations stored, or rebuilt."""

    largest_batch: int
    images_per_second: dict[int, float]  # by batch

    @property
    def best_batch(self) -> int:
        """The fastest."""
        return max(self.images_per_second, key=self.images_per_second.__getitem__)


def throughput(
    preset: str, side: int, name: str, setting: Setting, *, at_most: int = 2**20
) -> Throughput:
    """The largest batch that fits into a GPU's memory, and the speed at batches up to it."""
    model = Workload(preset, 1, side).model(setting)

    def speed(batch: int, steps: int = 1) -> float | None:
        try:
            seconds = _seconds(model, Workload(preset, batch, side), name, setting, steps)
        except RuntimeError as error:  # out of memory; or else the line below tells
            print(f"{name}: {batch} images: {reason(error)[:100]}", flush=True)
            return None
        finally:
            torch.cuda.empty_cache()
        how = "they fit" if steps == 1 else f"{batch / seconds:.1f} images/s"
        print(f"{name}: {batch} images: {how}", flush=True)
        return batch / seconds

    largest = largest_that(lambda batch: batch <= at_most and speed(batch) is not None)
    batches = {2**k for k in range(5, largest.bit_length(), 2)} | {largest}
    speeds = {batch: speed(batch, steps=4) for batch in sorted(batches)}
    return Throughput(largest, {batch: s for batch, s in speeds.items() if s})


def _seconds(model: IRevNet, work: Workload, name: str, setting: Setting, steps: int) -> float:
    """Of a training step without an optimizer: the median, but for the first to warm up."""
    step, labels = work.step(model, setting)
    network = losses(model, labels)[name]
    times = [time_step(step, network).step for _ in range(steps)]
    return statistics.median(times[1:] or times)


def largest_that(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, to about 3 %; 0 if not even 1 does."""
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 32):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
