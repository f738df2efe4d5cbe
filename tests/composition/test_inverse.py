"""Inverse is its layer with the directions swapped."""

import copy

import pytest
import torch
from torch import nn
from toys import (
    AddsContext,
    Affine,
    Double,
    Logistic,
    block,
    copied_in_both_ways,
    images,
    pair,
)

from invertible import (
    AdditiveCoupling,
    InjectivePad,
    Inverse,
    InvertibleSequential,
    PixelShuffle,
    PixelUnshuffle,
    Swap,
)
from invertible.testing import inversecheck


def test_the_directions_are_swapped():
    layer = Inverse(PixelUnshuffle(2))
    assert torch.equal(layer(images()), PixelShuffle(2)(images()))
    assert torch.equal(layer.inverse(images()), PixelUnshuffle(2)(images()))


def test_the_inverse_of_an_inverse_does_what_the_layer_does():
    layer = Affine()
    twice = Inverse(layer=Inverse(layer))
    assert isinstance(twice, Inverse)
    assert torch.equal(twice(images()), layer(images()))
    assert torch.equal(twice.inverse(images()), layer.inverse(images()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("layer", "x"),
    [(Affine(), images()), (Logistic(), images().sigmoid()), (block(), pair()), (Swap(), pair())],
)
def test_an_inverse_keeps_the_laws(layer, x, training):
    assert inversecheck(Inverse(layer).double().train(training), x)


def test_the_statistics_of_a_network_rest_both_ways():
    layer = Inverse(block()).double()
    before = copy.deepcopy(layer.state_dict())
    layer.inverse(layer(pair()))
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_log_determinants_are_swapped():
    layer, x = Affine(0.5), images()
    y, log_det = Inverse(layer).forward_and_log_det(x)
    assert torch.equal(y, layer.inverse(x))
    assert log_det.tolist() == [-8, -8]
    y, log_det = Inverse(layer).inverse_and_log_det(x)
    assert torch.equal(y, layer(x))
    assert log_det.tolist() == [8, 8]


def test_a_missing_log_determinant_names_the_layer_inside():
    with pytest.raises(NotImplementedError, match=r"^Double defines no"):
        Inverse(Double()).forward_and_log_det(images())


def test_it_is_what_its_layer_is():
    conditional = AdditiveCoupling(AddsContext(2), conditional=True)
    assert Inverse(conditional).conditional
    assert Inverse(conditional).volume_preserving
    assert not Inverse(Affine()).volume_preserving
    assert not Inverse(Affine()).conditional
    assert Inverse(Affine()).bijective


def test_a_context_goes_through():
    layer = AdditiveCoupling(AddsContext(2), conditional=True).double()
    context = torch.tensor([1.0, 2.0], dtype=torch.float64)
    y = layer(pair(), context)
    inverse = Inverse(layer)
    torch.testing.assert_close(inverse(y, context), pair())
    torch.testing.assert_close(inverse.inverse(pair(), context), y, rtol=0, atol=0)
    assert inverse.forward_and_log_det(y, context)[1].tolist() == [0, 0]
    assert inverse.inverse_and_log_det(pair(), context)[1].tolist() == [0, 0]


@pytest.mark.parametrize("method", ["forward", "inverse"])
def test_a_context_that_nothing_would_use_is_refused(method):
    with pytest.raises(TypeError, match=r"got a context .* that nothing in it would use"):
        getattr(Inverse(Swap()), method)(pair(), images())


def test_parameters_are_shared_and_trained_through_both():
    layer = Affine().double()
    inverse = Inverse(layer)
    assert [id(p) for p in inverse.parameters()] == [id(p) for p in layer.parameters()]
    inverse(images()).sum().backward()
    assert layer.shift.grad is not None
    with torch.no_grad():
        layer.shift.fill_(5)
    torch.testing.assert_close(inverse(layer(images())), images())


@copied_in_both_ways
def test_copies_and_state_dicts_carry_the_layer(again):
    inverse = Inverse(Affine(0.25, 3.0))
    assert list(inverse.state_dict()) == ["layer.log_scale", "layer.shift"]
    twin = again(inverse)
    assert type(twin) is Inverse
    assert twin.layer is not inverse.layer
    other = Inverse(Affine())
    other.load_state_dict(inverse.state_dict())
    for same in (twin, other):
        assert torch.equal(same(images()), inverse(images()))


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        (nn.ReLU(), TypeError, "Inverse takes an invertible layer, got a ReLU"),
        (Swap, TypeError, "Inverse takes an invertible layer, got .*Swap"),
        (None, TypeError, "Inverse takes an invertible layer, got "),
        (InjectivePad(1), ValueError, "and InjectivePad has a left inverse only: use its inverse"),
        (
            InvertibleSequential(InjectivePad(1)),
            ValueError,
            "a layer whose inverse can be undone, and InvertibleSequential has a left inverse only",
        ),
    ],
)
def test_what_cannot_be_turned_round_is_refused(layer, error, message):
    with pytest.raises(error, match=message):
        Inverse(layer)


def test_the_layer_inside_is_shown():
    assert repr(Inverse(Swap())) == "Inverse(\n  (layer): Swap()\n)"
