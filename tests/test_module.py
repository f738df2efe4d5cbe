"""The contract's base class: what a layer inherits, and what it must define."""

import pytest
import torch
from toys import Double, Keep, images

from invertible import InvertibleModule, InvertibleSequential


@pytest.mark.parametrize("methods", [(), ("forward",), ("inverse",)])
def test_a_layer_needs_both_directions(methods):
    layer = type("Half", (InvertibleModule,), dict.fromkeys(methods, lambda _, x: x))
    with pytest.raises(TypeError, match=r"abstract class Half .*(forward|inverse)"):
        layer()


def test_a_layer_is_bijective_and_plain_until_it_says_otherwise():
    layer = Double()
    assert layer.bijective
    assert not layer.volume_preserving
    assert not layer.conditional


@pytest.mark.parametrize("method", ["forward_and_log_det", "inverse_and_log_det"])
def test_a_missing_log_determinant_tells_how_to_define_one(method):
    with pytest.raises(NotImplementedError) as caught:
        getattr(Double(), method)(images())
    assert str(caught.value) == (
        "Double defines no log-determinant. A layer with a constant one of 0 sets "
        "volume_preserving = True; any other overrides forward_and_log_det and "
        "inverse_and_log_det."
    )


@pytest.mark.parametrize("x", [images(3, 4), images(3, 4).float(), (images(3, 1), images(3, 2))])
def test_a_volume_preserving_layer_inherits_zeros(x):
    for method in (Keep().forward_and_log_det, Keep().inverse_and_log_det):
        y, log_det = method(x)
        assert y is x
        assert torch.equal(log_det, torch.zeros(3, dtype=(x[0]).dtype))


def test_forward_hooks_fire_in_a_composition():
    layer, seen = Double(), []
    layer.register_forward_hook(lambda *_: seen.append(1))
    InvertibleSequential(layer)(images())
    assert seen == [1]
