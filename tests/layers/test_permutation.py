"""Permute moves whole channels to the right places."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import copied_in_both_ways, images

from invertible import Permute


@given(order=st.permutations(range(4)), dim=st.sampled_from([1, 2, -1]))
def test_channel_c_of_the_output_is_channel_pi_of_c_of_the_input(order, dim):
    x = images(2, 4, 4, 4)
    y = Permute(order, dim)(x)
    for c, source in enumerate(order):
        assert torch.equal(y.select(dim, c), x.select(dim, source))
    assert torch.equal(Permute(order, dim).inverse(y), x)


@pytest.mark.parametrize("order", [(1, 0, 2), torch.tensor([1, 0, 2]), np.array([1, 0, 2])])
def test_an_order_may_be_any_sequence(order):
    assert Permute(order).permutation.tolist() == [1, 0, 2]


def test_a_random_order_without_a_seed_comes_from_torch_s_generator():
    orders = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        orders.append(Permute.random(64).permutation.tolist())
    assert orders[0] == orders[1] != orders[2]
    assert Permute.random(64).permutation.tolist() != orders[2]


def test_a_random_order_comes_from_its_seed_alone():
    state = torch.get_rng_state()
    orders = [Permute.random(64, seed=seed).permutation.tolist() for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert orders[0] == orders[1] != orders[2]
    assert all(sorted(order) == list(range(64)) for order in orders)


def test_the_order_is_saved_with_a_network():
    saved, other = Permute.random(16, seed=0), Permute.random(16, seed=1)
    x = images(2, 16)
    assert not torch.equal(other(x), saved(x))
    other.load_state_dict(saved.state_dict())
    assert torch.equal(other(x), saved(x))
    assert torch.equal(other.inverse(saved(x)), x)


@copied_in_both_ways
def test_a_copy_has_the_same_order(again):
    layer = Permute.random(16, seed=0)
    assert torch.equal(again(layer).permutation, layer.permutation)


def test_the_order_stays_whole_when_a_network_changes_dtype():
    assert Permute([1, 0]).half().permutation.dtype == torch.int64


def test_the_channels_are_shown_and_not_their_order():
    assert repr(Permute.random(512, seed=0, dim=-1)) == "Permute(channels=512, dim=-1)"
