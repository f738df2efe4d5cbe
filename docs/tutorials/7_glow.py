"""
A Glow in flat memory
=====================

Flows of images are deep, and each layer stores its activations: that is what fills
the memory. You will build a small Glow of two scales, train it on digits while
activations are rebuilt, compare the memory with that of storing them, and draw
digits.
"""

# %%
# A step of the flow
# ------------------
#
# Glow (`Kingma and Dhariwal, 2018 <https://arxiv.org/abs/1807.03039>`_) repeats one
# step: scale and shift the channels, mix them by a matrix, and let half of them
# change the other half.

import torch
from sklearn.datasets import load_digits
from torch import nn

from invertible import (
    ActNorm,
    AffineCoupling,
    Dequantize,
    FactorOut,
    Flow,
    InvertibleLinear,
    InvertibleSequential,
    Merge,
    OnStreams,
    PixelUnshuffle,
    Split,
    measure_memory,
)

torch.manual_seed(0)


def conditioner(channels, width=48):
    """From half of the channels to a shift and a scale for each of the others."""
    last = nn.Conv2d(width, 2 * channels, 3, padding=1)
    nn.init.zeros_(last.weight)  # the flow begins as the identity
    nn.init.zeros_(last.bias)
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 1),
        nn.ReLU(),
        last,
    )


def step(channels):
    coupling = AffineCoupling(conditioner(channels // 2))
    return [
        ActNorm(channels),
        InvertibleLinear(channels),
        Split(),
        coupling,
        Merge(),
    ]


def steps(channels, count):
    return InvertibleSequential(
        *[layer for _ in range(count) for layer in step(channels)]
    )


# %%
# Two scales
# ----------
#
# Whole numbers become continuous by noise, which ``Dequantize`` adds. Pixels move
# into channels; behind some steps, half of the channels are factored out, and the
# others go on. All of it is one composition: ``checkpoint=True`` makes training
# rebuild what it would store.


def glow(depth, checkpoint=True):
    return InvertibleSequential(
        Dequantize(17),  # digits have levels 0 to 16
        PixelUnshuffle(2),
        steps(4, depth),
        FactorOut(),  # from here on the state is a pair
        OnStreams(0, InvertibleSequential(PixelUnshuffle(2), steps(8, depth))),
        checkpoint=checkpoint,
    )


flow = Flow(glow(depth=6), event_shape=(1, 8, 8))

# %%
# Memory
# ------
#
# What a step with 256 images would hold between its forward and backward pass:

digits = torch.tensor(load_digits().images).float()[:, None]
for depth in (2, 4, 8):
    found = measure_memory(glow(depth), digits[:256])
    print(
        f"{depth} steps a scale: {found.stored.held / 2**20:.1f} MiB stored, "
        f"{found.as_set.held / 2**20:.1f} rebuilt"
    )

# %%
# Training
# --------

train, test = digits[:1500], digits[1500:]
optimizer = torch.optim.Adam(flow.parameters(), lr=2e-3)
for iteration in range(200):
    batch = train[torch.randint(len(train), (128,))]
    loss = flow.bits_per_dim(batch).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if iteration % 40 == 0:
        print(f"{iteration}: {loss.item():.2f} bits per dimension")

with torch.no_grad():
    print(f"test images: {flow.bits_per_dim(test).mean():.2f} bits per dimension")

# %%
# Samples
# -------
#
# Above, images of the data; below, samples, drawn at a lower temperature.

import matplotlib.pyplot as plt

samples = flow.sample((16,), temperature=0.7)
figure, axes = plt.subplots(2, 16, figsize=(9, 1.5), layout="constrained")
for column in range(16):
    for row, images in enumerate((test, samples)):
        axes[row, column].imshow(images[column, 0], cmap="gray_r", vmin=0, vmax=16)
        axes[row, column].axis("off")
plt.show()

# %%
# After 200 steps they are digits at a second glance; longer training makes them
# better, in the same memory.
