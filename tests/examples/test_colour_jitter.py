"""The colour jitter against an image at a time.

The oracles are Pillow's ImageEnhance and its HSV images, which torchvision's transforms of Pillow's
images consist of, and Python's colorsys.
"""

import colorsys

import numpy as np
import pytest
import torch
from pictures import noise
from PIL import Image, ImageEnhance

from images.colour_jitter import change_colours, draw_changes

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
RELEASED = (0.87, 0.5, 0.5, 0.2)


def blurred(seed, side=24):
    """Colours that vary smoothly, as those of photographs do."""
    return noise(4, 4, seed=seed).resize((side, side), Image.Resampling.BICUBIC)


def batch(images):
    return torch.from_numpy(np.stack([np.array(image) for image in images])).permute(0, 3, 1, 2)


def changed(images, factors, orders):
    found = change_colours(batch(images), np.float32(factors), np.array(orders))
    return found.permute(0, 2, 3, 1).numpy().astype(int)


def alone(operation, factor):
    """The factors of one change, the others changing nothing."""
    factors = [1, 1, 1, 0]
    factors[operation] = factor
    return factors


@pytest.mark.parametrize(
    ("operation", "enhance"),
    [
        (BRIGHTNESS, ImageEnhance.Brightness),
        (CONTRAST, ImageEnhance.Contrast),
        (SATURATION, ImageEnhance.Color),
    ],
)
@pytest.mark.parametrize("factor", [0, 0.13, 0.5, 1, 1.5, 1.87])
def test_brightness_contrast_and_saturation_are_those_of_pillow(operation, enhance, factor):
    # Pillow rounds the mean grey, and cuts the fractions of the result off.
    images = [noise(16, 16, seed=1), blurred(2, 16)]
    found = changed(images, [alone(operation, factor)] * 2, [range(4)] * 2)
    for image, ours in zip(images, found, strict=True):
        assert np.abs(np.array(enhance(image).enhance(factor)) - ours).max() <= 1


def turned(pixel, turn):
    h, s, v = colorsys.rgb_to_hsv(*pixel)
    return colorsys.hsv_to_rgb((h + turn) % 1, s, v)


@pytest.mark.parametrize("turn", [-0.5, -0.2, 0, 0.07, 1 / 6, 0.5])
def test_the_hue_is_turned_as_by_colorsys(turn):
    image = noise(16, 16)
    image.putpixel((0, 0), (0, 0, 0))
    image.putpixel((1, 0), (255, 255, 255))
    image.putpixel((2, 0), (90, 90, 90))
    image.putpixel((3, 0), (90, 200, 200))
    [ours] = changed([image], [alone(HUE, turn)], [range(4)])
    pixels = np.array(image).reshape(-1, 3) / 255
    expected = 255 * np.array([turned(pixel, turn) for pixel in pixels]).reshape(16, 16, 3)
    assert np.abs(ours - expected).max() < 0.501  # half a level by rounding


def slowly(image, factors, order):
    """A change after the other, of one image, a pixel at a time."""
    pixels = [tuple(value / 255 for value in pixel) for pixel in np.array(image).reshape(-1, 3)]
    for operation in order:
        factor = factors[operation]
        greys = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b in pixels]
        bases = {
            BRIGHTNESS: [0.0] * len(pixels),
            CONTRAST: [sum(greys) / len(greys)] * len(pixels),
            SATURATION: greys,
        }
        if operation == HUE:
            pixels = [turned(pixel, factor) for pixel in pixels]
        else:
            pixels = [
                tuple(min(max(factor * value + (1 - factor) * base, 0), 1) for value in pixel)
                for pixel, base in zip(pixels, bases[operation], strict=True)
            ]
    return 255 * np.array(pixels).reshape(*image.size, 3)


def in_torchvision(image, factors, order):
    """The text of torchvision's functions for Pillow's images."""
    for operation in order:
        factor = float(factors[operation])
        if operation == HUE:
            h, s, v = image.convert("HSV").split()
            h = Image.fromarray(np.array(h) + np.int64(factor * 255).astype(np.uint8))
            image = Image.merge("HSV", (h, s, v)).convert("RGB")
        else:
            enhance = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
            image = enhance[operation](image).enhance(factor)
    return np.array(image)


def test_all_changes_in_the_drawn_order_are_those_of_the_slow_way():
    images = [noise(8, 8, seed=seed) for seed in range(24)]
    changes = draw_changes(RELEASED, 24, np.random.default_rng(0))
    ours = changed(images, *changes)
    for image, *drawn, found in zip(images, *changes, ours, strict=True):
        # Half a level by rounding; hues of greyish pixels are not exact in single precision.
        assert np.abs(slowly(image, *drawn) - found).max() < 0.51


def test_all_changes_in_the_drawn_order_are_about_those_of_torchvision():
    images = [blurred(seed) for seed in range(100)]
    changes = draw_changes(RELEASED, 100, np.random.default_rng(1))
    ours = changed(images, *changes)
    errors = [
        np.abs(in_torchvision(image, *drawn) - found)
        for image, *drawn, found in zip(images, *changes, ours, strict=True)
    ]
    # It rounds after each change, and hue and saturation to 256 levels.
    assert np.mean(errors) < 1.5
    assert np.percentile(errors, 99) < 8


def test_factors_and_orders_cover_their_ranges():
    factors, orders = draw_changes((1.2, 0.5, 0.25, 0.2), 2000, np.random.default_rng(0))
    ranges = np.array([[0, 2.2], [0.5, 1.5], [0.75, 1.25], [-0.2, 0.2]])
    width = np.diff(ranges)[:, 0]
    assert (factors >= ranges[:, 0]).all()
    assert (factors <= ranges[:, 1]).all()
    np.testing.assert_array_less(np.abs(factors.min(0) - ranges[:, 0]), 0.01 * width)
    np.testing.assert_array_less(np.abs(factors.max(0) - ranges[:, 1]), 0.01 * width)
    np.testing.assert_allclose(factors.mean(0), ranges.mean(1), atol=0.05 * width.max())
    assert len(np.unique(orders, axis=0)) == 24


def test_changes_by_nothing_leave_all_levels_as_they_are():
    image = noise(64, 64)
    changes = draw_changes((0, 0, 0, 0), 1, np.random.default_rng(0))
    np.testing.assert_array_equal(changed([image], *changes)[0], np.array(image))


def test_the_image_given_stays_as_it_was():
    images = batch([noise(8, 8)])
    before = images.clone()
    change_colours(images, *draw_changes(RELEASED, 1, np.random.default_rng(0)))
    assert torch.equal(images, before)


def test_grey_images_keep_hue_and_saturation():
    grey = noise(8, 8, "L")
    changes = draw_changes(RELEASED, 1, np.random.default_rng(3))
    images = torch.from_numpy(np.array(grey))[None, None]
    found = change_colours(images, *changes)
    in_colour = change_colours(images.expand(1, 3, 8, 8), *changes)
    assert found.shape == (1, 1, 8, 8)
    assert (found.int() - in_colour.int()).abs().max() <= 1
    assert not torch.equal(found, images)
