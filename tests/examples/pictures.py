"""Small images to try things on."""

from io import BytesIO

import numpy as np
from PIL import Image


def noise(width, height, mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def in_png(image):
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def rows(numbers):
    """A column of a parquet file: images of noise of these seeds."""
    return [
        {"bytes": in_png(noise(6, 5, seed=number)), "path": f"{number}.png"} for number in numbers
    ]


def write_folders(root, train=6, val=3):
    """So many images of a dark and of a bright class, in the folders that ``--data`` takes."""
    random = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for brightness, name in enumerate(["day", "night"]):
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(128 * brightness, 128 * (brightness + 1), (20, 24, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    return root
