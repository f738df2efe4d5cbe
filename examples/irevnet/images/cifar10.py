"""CIFAR-10 as its authors publish it: ``cifar-10-python.tar.gz``, whole or extracted.

The images are in pickles. Those can run any code when they are loaded, so that only what these
hold is let through: https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import codecs
import pickle
import tarfile
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from experiment.folder import RunError
from images.loading import Arrays

FOLDER = "cifar-10-batches-py"
TRAIN = [f"data_batch_{number}" for number in range(1, 6)]
TEST = ["test_batch"]


def is_cifar10(path: Path) -> bool:
    """Whether this is the archive, the folder in it or one that holds this folder."""
    return path.name.endswith((".tar.gz", ".tgz")) or _folder(path) is not None


def read_cifar10(path: Path) -> tuple[Arrays, Arrays, int]:
    """The training and the test images, and the number of classes."""
    folder = _folder(path)
    files = _unpack(path) if folder is None else _files_in(folder)
    return _join(files, TRAIN, path), _join(files, TEST, path), 10


def _folder(path: Path) -> Path | None:
    return next((f for f in (path, path / FOLDER) if (f / TRAIN[0]).is_file()), None)


def _files_in(folder: Path) -> dict[str, bytes]:
    return {
        name: (folder / name).read_bytes() for name in TRAIN + TEST if (folder / name).is_file()
    }


def _unpack(path: Path) -> dict[str, bytes]:
    # In memory: nothing that an archive holds is written anywhere.
    try:
        with tarfile.open(path) as archive:
            files = {Path(member.name).name: member for member in archive if member.isfile()}
            wanted = [name for name in TRAIN + TEST if name in files]
            return {name: archive.extractfile(files[name]).read() for name in wanted}
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise RunError(f"cannot read the archive {path}: {error}") from error


def _join(files: dict[str, bytes], names: list[str], path: Path) -> Arrays:
    missing = [name for name in names if name not in files]
    if missing:
        raise RunError(f"{path} has no {missing[0]}: is it CIFAR-10's python version, and whole?")
    images, labels = zip(*(_read(files[name], f"{name} of {path}") for name in names), strict=True)
    return Arrays(np.concatenate(images), np.concatenate(labels))


def _read(data: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = _Unpickler(BytesIO(data), encoding="bytes").load()
        planes, labels = batch[b"data"], np.array(batch[b"labels"], np.int64)
        if planes.dtype != np.uint8 or planes.shape != (len(labels), 3 * 32 * 32):
            raise ValueError(f"{planes.shape} of {planes.dtype} for {len(labels)} labels")
    except Exception as error:  # a damaged or foreign pickle fails in many ways
        raise RunError(f"cannot read {name}: {error or type(error).__name__}") from error
    return planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


class _Unpickler(pickle.Unpickler):
    """Loads lists, dictionaries, strings, numbers and arrays."""

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
