"""Image files decoded, and cut to squares for training and for tests as torchvision cuts them.

Nothing but Pillow is needed: torchvision would replace a CPU build of torch by its own. The crops
are those of torchvision's ``RandomResizedCrop``, ``RandomHorizontalFlip``, ``Resize`` and
``CenterCrop`` for Pillow's images, random numbers aside.
"""

from __future__ import annotations

import math
import random
import warnings
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

from errors import RunError

Box = tuple[int, int, int, int]  # left, top, right, bottom


def read_image(file: str | IO[bytes], mode: str, name: str) -> Image.Image:
    """Decodes an image as ``"RGB"`` or ``"L"``.

    Transparency is dropped, an animation's first image taken. The orientation that a camera notes
    in EXIF is ignored, as ImageNet's networks are trained.
    """
    try:
        with _open(file) as image:
            return _converted(image, mode)
    except UnidentifiedImageError as error:
        raise RunError(f"cannot read the image {name}: it is empty or no image.") from error
    except Exception as error:  # Pillow's decoders raise anything from OSError to SyntaxError
        raise RunError(f"cannot read the image {name}: {error}") from error


def _open(file: str | IO[bytes]) -> Image.Image:
    with warnings.catch_warnings():  # of more than 89 megapixels, which would name no file
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(file)


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == mode:
        image.load()
        return image
    if image.mode.startswith("I"):
        image = _in_8_bits(image)
    if image.mode == "F":
        raise ValueError("it holds floating-point numbers of unknown range: save it in 8 bits.")
    if "transparency" in image.info:  # a palette's, of which convert would warn
        image = image.convert("RGBA")
    return image.convert(mode)


def _in_8_bits(image: Image.Image) -> Image.Image:
    # Pillow's own conversion makes white of all above 255.
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("it holds grey values outside 0 to 65,535: save it in 8 bits.")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def augmented(image: Image.Image, size: int, rng: random.Random, *, flip: bool) -> Image.Image:
    """A random resized crop: 8 to 100 % of the area, sides of 3:4 to 4:3; half of them mirrored."""
    image = image.crop(random_box(image.size, rng)).resize((size, size), Image.Resampling.BILINEAR)
    if flip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def random_box(image_size: tuple[int, int], rng: random.Random) -> Box:
    """What :func:`augmented` crops of an image of this width and height.

    Ten trials, then the middle of the image as far as its ratio is allowed.
    """
    width, height = image_size
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def centre_crop(image: Image.Image, size: int, resize: int) -> Image.Image:
    """Makes the shorter side ``resize`` pixels long and crops a central square of ``size``."""
    shorter = min(image.size)
    width, height = (resize * side // shorter for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    # Half a pixel is rounded to even here, but always down in random_box: torchvision's ways.
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))
