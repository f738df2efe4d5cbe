"""
Train deep without storing activations
======================================

Training needs memory for every layer's activations, so that memory grows with
depth. An invertible network can compute them again from its output. You will see
the memory stop growing, check that the gradients stay the same, and train a
network of 100 blocks.
"""

# %%
# A stack of any depth
# --------------------
#
# A block has two functions of two convolutions each, on images of 32 channels.

import torch
from torch import nn

from invertible import InvertibleSequential, Merge, ReversibleBlock, Split

torch.manual_seed(0)


def residual():
    return nn.Sequential(
        nn.Conv2d(16, 16, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, kernel_size=3, padding=1),
    )


def stack(depth, checkpoint):
    blocks = [ReversibleBlock(residual(), residual()) for _ in range(depth)]
    return InvertibleSequential(Split(), *blocks, Merge(), checkpoint=checkpoint)


# %%
# ``checkpoint=True`` is the whole difference. In the backward pass, each layer's
# input is then rebuilt from its output just before it is needed, and freed right
# after.
#
# Measure the memory
# ------------------
#
# PyTorch's profiler is told of every allocation. What has been allocated in the
# forward pass and not been freed is what waits for the backward pass.

from torch.profiler import ProfilerActivity, profile


def held(network, x):
    """Bytes that are held between forward and backward."""
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        y = network(x)  # noqa: F841 - the graph lives as long as its output
    return sum(event.self_cpu_memory_usage for event in profiler.key_averages())


images = torch.randn(8, 32, 32, 32)
depths = [2, 4, 8, 16, 32]
stored, rebuilt = (
    [held(stack(depth, checkpoint), images) / 2**20 for depth in depths]
    for checkpoint in (False, True)
)
for row in zip(depths, stored, rebuilt, strict=True):
    print("{:3} blocks: {:5.1f} MiB stored, {:.1f} MiB rebuilt".format(*row))

# %%

import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
axes.plot(depths, stored, "o-", color="tab:orange", label="activations stored")
axes.plot(depths, rebuilt, "o-", color="tab:blue", label="rebuilt, checkpoint=True")
axes.set(xlabel="blocks", ylabel="MiB held for the backward pass", xticks=depths)
axes.spines[["top", "right"]].set_visible(False)
_ = axes.legend(frameon=False)

# %%
# What stays is one state: the output. At any depth.
#
# Same gradients, at a price
# --------------------------
#
# Both ways compute the gradients of the same function. Sharing the layers between
# two sequences lets you compare them.

plain = stack(8, checkpoint=False)
frugal = InvertibleSequential(*plain, checkpoint=True)


def gradient(network):
    """Of all parameters, in one vector."""
    parts = torch.autograd.grad(
        network(images).square().mean(), list(network.parameters())
    )
    return torch.cat([part.flatten() for part in parts])


expected, found = gradient(plain), gradient(frugal)
error = (found - expected).norm() / expected.norm()
print(f"relative difference of the gradients: {error:.1e}")

# %%
# They differ by rounding only. (How far that goes at great depth, and how to have
# no difference at all, is what the lesson on exact mode is about.) The price is
# time: each function is evaluated once more, in the backward pass, which is what
# ``torch.utils.checkpoint`` costs too.
#
# Train 100 blocks
# ----------------
#
# A toy task: tell horizontal stripes from vertical ones, under noise.


def stripes(count):
    """Noisy images of 32 channels with stripes, and whether these are vertical."""
    vertical = torch.arange(count) % 2
    wave = torch.arange(16).mul(torch.pi / 2).sin().expand(16, 16)
    waves = torch.stack((wave.T, wave))[vertical]
    return waves[:, None] + torch.randn(count, 32, 16, 16), vertical


deep = stack(100, checkpoint=True)
head = nn.Sequential(
    nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2)
)
optimizer = torch.optim.Adam([*deep.parameters(), *head.parameters()], lr=3e-4)
for step in range(10):
    x, label = stripes(16)
    loss = nn.functional.cross_entropy(head(deep(x)), label)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss:.3f}")

# %%
# Nothing in the loop knows that activations are rebuilt. What else works with it is
# in :doc:`/explanation/memory`; what it costs, beside other libraries too, in
# :doc:`/explanation/costs`.
