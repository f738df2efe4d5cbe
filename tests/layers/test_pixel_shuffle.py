"""PixelUnshuffle puts every pixel where its formula says, in 1, 2 and 3 dimensions."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from toys import images

from invertible import Inverse, PixelShuffle, PixelUnshuffle

ORDERS = ["channel-major", "offset-major"]


def by_loops(x, factors, order):
    """The definition: the place in the block becomes part of the channel."""
    n, c, *sides = x.shape
    block = math.prod(factors)
    small = [side // r for side, r in zip(sides, factors, strict=True)]
    y = x.new_empty(n, c * block, *small)
    for channel in range(c):
        for place in itertools.product(*map(range, sides)):
            offset = 0
            for p, r in zip(place, factors, strict=True):
                offset = offset * r + p % r
            target = {
                "channel-major": channel * block + offset,
                "offset-major": offset * c + channel,
            }[order]
            pixel = (p // r for p, r in zip(place, factors, strict=True))
            y[(slice(None), target, *pixel)] = x[(slice(None), channel, *place)]
    return y


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("r", [1, 2, 3])
def test_every_pixel_goes_where_the_loops_put_it(order, rank, r):
    x = images(2, 3, *[2 * r, r, r][:rank])
    y = by_loops(x, [r] * rank, order)
    assert torch.equal(PixelUnshuffle(r, order=order)(x), y)
    assert torch.equal(PixelUnshuffle(r, order=order).inverse(y), x)
    assert torch.equal(PixelShuffle(r, order=order)(y), x)
    assert torch.equal(PixelShuffle(r, order=order).inverse(x), y)


@pytest.mark.parametrize("order", ORDERS)
@given(factors=st.lists(st.integers(1, 3), min_size=1, max_size=3), channels_last=st.booleans())
def test_every_dimension_may_have_a_factor_of_its_own(order, factors, channels_last):
    x = images(2, 3, *[(i + 1) * r for i, r in enumerate(factors)])
    if channels_last and len(factors) == 2:
        x = x.to(memory_format=torch.channels_last)
    y = by_loops(x, factors, order)
    assert torch.equal(PixelUnshuffle(factors, order=order)(x), y)
    assert torch.equal(PixelUnshuffle(factors, order=order).inverse(y), x)
    assert torch.equal(PixelShuffle(factors, order=order)(y), x)
    assert torch.equal(PixelShuffle(factors, order=order).inverse(x), y)


@given(r=st.integers(1, 3), c=st.integers(1, 3), channels_last=st.booleans())
def test_channel_major_is_the_order_of_torch(r, c, channels_last):
    x = images(2, c, 2 * r, 3 * r)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    y = PixelUnshuffle(r)(x)
    assert torch.equal(y, nn.PixelUnshuffle(r)(x))
    assert torch.equal(PixelShuffle(r)(y), nn.PixelShuffle(r)(y))


def test_the_first_block_of_an_image_becomes_its_first_channels():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert PixelUnshuffle(2)(x)[0, :, 0, 0].tolist() == [0, 1, 4, 5]


def test_offset_major_keeps_the_channels_of_a_pixel_together():
    x = torch.arange(8.0).view(1, 2, 2, 2)
    assert PixelUnshuffle(2, order="offset-major")(x).flatten().tolist() == [
        *(0, 4),
        *(1, 5),
        *(2, 6),
        *(3, 7),
    ]


@pytest.mark.parametrize("order", ORDERS)
def test_shuffle_is_the_inverse_of_unshuffle(order):
    x = images(1, 8, 2, 2)
    inverse = Inverse(PixelUnshuffle(2, order=order))
    assert torch.equal(PixelShuffle(2, order=order)(x), inverse(x))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_an_empty_batch_keeps_its_shape(order, channels_last):
    x = images()[:0]
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    layer = PixelUnshuffle(2, order=order)
    assert layer(x).shape == (0, 16, 1, 1)
    assert layer.inverse(layer(x)).shape == x.shape


def test_the_options_are_shown():
    assert repr(PixelShuffle(2)) == "PixelShuffle(factor=2, order='channel-major')"
    assert "factor=(1, 2)" in repr(PixelUnshuffle([1, 2]))
