"""Quantize throws digits away, and says so."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import Function, couplings, linear

from invertible import (
    AdditiveCoupling,
    InjectivePad,
    Inverse,
    InvertibleSequential,
    Merge,
    OnStreams,
    Parallel,
    Quantize,
    Split,
    Swap,
)
from invertible.testing import inversecheck
from invertible.testing.strategies import tensors

Q = 2**-8
BESIDE = torch.full((2, 4), 1 / 3, dtype=torch.float64)


@given(x=tensors())
def test_each_direction_undoes_the_other_on_the_grid_and_forward_makes_it(x):
    layer = Quantize(Q)
    y = layer(x)
    assert torch.equal(layer(layer.inverse(y)), y)
    assert torch.equal(layer.inverse(layer(y)), y)
    assert (layer.inverse(y) - x).abs().max() <= Q / 2


def test_it_is_surjective_and_not_injective():
    layer = Quantize(Q)
    assert not torch.equal(layer.inverse(layer(BESIDE)), BESIDE)
    assert layer.surjective
    assert not layer.injective
    assert not layer.bijective
    assert layer.volume_preserving
    assert layer.forward_and_log_det(BESIDE)[1].tolist() == [0, 0]
    inversecheck(layer, BESIDE)


def test_compositions_are_what_their_members_are_together():
    rounding, padding = Quantize(Q), InjectivePad(1)
    for network in (
        InvertibleSequential(Swap(), rounding),
        OnStreams(0, rounding),
        Parallel(Swap(), rounding),
    ):
        assert (network.injective, network.surjective, network.bijective) == (False, True, False)
    turned = Inverse(rounding)
    assert (turned.injective, turned.surjective, turned.bijective) == (True, False, False)
    both = InvertibleSequential(padding, rounding)
    assert (both.injective, both.surjective, both.bijective) == (False, False, False)
    assert (padding.injective, padding.surjective) == (True, False)


@pytest.mark.parametrize("layer", [InjectivePad(1), Inverse(Quantize(Q))])
def test_inverse_takes_it_and_refuses_what_has_a_left_inverse_only(layer):
    with pytest.raises(ValueError, match="has a left inverse only"):
        Inverse(layer)
    with pytest.raises(ValueError, match="has a left inverse only"):
        Inverse(InvertibleSequential(Quantize(Q), layer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_inverse_of_a_network_that_quantizes_is_a_layer(checkpoint, dtype):
    network = InvertibleSequential(
        Quantize(Q), Split(), AdditiveCoupling(linear(), quantum=Q), Merge(), checkpoint=checkpoint
    ).to(dtype)
    x = BESIDE.to(dtype)
    turned = Inverse(network)
    y = network(x)
    assert torch.equal(turned(y), Quantize(Q)(x))
    assert torch.equal(turned.inverse(x), y)
    y, log_det = turned.forward_and_log_det(y)
    assert torch.equal(y, Quantize(Q)(x))
    assert log_det.tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64, torch.uint8])
def test_both_directions_refuse_what_holds_no_grid(dtype):
    x = torch.zeros(1, 2, dtype=dtype)
    for run in (Quantize(Q), Quantize(Q).inverse):
        with pytest.raises(TypeError, match="takes a float32 or float64 state"):
            run(x)


def gradients(network, x):
    network.zero_grad()
    x = x.clone().requires_grad_()
    network(x).sin().sum().backward()
    return [x.grad, *(p.grad for p in network.parameters())]


def test_layers_before_a_coarse_quantize_get_their_gradients():
    """It is of no help in rebuilding what it rounded, which is stored."""
    torch.manual_seed(0)
    stored = InvertibleSequential(
        *[Split(), *couplings(2, linear), Merge(), Quantize(0.25)],
        *[Split(), *couplings(2, linear), Merge()],
    ).double()
    rebuilt = copy.deepcopy(stored)
    rebuilt.checkpoint = True
    x = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(gradients(rebuilt, x), gradients(stored, x), rtol=1e-12, atol=1e-12)


@given(power=st.integers(-20, -4))
def test_an_input_may_be_overwritten_behind_a_quantize(power):
    """At the entrance nothing is stored for it."""
    f = Function(lambda x: x.sin())
    network = InvertibleSequential(
        Quantize(2.0**power), Split(), AdditiveCoupling(f, quantum=2.0**power), checkpoint=True
    )
    leaf = torch.ones(2, 4, requires_grad=True)
    x = leaf * 0.3
    y1, _ = network(x)
    x.detach().zero_()
    y1.sum().backward()
    expected = torch.tensor([1.0, 1.0, *2 * [Quantize(2.0**power)(torch.tensor(0.3)).cos()]])
    torch.testing.assert_close(leaf.grad, (0.3 * expected).expand(2, 4))
