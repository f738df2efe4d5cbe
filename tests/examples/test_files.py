from io import BytesIO

import numpy as np
import pytest
from pictures import noise
from PIL import Image

from errors import RunError
from images.dataset import read_image


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
        (
            saved(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"),
            "numbers of 16 bits",
        ),
        (
            saved(Image.fromarray(np.full((2, 2), 65536, np.int32)), "TIFF"),
            "numbers of 16 bits",
        ),
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
