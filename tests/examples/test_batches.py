import sys
from dataclasses import replace
from itertools import islice

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from archives import pack, write
from pictures import noise, rows

from errors import RunError
from experiment.settings import recipe
from images.augmentation import centre_crop
from images.batches import load_training, plain
from images.readers import of_array, open_images

CPU = torch.device("cpu")
SHIFTED = replace(recipe("cifar10"), image_size=8, padding=2, batch_size=4, workers=0)
CROPPED = replace(SHIFTED, augmentation="resized-crop")


def digits(_):
    return replace(recipe("digits"), batch_size=64)


def folder(root):
    for number in range(14):
        path = root / f"images/{'val' if number % 3 else 'train'}/{number % 2}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(10, 12, seed=number).save(path)
    return replace(CROPPED, data=str(root / "images"))


def folder_in_memory(root):
    return replace(folder(root), augmentation="shift")


def folder_with_jitter(root):
    return replace(folder(root), jitter=(0.8, 0.5, 0.5, 0.2))


def parquet(root):
    (root / "shards").mkdir()
    for part, numbers in (("train", range(9)), ("test", range(9, 15))):
        columns = {"image": rows(numbers), "label": [number % 2 for number in numbers]}
        pq.write_table(pa.table(columns), root / f"shards/{part}.parquet")
    return replace(CROPPED, data=str(root / "shards"))


def archive(root):
    path = pack(write(root / "cifar-10-batches-py"))
    return replace(SHIFTED, data=str(path), image_size=32, jitter=(0.8, 0.5, 0.5, 0.2))


@pytest.fixture(params=[digits, folder, folder_in_memory, folder_with_jitter, parquet, archive])
def config(request, tmp_path, monkeypatch):
    """The settings of a run on each kind of data."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    settings = request.param(tmp_path)
    if settings.data and "images" in settings.data:
        return replace(settings, batch_size=2)
    return settings


def training(config, *share):
    train, _ = load_training(config, CPU, *share)
    return train


def load_plain(config, part):
    return plain(open_images(config, part), config, CPU)


def as_pixels(batches, x):
    return (batches.undo(x) * 255).round().byte()


def epoch(config, number=0, start=0, share=()):
    return list(training(config, *share).epoch(number, start))


def same(first, second):
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))


def test_an_epoch_can_be_entered_at_any_step_in_another_run(config):
    whole = epoch(config, 3)
    assert len(whole) == len(training(config)) > 1
    for start in (1, len(whole)):
        assert same(epoch(config, 3, start), whole[start:])


def test_epochs_and_seeds_differ(config):
    assert same(epoch(config, 1), epoch(config, 1))
    assert not same(epoch(config, 1), epoch(config, 2))
    assert not same(epoch(config, 1), epoch(replace(config, seed=7), 1))


def test_processes_together_train_on_what_one_alone_does(config):
    parts = zip(*(epoch(config, 2, share=(rank, 2)) for rank in range(2)), strict=True)
    joined = [[torch.cat(pieces) for pieces in zip(*batches, strict=True)] for batches in parts]
    assert same(joined, epoch(config, 2))


def test_processes_together_test_every_image_once(config):
    tests = [load_training(config, CPU, rank, 2)[1] for rank in range(2)]
    parts = zip(*(test.epoch() for test in tests), strict=True)
    joined = [[torch.cat(pieces) for pieces in zip(*batches, strict=True)] for batches in parts]
    assert same(joined, load_plain(config, "test").epoch())
    assert sum(len(labels) for _, labels in joined) == len(tests[0].images) == len(tests[1].images)


def test_torchs_own_generator_stays_where_it_was(config):
    before = torch.get_rng_state()
    epoch(config)
    assert torch.equal(torch.get_rng_state(), before)


def test_plain_images_are_those_of_training_in_order_as_they_are(config):
    in_order = load_plain(config, "train")
    labels = torch.cat([labels for _, labels in in_order.epoch()])
    assert len(labels) == len(in_order.images) == len(training(config).images)
    changed = replace(config, seed=5, jitter=(0, 0, 0, 0), flip=False, padding=0)
    assert same(in_order.epoch(0), load_plain(changed, "train").epoch(3))
    for images, _ in islice(in_order.epoch(), 2):
        assert images.shape[1:] == (len(config.mean), config.image_size, config.image_size)
        assert images.dtype == torch.float32


def test_plain_images_in_memory_are_the_files_own_pixels(tmp_path):
    config = archive(tmp_path)
    test = load_plain(config, "test")
    planes = np.random.default_rng(5).integers(0, 256, (2, 3, 32, 32), np.uint8)
    assert torch.equal(as_pixels(test, test.joined()), torch.from_numpy(planes))


def test_test_images_are_resized_as_224_to_256_before_they_are_cropped(tmp_path):
    config = replace(folder(tmp_path), image_size=14)
    test = load_plain(config, "test")
    first = centre_crop(noise(10, 12, seed=10), 14, resize=16)  # of those with an even number
    assert torch.equal(
        as_pixels(test, test.joined()[0]), torch.from_numpy(np.array(first)).permute(2, 0, 1)
    )


def test_colours_are_changed_in_training_alone(tmp_path):
    config = folder_with_jitter(tmp_path)
    without = replace(config, jitter=(0, 0, 0, 0))
    assert not same(epoch(config), epoch(without))
    assert same(*(load_training(each, CPU)[1].epoch() for each in (config, without)))


def test_more_images_a_batch_than_there_are_is_refused(tmp_path):
    with pytest.raises(RunError, match="--batch-size 50 is above the 9 training images"):
        training(replace(parquet(tmp_path), batch_size=50))


def test_a_batch_that_processes_cannot_share_evenly_is_refused(tmp_path):
    with pytest.raises(RunError, match="--batch-size must be a multiple of 3 processes"):
        training(parquet(tmp_path), 0, 3)


@pytest.mark.parametrize("name", ["nowhere", "data/imagnet", "a/b/c", "x.jpg"])
def test_data_that_is_not_there_is_named_with_what_there_may_be(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "x.jpg").write_text("")
    with pytest.raises(RunError, match=rf"{tmp_path / name}\W.*val/<class>/<image>.*parquet"):
        training(replace(SHIFTED, data=name))


def test_a_preset_for_photographs_needs_data():
    with pytest.raises(
        RunError, match="--preset cifar10 trains on images of your own: give --data"
    ):
        training(SHIFTED)


def test_each_channel_is_normalised_and_white_is_1():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    config = replace(recipe("digits"), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), workers=0)
    found = plain(of_array(pixels, np.zeros(1, np.int64), "0"), config, CPU)
    x = found.joined()
    assert x[0, :, -1, -1].tolist() == pytest.approx([0.9 / 0.5, 0.8 / 0.6, 0.7 / 0.7])
    assert torch.equal(as_pixels(found, x)[0], torch.from_numpy(pixels[0]).permute(2, 0, 1))
