"""CIFAR-10 as it is published, of two images a file."""

import pickle
import tarfile
from io import BytesIO

import numpy as np

from images.readers import FOLDER

NAMES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


class Python2Pickler(pickle._Pickler):
    """Writes byte strings and NumPy's names as the Python 2 that pickled CIFAR-10."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_string(self, value):
        self.write(b"T" + len(value).to_bytes(4, "little") + value)  # BINSTRING
        self.memoize(value)

    def save_global(self, value, name=None):
        if value is np.zeros(0).__reduce__()[0]:
            self.write(b"cnumpy.core.multiarray\n_reconstruct\n")
            self.memoize(value)
        else:
            super().save_global(value, name)

    dispatch[bytes] = save_string
    dispatch[str] = lambda self, value: self.save_string(value.encode())
    dispatch[type(save_string)] = save_global
    dispatch[type(len)] = save_global


def python_2(value):
    file = BytesIO()
    Python2Pickler(file, 2).dump(value)
    return file.getvalue()


def python_3(value):
    return pickle.dumps(value, 2)


def batch(number, images=2):
    data = np.random.default_rng(number).integers(0, 256, (images, 3072), np.uint8)
    return {b"data": data, b"labels": [number, 9], b"filenames": [b"cat.png", b"dog.png"]}


def write(folder, dump=python_2, **others):
    """The published files of two images each, some of them replaced."""
    folder.mkdir()
    for number, name in enumerate(NAMES):
        (folder / name).write_bytes(others.get(name, dump(batch(number))))
    return folder


def pack(folder):
    path = folder.parent / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, FOLDER)
    return path
