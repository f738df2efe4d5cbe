import os
import pickle
import signal
from functools import partial
from itertools import chain

import numpy as np
import pytest
import torch
from pictures import noise

from errors import RunError
from experiment.settings import Config
from images.batches import Batches, shifted
from images.dataset import Images, Order, of_array

# Python 3.12 and later warn of processes that are forked beside threads, as torch has them.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

CPU = torch.device("cpu")


def order(images=10, batch_size=4, train=True, **options):
    return Order(images, batch_size, train, **options)


def steps(order, epoch=0, start=0):
    return [(step, indices.tolist()) for step, indices in order.steps(epoch, start)]


def test_a_training_epoch_shows_no_image_twice_and_leaves_out_an_incomplete_batch():
    found = [indices for _, indices in steps(order())]
    assert [len(indices) for indices in found] == [4, 4]
    assert len(order()) == 2
    assert len(set(chain(*found))) == 8


def test_a_test_shows_every_image_in_order():
    found = [indices for _, indices in steps(order(train=False))]
    assert found == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(order(train=False)) == 3


def test_an_epoch_can_be_entered_anywhere():
    whole = steps(order(40), 3)
    assert [step for step, _ in whole] == list(range(10))
    for start in range(11):
        assert steps(order(40), 3, start) == whole[start:]


def test_the_order_depends_on_the_epoch_and_the_seed_alone():
    assert steps(order(), 1) == steps(order(), 1)
    orders = [steps(order(seed=seed), epoch) for seed in (0, 1, -1) for epoch in (0, 1)]
    assert len({str(order) for order in orders}) == 6


@pytest.mark.parametrize("train", [False, True])
def test_processes_share_each_batch_in_order(train):
    whole = steps(order(11, 6, train), 2)
    parts = [steps(order(11, 6, train, rank=rank, ranks=3), 2) for rank in range(3)]
    for step, indices in whole:
        assert list(chain(*(dict(part)[step] for part in parts))) == indices
    assert {len(indices) for part in parts for step, indices in part if step == 0} == {2}


def test_fewer_images_than_processes_leave_some_without():
    parts = [steps(order(5, 4, train=False, rank=rank, ranks=4)) for rank in range(4)]
    assert sorted(len(part[1][1]) for part in parts) == [0, 0, 0, 1]


def test_random_numbers_of_no_two_uses_agree():
    numbers = [
        order(seed=seed).generator(purpose, epoch, step).random()
        for seed in (0, 1)
        for purpose in (0, 1)
        for epoch in (0, 1)
        for step in (0, 1)
    ]
    assert len(np.unique(numbers)) == 16


def images(n=7, read=None, side=8, **options):
    pixels = np.stack([np.array(noise(12, 10, seed=i)) for i in range(n)])
    found = of_array(pixels, np.arange(n), [f"class {i}" for i in range(n)])
    settings = {"size": side, "resize": side + 2} | options
    return Images(read or found.read, found.labels, found.classes, **settings)


def batches(source=None, train=False, workers=0, batch_size=4, held=False, share=(0, 1), **flags):
    source = source or images()
    config = Config(workers=workers, **{"padding": 2} | flags)
    rank, ranks = share
    found = Order(len(source), batch_size, train, rank=rank, ranks=ranks)
    return Batches(source, found, config, CPU, held=held)


def read_broken(index, mode):
    if index == 3:
        raise RunError("cannot read the image 3.")
    return noise(12, 10).convert(mode)


