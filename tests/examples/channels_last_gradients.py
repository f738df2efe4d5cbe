"""Compares each preset's gradients with channels last to contiguous ones; run by a test."""

import sys

import torch
from torch import nn
from torch.nn import functional as F

from experiment.settings import recipe
from presets import PRESETS

THREE_STAGES = {"cifar10", "digits", "resnet-digits", "revnet-digits"}
# Where a last bit turns a unit of a ReLU on or off, all gradients before it are 0.02 off. Those of
# the wrong kernels were 0.6 off and more.
TOLERANCE = 0.1


def largest_error(name):
    """The largest relative error of a parameter's gradient, with a block in each stage."""
    torch.manual_seed(0)
    network = PRESETS[name].build(num_classes=8, blocks=(1,) * (3 if name in THREE_STAGES else 4))
    for part in network.modules():
        if isinstance(part, nn.Dropout):  # drops others in another layout
            part.p = 0.0
    side = min(recipe(name).image_size, 64)  # the wrong kernels are wrong there, too
    x = torch.randn(8, network.in_channels, side, side)
    right = gradients(network, x, torch.contiguous_format)
    found = gradients(network, x, torch.channels_last)
    # Channels of zeros give zero gradients, and must in both layouts.
    return max(
        ((found[p] - right[p]).norm() / right[p].norm()).item()
        for p in right
        if found[p].any() or right[p].any()
    )


def gradients(network, x, memory_format):
    network.to(memory_format=memory_format).zero_grad()
    logits = network(x.contiguous(memory_format=memory_format))
    F.cross_entropy(logits, torch.arange(8)).backward()
    return {name: p.grad.clone() for name, p in network.named_parameters()}


def main():
    torch.set_num_threads(int(sys.argv[1]))
    wrong = False
    for name in PRESETS:
        print(name, end=": ", flush=True)  # seen even if the next step crashes
        error = largest_error(name)
        print(error, flush=True)
        wrong |= not error < TOLERANCE
    sys.exit(wrong)


if __name__ == "__main__":
    main()
