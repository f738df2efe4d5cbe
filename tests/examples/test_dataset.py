import pickle
from itertools import chain

import numpy as np
import pytest
import torch
from pictures import noise

from errors import RunError
from experiment.settings import Config
from images.batches import Batches, Order, Squares
from images.dataset import Images, difference
from images.readers import of_array

# Python 3.12 and later warn of processes that are forked beside threads, as torch has them.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

CPU = torch.device("cpu")
SMALL = Config(image_size=8, augmentation="shift", padding=2, workers=0)


def images(n=10, read=None):
    """Noise, each image with a label of its own."""
    pixels = np.stack([np.array(noise(8, 8, seed=i)) for i in range(n)])
    found = of_array(pixels, np.arange(n), [f"class {i}" for i in range(n)])
    return Images(read or found.read, found.labels, found.classes)


def batches(n=10, batch_size=4, train=True, read=None, rank=0, ranks=1, **flags):
    config = Config(**vars(SMALL) | {"batch_size": batch_size} | flags)
    return Batches(images(n, read), Order(np.arange(n), config, train, rank, ranks), CPU)


def epoch(found, number=0, start=0):
    """The labels in each batch, which tell the images."""
    return [labels.tolist() for _, labels in found.epoch(number, start)]


def test_a_training_epoch_shows_no_image_twice_and_leaves_out_an_incomplete_batch():
    found = epoch(batches())
    assert [len(labels) for labels in found] == [4, 4]
    assert len(batches()) == 2
    assert len(set(chain(*found))) == 8


def test_a_test_shows_every_image_in_order():
    assert epoch(batches(train=False)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(batches(train=False)) == 3


def test_an_epoch_can_be_entered_anywhere():
    whole = epoch(batches(40), 3)
    assert len(whole) == 10
    for start in range(11):
        assert epoch(batches(40), 3, start) == whole[start:]


def test_the_order_depends_on_the_epoch_and_the_seed_alone():
    assert epoch(batches(), 1) == epoch(batches(), 1)
    orders = [epoch(batches(seed=seed), number) for seed in (0, 1) for number in (0, 1)]
    assert len({str(order) for order in orders}) == 4


@pytest.mark.parametrize("train", [False, True])
def test_processes_share_each_batch_in_order(train):
    whole = epoch(batches(11, 6, train), 2)
    parts = [epoch(batches(11, 6, train, rank=rank, ranks=3), 2) for rank in range(3)]
    for labels, *shares in zip(whole, *parts, strict=True):
        assert list(chain(*shares)) == labels
    assert {len(part[0]) for part in parts} == {2}


def test_fewer_images_than_processes_leave_some_without():
    parts = [epoch(batches(5, 4, train=False, rank=rank, ranks=4)) for rank in range(4)]
    assert sorted(len(part[1]) for part in parts) == [0, 0, 0, 1]


def read_broken(index, mode):
    if index == 3:
        raise RunError("cannot read the image 3.")
    return noise(12, 10).convert(mode)


def test_images_become_squares_in_colour_or_grey():
    for mean, channels in (((0.5,) * 3, 3), ((0.5,), 1)):
        config = Config(**vars(SMALL) | {"mean": mean, "std": mean})
        pixels, labels = Squares(images(), config).__getitems__([(2, None), (4, "7")])
        assert pixels.shape == (2, channels, 8, 8)
        assert pixels.dtype == torch.uint8
        assert labels.tolist() == [2, 4]


def test_augmentation_depends_on_the_seed_alone():
    squares = Squares(images(), SMALL)
    first, second = (squares.__getitems__([(0, "1"), (0, "1"), (0, "2")])[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])


def test_no_two_images_and_epochs_are_augmented_alike():
    same = np.stack([np.array(noise(32, 32))] * 64)
    found = of_array(same, np.arange(64), [str(i) for i in range(64)])
    config = Config(
        **vars(SMALL) | {"augmentation": "resized-crop", "batch_size": 64, "image_size": 16}
    )
    batches = Batches(found, Order(np.arange(64), config, train=True), CPU)
    seen = [next(batches.epoch(number))[0] for number in (0, 1)]
    assert len(torch.cat(seen).unique(dim=0)) > 120


def test_a_worker_that_starts_afresh_can_read_the_images():
    keys = [(0, None), (1, "5")]
    squares = Squares(images(), SMALL)
    sent = pickle.loads(pickle.dumps(squares))
    assert torch.equal(sent.__getitems__(keys)[0], squares.__getitems__(keys)[0])


def test_fewer_images_are_evenly_spread():
    every = batches(9, train=False)
    some = every.at_most(3)
    assert epoch(some) == [[0, 3, 6]]
    assert torch.equal(some.joined(), every.joined()[[0, 3, 6]])
    assert epoch(some.at_most(2)) == [[0, 3]]
    assert epoch(every.at_most(99)) == epoch(every.at_most(None)) == epoch(every)


def test_the_fingerprint_tells_images_and_classes_apart():
    def print_of(files, labels=(0, 1)):
        return Images(None, np.array(labels), ("a", "b"), np.array(files)).fingerprint()

    assert print_of([b"a", b"b"]) == print_of([b"a", b"b"])
    others = [print_of([b"a", b"c"]), print_of([b"b", b"a"]), print_of([b"a", b"b"], (1, 1))]
    assert len({print_of([b"a", b"b"]), *others}) == 4


def test_classes_are_compared_as_far_as_they_have_names():
    assert difference(("cat", "dog"), ("cat", "dog")) == ""
    assert difference(("0", "1"), ("cat", "dog")) == difference(("cat", "dog"), ("0", "1")) == ""
    assert difference(("dog", "cat"), ("cat", "dog")) == "class 0 was 'dog', is 'cat'"
    assert difference(("0", "1", "2"), ("a", "b")) == "3 classes were trained, and there are 2"


def test_an_epoch_is_the_same_with_and_without_workers():
    alone, helped = batches(), batches(workers=2)
    for number, start in ((1, 0), (2, 0), (2, 1)):
        pairs = zip(alone.epoch(number, start), helped.epoch(number, start), strict=True)
        for (pixels, labels), (same_pixels, same_labels) in pairs:
            assert pixels.shape == (4, 3, 8, 8)
            assert pixels.is_contiguous()
            assert torch.equal(pixels, same_pixels)
            assert torch.equal(labels, same_labels)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_may_be_left(workers):
    found = batches(7, 1, train=False, workers=workers)
    next(found.epoch(0))
    assert list(chain(*epoch(found, 2))) == list(range(7))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_ends_the_epoch_with_its_name(workers):
    with pytest.raises(RunError, match=r"^cannot read the image 3\.$"):
        list(batches(read=read_broken, workers=workers, train=False).epoch())


def test_processes_augment_as_one_alone():
    [(whole, _)] = batches(batch_size=6).epoch(4)
    parts = [next(batches(batch_size=6, rank=rank, ranks=3).epoch(4))[0] for rank in range(3)]
    assert torch.equal(torch.cat(parts), whole)
