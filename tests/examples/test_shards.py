import pickle
import sys
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import noise, rows

from errors import RunError
from images.readers import read_tables


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def write(path, numbers, image="image", label="label", **columns):
    """A file of plain columns, each image with the class of its number in tens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {image: rows(numbers), label: [number // 10 for number in numbers]} | columns
    pq.write_table(pa.table(columns), path)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "data/train-00000-of-00002.parquet", [1, 12, 3])
    write(tmp_path / "data/train-00001-of-00002.parquet", [24, 5])
    write(tmp_path / "data/test.parquet", [16, 7])
    return tmp_path / "data"


def seeds(shards):
    """Which images these are."""
    known = {noise(6, 5, seed=seed).tobytes(): seed for seed in range(30)}
    return [known[shards.read(index, "RGB").tobytes()] for index in range(len(shards.labels))]


def both(data):
    return [read_tables(Path(data), part) for part in ("train", "test")]


def test_all_files_of_a_part_are_read_in_order(folder):
    train, test = both(folder)
    assert seeds(train) == [1, 12, 3, 24, 5]
    assert train.labels.tolist() == [0, 1, 0, 2, 0]
    assert seeds(test) == [16, 7]
    assert test.labels.tolist() == [1, 0]
    assert train.classes == test.classes == ("0", "1", "2")


def test_images_are_read_in_grey_as_well(folder):
    assert both(folder)[0].read(0, "L").mode == "L"


def test_a_worker_that_starts_afresh_can_read_the_images(folder):
    train, _ = both(folder)
    assert seeds(pickle.loads(pickle.dumps(train))) == seeds(train)


@pytest.mark.parametrize("name", ["val", "validation", "validation-00000-of-00001"])
def test_the_test_may_be_called_validation_and_is_preferred_to_one_without_labels(folder, name):
    pq.write_table(pa.table({"image": rows([1]), "label": [-1]}), folder / "test.parquet")
    write(folder / f"{name}.parquet", [8, 9])
    assert seeds(both(folder)[1]) == [8, 9]


@pytest.mark.parametrize(("image", "label"), [("img", "labels"), ("image", "fine_label")])
def test_columns_may_have_any_of_the_usual_names(tmp_path, image, label):
    for part in ("train", "test"):
        write(tmp_path / f"data/{part}.parquet", [1, 12], image, label, coarse_label=[7, 7])
    train, _ = both(tmp_path / "data")
    assert (seeds(train), train.labels.tolist()) == ([1, 12], [0, 1])


def hub_files(folder, part, numbers):
    """A file as the hub has them, which marks its columns as images and classes."""
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog", "owl"])}
    )
    columns = {"img": rows(numbers), "label": [number // 10 for number in numbers]}
    folder.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_dict(columns, features)
    table.to_parquet(folder / f"{part}-00000-of-00001.parquet")


def test_columns_may_be_marked_as_images_and_classes(tmp_path):
    hub_files(tmp_path / "data", "train", [24, 1])
    hub_files(tmp_path / "data", "test", [2])
    train, _ = both(tmp_path / "data")
    assert (seeds(train), train.labels.tolist()) == ([24, 1], [2, 0])
    assert train.classes == ("cat", "dog", "owl")


def test_a_name_is_read_as_datasets_reads_it(tmp_path, monkeypatch):
    # It takes a folder of this name for the hub's.
    hub_files(tmp_path / "owner/name/data", "train", [24, 1])
    hub_files(tmp_path / "owner/name/data", "validation", [2])
    monkeypatch.chdir(tmp_path)
    train, test = both("owner/name")
    assert (seeds(train), seeds(test)) == ([24, 1], [2])


def test_a_name_that_cannot_be_reached_is_named():
    with pytest.raises(RunError, match=r"^cannot read owner/name: ."):
        both("owner/name")


def test_a_missing_package_is_named_with_its_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        RunError, match=r"data, install .* pip install 'invertible\[examples,datasets"
    ):
        both(folder)


def test_a_missing_part_is_named(folder):
    (folder / "test.parquet").unlink()
    with pytest.raises(RunError, match="data has no validation or val or test: it has train"):
        both(folder)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": "picture"}, "data has no image or img: it has picture, label"),
        ({"label": "class"}, "data has no label or labels or fine_label: it has image, class"),
    ],
)
def test_a_missing_column_is_named_with_those_there_are(folder, columns, message):
    write(folder / "train-00001-of-00002.parquet", [1], **columns)
    write(folder / "train-00000-of-00002.parquet", [1], **columns)
    write(folder / "test.parquet", [1], **columns)
    with pytest.raises(RunError, match=message):
        both(folder)


@pytest.mark.parametrize("labels", [["cat"], [0.5], [-1], [None]])
def test_labels_that_number_no_classes_are_refused(tmp_path, labels):
    for part in ("train", "test"):
        path = tmp_path / f"data/{part}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"image": rows([1]), "label": labels}), path)
    with pytest.raises(RunError, match=r"column label of .*data must number the classes from 0"):
        both(tmp_path / "data")


def test_a_column_without_image_files_is_refused(tmp_path):
    for part in ("train", "test"):
        path = tmp_path / f"data/{part}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"image": [[1, 2]], "label": [0]}), path)
    with pytest.raises(RunError, match=r"column image of .*data holds no image files: ."):
        both(tmp_path / "data")


def test_a_class_that_is_not_trained_on_is_named(folder):
    write(folder / "test.parquet", [31])
    with pytest.raises(RunError, match="data has the class 3 in its test, which is not"):
        both(folder)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"bytes": b"", "path": None}, "cannot read the image 1 of .*data: it is empty"),
        ({"bytes": None, "path": "far/away.png"}, "cannot read the image 1 of .*data: it is empty"),
        (None, "cannot read the image 1 of .*data: it is empty"),
        ({"bytes": b"no", "path": None}, "cannot read the image 1 of .*data: it is empty"),
    ],
    ids=["empty", "elsewhere", "none", "text"],
)
def test_an_unreadable_image_is_named(tmp_path, row, message):
    for part in ("train", "test"):
        path = tmp_path / f"data/{part}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"image": [*rows([0]), row], "label": [0, 1]}), path)
    train, _ = both(tmp_path / "data")
    with pytest.raises(RunError, match=message):
        train.read(1, "RGB")


def test_a_damaged_file_is_named(folder):
    (folder / "test.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunError, match=r"^cannot read .*data: ."):
        both(folder)
