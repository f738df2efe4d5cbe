"""Images in parquet files, from a folder or from the hub, through the package ``datasets``.

It converts them once into its cache, ~/.cache/huggingface/datasets unless ``HF_HOME`` names
another place; that takes about as much space as the files. Images are read from there as they are
needed. So every image is at hand at any time: epochs are shuffled as a whole, and a run is resumed
anywhere in one.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from experiment.folder import RunError
from images.image_files import read_image

IMAGE = ("image", "img")
LABEL = ("label", "labels", "fine_label")
TRAIN = ("train",)
TEST = ("validation", "val", "test")  # the first there is: ImageNet's test images have no labels


class Shards:
    """The images of one part of a data set.

    Args:
        table: A ``datasets.Dataset`` with a column of images and one of labels.
        name: What to call it in messages.
    """

    def __init__(self, table: Any, name: str) -> None:
        self.name = name
        self.image = _column(table, IMAGE, name)
        self.labels = _labels(table, _column(table, LABEL, name), name)
        self.table = _undecoded(table, self.image, name)

    def read(self, index: int, mode: str) -> Image.Image:
        """The image as ``"RGB"`` or ``"L"``."""
        found = self.table[index][self.image]
        name = f"{index} of {self.name}"
        if not found or not found["bytes"]:
            raise RunError(f"the image {name} is missing.")
        return read_image(BytesIO(found["bytes"]), mode, name)


def is_shards(folder: Path) -> bool:
    """Whether there are parquet files in it."""
    return folder.is_dir() and any(folder.glob("*.parquet"))


def is_hub_name(name: str) -> bool:
    """Whether it could be "owner/name"."""
    return re.fullmatch(r"[\w.-]*\w/\w[\w.-]*", name) is not None


def read_shards(folder: Path) -> tuple[Shards, Shards, int]:
    """The training and the test images, and the number of classes.

    Args:
        folder: Holds ``train*.parquet`` and ``val*.parquet`` or ``test*.parquet``.
    """
    data = str(folder)
    files = {name: sorted(map(str, folder.glob(f"{name}*.parquet"))) for name in TRAIN + TEST}
    parts = _parts([name for name, found in files.items() if found], data)
    tables = [_load(data, "parquet", data_files=files[name], split="train") for name in parts]
    return _both(*map(Shards, tables, [f"{data}, {name}" for name in parts]))


def read_hub(name: str) -> tuple[Shards, Shards, int]:
    """The same of the data set "owner/name" on the hub."""
    tables = _load(f"{name} of the hub (there is no such folder here)", name)
    return _both(*(Shards(tables[part], f"{name}, {part}") for part in _parts(tables, name)))


def _load(data: str, *arguments: str, **options: Any) -> Any:
    datasets = _import_datasets(data)
    try:
        return datasets.load_dataset(*arguments, **options)
    except Exception as error:  # of the network, the hub, the disk or the files
        reason = " ".join(str(error.__cause__ or error).split())
        raise RunError(f"cannot read {data}: {reason or type(error).__name__}") from error


def _parts(present: Collection[str], data: str) -> tuple[str, str]:
    """What the training and the test part are called."""
    return _first(TRAIN, present, data), _first(TEST, present, data)


def _first(names: tuple[str, ...], present: Collection[str], data: str) -> str:
    for name in names:
        if name in present:
            return name
    raise RunError(
        f"{data} has no part {' or '.join(names)}: it has {', '.join(present) or 'none'}. In a "
        "folder, the names of a part's files begin with its name."
    )


def _both(train: Shards, test: Shards) -> tuple[Shards, Shards, int]:
    classes = int(train.labels.max(initial=0)) + 1
    if test.labels.max(initial=0) >= classes:
        raise RunError(f"{test.name} has the class {test.labels.max()}, which is not trained on.")
    return train, test, classes


def _column(table: Any, names: tuple[str, ...], where: str) -> str:
    for name in names:
        if name in table.column_names:
            return name
    raise RunError(
        f"{where} has no column {' or '.join(names)}: it has {', '.join(table.column_names)}."
    )


def _labels(table: Any, column: str, where: str) -> np.ndarray:
    labels = table.data.column(column).to_numpy()
    if labels.dtype.kind not in "iu" or labels.min(initial=0) < 0:
        raise RunError(f"the column {column} of {where} must number the classes from 0.")
    return labels.astype(np.int64)


def _undecoded(table: Any, column: str, where: str) -> Any:
    """With the files' bytes in this column, whether it is marked as images or not."""
    image = _import_datasets(where).Image(decode=False)
    try:
        return table.cast_column(column, image).select_columns(column)
    except Exception as error:
        raise RunError(
            f"the column {column} of {where} must hold image files, has {table.features[column]}."
        ) from error


def _import_datasets(data: str) -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise RunError(
            f"to read {data}, install the package datasets: "
            "pip install 'invertible[examples,datasets]'."
        ) from error
    return datasets
