"""The data sets that ``--data`` takes: digits, CIFAR-10, parquet files and folders of images."""

import codecs
import os
import pickle
import tarfile
from collections.abc import Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from errors import RunError, meaning
from experiment.settings import Config
from images.dataset import Images, numbered, read_image
from presets import DIGITS, PRESETS

Part = Literal["train", "test"]
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
ACCEPTED = (
    "--data takes a folder with train/<class>/<image> and val/<class>/<image>, a folder of "
    "train*.parquet and val*.parquet, cifar-10-python.tar.gz, or owner/name of a data set on the "
    "hub"
)


def open_images(config: Config, part: Part) -> Images:
    """A part of the images of ``--data``."""
    if config.data is None:
        if PRESETS[config.preset].recipe is not DIGITS:
            raise RunError(
                f"--preset {config.preset} trains on images of your own: give --data. Without it "
                "only the presets for digits run."
            )
        return read_digits(part, config.image_size)
    path = Path(config.data)
    for folder in (path, path / FOLDER):
        if folder.name.endswith((".tar.gz", ".tgz")) or (folder / FILES["test"][0]).is_file():
            return read_cifar10(folder, part)
    if path.is_dir():
        return (read_tables if any(path.glob("*.parquet")) else read_folder)(path, part)
    error = f"{path.absolute()} is {'no folder' if path.exists() else 'not there'}: {ACCEPTED}."
    if path.exists() or path.parent.is_dir() or len(path.parts) != 2:
        raise RunError(error)
    try:
        return read_tables(path, part)
    except RunError as hub:
        raise RunError(f"{error} And of the hub: {hub}") from hub


def read_digits(part: Part, side: int) -> Images:
    """Scikit-learn's 1,797 handwritten digits, 8x8 pixels in 17 shades of grey, enlarged.

    360 are for the test, always the same.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    grey = torch.from_numpy(found.images).float()[:, None] * (255 / 16)
    enlarged = F.interpolate(grey, size=(side, side), mode="bilinear").round().byte()
    train, test = train_test_split(
        range(len(grey)), test_size=360, stratify=found.target, random_state=0
    )
    chosen = train if part == "train" else test
    return of_array(enlarged[chosen, 0].numpy(), found.target[chosen], numbered(10))


def of_array(images: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> Images:
    """Images that are in memory: uint8 of shape :math:`(N, H, W)` or :math:`(N, H, W, 3)`."""
    return Images(partial(_from_array, images), labels, tuple(classes))


def _from_array(images: np.ndarray, index: int, mode: str) -> Image.Image:
    return Image.fromarray(images[index]).convert(mode)


def read_folder(folder: Path, part: Part) -> Images:
    """The images of a part, those in ``train/`` or in ``val/``, also deep in their class's folder.

    The classes are numbered in the order of their names. For a test ``val/`` alone will do. What
    begins with a dot is skipped; what else is no image is counted in the note.
    """
    home = folder / ("train" if part == "train" else "val")
    names = _classes(home)
    known = _classes(folder / "train") if (folder / "train").is_dir() else names
    files: list[str] = []
    others: list[str] = []
    for place, folders, found in os.walk(home, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in found if not name.startswith(".")):
            path = os.path.relpath(os.path.join(place, name), home)  # noqa: PTH118 (much faster)
            is_image = os.sep in path and name.lower().endswith(SUFFIXES)
            (files if is_image else others).append(path)
    classes = [path.partition(os.sep)[0] for path in files]
    if strangers := {*names} - {*known}:
        raise RunError(f"{home} has the class {min(strangers)!r}, which is not trained on.")
    if empty := {*names} - {*classes}:
        kinds = ", ".join(SUFFIXES)
        raise RunError(f"there is no image in {home / min(empty)}: remove it. Images: {kinds}.")
    note = ""
    if others:
        note = f"{len(others):,} files in {home} are no images and left out, as {others[0]}"
    # An array, since workers that merely look at a million strings come to own a copy of each.
    paths = np.array([os.fsencode(path) for path in files])
    numbers = {name: number for number, name in enumerate(known)}
    labels = np.array([numbers[name] for name in classes])
    read = partial(_from_folder, os.fsencode(home), paths)
    return Images(read, labels, tuple(known), paths, note)


def _classes(folder: Path) -> list[str]:
    """The names of the class folders, sorted."""
    found = sorted(path.name for path in folder.glob("[!.]*/")) if folder.is_dir() else []
    if not found:
        raise RunError(f"there is no class folder in {folder.absolute()}: {ACCEPTED}.")
    return found


def _from_folder(home: bytes, files: np.ndarray, index: int, mode: str) -> Image.Image:
    path = os.fsdecode(os.path.join(home, files[index]))  # noqa: PTH118 (bytes)
    return read_image(path, mode, path)


# CIFAR-10, as https://www.cs.toronto.edu/~kriz/cifar.html has it for Python.
FOLDER = "cifar-10-batches-py"
FILES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
CLASSES = ["airplane", "automobile", "bird", "cat", "deer"]
CLASSES += ["dog", "frog", "horse", "ship", "truck"]


def read_cifar10(path: Path, part: Part) -> Images:
    """CIFAR-10's archive ``cifar-10-python.tar.gz``, or the folder in it."""
    # A damaged or foreign archive or pickle fails in many ways.
    with meaning(f"cannot read CIFAR-10's python version in {path.absolute()}", Exception):
        if path.is_dir():
            pickles = [(path / name).read_bytes() for name in FILES[part]]
        else:
            with tarfile.open(path) as archive:  # in memory: nothing in it is written anywhere
                files = [archive.extractfile(f"{FOLDER}/{name}") for name in FILES[part]]
                pickles = [file.read() for file in files if file is not None]
        images, labels = map(np.concatenate, zip(*map(_load_batch, pickles), strict=True))
    return of_array(images, labels, CLASSES)


