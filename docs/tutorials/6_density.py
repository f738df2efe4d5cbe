"""
A density in twenty lines
=========================

How likely is a point, and what do more of its kind look like? A normalizing flow
answers both: an invertible network leads from data to a normal distribution, so
the density of the data is known, and samples come from running it backward. You
will fit one to two moons, look at its density, and check that it is one.
"""

# %%
# The flow
# --------
#
# Eight couplings, each of which bends one of the two coordinates by a spline that
# depends on the other. The network leads from data to latents; ``Flow`` adds the
# normal distribution behind it.

import torch
from sklearn.datasets import make_moons
from torch import nn

from invertible import (
    Flow,
    InvertibleSequential,
    Merge,
    SplineCoupling,
    Split,
    Swap,
)

torch.manual_seed(0)
BINS = 8


def conditioner():
    return nn.Sequential(
        nn.Linear(1, 64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, 3 * BINS - 1),
    )


couplings = [
    layer
    for _ in range(8)
    for layer in (SplineCoupling(conditioner(), BINS), Swap())
]
flow = Flow(InvertibleSequential(Split(), *couplings, Merge()), event_shape=(2,))

# %%
# Training
# --------
#
# The loss is the negative logarithm of the density of the data, on average.


def moons(count, seed):
    points = torch.tensor(
        make_moons(count, noise=0.05, random_state=seed)[0]
    ).float()
    return (points - torch.tensor([0.5, 0.25])) * 1.5


optimizer = torch.optim.Adam(flow.parameters(), lr=2e-3)
for step in range(400):
    loss = -flow.log_prob(moons(512, seed=step)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 100 == 0:
        print(f"step {step}: {loss.item():.3f} nats")

# %%
# What it has learned
# -------------------
#
# The density on a grid, and samples, beside points that it has not seen.

import matplotlib.pyplot as plt

axis = torch.linspace(-4, 4, 401)
grid = torch.cartesian_prod(axis, axis)
with torch.no_grad():
    density = flow.log_prob(grid).exp().reshape(401, 401)
test = moons(2000, seed=-1 % 2**32)
samples = flow.sample((2000,))

figure, axes = plt.subplots(
    1, 3, figsize=(9, 3.2), layout="constrained", sharex=True, sharey=True
)
axes[0].scatter(*test.T, s=2)
axes[1].imshow(
    density.T,
    origin="lower",
    extent=(-4, 4, -4, 4),
    cmap="Blues",
    vmax=density.max() / 2,
)
axes[2].scatter(*samples.T, s=2)
for ax, title in zip(axes, ["data", "density", "samples"], strict=True):
    ax.set(title=title, xlim=(-3, 3), ylim=(-2.2, 2.2), aspect="equal")
plt.show()

# %%
# Is it a density?
# ----------------
#
# Then it integrates to 1 over the plane. And a sample comes with its density in one
# pass, by the same numbers as when it is asked for.

cell = (axis[1] - axis[0]) ** 2
print(f"the integral: {(density.sum() * cell).item():.4f}")
assert abs(density.sum() * cell - 1) < 0.01

points, log_prob = flow.rsample_and_log_prob((5,))
torch.testing.assert_close(flow.log_prob(points), log_prob, rtol=1e-3, atol=1e-3)

# %%
# Called, the flow is a :class:`torch.distributions.Distribution`, for all code that
# takes one:

moon = flow()
print(moon.sample((2, 3)).shape, moon.log_prob(torch.zeros(2)).item())

# %%
# Where to go from here:
#
# - conditional densities: ``SplineCoupling(f, conditional=True)`` hands ``f`` a
#   context, and ``flow(context)`` is the distribution (:class:`~invertible.Flow`);
# - images, in memory that does not grow with depth: :doc:`7_glow`;
# - coming from another library: :doc:`/howto/from_flow_libraries`.
