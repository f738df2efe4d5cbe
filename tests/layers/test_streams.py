"""Split and Merge agree with ``torch.split`` and ``torch.cat``; Swap exchanges."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import images, pair

from invertible import Merge, Split, Swap

SIZES = st.lists(st.integers(1, 3), min_size=2, max_size=4).map(tuple)


@given(sizes=SIZES, dim=st.sampled_from([1, 2, 3, -1, -2, -3]))
def test_split_cuts_as_torch_does_and_merge_joins(sizes, dim):
    shape = [2, 2, 2, 2]
    shape[dim] = sum(sizes)
    x = images(*shape)
    expected = torch.split(x, sizes, dim)
    for streams in (Split(sizes, dim)(x), Merge(sizes, dim).inverse(x)):
        assert type(streams) is tuple
        torch.testing.assert_close(streams, expected, rtol=0, atol=0)
    for joined in (Merge(sizes, dim)(expected), Split(sizes, dim).inverse(expected)):
        assert torch.equal(joined, x)


@pytest.mark.parametrize("dim", [1, 2, -1])
def test_halves_are_the_default(dim):
    x = images(2, 4, 6, 8)
    torch.testing.assert_close(Split(dim=dim)(x), x.chunk(2, dim), rtol=0, atol=0)


def test_an_image_of_three_channels_is_cut_in_sizes():
    x1, x2 = Split((1, 2))(images(2, 3, 4, 4))
    assert x1.shape == (2, 1, 4, 4)
    assert x2.shape == (2, 2, 4, 4)


def test_streams_are_views_of_the_tensor():
    x = images()
    assert all(stream._base is x for stream in Split()(x))


def test_matrices_and_a_list_of_sizes_are_taken():
    assert [stream.shape[1] for stream in Split([2, 3])(images(4, 5))] == [2, 3]


@pytest.mark.parametrize("layer", [Split, Merge])
def test_the_options_are_shown(layer):
    assert repr(layer((1, 2), dim=2)) == f"{layer.__name__}(sizes=(1, 2), dim=2)"


def test_swap_exchanges_the_very_tensors():
    x1, x2 = pair()
    for direction in (Swap(), Swap().inverse):
        y1, y2 = direction((x1, x2))
        assert y1 is x2
        assert y2 is x1


def test_swap_takes_streams_of_two_shapes():
    x1, x2 = images(2, 1), images(2, 3)
    assert Swap()((x1, x2))[0].shape == (2, 3)
