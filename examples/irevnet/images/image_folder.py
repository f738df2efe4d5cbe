"""Images in a folder per class: which there are, and of which class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from experiment.folder import RunError
from images.image_files import read_image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")


class ImageFolder:
    """The images of ``folder/<class>/``.

    Args:
        folder: Holds the class folders.
        classes: Their names; the position of a name is the label.
    """

    def __init__(self, folder: Path, classes: Sequence[str]) -> None:
        strangers = sorted(set(find_classes(folder)) - set(classes))
        if strangers:
            raise RunError(f"{folder} has the class {strangers[0]!r}, which is not trained on.")
        present = [name for name in classes if (folder / name).is_dir()]
        images = {classes.index(name): _find_images(folder / name) for name in present}
        # Arrays, since workers that merely look at a million strings come to own a copy of each.
        self.paths = np.array([path for paths in images.values() for path in paths])
        self.labels = np.repeat(list(images), [len(paths) for paths in images.values()])

    def read(self, index: int, mode: str) -> Image.Image:
        """The image as ``"RGB"`` or ``"L"``."""
        path = os.fsdecode(self.paths[index])
        return read_image(path, mode, path)


def read_folders(folder: Path) -> tuple[ImageFolder, ImageFolder, int]:
    """The training and the test images, in train/ and val/, and the number of classes."""
    classes = find_classes(folder / "train")
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