def _load_batch(pickled: bytes) -> tuple[np.ndarray, np.ndarray]:
    batch = _Unpickler(BytesIO(pickled), encoding="bytes").load()
    planes, labels = batch[b"data"], np.array(batch[b"labels"], np.int64)
    if planes.dtype != np.uint8 or planes.shape != (len(labels), 3 * 32 * 32):
        raise ValueError(f"it has {planes.shape} of {planes.dtype} for {len(labels)} labels")
    if labels.min() < 0 or labels.max() >= len(CLASSES):
        raise ValueError(f"it has labels from {labels.min()} to {labels.max()}")
    return planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


class _Unpickler(pickle.Unpickler):
    """Loads lists, dictionaries, strings, numbers and arrays; a pickle may call any code."""

    def find_class(self, module: str, name: str) -> Any:
        """What arrays and, in Python 3, bytes are made by; all else is refused."""
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it calls {module}.{name}, as no CIFAR-10 does")
        return ALLOWED[module, name]


_RECONSTRUCT = np.empty(0).__reduce__()[0]  # its module moved in NumPy 2
ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("_codecs", "encode"): codecs.encode,
}

# What parts and columns are called. Of the tests the first there is: ImageNet's test images have no
# labels.
PARTS = {"train": ("train",), "test": ("validation", "val", "test")}
IMAGE = "image", "img"
LABEL = "label", "labels", "fine_label"


def read_tables(data: Path, part: Part) -> Images:
    """A folder of ``train*.parquet`` and ``val*.parquet`` or ``test*.parquet``, or one on the hub.

    The package ``datasets`` converts them once into its cache, ~/.cache/huggingface/datasets unless
    ``HF_HOME`` names another place; that takes about as much space as the files. Images are read
    from there as they are needed, so that every image is at hand at any time.
    """
    wanted = "the package datasets: pip install 'invertible[examples,datasets]'"
    with meaning(f"to read {data}, install {wanted}", ImportError):
        import datasets
    try:
        found = datasets.load_dataset(str(data))
    except Exception as error:  # of the network, the hub, the disk or the files
        reason = " ".join(str(error.__cause__ or error).split())
        raise RunError(f"cannot read {data}: {reason or type(error).__name__}") from error
    tables = {part: found[_first(names, found, data)] for part, names in PARTS.items()}
    labels = {part: _labels(table, data) for part, table in tables.items()}
    column = tables["train"].features[_first(LABEL, tables["train"].features, data)]
    classes = getattr(column, "names", None) or numbered(labels["train"].max(initial=0) + 1)
    if (highest := labels["test"].max(initial=0)) >= len(classes):
        raise RunError(f"{data} has the class {highest} in its test, which is not trained on.")
    column = _first(IMAGE, tables[part].features, data)
    with meaning(f"the column {column} of {data} holds no image files", Exception):
        files = tables[part].cast_column(column, datasets.Image(decode=False))
    read = partial(_from_table, files.select_columns(column), str(data))
    return Images(read, labels[part], tuple(classes))


def _first(names: Sequence[str], present: Any, data: Path) -> str:
    """The first of the names of parts or columns that is there."""
    for name in names:
        if name in present:
            return name
    raise RunError(f"{data} has no {' or '.join(names)}: it has {', '.join(present)}.")


def _labels(table: Any, data: Path) -> np.ndarray:
    column = _first(LABEL, table.features, data)
    labels: np.ndarray = table.data.column(column).to_numpy()
    if labels.dtype.kind not in "iu" or labels.min(initial=0) < 0:
        raise RunError(f"the column {column} of {data} must number the classes from 0.")
    return labels.astype(np.int64)


def _from_table(table: Any, name: str, index: int, mode: str) -> Image.Image:
    [file] = table[index].values()
    return read_image(BytesIO((file or {}).get("bytes") or b""), mode, f"{index} of {name}")
