import random
from io import BytesIO

import numpy as np
import pytest
from pictures import noise
from PIL import Image

from errors import RunError
from images.files import augmented, centre_crop, random_box, read_image


def saved(image, suffix="PNG", **options):
    file = BytesIO()
    image.save(file, suffix, **options)
    return BytesIO(file.getvalue())


def read(image, mode="RGB", suffix="PNG", **options):
    return np.array(read_image(saved(image, suffix, **options), mode, "it"))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_kind_of_image_is_read_in_colour_and_in_grey(mode):
    image = noise(5, 4, mode)
    np.testing.assert_array_equal(read(image), np.array(image.convert("RGB")))
    np.testing.assert_array_equal(read(image, "L"), np.array(image.convert("L")))


def test_transparency_is_dropped():
    image = noise(8, 8).quantize(8)
    expected = np.array(image.convert("RGB"))
    np.testing.assert_array_equal(read(image, transparency=b"\x00\x80"), expected)
    np.testing.assert_array_equal(read(noise(8, 8), transparency=(1, 2, 3)), np.array(noise(8, 8)))


def test_a_print_keeps_its_colours():
    red = Image.new("RGB", (16, 16), (200, 30, 40)).convert("CMYK")
    assert np.abs(read(red, suffix="JPEG") - np.array([200.0, 30, 40])).max() < 4


@pytest.mark.parametrize("suffix", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled_to_8(suffix):
    values = np.array([[0, 128, 129, 257], [32768, 65406, 65407, 65535]], np.uint16)
    expected = [[0, 0, 1, 1], [128, 254, 255, 255]]
    np.testing.assert_array_equal(read(Image.fromarray(values), "L", suffix), expected)
    colour = read(Image.fromarray(values), "RGB", suffix)
    np.testing.assert_array_equal(colour, np.stack([expected] * 3, -1))


def test_16_bits_of_the_other_byte_order_are_scaled_as_well():
    values = Image.fromarray(np.array([[257, 65535]], ">u2"))
    np.testing.assert_array_equal(read(values, "L", "TIFF"), [[1, 255]])


def test_an_animation_shows_its_first_image():
    first, second = noise(8, 8, seed=1).quantize(16), noise(8, 8, seed=2).quantize(16)
    file = saved(first, "GIF", save_all=True, append_images=[second])
    np.testing.assert_array_equal(
        np.array(read_image(file, "RGB", "it")), np.array(first.convert("RGB"))
    )


def test_the_orientation_that_a_camera_notes_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    assert read(noise(8, 4), suffix="JPEG", exif=exif).shape == (4, 8, 3)


def cut(suffix):
    return BytesIO(saved(noise(64, 64), suffix).getvalue()[:300])


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (BytesIO(b""), "it is empty or no image"),
        (BytesIO(b"GIF? no"), "it is empty or no image"),
        (cut("JPEG"), "truncated"),
        (cut("PNG"), "truncated"),
        (saved(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), "unknown range"),
        (saved(Image.fromarray(np.full((2, 2), 65536, np.int32)), "TIFF"), "outside 0 to 65,535"),
    ],
    ids=["empty", "text", "cut jpeg", "cut png", "float", "32 bits"],
)
def test_an_unreadable_image_is_named(file, reason):
    with pytest.raises(RunError, match=f"^cannot read the image cat/it.jpg: (?i:.*{reason})"):
        read_image(file, "RGB", "cat/it.jpg")


@pytest.mark.parametrize("pixels", [64, 100], ids=["Pillow refuses", "Pillow warns"])
def test_an_image_of_too_many_pixels_is_named(monkeypatch, pixels):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels)
    with pytest.raises(RunError, match=r"^cannot read the image it: .*exceeds limit"):
        read_image(saved(noise(12, 12)), "RGB", "it")


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
        found = np.array(augmented(image, 16, Scripted(0, 0, 0, 0, draw), flip=True))
        np.testing.assert_array_equal(found[:, ::-1] if mirrored else found, np.array(expected))


def test_nothing_is_mirrored_unless_asked_for():
    image = noise(20, 20)
    plain = augmented(image, 8, Scripted(0, 0, 0, 0), flip=False)
    unmirrored = augmented(image, 8, Scripted(0, 0, 0, 0, 1), flip=True)
    np.testing.assert_array_equal(np.array(plain), np.array(unmirrored))
