"""Parallel runs each layer on its stream and nothing else."""

import copy
import pickle

import pytest
import torch
from toys import Affine, Double, images, pair

from invertible import (
    AdditiveCoupling,
    InjectivePad,
    Inverse,
    InvertibleModule,
    InvertibleSequential,
    Merge,
    Parallel,
    PixelUnshuffle,
    Split,
)


def test_each_stream_passes_its_layer():
    x1, x2 = pair()
    layer = Parallel(Double(), PixelUnshuffle(2))
    y1, y2 = layer((x1, x2))
    assert torch.equal(y1, 2 * x1)
    assert torch.equal(y2, PixelUnshuffle(2)(x2))
    torch.testing.assert_close(layer.inverse((y1, y2)), (x1, x2), rtol=0, atol=0)


def test_three_streams_of_three_shapes_are_taken():
    x = images(2, 1), images(2, 2, 4), images(2, 3, 4, 4)
    y = Parallel(Double(), PixelUnshuffle(2), PixelUnshuffle(4))(x)
    assert [tuple(part.shape) for part in y] == [(2, 1), (2, 4, 2), (2, 48, 1, 1)]


def test_a_shared_layer_runs_on_both_streams_and_has_one_set_of_parameters():
    shared = Affine()
    layer = Parallel(shared, shared)
    assert len(list(layer.parameters())) == 1 + 1
    for y, x in zip(layer(pair()), pair(), strict=True):
        assert torch.equal(y, shared(x))
    layer(pair())[0].sum().backward()
    assert shared.shift.grad is not None
    assert len(list(copy.deepcopy(layer).parameters())) == 1 + 1


def test_a_layer_may_be_a_composition():
    image = InvertibleSequential(Split(), AdditiveCoupling(torch.nn.Tanh()), Merge())
    layer = Parallel(image, image)
    x = images(), images()
    torch.testing.assert_close(layer.inverse(layer(x)), x)


def test_log_determinants_of_all_streams_add_up():
    x = pair()  # 8 numbers an example and stream
    layer = Parallel(Affine(0.5), Affine(2.0))
    y, log_det = layer.forward_and_log_det(x)
    torch.testing.assert_close(y, layer(x), rtol=0, atol=0)
    assert log_det.tolist() == [8 * 2.5, 8 * 2.5]
    x, log_det = layer.inverse_and_log_det(y)
    torch.testing.assert_close(x, pair())
    assert log_det.tolist() == [-8 * 2.5, -8 * 2.5]


class Shift(InvertibleModule):
    conditional = True

    def forward(self, x, context):
        return x + context

    def inverse(self, y, context):
        return y - context


def test_a_context_reaches_the_layers_that_take_one():
    layer = Parallel(Shift(), Double())
    x, context = pair(), torch.ones(1)
    y1, y2 = layer(x, context)
    assert torch.equal(y1, x[0] + 1)
    assert torch.equal(y2, 2 * x[1])
    torch.testing.assert_close(layer.inverse((y1, y2), context), x)
    with pytest.raises(TypeError, match="Parallel is conditional and got no context"):
        layer(x)


@pytest.mark.parametrize(
    ("layers", "bijective", "volume_preserving", "conditional"),
    [
        ((PixelUnshuffle(2), PixelUnshuffle(2)), True, True, False),
        ((PixelUnshuffle(2), InjectivePad(1)), False, False, False),
        ((PixelUnshuffle(2), Affine()), True, False, False),
        ((PixelUnshuffle(2), Shift()), True, False, True),
    ],
)
def test_it_is_what_all_its_layers_are(layers, bijective, volume_preserving, conditional):
    layer = Parallel(*layers)
    assert layer.bijective is bijective
    assert layer.volume_preserving is volume_preserving
    assert layer.conditional is conditional


def test_a_layer_without_a_log_determinant_is_named():
    with pytest.raises(NotImplementedError, match="Double defines no") as caught:
        Parallel(Affine(), Double()).forward_and_log_det(pair())
    assert caught.value.__notes__ == ["In layer 1 (Double) of Parallel."]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_and_state_dicts_carry_all_layers(again):
    layer = Parallel(Affine(), Inverse(Affine(2.0)))
    assert list(layer.state_dict()) == [
        *("0.log_scale", "0.shift"),
        *("1.layer.log_scale", "1.layer.shift"),
    ]
    torch.testing.assert_close(again(layer)(pair()), layer(pair()), rtol=0, atol=0)
    other = Parallel(Affine(), Inverse(Affine()))
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(pair()), layer(pair()), rtol=0, atol=0)


def test_its_layers_are_shown():
    shown = repr(Parallel(Double(), Double()))
    assert shown == "Parallel(\n  (0): Double()\n  (1): Double()\n)"