def read_deadly(*_):
    """Ends the process, as the kernel does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_images_become_squares_in_colour_or_grey():
    for mode, channels in (("RGB", 3), ("L", 1)):
        pixels, labels = images(mode=mode).__getitems__([(2, None), (4, 7)])
        assert pixels.shape == (2, 8, 8, channels)
        assert pixels.dtype == torch.uint8
        assert labels.tolist() == [2, 4]


def test_augmentation_depends_on_the_seed_alone():
    first, second = (images().__getitems__([(0, 1), (0, 1), (0, 2)])[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])


def test_a_worker_that_starts_afresh_can_read_the_images():
    keys = [(0, None), (1, 5)]
    sent = pickle.loads(pickle.dumps(images()))
    assert torch.equal(sent.__getitems__(keys)[0], images().__getitems__(keys)[0])


def test_fewer_images_are_evenly_spread():
    some = images(9).at_most(3)
    assert some.labels.tolist() == [0, 3, 6]
    assert np.array_equal(some.read(1, "RGB"), images(9).read(3, "RGB"))
    assert len(images(9).at_most(99)) == len(images(9).at_most(None)) == 9


def test_the_fingerprint_tells_images_and_classes_apart():
    def print_of(files, labels=(0, 1)):
        return Images(None, np.array(labels), ("a", "b"), np.array(files)).fingerprint()

    assert print_of([b"a", b"b"]) == print_of([b"a", b"b"])
    others = [print_of([b"a", b"c"]), print_of([b"b", b"a"]), print_of([b"a", b"b"], (1, 1))]
    assert len({print_of([b"a", b"b"]), *others}) == 4


def test_an_epoch_is_the_same_with_and_without_workers():
    alone, helped = batches(train=True), batches(train=True, workers=2)
    for number, start in ((1, 0), (2, 0), (2, 1)):
        pairs = zip(alone.epoch(number, start), helped.epoch(number, start), strict=True)
        for (pixels, labels), (same_pixels, same_labels) in pairs:
            assert pixels.shape == (4, 3, 8, 8)
            assert pixels.is_contiguous()
            assert torch.equal(pixels, same_pixels)
            assert torch.equal(labels, same_labels)


def test_a_batch_may_be_empty():
    pixels, labels = images().__getitems__([])
    assert pixels.shape == (0, 8, 8, 3)
    assert labels.dtype == torch.int64
    assert len(labels) == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_may_be_left_but_not_mixed_with_another(workers):
    found = batches(workers=workers, batch_size=1)
    left = found.epoch(0)
    next(left)
    assert len(next(found.epoch(1))[0]) == 1
    with pytest.raises(RuntimeError, match="epoch 0 ended when another one was begun"):
        next(left)
    assert [labels.item() for _, labels in found.epoch(2)] == list(range(7))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_ends_the_epoch_with_its_name(workers):
    with pytest.raises(RunError, match=r"^cannot read the image 3\.$"):
        list(batches(images(read=read_broken), workers=workers).epoch())


def test_a_worker_that_is_killed_is_explained():
    with pytest.raises(RunError, match=r"died, perhaps out of memory: .* Try fewer --workers"):
        list(batches(images(read=read_deadly), workers=1).epoch())


held = partial(batches, held=True, train=True, batch_size=7)


def kept():
    pixels, _ = batches(held=True).held
    return pixels


def cut(image, row, column, mirror=False):
    """The plain way to one image of :func:`shifted`."""
    framed = torch.nn.functional.pad(image, (2,) * 4)
    cut = framed[:, row : row + image.shape[1], column : column + image.shape[2]]
    return cut.flip(-1) if mirror else cut


def test_each_image_is_moved_and_mirrored_by_itself():
    corners = torch.tensor([[0, 0], [4, 4], [0, 4], [4, 0], [2, 2], [1, 3], [3, 0]])
    mirrored = torch.tensor([True, False, True, False, True, False, True])
    found = shifted(kept(), 2, corners, mirrored)
    for image, original, corner, mirror in zip(
        found, kept(), corners.tolist(), mirrored.tolist(), strict=True
    ):
        assert torch.equal(image, cut(original, *corner, mirror))


def test_mirroring_is_done_to_about_half_of_the_images():
    mirrored, train = 0, held(padding=0)
    for number in range(20):
        [(pixels, labels)] = train.epoch(number)
        for image, original in zip(pixels, kept()[labels], strict=True):
            assert torch.equal(image, original) or torch.equal(image, original.flip(-1))
            mirrored += torch.equal(image, original.flip(-1))
    assert 40 < mirrored < 100


def test_training_moves_images_every_way():
    moves, train = set(), held(flip=False)
    for number in range(30):
        [(pixels, labels)] = train.epoch(number)
        for image, original in zip(pixels, kept()[labels], strict=True):
            [move] = [
                (row, column)
                for row in range(5)
                for column in range(5)
                if torch.equal(cut(original, row, column), image)
            ]
            moves.add(move)
    assert len(moves) == 25


def test_processes_augment_as_one_alone():
    [(whole, _)] = held(batch_size=6).epoch(4)
    parts = [next(held(batch_size=6, share=(rank, 3)).epoch(4))[0] for rank in range(3)]
    assert torch.equal(torch.cat(parts), whole)
