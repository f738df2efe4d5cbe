import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from image_folder import FolderBatches, ImageFolder, augmented, centre_crop, find_classes
from in_memory import TensorBatches, shifted
from runs import RunError

CPU = torch.device("cpu")


def noise(width, height, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture
def folder(tmp_path):
    """Two classes, their images of several kinds and shapes."""
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
    noise(40, 30).save(tmp_path / "cat/colour.JPEG")
    noise(30, 50, "L").save(tmp_path / "cat/grey.png")
    noise(16, 16).quantize(8).save(tmp_path / "dog/palette.png")
    noise(16, 20).quantize(8).save(tmp_path / "dog/transparent.png", transparency=b"\x00\x80")
    noise(20, 20, "CMYK").save(tmp_path / "dog/print.jpg")
    (tmp_path / "dog/notes.txt").write_text("no image")
    return tmp_path


def images_in(folder, **options):
    return ImageFolder(folder, find_classes(folder), **{"size": 8, "resize": 10} | options)


def test_every_kind_of_image_becomes_a_square_in_colour(folder):
    images = images_in(folder)
    assert len(images) == 5
    for index in range(5):
        pixels, label = images[index, None]
        assert pixels.shape == (3, 8, 8)
        assert pixels.dtype == torch.uint8
        assert label == (0 if index < 2 else 1)


def test_images_become_grey_on_request(folder):
    assert images_in(folder, grey=True)[0, None][0].shape == (1, 8, 8)


def test_augmentation_depends_on_the_seed_alone(folder):
    images = images_in(folder)
    assert torch.equal(images[0, 1][0], images[0, 1][0])
    assert not torch.equal(images[0, 1][0], images[0, 2][0])


def test_the_central_crop_is_the_middle_of_the_resized_image():
    pixels = np.zeros((20, 40), np.uint8)
    pixels[8:12, 18:22] = 255
    assert np.array(centre_crop(Image.fromarray(pixels), 4, 20)).min() == 255


def test_a_random_crop_keeps_to_its_range_of_areas_and_ratios():
    # A ramp to the right and one downwards: the crop's extent can be read from its pixels.
    right, down = np.meshgrid(np.linspace(0, 255, 200), np.linspace(0, 255, 200))
    ramps = Image.fromarray(np.stack([right, down, 0 * down], -1).astype(np.uint8))
    areas, ratios, mirrored = [], [], 0
    for seed in range(200):
        crop = np.array(augmented(ramps, 64, random.Random(seed), flip=True)).astype(float)
        width = (crop[0, -1, 0] - crop[0, 0, 0]) / 255
        height = (crop[-1, 0, 1] - crop[0, 0, 1]) / 255
        mirrored += width < 0
        areas.append(abs(width) * height)
        ratios.append(abs(width) / height)
    assert 0.07 < min(areas) < 0.12
    assert 0.9 < max(areas) <= 1
    assert 0.7 < min(ratios) < 0.8
    assert 1.25 < max(ratios) < 1.4
    assert 70 < mirrored < 130


def test_a_very_long_image_is_cropped_to_an_allowed_ratio():
    assert augmented(noise(400, 10), 8, random.Random(0), flip=False).size == (8, 8)


def test_training_batches_hold_each_image_once_and_leave_out_an_incomplete_one(folder):
    batches = FolderBatches(images_in(folder), 2, train=True, workers=0, device=CPU)
    assert len(batches) == 2
    assert [len(labels) for _, labels in batches] == [2, 2]
    everything = FolderBatches(images_in(folder), 2, train=False, workers=0, device=CPU)
    assert [labels.tolist() for _, labels in everything] == [[0, 0], [1, 1], [1]]


def test_training_batches_follow_the_seed(folder):
    batches = FolderBatches(images_in(folder), 5, train=True, workers=0, device=CPU)

    def epoch(seed):
        torch.manual_seed(seed)
        return next(iter(batches))[0]

    assert torch.equal(epoch(1), epoch(1))
    assert not torch.equal(epoch(1), epoch(2))


@pytest.mark.parametrize("name", ["cut.jpg", "cut.png"])
def test_an_unreadable_image_is_named(folder, name):
    path = folder / "cat" / name
    noise(64, 64).save(path)
    path.write_bytes(path.read_bytes()[:300])
    batches = FolderBatches(images_in(folder), 2, train=False, workers=0, device=CPU)
    with pytest.raises(RunError, match=f"^cannot read the image .*cat/{name}: .+"):
        list(batches)


def missing(folder):
    return folder / "nowhere"


def without_classes(folder):
    return folder / "cat"


@pytest.mark.parametrize(
    ("where", "message"),
    [(missing, "there is no folder .*nowhere: --data takes"), (without_classes, "no class folder")],
)
def test_a_folder_without_classes_is_refused(folder, where, message):
    with pytest.raises(RunError, match=message):
        find_classes(where(folder))


def test_an_empty_class_is_named(folder):
    (folder / "mouse").mkdir()
    with pytest.raises(RunError, match=r"no image in .*mouse: fill or remove it. Images end in"):
        images_in(folder)


def test_a_class_that_is_not_trained_on_is_named(folder):
    with pytest.raises(RunError, match="has the class 'dog', which is not trained on"):
        ImageFolder(folder, ["cat"], size=8, resize=8)


def test_a_class_may_be_missing_in_the_test(folder):
    images = ImageFolder(folder, ["ant", "cat", "dog"], size=8, resize=8)
    assert {images[i, None][1] for i in range(5)} == {1, 2}


@pytest.fixture
def small():
    images = torch.randint(1, 256, (7, 3, 6, 6), dtype=torch.uint8)
    return SimpleNamespace(images=images, labels=torch.arange(7))


def test_batches_in_memory_hold_each_image_once(small):
    test = TensorBatches(small.images, small.labels, 3, train=False, padding=2, flip=True)
    assert len(test) == 3
    images, labels = (torch.cat(parts) for parts in zip(*test, strict=True))
    assert torch.equal(images, small.images)
    assert torch.equal(labels, small.labels)


def test_training_batches_in_memory_are_shuffled_and_complete(small):
    train = TensorBatches(small.images, small.labels, 3, train=True)
    labels = [labels for _, labels in train]
    assert len(train) == len(labels) == 2
    assert len(set(torch.cat(labels).tolist())) == 6
    for images, labels in train:
        assert torch.equal(images, small.images[labels])


def test_flipping_mirrors_about_half_of_the_images(small):
    train = TensorBatches(small.images, small.labels, 7, train=True, flip=True)
    mirrored = 0
    for _ in range(20):
        for images, labels in train:
            for image, original in zip(images, small.images[labels], strict=True):
                assert torch.equal(image, original) or torch.equal(image, original.flip(-1))
                mirrored += torch.equal(image, original.flip(-1))
    assert 40 < mirrored < 100


def test_shifting_moves_every_way_and_lets_black_in(small):
    original = torch.nn.functional.pad(small.images, (2,) * 4)
    moves = set()
    for _ in range(30):
        for before, after in zip(original, shifted(small.images, 2), strict=True):
            [move] = [
                (dy, dx)
                for dy in range(5)
                for dx in range(5)
                if torch.equal(before[:, dy : dy + 6, dx : dx + 6], after)
            ]
            moves.add(move)
    assert len(moves) == 25
