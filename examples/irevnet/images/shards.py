"""Images in parquet files, from a folder or from the hub, through the package ``datasets``.

It converts them once into its cache, ~/.cache/huggingface/datasets unless ``HF_HOME`` names
another place; that takes about as much space as the files. Images are read from there as they are
needed. So every image is at hand at any time: epochs are shuffled as a whole, and a run is resumed
anywhere in one.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import partial
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from errors import RunError
from images.dataset import Images, numbered
from images.files import read_image

IMAGE = ("image", "img")
LABEL = ("label", "labels", "fine_label")
# Of the test, the first there is: ImageNet's test images have no labels.
PARTS = (("train",), ("validation", "val", "test"))


def is_shards(folder: Path) -> bool:
    """Whether there are parquet files in it."""
    return folder.is_dir() and any(folder.glob("*.parquet"))


def is_hub_name(name: str) -> bool:
    """Whether it could be "owner/name"."""
    return re.fullmatch(r"[\w.-]*\w/\w[\w.-]*", name) is not None


def read_shards(data: str, part: str) -> Images:
    """The images of a part.

    Args:
        data: A folder of ``train*.parquet`` and ``val*.parquet`` or ``test*.parquet``, or the name
            of a data set on the hub.
        part: Which images.
    """
    tables = _open(data)
    train, test = tables
    chosen = train if part == "train" else test
    where = f"{data}, {chosen}"
    column = _column(tables[chosen], IMAGE, where)
    labels = {name: _labels(table, f"{data}, {name}") for name, table in tables.items()}
    classes = _class_names(tables[train], int(labels[train].max(initial=0)) + 1)
    if labels[test].max(initial=0) >= len(classes):
        raise RunError(
            f"{data}, {test} has the class {labels[test].max()}, which is not trained on."
        )
    read = partial(_read, _undecoded(tables[chosen], column, where), column, where)
    return Images(read, labels[chosen], classes)


def _open(data: str) -> dict[str, Any]:
    """The tables of the training and of the test part, by their names."""
    folder = Path(data)
    if not is_shards(folder):
        found = _load(f"{data} of the hub", data)
        return {name: found[name] for name in _parts(found, data)}
    names = [name for part in PARTS for name in part]
    files = {name: sorted(map(str, folder.glob(f"{name}*.parquet"))) for name in names}
    present = [name for name, found in files.items() if found]
    return {
        name: _load(data, "parquet", data_files=files[name], split="train")
        for name in _parts(present, data)
    }


def _load(data: str, *arguments: str, **options: Any) -> Any:
    datasets = _import_datasets(data)
    try:
        return datasets.load_dataset(*arguments, **options)
    except Exception as error:  # of the network, the hub, the disk or the files
        reason = " ".join(str(error.__cause__ or error).split())
        raise RunError(f"cannot read {data}: {reason or type(error).__name__}") from error


def _parts(present: Collection[str], data: str) -> list[str]:
    """What the training and the test part are called."""
    found = []
    for names in PARTS:
        found += [name for name in names if name in present][:1]
        if not found or found[-1] not in names:
            raise RunError(
                f"{data} has no part {' or '.join(names)}: it has {', '.join(present) or 'none'}. "
                "In a folder, the names of a part's files begin with its name."
            )
    return found


def _column(table: Any, names: tuple[str, ...], where: str) -> str:
    for name in names:
        if name in table.column_names:
            return name
    raise RunError(
        f"{where} has no column {' or '.join(names)}: it has {', '.join(table.column_names)}."
    )


def _labels(table: Any, where: str) -> np.ndarray:
    column = _column(table, LABEL, where)
    labels: np.ndarray = table.data.column(column).to_numpy()
    if labels.dtype.kind not in "iu" or labels.min(initial=0) < 0:
        raise RunError(f"the column {column} of {where} must number the classes from 0.")
    return labels.astype(np.int64)


def _class_names(table: Any, count: int) -> tuple[str, ...]:
    """As the files mark their labels, or numbers."""
    names = getattr(table.features[_column(table, LABEL, "")], "names", None)
    return tuple(names) if names else numbered(count)


def _undecoded(table: Any, column: str, where: str) -> Any:
    """With the files' bytes in this column, whether it is marked as images or not."""
    image = _import_datasets(where).Image(decode=False)
    try:
        return table.cast_column(column, image).select_columns(column)
    except Exception as error:
        raise RunError(
            f"the column {column} of {where} must hold image files, has {table.features[column]}."
        ) from error


def _read(table: Any, column: str, name: str, index: int, mode: str) -> Image.Image:
    found = table[index][column]
    if not found or not found["bytes"]:
        raise RunError(f"the image {index} of {name} is missing.")
    return read_image(BytesIO(found["bytes"]), mode, f"{index} of {name}")


def _import_datasets(data: str) -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise RunError(
            f"to read {data}, install the package datasets: "
            "pip install 'invertible[examples,datasets]'."
        ) from error
    return datasets
