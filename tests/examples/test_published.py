import os
import pickle

import numpy as np
import pytest
from archives import batch, pack, python_2, python_3, write

from errors import RunError
from experiment.settings import Config
from images.readers import CLASSES, FOLDER, open_images, read_cifar10


def both(path):
    return [read_cifar10(path, part) for part in ("train", "test")]


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / FOLDER)


def test_the_archive_and_the_folder_in_it_hold_the_same(folder):
    for path in (pack(folder), folder, folder.parent):
        config = Config(data=str(path))
        train, test = (open_images(config, part) for part in ("train", "test"))
        assert train.labels.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
        assert test.labels.tolist() == [5, 9]
        assert train.classes == tuple(CLASSES)
        assert train.read(9, "RGB").size == (32, 32)


def test_planes_of_rows_become_pixels(folder):
    train, _ = both(folder)
    data = batch(1)[b"data"][1].reshape(3, 32, 32)  # as the authors describe it
    np.testing.assert_array_equal(np.array(train.read(3, "RGB")), np.stack(list(data), -1))
    pixel = train.read(3, "RGB").getpixel((5, 7))
    assert pixel == tuple(data[:, 7, 5].tolist())


def test_an_archive_that_python_3_pickled_is_read_as_well(tmp_path):
    ours, theirs = write(tmp_path / "mine", python_3), write(tmp_path / "theirs")
    images = [np.array(both(path)[0].read(1, "RGB")) for path in (ours, theirs)]
    np.testing.assert_array_equal(*images)


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("where", [lambda m: m, lambda m: {b"data": m, b"labels": []}])
def test_code_in_a_pickle_is_refused_and_does_not_run(tmp_path, where):
    trace = tmp_path / "it ran"
    folder = write(tmp_path / "bad", data_batch_3=pickle.dumps(where(Malicious(trace)), 2))
    with pytest.raises(RunError, match=rf"cannot read .*bad: it calls {os.mkdir.__module__}.mkdir"):
        both(folder)
    assert not trace.exists()


def test_code_in_an_array_of_objects_is_refused_and_does_not_run(tmp_path):
    trace = tmp_path / "it ran"
    bad = {b"data": np.array([Malicious(trace)], object), b"labels": [0]}
    with pytest.raises(RunError, match=r"it calls .*mkdir"):
        both(write(tmp_path / "bad", data_batch_1=python_3(bad)))
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Ran out of input"),
        (python_2(batch(0))[:500], "truncated|out of input"),
        (python_2({b"data": batch(0)[b"data"], b"fine_labels": [1, 2]}), "labels"),
        (python_2({b"data": batch(0)[b"data"], b"labels": [1]}), r"\(2, 3072\) .* for 1 labels"),
        (python_2(batch(0) | {b"labels": [1, 10]}), "labels from 1 to 10"),
        (python_2({b"data": np.zeros((2, 3072)), b"labels": [1, 2]}), "float64"),
        (python_2([1, 2]), "list"),
    ],
)
def test_a_foreign_file_is_named(tmp_path, content, reason):
    with pytest.raises(RunError, match=f"^cannot read .*mine: .*({reason})"):
        both(write(tmp_path / "mine", test_batch=content))


def test_a_missing_file_is_named(folder):
    (folder / "data_batch_4").unlink()
    for path in (folder, pack(folder)):
        with pytest.raises(RunError, match=r"CIFAR-10's python version in .*data_batch_4"):
            both(path)


def test_a_cut_archive_is_named(folder):
    path = pack(folder)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(RunError, match=r"^cannot read .*cifar-10-python.tar.gz: ."):
        both(path)


def test_an_archive_of_another_kind_is_named(tmp_path):
    path = tmp_path / "cifar.tar.gz"
    path.write_text("not an archive")
    with pytest.raises(RunError, match=r"^cannot read .*cifar.tar.gz: ."):
        both(path)
