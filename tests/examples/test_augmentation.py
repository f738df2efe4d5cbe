"""What training and tests show of an image, against torchvision's published text."""

import colorsys
import random
from dataclasses import replace

import numpy as np
import pytest
from pictures import noise
from PIL import Image, ImageEnhance

from experiment.settings import Config
from images.augmentation import centre_crop, jitter_colours, prepare, random_box, turn_hue

CROPPED = Config(image_size=16)
SHIFTED = Config(image_size=8, augmentation="shift", padding=2)
RELEASED = (0.87, 0.5, 0.5, 0.2)

# What the following expect was worked out by hand from the text of torchvision's Resize,
# CenterCrop and RandomResizedCrop (get_params).


@pytest.mark.parametrize(
    ("size", "resized", "box"),
    [
        ((500, 375), (341, 256), (58, 16, 282, 240)),  # int(341.33), round(58.5)
        ((375, 500), (256, 341), (16, 58, 240, 282)),
        ((500, 333), (384, 256), (80, 16, 304, 240)),  # int(384.38)
        ((100, 101), (256, 258), (16, 17, 240, 241)),  # int(258.56)
    ],
)
def test_a_test_image_is_resized_and_cropped_as_in_torchvision(size, resized, box):
    image = noise(*size)
    expected = image.resize(resized, Image.Resampling.BILINEAR).crop(box)
    np.testing.assert_array_equal(np.array(centre_crop(image, 224, 256)), np.array(expected))


class Scripted:
    """Draws what it is told to, as fractions of the range asked for."""

    def __init__(self, *fractions):
        self.fractions = list(fractions)

    def uniform(self, low, high):
        return low + (high - low) * self.fractions.pop(0)

    def randint(self, low, high):
        return round(self.uniform(low, high))

    def random(self):
        return self.fractions.pop(0)


@pytest.mark.parametrize(
    ("fractions", "box"),
    [
        # 8 % of 200 x 100 at 3:4 is 34.64 x 46.19, at 4:3 the other way round.
        ((0, 0, 0, 0), (0, 0, 35, 46)),
        ((0, 1, 1, 1), (200 - 46, 100 - 35, 200, 100)),
        # Half of the range of areas is 54 %, of that of ratios 1:1: 103.9 squared does not fit.
        ((0.5, 0.5, 0, 0.5, 0, 0), (0, 0, 40, 40)),
    ],
)
def test_a_random_crop_has_the_drawn_area_and_ratio(fractions, box):
    rng = Scripted(*fractions)
    assert random_box((200, 100), rng) == box
    assert not rng.fractions


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((400, 10), (193, 0, 206, 10)),  # 10 * 4 / 3 wide, the middle rounded down
        ((10, 400), (0, 193, 10, 206)),
    ],
)
def test_after_ten_trials_a_very_long_image_is_cropped_to_an_allowed_ratio(size, box):
    rng = Scripted(*[0.5] * 20)
    assert random_box(size, rng) == box
    assert not rng.fractions


def test_after_ten_trials_an_image_of_an_allowed_ratio_is_taken_whole():
    # All of the area at a ratio that does not fit.
    assert random_box((100, 90), Scripted(*[1, 0] * 10)) == (0, 0, 100, 90)


def test_random_crops_cover_their_range_of_areas_and_ratios():
    boxes = [random_box((200, 200), random.Random(seed)) for seed in range(300)]
    widths, heights = np.array([(r - l, b - t) for l, t, r, b in boxes]).T  # noqa: E741
    areas, ratios = widths * heights / 200**2, widths / heights
    assert 0.079 < areas.min() < 0.1
    assert 0.9 < areas.max() <= 1
    assert 0.74 < ratios.min() < 0.77
    assert 1.3 < ratios.max() < 1.35
    assert len({(left, top) for left, top, *_ in boxes}) > 200


def test_a_crop_is_resized_by_itself():
    image = noise(200, 100)
    expected = image.crop((0, 0, 35, 46)).resize((16, 16), Image.Resampling.BILINEAR)
    for mirrored, draw in ((False, 0.5), (True, 0.49)):
        found = np.array(prepare(image, CROPPED, Scripted(0, 0, 0, 0, draw)))
        np.testing.assert_array_equal(found[:, ::-1] if mirrored else found, np.array(expected))


