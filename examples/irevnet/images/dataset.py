"""The images of one part of a data set: read one by one, whatever their files hold."""

import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

from errors import RunError


@dataclass(frozen=True)
class Images:
    """The images of one part of a data set and their classes."""

    # the image of an index in a mode of Pillow's, "RGB" or "L"
    read: Callable[[int, str], Image.Image]
    labels: np.ndarray  # their classes, integers of shape (N,)
    classes: tuple[str, ...]  # the classes' names
    files: np.ndarray | None = None  # the images' names in bytes, where they have some
    note: str = ""  # what else there is to say of them

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> int:
        """Changes if an image is added, removed, renamed or given another class."""
        found = zlib.crc32(np.asarray(self.labels, np.int64).tobytes())
        return found if self.files is None else zlib.crc32(self.files.tobytes(), found)


def numbered(classes: int) -> tuple[str, ...]:
    """The names of classes that have none."""
    return tuple(map(str, range(classes)))


def difference(known: Sequence[str], found: Sequence[str]) -> str:
    """In what the names of classes differ, as far as they have some; empty if in nothing."""
    if len(known) != len(found):
        return f"{len(known):,} classes were trained, and there are {len(found):,}"
    if numbered(len(known)) not in (tuple(known), tuple(found)):
        for number, (old, new) in enumerate(zip(known, found, strict=True)):
            if old != new:
                return f"class {number} was {old!r}, is {new!r}"
    return ""


def read_image(file: str | IO[bytes], mode: str, name: str) -> Image.Image:
    """Decodes an image as ``"RGB"`` or ``"L"``.

    Transparency is dropped, an animation's first image taken. The orientation that a camera notes
    in EXIF is ignored, as ImageNet's networks are trained.
    """
    try:
        with warnings.catch_warnings():  # of more than 89 megapixels, which would name no file
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(file)
        with image:
            image.load()
            return _converted(image, mode)
    except UnidentifiedImageError as error:
        raise RunError(f"cannot read the image {name}: it is empty or no image.") from error
    except Exception as error:  # Pillow's decoders raise anything from OSError to SyntaxError
        raise RunError(f"cannot read the image {name}: {error}") from error


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # of which Pillow's conversion makes white above 255
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError("its grey values are not whole numbers of 16 bits: save it in 8 bits.")
        image = Image.fromarray(((values.astype(np.int64) + 128) // 257).astype(np.uint8))
    if "transparency" in image.info:  # a palette's, of which convert would warn
        image = image.convert("RGBA")
    return image.convert(mode)
