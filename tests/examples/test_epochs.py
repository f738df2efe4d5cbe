from itertools import chain

import numpy as np
import pytest

from images.epochs import Epochs, Share


def epochs(images=10, batch_size=4, train=True, **options):
    return Epochs(images, batch_size, train, **options)


def steps(epochs, number=0, start=0):
    return [(step, indices.tolist()) for step, indices in epochs.steps(number, start)]


def test_a_training_epoch_shows_no_image_twice_and_leaves_out_an_incomplete_batch():
    found = [indices for _, indices in steps(epochs())]
    assert [len(indices) for indices in found] == [4, 4]
    assert len(epochs()) == 2
    assert len(set(chain(*found))) == 8


def test_a_test_shows_every_image_in_order():
    found = [indices for _, indices in steps(epochs(train=False))]
    assert found == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(epochs(train=False)) == 3


def test_an_epoch_can_be_entered_anywhere():
    whole = steps(epochs(40), 3)
    assert [step for step, _ in whole] == list(range(10))
    for start in range(11):
        assert steps(epochs(40), 3, start) == whole[start:]


def test_the_order_depends_on_the_epoch_and_the_seed_alone():
    assert steps(epochs(), 1) == steps(epochs(), 1)
    orders = [steps(epochs(seed=seed), number) for seed in (0, 1, -1) for number in (0, 1)]
    assert len({str(order) for order in orders}) == 6


@pytest.mark.parametrize("train", [False, True])
def test_processes_share_each_batch_in_order(train):
    whole = steps(epochs(11, 6, train), 2)
    parts = [steps(epochs(11, 6, train, share=Share(rank, 3)), 2) for rank in range(3)]
    for step, indices in whole:
        assert list(chain(*(dict(part)[step] for part in parts))) == indices
    assert {len(indices) for part in parts for step, indices in part if step == 0} == {2}


def test_fewer_images_than_processes_leave_some_without():
    parts = [steps(epochs(5, 4, train=False, share=Share(rank, 4))) for rank in range(4)]
    assert sorted(len(part[1][1]) for part in parts) == [0, 0, 0, 1]


def test_random_numbers_of_no_two_uses_agree():
    numbers = [
        epochs(seed=seed).generator(purpose, number, step).random()
        for seed in (0, 1)
        for purpose in (0, 1)
        for number in (0, 1)
        for step in (0, 1)
    ]
    assert len(np.unique(numbers)) == 16
