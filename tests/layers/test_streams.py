"""Split, Merge and FactorOut agree with ``torch.split`` and ``torch.cat``; Swap exchanges."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import Affine, images, pair

from invertible import FactorOut, InvertibleSequential, Merge, OnStreams, Split, Swap

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


@pytest.mark.parametrize("layer", [Split, Merge, FactorOut])
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


@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dim=st.sampled_from([1, 2, -1]),
    others=st.integers(0, 3),
)
def test_the_second_part_of_the_first_stream_goes_behind_the_others(sizes, dim, others):
    shape = [2, 2, 2, 2]
    shape[dim] = sum(sizes)
    first, rest = images(*shape), [images(2, i + 1) for i in range(others)]
    x = (first, *rest) if others else first
    layer = FactorOut(sizes, dim)
    y = layer(x)
    assert type(y) is tuple
    kept, *between, factored = y
    assert torch.equal(torch.cat((kept, factored), dim), first)
    assert kept.shape[dim] == sizes[0]
    assert all(found is stream for found, stream in zip(between, rest, strict=True))
    torch.testing.assert_close(layer.inverse(y), x, rtol=0, atol=0)


def test_halves_are_factored_out_by_default():
    x = images(2, 4, 6, 8)
    for dim in (1, 2, -1):
        torch.testing.assert_close(FactorOut(dim=dim)(x), x.chunk(2, dim), rtol=0, atol=0)


def test_factored_parts_are_views_in_the_order_in_which_they_were_left():
    x = images(2, 8, 2, 2)
    layers = InvertibleSequential(FactorOut(), FactorOut(), FactorOut((1, 1)))
    y = layers(x)
    assert [stream.shape[1] for stream in y] == [1, 4, 2, 1]
    assert all(stream._base is x for stream in y)
    assert torch.equal(y[1], x[:, 4:])
    assert torch.equal(layers.inverse(y), x)


def test_log_determinants_of_scales_add_up():
    x = images(2, 4, 2, 2)
    layer = InvertibleSequential(
        Affine(0.5),
        FactorOut(),
        OnStreams(0, Affine(0.25)),
        FactorOut(),
        OnStreams(-1, Affine(1.0)),
    )
    y, log_det = layer.double().forward_and_log_det(x)
    assert log_det.tolist() == [0.5 * 16 + 0.25 * 8 + 1.0 * 4] * 2
    back, log_det = layer.inverse_and_log_det(y)
    torch.testing.assert_close(back, x)
    assert log_det.tolist() == [-0.5 * 16 - 0.25 * 8 - 1.0 * 4] * 2


def test_factoring_out_keeps_the_memory_format():
    x = images(2, 8, 4, 4).to(memory_format=torch.channels_last)
    kept, factored = FactorOut()(x)
    back = FactorOut().inverse((kept, factored))
    assert back.is_contiguous(memory_format=torch.channels_last)
    assert FactorOut().inverse((kept.contiguous(), factored.contiguous())).is_contiguous()


@pytest.mark.parametrize("make", [Split, Merge, FactorOut])
def test_the_dimension_to_cut_is_said_where_there_are_three(make):
    """Halves of a sequence would look like two streams of tokens."""
    tokens = torch.zeros(2, 10, 6)
    x = (tokens, tokens) if make is Merge else tokens
    message = (
        rf"{make.__name__} must be told the dimension of the channels .* shape \(2, 10, 6\): "
        rf"{make.__name__}\(dim=-1\) for tokens \(N, T, D\), {make.__name__}\(dim=1\) for signals"
    )
    with pytest.raises(ValueError, match=message):
        make()(x)
    with pytest.raises(ValueError, match=message.replace(" must", "'s inverse must")):
        make().inverse(tokens if make is Merge else (tokens, tokens))
    for dim in (1, -1):
        layer = make(dim=dim)
        torch.testing.assert_close(layer.inverse(layer(x)), x)
