import re
import runpy
import shutil
from pathlib import Path

import pytest
from pictures import noise

from experiment.folder import RunError
from images.image_folder import ImageFolder, find_classes, read_folders


@pytest.fixture
def folder(tmp_path):
    for name in ("cat/a.JPEG", "cat/b.png", "dog/c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        noise(8, 6).save(tmp_path / name)
    (tmp_path / "dog/notes.txt").write_text("no image")
    return tmp_path


def test_images_are_found_with_the_numbers_of_their_classes(folder):
    images = ImageFolder(folder, find_classes(folder))
    assert images.labels.tolist() == [0, 0, 1]
    assert images.read(2, "RGB").size == (8, 6)
    assert images.read(0, "L").mode == "L"


@pytest.fixture
def parts(folder):
    """The same for training, and one for the test."""
    (folder / "train").mkdir()
    (folder / "cat").rename(folder / "train/cat")
    (folder / "dog").rename(folder / "train/dog")
    (folder / "val/dog").mkdir(parents=True)
    noise(8, 8).save(folder / "val/dog/d.png")
    return folder


def test_training_and_test_images_are_in_folders_of_their_own(parts):
    train, test, classes = read_folders(parts)
    assert (train.labels.tolist(), test.labels.tolist(), classes) == ([0, 0, 1], [1], 2)


def test_a_test_needs_no_training_images(parts):
    shutil.rmtree(parts / "train")
    train, test, classes = read_folders(parts)
    assert (test.labels.tolist(), classes) == ([0], 1)
    with pytest.raises(RunError, match=r"there is no folder .*train: --data takes"):
        train.labels  # noqa: B018


def test_an_unreadable_image_is_named(folder):
    (folder / "cat/b.png").write_bytes(b"")
    with pytest.raises(RunError, match=r"cannot read the image .*cat/b.png: it is empty"):
        ImageFolder(folder, ["cat", "dog"]).read(1, "RGB")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("nowhere", "there is no folder .*nowhere: --data takes"),
        ("cat", "no class folder in .*cat"),
    ],
)
def test_a_folder_without_classes_is_refused(folder, where, message):
    with pytest.raises(RunError, match=message):
        find_classes(folder / where)


def test_an_empty_class_is_named(folder):
    (folder / "mouse").mkdir()
    with pytest.raises(RunError, match=r"no image in .*mouse: fill or remove it. Images end in"):
        ImageFolder(folder, find_classes(folder)).labels  # noqa: B018


def test_a_class_that_is_not_trained_on_is_named(folder):
    with pytest.raises(RunError, match="has the class 'dog', which is not trained on"):
        ImageFolder(folder, ["cat"]).labels  # noqa: B018


def test_a_class_may_be_missing_in_the_test(folder):
    images = ImageFolder(folder, ["ant", "cat", "dog"])
    assert images.labels.tolist() == [1, 1, 2]


def test_the_benchmark_shows_a_speed_for_each_task(parts, capsys):
    script = Path(__file__).parents[2] / "benchmarks/decoding.py"
    runpy.run_path(str(script))["main"](["--data", str(parts), "--rounds", "2"])
    shown = capsys.readouterr().out
    assert re.findall(r"(\w+) +\d+ +\(\d+ to \d+\)", shown) == ["decoded", "training", "test"]
    assert "3 images" in shown
