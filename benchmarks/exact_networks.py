"""Whole i-RevNets at initialisation: rebuilt images and gradients, with the grid and without it."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from comparing.meters import total_error
from torch import Tensor
from torch.nn import functional as F

sys.path.append(str(Path(__file__).parents[1] / "examples" / "irevnet"))
from invertible import Rebuild
from networks.irevnet import IRevNet
from presets import PRESETS

QUANTUM = 2**-16


@dataclass(frozen=True)
class Case:
    """A network, and the images that it is given."""

    preset: str
    batch: int
    side: int  # height and width of the images
    quantum: float | None
    autocast: bool = False  # bfloat16
    device: str = "cpu"

    def model(self, seed: int, **settings: float) -> IRevNet:
        """The network in train mode, the same at each call."""
        torch.manual_seed(seed)
        return PRESETS[self.preset].build(quantum=self.quantum, **settings).to(self.device)

    def images(self, model: IRevNet, seed: int) -> tuple[Tensor, Tensor]:
        """Noise, uniform as pixels are and normalised as CIFAR-10 is, and labels."""
        torch.manual_seed(seed)
        x = (torch.rand(self.batch, model.in_channels, self.side, self.side) - 0.47) / 0.2
        labels = torch.randint(model.classifier.out_features, (self.batch,))
        return x.to(self.device), labels.to(self.device)


class Found(NamedTuple):
    """What rebuilding loses. Errors are relative L2 errors."""

    train_error: float  # of the images, decoded from their features in train mode
    eval_error: float
    images_equal: int  # decoded bit for bit in train mode
    gradient_error: float  # of all parameters together, against stored activations
    gradients_equal: int  # tensors that agree in every bit
    gradients: int
    buffers_equal: bool


def measure(case: Case, seed: int) -> Found:
    """One training step with activations stored, one with them rebuilt; images there and back."""
    stored, rebuilt = (_train(case, seed, checkpoint=on) for on in (False, True))
    equal = [torch.equal(a, b) for a, b in zip(rebuilt.gradients, stored.gradients, strict=True)]

    # Dropout draws anew on the way back, unless its random state is kept as in training.
    model = case.model(seed, dropout=0.0)
    x, _ = case.images(model, seed)
    x = model.as_read(x)
    decoded = _decode(case, model, x)
    return Found(
        total_error([decoded], [x]),
        total_error([_decode(case, model.eval(), x)], [x]),
        sum(map(torch.equal, decoded, x)),
        total_error(rebuilt.gradients, stored.gradients),
        sum(equal),
        len(equal),
        all(map(torch.equal, rebuilt.buffers, stored.buffers)),
    )


class Equal(NamedTuple):
    """Tensors of gradients that agree in every bit with those of a step with stored activations."""

    rebuilt: int  # in a step with rebuilt activations
    stored_again: int  # in the same step, repeated: less than all where kernels add in any order
    gradients: int


def equal_gradients(case: Case, seed: int) -> Equal:
    """Two training steps with activations stored, and one with them rebuilt."""
    stored, again, rebuilt = (_train(case, seed, checkpoint=on) for on in (False, False, True))
    equal = (sum(map(torch.equal, other.gradients, stored.gradients)) for other in (rebuilt, again))
    return Equal(*equal, len(stored.gradients))


class _Trained(NamedTuple):
    gradients: list[Tensor]
    buffers: list[Tensor]


def _train(case: Case, seed: int, *, checkpoint: bool) -> _Trained:
    model = case.model(seed)
    # What comes back too far off is what is measured here.
    model.body.checkpoint = Rebuild(tolerance=math.inf) if checkpoint else False
    x, labels = case.images(model, seed)
    with torch.autocast(case.device, torch.bfloat16, enabled=case.autocast):
        loss = F.cross_entropy(model(x), labels)
    loss.backward()
    return _Trained([p.grad for p in model.parameters() if p.grad is not None], [*model.buffers()])


@torch.no_grad()
def _decode(case: Case, model: IRevNet, x: Tensor) -> Tensor:
    with torch.autocast(case.device, torch.bfloat16, enabled=case.autocast):
        return model.inverse(model.features(x))
