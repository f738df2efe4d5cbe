"""Identity returns its state, Reshape and Flatten keep the numbers in order."""

import pytest
import torch
from toys import images, pair

from invertible import Flatten, Identity, Reshape


@pytest.mark.parametrize("channels_last", [False, True])
def test_an_example_is_flattened_in_the_order_of_its_indices(channels_last):
    x = images(3, 4, 2, 2)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    y = Flatten((4, 2, 2))(x)
    assert y.shape == (3, 16)
    assert y[1].tolist() == [x[1, c, h, w] for c in range(4) for h in range(2) for w in range(2)]
    assert torch.equal(Flatten((4, 2, 2)).inverse(y), x)


@pytest.mark.parametrize("shape", [(16,), (2, 8), (2, 2, 4), (1, 2, 2, 2, 2)])
def test_any_shape_of_as_many_numbers_is_given_and_taken_back(shape):
    layer = Reshape((4, 2, 2), shape)
    y = layer(images())
    assert torch.equal(y, images().reshape(2, *shape))
    assert torch.equal(layer.inverse(y), images())


def test_a_number_an_example_becomes_a_channel():
    assert Reshape((), (1, 1))(images(3)).shape == (3, 1, 1)


def test_a_slice_that_has_no_view_is_copied():
    x = images(2, 4, 2, 3)[..., :2]
    assert torch.equal(Flatten((4, 2, 2))(x), x.flatten(1))


def test_both_shapes_are_shown():
    assert repr(Flatten((3, 4))) == "Flatten((3, 4) -> (12,))"


@pytest.mark.parametrize("x", [images(), pair(), images(3)], ids=type)
def test_identity_returns_the_very_state(x):
    assert Identity()(x) is x
    assert Identity().inverse(x) is x


def test_identity_has_a_log_determinant_of_zero_and_keeps_every_grid():
    y, log_det = Identity().forward_and_log_det(pair())
    assert y[0].equal(pair()[0])
    assert log_det.tolist() == [0, 0]
    assert Identity().exact
