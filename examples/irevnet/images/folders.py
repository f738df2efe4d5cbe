"""Images in a folder per class: which there are, and of which class."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from errors import RunError
from images.dataset import Images
from images.files import read_image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
LAYOUT = "--data takes a folder with train/<class>/<image> and val/<class>/<image>"


def read_folder(folder: Path, part: str) -> Images:
    """The images of a part, those in ``train/`` or in ``val/``, also deep in their class's folder.

    The classes are numbered in the order of their names. For a test ``val/`` alone will do. What
    begins with a dot is skipped; what else is no image is counted in the note.
    """
    home = folder / ("train" if part == "train" else "val")
    only_test = part == "test" and not (folder / "train").is_dir()
    present, left_out = _classes(home)
    classes = present if only_test else _classes(folder / "train")[0]
    strangers = sorted(set(present) - set(classes))
    if strangers:
        raise RunError(f"{home} has the class {strangers[0]!r}, which is not trained on.")
    files: list[bytes] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        if name in present:
            found, others = _walk(home, name)
            files += found
            labels += [label] * len(found)
            left_out += others
    note = ""
    if left_out:
        note = f"{len(left_out):,} files in {home} are no images and left out, as {left_out[0]}"
    # An array, since workers that merely look at a million strings come to own a copy of each.
    paths = np.array(files)
    read = partial(_read, os.fsencode(home), paths)
    return Images(read, np.array(labels), tuple(classes), paths, note)


def _read(home: bytes, files: np.ndarray, index: int, mode: str) -> Image.Image:
    path = os.fsdecode(os.path.join(home, files[index]))  # noqa: PTH118 (bytes)
    return read_image(path, mode, path)


def _classes(folder: Path) -> tuple[list[str], list[str]]:
    """The names of the folders in ``folder``, sorted, and those of its files."""
    if not folder.is_dir():
        raise RunError(f"there is no folder {folder.absolute()}: {LAYOUT}.")
    with os.scandir(folder) as entries:
        seen = sorted((e.name, e.is_dir()) for e in entries if not e.name.startswith("."))
    classes = [name for name, is_folder in seen if is_folder]
    if not classes:
        raise RunError(f"there is no class folder in {folder.absolute()}: {LAYOUT}.")
    return classes, [name for name, is_folder in seen if not is_folder]


def _walk(home: Path, name: str) -> tuple[list[bytes], list[str]]:
    """The images of a class, and its other files, as paths from ``home`` on."""
    images: list[str] = []
    others: list[str] = []
    for folder, folders, files in os.walk(home / name, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for file in sorted(f for f in files if not f.startswith(".")):
            path = os.path.relpath(os.path.join(folder, file), home)  # noqa: PTH118 (much faster)
            (images if file.lower().endswith(SUFFIXES) else others).append(path)
    if not images:
        raise RunError(
            f"there is no image in {home / name}: fill or remove it. Images end in "
            f"{', '.join(SUFFIXES)}."
        )
    return [os.fsencode(path) for path in images], others
