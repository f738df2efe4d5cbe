"""What a network is shown of an image: in training changed at random, in a test its middle.

The operations are those of torchvision's ``RandomResizedCrop``, ``RandomHorizontalFlip``,
``ColorJitter``, ``Resize`` and ``CenterCrop`` for images of Pillow, random numbers aside. To
install torchvision would replace a CPU build of torch by its own.
"""

import math
import random
from collections.abc import Sequence

from PIL import Image, ImageEnhance

from experiment.settings import Config

Box = tuple[int, int, int, int]  # left, top, right, bottom
BILINEAR = Image.Resampling.BILINEAR
ENHANCERS = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color


def prepare(image: Image.Image, config: Config, rng: random.Random | None) -> Image.Image:
    """A square of an image: augmented with the numbers that are drawn, or without any as in a test.

    Small images, which ``--augmentation shift`` is for, are taken whole in a test; of others the
    middle, the usual 224 of 256 pixels.
    """
    size = config.image_size
    if rng is None:
        whole = config.augmentation == "shift"
        return centre_crop(image, size, size if whole else size * 256 // 224)
    if config.augmentation == "shift":
        image = shift(centre_crop(image, size, size), config.padding, rng)
    else:
        image = image.crop(random_box(image.size, rng)).resize((size, size), BILINEAR)
    if config.flip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return jitter_colours(image, config.jitter, rng)


def centre_crop(image: Image.Image, size: int, resize: int) -> Image.Image:
    """Makes the shorter side ``resize`` pixels long and crops a central square of ``size``."""
    shorter = min(image.size)
    width, height = (resize * side // shorter for side in image.size)
    image = image.resize((width, height), BILINEAR)
    # Half a pixel is rounded to even here, but always down in random_box: torchvision's ways.
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def shift(image: Image.Image, padding: int, rng: random.Random) -> Image.Image:
    """Moves an image by up to ``padding`` pixels each way, black moving in."""
    left, top = rng.randint(-padding, padding), rng.randint(-padding, padding)
    return image.crop((left, top, left + image.width, top + image.height))


def random_box(image_size: tuple[int, int], rng: random.Random) -> Box:
    """A part of an image of this width and height: 8 to 100 % of the area, sides of 3:4 to 4:3.

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


def jitter_colours(image: Image.Image, jitter: Sequence[float], rng: random.Random) -> Image.Image:
    """Changes brightness, contrast, saturation and hue, in random order.

    The first three factors are drawn from ``1 - jitter`` to ``1 + jitter``, but not below 0. The
    fourth is the largest turn of the hue either way, 0.5 being half of the colour circle.
    """
    for change in rng.sample(range(4), 4) if any(jitter) else ():
        amount = jitter[change]
        if change < 3:
            factor = rng.uniform(max(0.0, 1 - amount), 1 + amount)
            image = ENHANCERS[change](image).enhance(factor)
        elif image.mode != "L":
            image = turn_hue(image, rng.uniform(-amount, amount))
    return image


def turn_hue(image: Image.Image, turn: float) -> Image.Image:
    """Turns all colours by a part of the circle."""
    hue, *others = image.convert("HSV").split()
    turned = hue.point([(level + int(255 * turn)) % 256 for level in range(256)])
    return Image.merge("HSV", (turned, *others)).convert("RGB")
