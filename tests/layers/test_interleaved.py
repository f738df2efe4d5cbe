"""CheckerboardSplit and StripeSplit deal places out to streams, and join them again."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import images

from invertible import CheckerboardSplit, Permute, Split, StripeSplit


def test_the_streams_are_the_diagonals_of_each_patch():
    x = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    black, white = CheckerboardSplit()(x)
    assert black.shape == white.shape == (2, 6, 2, 3)
    for c in range(3):
        assert torch.equal(black[:, 2 * c], x[:, c, ::2, ::2])
        assert torch.equal(black[:, 2 * c + 1], x[:, c, 1::2, 1::2])
        assert torch.equal(white[:, 2 * c], x[:, c, ::2, 1::2])
        assert torch.equal(white[:, 2 * c + 1], x[:, c, 1::2, ::2])
    assert torch.equal(CheckerboardSplit().inverse((black, white)), x)


def test_each_stream_holds_the_squares_of_one_colour():
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    colours = ((rows + columns) % 2).view(1, 1, 4, 6)
    black, white = CheckerboardSplit()(colours)
    assert not black.any()
    assert white.all()


@pytest.mark.parametrize("shape", [(2, 3, 3, 4), (2, 3, 4, 3), (2, 3, 4), (2, 3, 4, 4, 4), (2, 3)])
def test_a_checkerboard_needs_even_sides_of_an_image(shape):
    with pytest.raises(ValueError, match=r"takes images \(N, C, H, W\) of even height and width"):
        CheckerboardSplit()(torch.zeros(shape))


@pytest.mark.parametrize(
    "shapes", [((2, 4, 2, 2), (2, 4, 2, 3)), ((2, 3, 2, 2),) * 2, ((2, 4),) * 2]
)
def test_streams_of_no_checkerboard_are_refused(shapes):
    with pytest.raises(ValueError, match=r"CheckerboardSplit's inverse takes two streams"):
        CheckerboardSplit().inverse(tuple(map(torch.zeros, shapes)))


@given(count=st.integers(2, 4), dim=st.sampled_from([1, 2, -1, -2]))
def test_stripes_are_dealt_out_in_turn(count, dim):
    shape = [2, 12, 12]
    x = images(*shape)
    streams = StripeSplit(count, dim)(x)
    assert len(streams) == count
    for s, stream in enumerate(streams):
        expected = x.index_select(dim, torch.arange(s, 12, count))
        assert torch.equal(stream, expected)
    assert torch.equal(StripeSplit(count, dim).inverse(streams), x)


def test_rows_of_an_image_keep_its_memory_format():
    x = images(2, 4, 6, 6).to(memory_format=torch.channels_last)
    back = StripeSplit(dim=2).inverse(StripeSplit(dim=2)(x))
    assert torch.equal(back, x)
    assert back.is_contiguous(memory_format=torch.channels_last)


def test_tokens_are_halved_and_dealt_out_at_random_by_split():
    x = images(2, 6, 3)
    first, second = Split(dim=1)(x)
    assert torch.equal(torch.cat([first, second], 1), x)
    order = Permute.random(6, seed=3, dim=1)
    one, _ = Split(dim=1)(order(x))
    assert torch.equal(one, x[:, order.permutation[:3]])


def test_settings_and_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="a count of at least 2 streams, got 1"):
        StripeSplit(1)
    with pytest.raises(ValueError, match="StripeSplit cannot take dim=0"):
        StripeSplit(dim=0)
    with pytest.raises(
        ValueError, match=r"out to 2 streams, whose sizes must be equal, got size 3"
    ):
        StripeSplit()(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"streams of one shape, got shapes \(2, 3\), \(2, 4\)"):
        StripeSplit().inverse((torch.zeros(2, 3), torch.zeros(2, 4)))
