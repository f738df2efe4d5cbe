"""
An invertible network in ten lines
==================================

An invertible network computes its output from its input, and its input from its
output. You will build one, train it to tell two spirals apart, and run it
backwards to draw what it has learned.
"""

# %%
# The network
# -----------
#
# Splitting the input in two is the trick. Of a pair :math:`(x_1, x_2)`, a
# *coupling* changes one half by a function of the other,
#
# .. math:: y_1 = x_1 + f(x_2), \qquad y_2 = x_2,
#
# and whoever has the output can take the change back: :math:`x_1 = y_1 - f(y_2)`.
# So :math:`f` may be any network at all. Couple the other half to the first by a
# function :math:`g`, and both have changed. The two couplings together are a
# *reversible block*.

import torch
from torch import nn

from invertible import InvertibleSequential, Merge, ReversibleBlock, Split

torch.manual_seed(0)


def shift():
    return nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))


blocks = [ReversibleBlock(shift(), shift()) for _ in range(3)]
network = InvertibleSequential(Split(), *blocks, Merge())

# %%
# That is all. It is called as any module is, and has an ``inverse`` as well:

x = torch.randn(5, 2)
y = network(x)
print((network.inverse(y) - x).detach())

# %%
# What is left is rounding: in floating point, :math:`(x + f) - f` is :math:`x` up
# to its last digits.
#
# Something to learn
# ------------------
#
# A thousand points on two spiral arms. No straight line parts them.


def spirals(count):
    """Points in the plane, and the arm that each is on: 0 or 1."""
    arm = torch.arange(count) % 2
    radius = 0.5 + 7.5 * torch.rand(count).sqrt()
    angle = radius + torch.pi * arm
    points = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=1) / 4
    return points + 0.06 * torch.randn(count, 2), arm.float()


points, arm = spirals(1000)

# %%
# Training is ordinary PyTorch. The network is to bring one arm to the left of
# zero and the other to the right; where they are along the vertical does not
# matter.

optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
for _ in range(400):
    score = network(points)[:, 0]
    loss = nn.functional.binary_cross_entropy_with_logits(score, arm)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

with torch.no_grad():
    fresh_points, fresh_arm = spirals(1000)
    moved = network(fresh_points)
    accuracy = ((moved[:, 0] > 0) == fresh_arm.bool()).float().mean()
print(f"{accuracy:.1%} of 1000 fresh points are on the right side")

# %%
# Run it backwards
# ----------------
#
# Behind the network the border between the arms is the straight line where the
# score is zero. To see it among the spirals, hand the line to the inverse. An
# ordinary classifier can't do this: it would have to be asked about every point
# of the plane.

import matplotlib.pyplot as plt

with torch.no_grad():
    height = torch.linspace(-30, 30, 20_000)
    line = torch.stack((torch.zeros_like(height), height), dim=1)
    border = network.inverse(line)

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 4), layout="constrained")
for axes, where, straight, title in (
    (left, fresh_points, border, "the input, and the line brought back"),
    (right, moved, line, "the output, and a straight line"),
):
    axes.scatter(*where.T, c=fresh_arm, s=6, cmap="coolwarm")
    limits = axes.axis()
    axes.plot(*straight.T, color="black", linewidth=1.5)
    axes.axis(limits)
    axes.set_title(title)

# %%
# Nothing was lost on the way: training has bent the plane, and torn or folded it
# nowhere. So every point still comes back.

print(f"largest error: {(network.inverse(moved) - fresh_points).abs().max():.1e}")

# %%
# You have seen all there is to the idea. A network for images is built alike,
# with convolutions for :math:`f`. The next lesson shows what else invertibility
# buys: training without storing activations.