def test_nothing_is_mirrored_unless_asked_for():
    image = noise(20, 20)
    plain = prepare(image, replace(CROPPED, flip=False), Scripted(0, 0, 0, 0))
    unmirrored = prepare(image, CROPPED, Scripted(0, 0, 0, 0, 1))
    np.testing.assert_array_equal(np.array(plain), np.array(unmirrored))


@pytest.mark.parametrize(("left", "top"), [(0, 0), (1, 1), (0, 1), (0.5, 0.5), (0.75, 0.25)])
def test_a_shifted_image_is_one_cut_out_of_a_black_frame(left, top):
    image = noise(8, 8)
    framed = np.pad(np.array(image), ((2, 2), (2, 2), (0, 0)))
    row, column = round(4 * top), round(4 * left)
    found = prepare(image, SHIFTED, Scripted(left, top, 1))
    np.testing.assert_array_equal(np.array(found), framed[row : row + 8, column : column + 8])


def test_small_images_are_taken_whole_in_a_test():
    image = noise(8, 8)
    np.testing.assert_array_equal(np.array(prepare(image, SHIFTED, None)), np.array(image))
    resized = centre_crop(image, 16, 18)  # 256 of 224
    np.testing.assert_array_equal(np.array(prepare(image, CROPPED, None)), np.array(resized))


# The oracles of the following are the text of torchvision's ColorJitter, and Python's colorsys.


def in_torchvision(image, jitter, rng):
    """The text of torchvision's functions for Pillow's images."""
    enhancers = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    for change in rng.sample(range(4), 4):
        if change == 3:
            factor = rng.uniform(-jitter[3], jitter[3])
            h, s, v = image.convert("HSV").split()
            h = Image.fromarray(np.array(h) + np.int64(factor * 255).astype(np.uint8))
            image = Image.merge("HSV", (h, s, v)).convert("RGB")
        else:
            factor = rng.uniform(max(0, 1 - jitter[change]), 1 + jitter[change])
            image = enhancers[change](image).enhance(factor)
    return np.array(image)


def test_colours_are_changed_as_in_torchvision():
    for seed in range(20):
        image = noise(12, 12, seed=seed)
        found = jitter_colours(image, RELEASED, random.Random(seed))
        expected = in_torchvision(image, RELEASED, random.Random(seed))
        np.testing.assert_array_equal(np.array(found), expected)


@pytest.mark.parametrize("turn", [-0.5, -0.2, 0, 0.07, 1 / 6, 0.5])
def test_the_hue_is_turned_as_by_colorsys(turn):
    image = noise(4, 4).resize((16, 16), Image.Resampling.BICUBIC)
    for x, grey in enumerate([(0, 0, 0), (255, 255, 255), (90, 90, 90)]):
        image.putpixel((x, 0), grey)
    expected = []
    for pixel in np.array(image).reshape(-1, 3) / 255:
        h, s, v = colorsys.rgb_to_hsv(*pixel)
        expected.append(colorsys.hsv_to_rgb((h + turn) % 1, s, v))
    error = np.array(turn_hue(image, turn)).reshape(-1, 3) - 255 * np.array(expected)
    # Pillow has hue and saturation in 256 levels.
    assert np.abs(error).max() < 10
    assert np.abs(error).mean() < 2
    np.testing.assert_array_equal(error[:3], 0)


def test_changes_by_nothing_leave_all_levels_as_they_are():
    image = noise(16, 16)
    assert jitter_colours(image, (0, 0, 0, 0), random.Random(0)) is image


def test_grey_images_keep_hue_and_saturation():
    grey = noise(8, 8, "L")
    found = jitter_colours(grey, (0, 0, 0.9, 0.5), random.Random(3))
    np.testing.assert_array_equal(np.array(found), np.array(grey))
    assert jitter_colours(grey, RELEASED, random.Random(3)).mode == "L"
