"""
Decode an image from the last layer
===================================

A classifier throws away what doesn't help it to classify: so one reads, and so it
is in most networks. You will train one that keeps everything, get handwritten
digits back from its last layer, walk from one digit to another among its
features, and do the same to a photograph.
"""

# %%
# A small i-RevNet
# ----------------
#
# The i-RevNet of `Jacobsen et al. (2018) <https://arxiv.org/abs/1802.07088>`_
# shrinks an image as any convolutional network does, but where others pool, it
# moves pixels into channels. Between such steps stand couplings.

import torch
from torch import nn

from invertible import (
    AdditiveCoupling,
    InvertibleSequential,
    Merge,
    Parallel,
    PixelUnshuffle,
    Split,
    Swap,
)

torch.manual_seed(0)


def residual(channels):
    return nn.Sequential(
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, 32, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, channels, kernel_size=3, padding=1),
    )


def irevnet(image_channels):
    """Three stages of four blocks, each at half the size of the one before."""
    layers = [PixelUnshuffle(2), Split()]
    for stage in range(3):
        if stage:
            layers.append(Parallel(PixelUnshuffle(2), PixelUnshuffle(2)))
        width = image_channels * 2 * 4**stage  # channels of one stream
        for _ in range(4):
            layers += [AdditiveCoupling(residual(width)), Swap()]
    return InvertibleSequential(*layers, Merge(), checkpoint=True)


# %%
# Only the classifier behind it loses anything: ten numbers do not make an image.

features = irevnet(image_channels=1)
classify = nn.Sequential(
    nn.BatchNorm2d(64),
    nn.ReLU(),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(64, 10),
)

# %%
# Train it on digits
# ------------------
#
# scikit-learn ships 1797 digits of 8x8 pixels.

from sklearn.datasets import load_digits

bunch = load_digits()
order = torch.randperm(len(bunch.images))
digits = torch.tensor(bunch.images, dtype=torch.float32)[order, None] / 16
labels = torch.tensor(bunch.target)[order]
train, test = slice(0, 1500), slice(1500, None)

parameters = [*features.parameters(), *classify.parameters()]
optimizer = torch.optim.Adam(parameters)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=8 * 30)
for _ in range(8):
    for batch in torch.randperm(1500).split(50):
        loss = nn.functional.cross_entropy(
            classify(features(digits[batch])), labels[batch]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

# %%
# Get them back
# -------------
#
# In the last layer, a digit has become 64 channels of a single pixel. The
# classifier finds its class there, and the inverse finds all its pixels.

features.eval()
classify.eval()
with torch.no_grad():
    phi = features(digits[test])
    accuracy = (classify(phi).argmax(1) == labels[test]).float().mean()
    decoded = features.inverse(phi)

print("features:", tuple(phi.shape))
print(f"accuracy on test digits: {accuracy:.1%}")
error = (decoded - digits[test]).abs().max()
print(f"largest error of a pixel, white being 1: {error:.0e}")

# %%

import matplotlib.pyplot as plt


def show(title, images, size=1.0):
    """Draws images of the same size side by side."""
    _, height, width = images[0].shape
    figure, places = plt.subplots(
        1,
        len(images),
        figsize=(size * len(images), size * height / width + 0.4),
        layout="constrained",
    )
    figure.suptitle(title, fontsize=10)
    for axes, image in zip(places, images, strict=True):
        axes.imshow(image.clamp(0, 1).movedim(0, -1), cmap="gray", vmin=0, vmax=1)
        axes.set_axis_off()


show("original", digits[test][:8])

# %%

show("decoded from the last layer", decoded[:8])

# %%
# Walk among the features
# -----------------------
#
# Any 64 numbers are the features of some image. So there are images on the line
# between the features of two digits, and decoding shows them. On the way the
# class changes; the images are noisy, as nothing asked them to be digits.

start, end = phi[labels[test] == 3][0], phi[labels[test] == 8][0]
steps = torch.linspace(0, 1, 8).view(-1, 1, 1, 1)
with torch.no_grad():
    between = (1 - steps) * start + steps * end
    walk = features.inverse(between)
    print("classes on the way:", classify(between).argmax(1).tolist())
show("from a 3 to an 8, along a straight line among the features", walk)

# %%
# A photograph
# ------------
#
# Invertibility owes nothing to training, nor to the size of the image. Here the
# weights are left as they were initialised, and the photograph comes back all the
# same.

from sklearn.datasets import load_sample_image

pixels = torch.tensor(load_sample_image("china.jpg"))[
    :424
]  # sides must be multiples of 8
photo = pixels.movedim(-1, 0)[None] / 255
network = irevnet(image_channels=3).eval()
with torch.no_grad():
    phi = network(photo)
    photo_decoded = network.inverse(phi)

print(tuple(photo.shape), "becomes", tuple(phi.shape))
error = (photo_decoded - photo).abs().max()
print(f"largest error of a pixel, white being 1: {error:.0e}")

# %%

channels = phi[0, ::20]
low, high = channels.amin((1, 2), keepdim=True), channels.amax((1, 2), keepdim=True)
tiles = ((channels - low) / (high - low))[:, None]
show("10 of the 192 channels of the last layer", tiles, size=0.85)

# %%

# sphinx_gallery_thumbnail_number = 5
show("the photograph, and what it decodes to", [photo[0], photo_decoded[0]], size=4)

# %%
# Back in eight bits, no pixel has changed:

restored = (photo_decoded[0] * 255).round().to(torch.uint8).movedim(0, -1)
print("equal to the file:", torch.equal(restored, pixels))

# %%
# In train mode batch statistics take part in the computation: decode the same
# batch that was encoded, or decode in eval mode, as here. The networks of the
# paper, their training on ImageNet and their analysis are in the folder
# ``examples/irevnet`` of the repository.
