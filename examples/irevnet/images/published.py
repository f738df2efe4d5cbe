"""Small images that others publish, kept in memory: CIFAR-10, and scikit-learn's digits.

CIFAR-10 is in pickles, which can run any code when they are loaded, so that only what its own hold
is let through: https://www.cs.toronto.edu/~kriz/cifar.html.
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
import torch
from torch.nn import functional as F

from errors import RunError
from experiment.settings import Config
from images.dataset import Images, numbered, of_array
from presets import DIGITS, PRESETS

FOLDER = "cifar-10-batches-py"
FILES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
CLASSES = ["airplane", "automobile", "bird", "cat", "deer"]
CLASSES += ["dog", "frog", "horse", "ship", "truck"]


def read_digits(config: Config, part: str) -> Images:
    """Scikit-learn's 1,797 handwritten digits, 8x8 pixels in 17 shades of grey, enlarged.

    360 are for the test, always the same.
    """
    if PRESETS[config.preset].recipe is not DIGITS:
        raise RunError(
            f"--preset {config.preset} trains on images of your own: give --data. Without it only "
            "the presets for digits run."
        )
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    grey = torch.from_numpy(found.images).float()[:, None] * (255 / 16)
    side = config.image_size
    enlarged = F.interpolate(grey, size=(side, side), mode="bilinear").round().byte()
    train, test = train_test_split(
        range(len(grey)), test_size=360, stratify=found.target, random_state=0
    )
    chosen = train if part == "train" else test
    return of_array(enlarged[chosen, 0].numpy(), found.target[chosen], numbered(10))


def is_cifar10(path: Path) -> bool:
    """Whether this is the archive, the folder in it or one that holds this folder."""
    return path.name.endswith((".tar.gz", ".tgz")) or _folder(path) is not None


def read_cifar10(path: Path, part: str) -> Images:
    """CIFAR-10's archive ``cifar-10-python.tar.gz``, or the folder in it."""
    folder = _folder(path)
    files = _unpack(path, FILES[part]) if folder is None else _files_in(folder, FILES[part])
    for name in FILES[part]:
        if name not in files:
            raise RunError(f"{path} has no {name}: is it CIFAR-10's python version, and whole?")
    found = [_read(files[name], f"{name} of {path}") for name in FILES[part]]
    images, labels = map(np.concatenate, zip(*found, strict=True))
    return of_array(images, labels, CLASSES)


def _folder(path: Path) -> Path | None:
    return next((f for f in (path, path / FOLDER) if (f / FILES["train"][0]).is_file()), None)


def _files_in(folder: Path, names: list[str]) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def _unpack(path: Path, names: list[str]) -> dict[str, bytes]:
    # In memory: nothing that an archive holds is written anywhere.
    found = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                file = archive.extractfile(member) if Path(member.name).name in names else None
                if file is not None:
                    found[Path(member.name).name] = file.read()
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise RunError(f"cannot read the archive {path.absolute()}: {error}") from error
    return found


def _read(data: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = _Unpickler(BytesIO(data), encoding="bytes").load()
        planes, labels = batch[b"data"], np.array(batch[b"labels"], np.int64)
        if planes.dtype != np.uint8 or planes.shape != (len(labels), 3 * 32 * 32):
            raise ValueError(f"{planes.shape} of {planes.dtype} for {len(labels)} labels")
        if labels.min() < 0 or labels.max() >= len(CLASSES):
            raise ValueError(f"labels from {labels.min()} to {labels.max()}")
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
