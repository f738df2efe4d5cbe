import re
import runpy
import shutil
from pathlib import Path

import pytest
from pictures import noise

from errors import RunError
from images.readers import read_folder


@pytest.fixture
def folder(tmp_path):
    for name in ("train/cat/a.JPEG", "train/cat/b.png", "train/dog/c.jpg", "val/dog/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        noise(8, 6).save(tmp_path / name)
    return tmp_path


def test_images_are_found_with_the_numbers_of_their_classes(folder):
    images = read_folder(folder, "train")
    assert images.labels.tolist() == [0, 0, 1]
    assert images.classes == ("cat", "dog")
    assert images.files.tolist() == [b"cat/a.JPEG", b"cat/b.png", b"dog/c.jpg"]
    assert images.read(2, "RGB").size == (8, 6)
    assert images.read(0, "L").mode == "L"
    assert read_folder(folder, "test").labels.tolist() == [1]


def test_a_test_needs_no_training_images(folder):
    shutil.rmtree(folder / "train")
    images = read_folder(folder, "test")
    assert (images.labels.tolist(), images.classes) == ([0], ("dog",))
    with pytest.raises(RunError, match=r"there is no class folder in .*train: --data takes"):
        read_folder(folder, "train")


@pytest.mark.parametrize("name", [".ipynb_checkpoints", "cat/.cache"])
def test_what_begins_with_a_dot_is_skipped(folder, name):
    (folder / "train" / name).mkdir()
    noise(8, 6).save(folder / "train" / name / "a.png")
    noise(8, 6).save(folder / "train/cat/._a.png")
    images = read_folder(folder, "train")
    assert (images.labels.tolist(), images.classes) == ([0, 0, 1], ("cat", "dog"))
    assert images.note == ""


@pytest.mark.parametrize("linked", [False, True])
def test_images_deep_in_a_class_are_read_too(folder, linked):
    place = folder / "elsewhere" if linked else folder / "train/cat/more"
    (place / "deep").mkdir(parents=True)
    noise(8, 6).save(place / "deep/x.png")
    if linked:
        (folder / "train/cat/more").symlink_to(place)
    assert read_folder(folder, "train").labels.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("name", ["notes.txt", "cat/notes.txt", "cat/x.heic", "loose.png"])
def test_what_is_left_out_is_told(folder, name):
    (folder / "train" / name).write_text("no image")
    note = read_folder(folder, "train").note
    assert re.fullmatch(rf"1 files in .*train are no images and left out, as {name}", note)


def test_an_unreadable_image_is_named(folder):
    (folder / "train/cat/b.png").write_bytes(b"")
    with pytest.raises(RunError, match=r"cannot read the image .*cat/b.png: it is empty"):
        read_folder(folder, "train").read(1, "RGB")


def test_a_folder_without_classes_is_refused(folder):
    with pytest.raises(RunError, match=r"no class folder in .*nowhere.train: --data takes"):
        read_folder(folder / "nowhere", "train")
    shutil.rmtree(folder / "val/dog")
    with pytest.raises(RunError, match=r"no class folder in .*val"):
        read_folder(folder, "test")


def test_an_empty_class_is_named(folder):
    (folder / "train/mouse").mkdir()
    with pytest.raises(RunError, match=r"no image in .*mouse: remove it. Images: .jpg"):
        read_folder(folder, "train")


def test_a_class_that_is_not_trained_on_is_named(folder):
    (folder / "val/dog").rename(folder / "val/owl")
    with pytest.raises(RunError, match="has the class 'owl', which is not trained on"):
        read_folder(folder, "test")


def test_the_benchmark_shows_a_speed_for_each_task(folder, capsys):
    script = Path(__file__).parents[2] / "benchmarks/decoding.py"
    runpy.run_path(str(script))["main"](["--data", str(folder), "--rounds", "2"])
    shown = capsys.readouterr().out
    tasks = re.findall(r"(\w+) +\d+ +\(\d+ to \d+\)", shown)
    assert tasks == ["decoded", "training", "colour", "test"]
    assert "3 images" in shown
