"""All networks and their recipes: one table."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from torch import nn

from networks.irevnet import IRevNet
from networks.resnet import ResNet
from networks.revnet import RevNet

Classifier = IRevNet | ResNet | RevNet
Row = tuple[int, ...]


@dataclass(frozen=True)
class Preset:
    """A network and how it is trained."""

    network: type[Classifier]
    settings: Mapping[str, Any]  # the arguments of that class
    recipe: Mapping[str, Any]  # what is not as for ImageNet with the released code's recipe
    classes: int = 10  # how many it tells apart by default

    @property
    def reversible(self) -> bool:
        """Whether it adds what can be undone, so that activations need not be stored."""
        return self.network is not ResNet

    def build(self, num_classes: int | None = None, **changes: Any) -> Classifier:
        """The network, some of its settings changed."""
        return self.network(num_classes or self.classes, **{**self.settings, **changes})


def is_invertible(model: nn.Module) -> TypeGuard[IRevNet]:
    """Whether images can be decoded from the features."""
    return isinstance(model, IRevNet)


# The recipes, as far as they differ from the defaults of the settings: these two the released
# code's,
IMAGENET: dict[str, Any] = {"jitter": (0.87, 0.5, 0.5, 0.2)}
CIFAR10: dict[str, Any] = {
    "epochs": 200,
    "batch_size": 128,
    "milestones": (60, 120, 160),
    "lr_factor": 0.2,
    "weight_decay": 5e-4,
    "image_size": 32,
    "augmentation": "shift",
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2023, 0.1994, 0.2010),
}
# ours for few epochs,
CIFAR10_SHORT = CIFAR10 | {"epochs": 30, "schedule": "one-cycle", "warmup": 5}
# for digits, whose 8x8 pixels are enlarged: a shift by 2 is one of theirs,
DIGITS: dict[str, Any] = {
    "epochs": 18,
    "batch_size": 64,
    "schedule": "cosine",
    "weight_decay": 5e-4,
    "image_size": 16,
    "augmentation": "shift",
    "padding": 2,
    "flip": False,
    "mean": (0.31,),
    "std": (0.32,),
    # So small a network gains 7 % from a second thread, and with two it becomes 30 times slower
    # when another process takes one of two cores.
    "threads": 1,
    "workers": 0,  # to start one takes longer than to read the images
}
# and the paper's for ImageNet.
PAPER: dict[str, Any] = {"iterations": 600_000, "milestones": (160_000, 320_000, 480_000)}


def _stages(blocks: Row, strides: Row, widths: Row, **others: Any) -> dict[str, Any]:
    return {"blocks": blocks, "strides": strides, "widths": widths, "downsampling": 1} | others


_A = _stages((4, 4, 6, 4), (1, 2, 2, 2), (96, 384, 1536, 6144), downsampling=4)
_B = _stages((6, 16, 72, 6), (2, 2, 2, 2), (24, 96, 384, 1536), downsampling=2)
_RELEASED = _B | {"kernel_sizes": (3, 3, 3)}
_CIFAR10 = _stages((18, 18, 18), (1, 2, 2), (16, 64, 256), kernel_sizes=(3, 3, 3), dropout=0.1)
_CIFAR10_SMALL = _stages((2, 4, 4, 5), (1, 2, 2, 2), (6, 24, 96, 384), downsampling=2)
# A bijective network has narrow streams where its images are large. Bottlenecks of a quarter of
# that width learn little there, so that these are wider.
_CIFAR10_SMALL |= {"inner_widths": (32, 48, 64, 96)}
_GREY = {"in_channels": 1}
_DIGITS = _RELEASED | _stages((6, 12, 6), (2, 2, 2), (8, 32, 128), downsampling=2, **_GREY)
_RESNET50 = _stages((3, 4, 6, 3), (1, 2, 2, 2), (64, 128, 256, 512), downsampling=4)
_RESNET_CIFAR10 = _stages((3, 3, 3, 3), (2, 2, 2, 2), (16, 32, 64, 112))
_RESNET_DIGITS = _stages((3, 3, 3), (2, 2, 2), (16, 40, 88), **_GREY)
_REVNET56 = _stages((2, 2, 3, 2), (1, 2, 2, 2), (512, 1024, 2048, 3328), downsampling=4)
_REVNET_CIFAR10 = _stages((3, 3, 3, 3), (2, 2, 2, 2), (64, 128, 256, 704))
_REVNET_DIGITS = _stages((3, 3, 3), (2, 2, 2), (64, 192, 512), **_GREY)

# i-RevNets: the paper's injective (a) and bijective (b); (b) with the 3x3 kernels of the published
# weights, 125,120,356 parameters; the released code's for CIFAR-10; small bijective ones. Then what
# they are compared with, the small ones of about their size.
PRESETS = {
    "a": Preset(IRevNet, _A, IMAGENET, 1000),
    "b": Preset(IRevNet, _B, IMAGENET, 1000),
    "b-released": Preset(IRevNet, _RELEASED, IMAGENET, 1000),
    "cifar10": Preset(IRevNet, _CIFAR10, CIFAR10),
    "cifar10-small": Preset(IRevNet, _CIFAR10_SMALL, CIFAR10_SHORT),
    "digits": Preset(IRevNet, _DIGITS, DIGITS),
    "resnet50": Preset(ResNet, _RESNET50, IMAGENET, 1000),
    "resnet-cifar10": Preset(ResNet, _RESNET_CIFAR10, CIFAR10_SHORT),
    "resnet-digits": Preset(ResNet, _RESNET_DIGITS, DIGITS),
    "revnet56": Preset(RevNet, _REVNET56, IMAGENET, 1000),
    "revnet-cifar10": Preset(RevNet, _REVNET_CIFAR10, CIFAR10_SHORT),
    "revnet-digits": Preset(RevNet, _REVNET_DIGITS, DIGITS),
}
