"""
Bit for bit: exact mode
=======================

So far, what came back was right up to rounding. You will see rounding grow with
depth, until in mixed precision the gradients of rebuilt activations are wrong.
Then you take it away with one argument.
"""

# %%
# Where bits get lost
# -------------------
#
# A coupling adds, and its inverse subtracts. In floating point the two don't
# always cancel, because the sum is rounded:

import torch
from torch import nn

torch.manual_seed(0)
x, r = torch.randn(2, 10_000)
print(f"{((x + r) - r == x).float().mean():.0%} come back")

# %%
# But on a grid, the multiples of one power of two, sums are exact as long as they
# don't become too large:

q = 2**-16
x, r = (x / q).round() * q, (r / q).round() * q
print(f"{((x + r) - r == x).float().mean():.0%} come back")

# %%
# Exact mode is just this: the input is put on the grid once, and what each
# coupling adds is rounded to it.
#
# Two networks
# ------------
#
# ``quantum`` is the width of the grid. Without it, the network computes in
# floating point.

from invertible import (
    AdditiveCoupling,
    InvertibleSequential,
    Merge,
    Quantize,
    Split,
    Swap,
)


def residual():
    return nn.Sequential(
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Linear(16, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Linear(16, 16),
    )


def blocks(depth, quantum):
    layers = [
        (AdditiveCoupling(residual(), quantum=quantum), Swap())
        for _ in range(depth)
    ]
    entrance = [] if quantum is None else [Quantize(quantum)]
    return [
        *entrance,
        Split(),
        *(layer for pair in layers for layer in pair),
        Merge(),
    ]


x = torch.randn(64, 32)
for quantum in (None, q):
    network = InvertibleSequential(*blocks(100, quantum)).eval()
    expected = x if quantum is None else Quantize(q)(x)
    with torch.no_grad():
        found = network.inverse(network(x))
    name = "in floating point" if quantum is None else "exact mode"
    print(
        f"{name}: {(found == expected).float().mean():.0%} of the numbers come back"
    )

# %%
# The inverse gives back the input as ``Quantize`` rounded it. Images of 8 bits
# divided by 256 are on the grid from the start, and come back as they are.
#
# What it does to gradients
# -------------------------
#
# With ``checkpoint=True``, the backward pass works on rebuilt activations. An
# error of a millionth puts some ReLU on its other side, and every block on the
# way down makes errors larger. Compare with the gradients of the same layers when
# they store their activations. (What comes back too far off raises an error. Here
# an infinite tolerance lets it pass, so that you see it.)

import math

from invertible import Rebuild


def gradient(layers, checkpoint):
    """Of all parameters, in one vector."""
    network = InvertibleSequential(*layers, checkpoint=checkpoint)
    loss = network(x).square().mean()
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))]
    )


def error(depth, quantum):
    """Of the gradient from rebuilt activations, relative to the true one."""
    torch.manual_seed(1)
    layers = blocks(depth, quantum)
    expected, found = (
        gradient(layers, checkpoint=False),
        gradient(layers, checkpoint=Rebuild(tolerance=math.inf)),
    )
    return ((found - expected).norm() / expected.norm()).item()


depths = [10, 30, 100, 300]
errors = {
    "float32": [error(depth, quantum=None) for depth in depths],
    "float32, exact mode": [error(depth, quantum=q) for depth in depths],
}

# %%
# Mixed precision, where sub-networks compute in bfloat16, first helps and then
# makes matters worse. A small error of the state disappears when the sub-network's
# input is rounded to three digits: it returns the same bits, and nothing is passed
# on. But the deeper the network, the more often a number lies where the rounding
# goes the other way, and then the error is a whole digit of bfloat16.

with torch.autocast("cpu", dtype=torch.bfloat16):
    errors["bfloat16 autocast"] = [error(depth, quantum=None) for depth in depths]
    errors["bfloat16 autocast, exact mode"] = [
        error(depth, quantum=q) for depth in depths
    ]

print(f"{'blocks':30}" + "".join(f"{depth:8}" for depth in depths))
for name, row in errors.items():
    print(f"{name:30}" + "".join(f"{value:8.0g}" for value in row))

# %%

import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
for (name, row), style in zip(
    errors.items(), ("o-", "s-", "o--", "^--"), strict=True
):
    colour = "tab:blue" if "exact" in name else "tab:orange"
    axes.plot(depths, row, style, color=colour, label=name)
axes.set_xscale("log")
axes.set_xticks(depths, depths)
axes.minorticks_off()
axes.set_yscale("symlog", linthresh=1e-8)
axes.set(xlabel="blocks", ylabel="relative error of the gradient", ylim=(-2e-9, 3))
axes.spines[["top", "right"]].set_visible(False)
_ = axes.legend(frameon=False)

# %%
# Zero means that not one bit differs: in train mode, with batch statistics, at
# any depth.
#
# Which layers can be exact
# -------------------------
#
# A composition is exact when all its layers are, and knows which are not:

mixed = InvertibleSequential(*blocks(1, q), *blocks(1, None))
print(mixed.exact, list(mixed.inexact_layers))

# %%
# The grid has an end: in float32, sums are exact below :math:`2^{24} q`, here
# 256. An exact network looks at its state, and says when it is too large:

try:
    network(torch.full((1, 32), 300.0))
except ValueError as problem:
    print(problem)

# %%
# What exact mode costs in time and in accuracy (little, and none that could be
# told from luck), and what keeps it exact on a GPU, is in
# :doc:`/explanation/exact`.
