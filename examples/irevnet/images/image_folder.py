"""Images in a folder per class: which there are, and of which class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from experiment.folder import RunError
from images.image_files import read_image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")


class ImageFolder:
    """The images of ``folder/<class>/``, looked for when they are first needed.

    Args:
        folder: Holds the class folders.
        classes: Their names; the position of a name is the label.
    """

    def __init__(self, folder: Path, classes: Sequence[str]) -> None:
        self.folder = folder
        self.classes = classes

    @property
    def labels(self) -> np.ndarray:
        """The labels of all images."""
        return self._found[1]

    def read(self, index: int, mode: str) -> Image.Image:
        """The image as ``"RGB"`` or ``"L"``."""
        path = os.fsdecode(self._found[0][index])
        return read_image(path, mode, path)

    @cached_property
    def _found(self) -> tuple[np.ndarray, np.ndarray]:
        """Paths and labels."""
        strangers = sorted(set(find_classes(self.folder)) - set(self.classes))
        if strangers:
            raise RunError(
                f"{self.folder} has the class {strangers[0]!r}, which is not trained on."
            )
        images = {
            label: _find_images(self.folder / name)
            for label, name in enumerate(self.classes)
            if (self.folder / name).is_dir()
        }
        # Arrays, since workers that merely look at a million strings come to own a copy of each.
        return (
            np.array([path for paths in images.values() for path in paths]),
            np.repeat(list(images), [len(paths) for paths in images.values()]),
        )


def read_folders(folder: Path) -> tuple[ImageFolder, ImageFolder, int]:
    """The training and the test images, in train/ and val/, and the number of classes.

    For a test val/ alone will do.
    """
    only_test = (folder / "val").is_dir() and not (folder / "train").is_dir()
    classes = find_classes(folder / ("val" if only_test else "train"))
    train, test = (ImageFolder(folder / part, classes) for part in ("train", "val"))
    return train, test, len(classes)


def find_classes(folder: Path) -> list[str]:
    """The names of the folders in ``folder``, sorted."""
    layout = "--data takes a folder with train/<class>/<image> and val/<class>/<image>"
    if not folder.is_dir():
        raise RunError(f"there is no folder {folder}: {layout}.")
    with os.scandir(folder) as entries:
        classes = sorted(entry.name for entry in entries if entry.is_dir())
    if not classes:
        raise RunError(f"there is no class folder in {folder}: {layout}.")
    return classes


def _find_images(folder: Path) -> list[bytes]:
    with os.scandir(folder) as entries:
        found = sorted(e.path for e in entries if e.name.lower().endswith(SUFFIXES))
    if not found:
        raise RunError(
            f"there is no image in {folder}: fill or remove it. Images end in "
            f"{', '.join(SUFFIXES)}."
        )
    return [os.fsencode(path) for path in found]
