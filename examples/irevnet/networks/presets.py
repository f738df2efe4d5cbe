"""The networks by name, and what they have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, TypeGuard

from torch import Tensor, nn

from networks.irevnet import (
    IRevNet,
    irevnet_a,
    irevnet_b,
    irevnet_b_released,
    irevnet_cifar10,
    irevnet_cifar10_small,
    irevnet_digits,
)
from networks.resnet import resnet50, resnet_cifar10, resnet_digits
from networks.revnet import revnet56, revnet_cifar10, revnet_digits


class Classifier(Protocol):
    """What training and analyses need of a network, besides being an ``nn.Module``."""

    in_channels: int  # of the images
    stride: int  # height and width of the images are multiples of it

    def features(self, x: Tensor) -> Tensor:
        """The last layer before the classifier's pooling, ``(N, C, H, W)``."""
        ...

    def classify(self, phi: Tensor) -> Tensor:
        """The logits of features."""
        ...

    def each_block(self, x: Tensor) -> Iterator[Tensor]:
        """The state behind each block in turn, ``(N, C, H, W)``; the last is the features."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """The logits of images."""
        ...


PRESETS: dict[str, Callable[..., Classifier]] = {
    "a": irevnet_a,
    "b": irevnet_b,
    "b-released": irevnet_b_released,
    "cifar10": irevnet_cifar10,
    "cifar10-small": irevnet_cifar10_small,
    "digits": irevnet_digits,
    "resnet50": resnet50,
    "resnet-cifar10": resnet_cifar10,
    "resnet-digits": resnet_digits,
    "revnet56": revnet56,
    "revnet-cifar10": revnet_cifar10,
    "revnet-digits": revnet_digits,
}


def is_invertible(model: nn.Module) -> TypeGuard[IRevNet]:
    """Whether images can be decoded from the features."""
    return isinstance(model, IRevNet)
