"""OnStreams runs a layer on some streams of a state."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from toys import (
    AddsContext,
    Affine,
    Double,
    Function,
    Keep,
    copied_in_both_ways,
    images,
    linear,
    pair,
)

from invertible import (
    AdditiveCoupling,
    InjectivePad,
    Inverse,
    InvertibleSequential,
    Merge,
    OnStreams,
    Parallel,
    PixelUnshuffle,
    Split,
    Swap,
)


def streams(count=3):
    """Streams that differ in size."""
    return tuple(images(2, i + 1, 2, 2) for i in range(count))


@given(count=st.integers(1, 4), data=st.data())
def test_one_stream_passes_as_a_bare_tensor(count, data):
    number = data.draw(st.integers(-count, count - 1))
    x, layer = streams(count), PixelUnshuffle(2)
    expected = list(x)
    expected[number] = layer(x[number])
    y = OnStreams(number, layer)(x)
    assert type(y) is tuple
    torch.testing.assert_close(y, tuple(expected), rtol=0, atol=0)
    torch.testing.assert_close(OnStreams(number, layer).inverse(y), x, rtol=0, atol=0)


@given(count=st.integers(2, 4), data=st.data())
def test_a_tuple_of_streams_goes_and_comes_back_to_the_same_places(count, data):
    places = st.lists(st.integers(0, count - 1), min_size=1, unique=True)
    numbers = tuple(data.draw(places))
    from_the_end = tuple(i - count if data.draw(st.booleans()) else i for i in numbers)
    factors = [Affine(0.1 * i, 1.0 * i).double() for i in range(len(numbers))]
    x = streams(count)
    expected = list(x)
    for number, factor in zip(numbers, factors, strict=True):
        expected[number] = factor(x[number])
    layer = OnStreams(from_the_end, Parallel(*factors))
    y = layer(x)
    torch.testing.assert_close(y, tuple(expected), rtol=0, atol=0)
    torch.testing.assert_close(layer.inverse(y), x)


def test_other_streams_are_handed_through_untouched():
    x = streams()
    y = OnStreams((0, 2), Swap())(x)
    assert all(one is other for one, other in zip(y, (x[2], x[1], x[0]), strict=True))


def test_a_tuple_of_one_hands_over_a_tuple():
    x = streams()
    y = OnStreams((1,), Parallel(Double()))(x)
    assert torch.equal(y[1], 2 * x[1])


def test_couplings_between_any_streams_can_be_made():
    coupling = AdditiveCoupling(Function(lambda x: x.sum(1, keepdim=True)))
    x1, x2, x3 = streams()
    y = OnStreams((0, -1), coupling)((x1, x2, x3))
    torch.testing.assert_close(y, (x1 + x3.sum(1, keepdim=True), x2, x3), rtol=0, atol=0)


def test_a_composition_may_cut_and_join_inside():
    inner = InvertibleSequential(Split((1, 2)), Swap(), Merge((2, 1)))
    x = streams()
    y = OnStreams(2, inner)(x)
    assert torch.equal(y[2], inner(x[2]))
    torch.testing.assert_close(OnStreams(2, inner).inverse(y), x, rtol=0, atol=0)


def test_it_nests():
    layer = OnStreams((2, 0), OnStreams(-1, Affine()))
    x = streams()
    y = layer.double()(x)
    torch.testing.assert_close(y, (layer.layer.layer(x[0]), x[1], x[2]), rtol=0, atol=0)
    torch.testing.assert_close(layer.inverse(y), x)
    turned = Inverse(layer)
    torch.testing.assert_close(turned.inverse(x), y, rtol=0, atol=0)


def test_log_determinants_are_those_of_the_layer():
    layer = OnStreams((0, 1), Parallel(Affine(0.5), Affine(0.25)))
    x = streams()  # of 4, 8 and 12 numbers an example
    y, log_det = layer.forward_and_log_det(x)
    torch.testing.assert_close(y, layer(x), rtol=0, atol=0)
    assert log_det.tolist() == [4 * 0.5 + 8 * 0.25] * 2
    _, log_det = layer.inverse_and_log_det(y)
    assert log_det.tolist() == [-4 * 0.5 - 8 * 0.25] * 2
    assert OnStreams(1, Keep()).forward_and_log_det(x)[1].tolist() == [0, 0]


def test_a_context_goes_through():
    coupling = AdditiveCoupling(AddsContext(1), conditional=True).double()
    layer, context = OnStreams((2, 0), coupling), torch.tensor([1.0, 2.0], dtype=torch.float64)
    x = tuple(images(2, 1, 2, 2) for _ in range(3))
    y = layer(x, context)
    torch.testing.assert_close(y[2], coupling((x[2], x[0]), context)[0], rtol=0, atol=0)
    torch.testing.assert_close(layer.inverse(y, context), x)
    with pytest.raises(TypeError, match="OnStreams is conditional and got no context"):
        layer(x)
    with pytest.raises(TypeError, match="OnStreams got a context"):
        OnStreams(0, Keep())(x, context)


def test_it_is_what_its_layer_is():
    conditional = AdditiveCoupling(AddsContext(2), conditional=True)
    assert OnStreams((0, 1), conditional).conditional
    assert OnStreams((0, 1), conditional).volume_preserving
    assert not OnStreams(0, Affine()).volume_preserving
    assert OnStreams(0, PixelUnshuffle(2)).moves_only
    assert OnStreams(0, PixelUnshuffle(2)).exact
    assert OnStreams((0, 1), AdditiveCoupling(nn.Tanh(), quantum=0.5)).quantum == 0.5
    assert not OnStreams(0, InjectivePad(1)).bijective


def test_an_injective_layer_inside_is_undone():
    layer, x = OnStreams(1, InjectivePad(2)), streams()
    y = layer(x)
    assert y[1].shape[1] == 4
    torch.testing.assert_close(layer.inverse(y), x, rtol=0, atol=0)


# --- what is refused


@pytest.mark.parametrize(
    ("numbers", "layer", "error", "message"),
    [
        (1.0, Swap(), TypeError, r"takes the number of a stream or a tuple of such, got 1\.0"),
        (True, Swap(), TypeError, "takes the number of a stream or a tuple of such, got True"),
        ("0", Swap(), TypeError, "takes the number of a stream or a tuple of such, got '0'"),
        ([0, 1], Swap(), TypeError, r"number of a stream or a tuple of such, got \[0, 1\]"),
        (None, Swap(), TypeError, "takes the number of a stream or a tuple of such, got None"),
        ((0, 1.0), Swap(), TypeError, r"or a tuple of such, got \(0, 1\.0\)"),
        ((), Swap(), ValueError, r"takes each stream once, and at least one, got \(\)"),
        ((1, 1), Swap(), ValueError, r"takes each stream once, and at least one, got \(1, 1\)"),
        (0, nn.ReLU(), TypeError, r"behind the streams, got a ReLU.*AdditiveCoupling\(f\)"),
        (0, Swap, TypeError, "takes an invertible layer behind the streams, got the class Swap"),
        (Swap(), 0, TypeError, "takes the number of a stream or a tuple of such, got Swap"),
    ],
)
def test_a_mistake_is_told_when_it_is_made(numbers, layer, error, message):
    with pytest.raises(error, match=message):
        OnStreams(numbers, layer)


OUT_OF_RANGE = r"OnStreams runs a layer on stream {}, got a state of 3 \(numbered from 0, or from"


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("method", ["forward", "inverse", "forward_and_log_det"])
@pytest.mark.parametrize(
    ("numbers", "layer", "x", "error", "message"),
    [
        (3, Keep(), streams(), ValueError, OUT_OF_RANGE.format(3)),
        (-4, Keep(), streams(), ValueError, OUT_OF_RANGE.format(-4)),
        ((0, 5), Swap(), streams(), ValueError, OUT_OF_RANGE.format(5)),
        ((0, -3), Swap(), streams(), ValueError, r"once, got \(0, -3\) and a state of 3, in"),
        (0, Keep(), images(), TypeError, "takes a tuple of tensors, got a tensor of shape"),
        (0, Keep(), list(streams()), TypeError, r"got a list of 3 .* plain tuple: tuple\(x\)"),
        (0, Keep(), (), ValueError, "takes a tuple of tensors, got a tuple of 0"),
        (0, Keep(), (images(), 3), TypeError, "Each must be a tensor"),
        (0, Keep(), (images(), images().float()), ValueError, "streams of one dtype, got"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(
    numbers, layer, x, error, message, method, checkpoint
):
    layer = OnStreams(numbers, layer)
    layer.checkpoint = checkpoint
    with pytest.raises(error, match=message):
        getattr(layer, method)(x)


ONE_BACK = (
    r"OnStreams hands one stream to layer layer \({}\) and takes one tensor back, got a tuple"
)
MANY_BACK = r"OnStreams hands {} streams to layer layer \({}\) and takes as many back, got a {}"


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize(
    ("method", "numbers", "layer", "error", "message"),
    [
        ("forward", 1, Split(), TypeError, ONE_BACK.format("Split")),
        ("inverse", 1, Inverse(Split()), TypeError, ONE_BACK.format("Inverse")),
        ("forward", (0, 1), Merge((1, 2)), TypeError, MANY_BACK.format(2, "Merge", "tensor")),
        ("inverse", (0, 1), Split((1, 2)), TypeError, MANY_BACK.format(2, "Split", "tensor")),
        (
            "forward",
            (0, 1),
            InvertibleSequential(Merge((1, 2)), Split((1, 1, 1))),
            ValueError,
            MANY_BACK.format(2, "InvertibleSequential", "tuple of 3"),
        ),
    ],
)
def test_a_layer_that_changes_the_number_of_streams_is_refused(
    method, numbers, layer, error, message, checkpoint
):
    layer = OnStreams(numbers, layer)
    layer.checkpoint = checkpoint
    with pytest.raises(error, match=message):
        getattr(layer, method)(streams())


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_mistake_in_a_nest_is_placed(checkpoint):
    inner = InvertibleSequential(Keep(), OnStreams(4, Keep()))
    network = InvertibleSequential(Keep(), inner, checkpoint=checkpoint)
    with pytest.raises(ValueError, match="on stream 4, got a state of 3") as caught:
        network(streams())
    assert caught.value.__notes__ == ["In layer 1.1 (OnStreams) of InvertibleSequential."]
    network = InvertibleSequential(Swap(), OnStreams((0, 1), Parallel(Keep(), Split())))
    with pytest.raises(TypeError, match="Parallel hands one stream to layer 1") as caught:
        network(pair())
    assert caught.value.__notes__ == ["In layer 1.layer (Parallel) of InvertibleSequential."]


# --- copies


@copied_in_both_ways
def test_copies_and_state_dicts_carry_the_layer(again):
    layer = OnStreams((0, 1), AdditiveCoupling(linear())).double()
    assert list(layer.state_dict()) == ["layer.f.0.weight", "layer.f.0.bias"]
    x = pair(3, 4)
    torch.testing.assert_close(again(layer)(x), layer(x), rtol=0, atol=0)


def test_streams_and_layer_are_shown():
    assert repr(OnStreams((0, -1), Swap())) == "OnStreams(\n  streams=(0, -1)\n  (layer): Swap()\n)"


def test_the_streams_may_be_changed():
    layer, x = OnStreams(0, Double()), pair()
    for checkpoint in (False, True):
        network = InvertibleSequential(layer, checkpoint=checkpoint)
        layer.streams = 0
        torch.testing.assert_close(network(x), (2 * x[0], x[1]), rtol=0, atol=0)
        layer.streams = 1
        torch.testing.assert_close(network(x), (x[0], 2 * x[1]), rtol=0, atol=0)
