"""Sigmoid, Logit, Tanh and Softplus are safe at both ends, in both directions."""

import pytest
import torch
from toys import assert_same_gradients, both, images

from invertible import InvertibleSequential, Logit, Scale, Sigmoid, Softplus, Tanh

LAYERS = {
    "Sigmoid": (Sigmoid(), torch.sigmoid),
    "Logit": (Logit(), torch.logit),
    "Tanh": (Tanh(), torch.tanh),
    "Softplus": (Softplus(), torch.nn.functional.softplus),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
# Far beyond what each of them takes or returns, and on its ends.
ENDS = [-1e6, -200.0, -1.0, -1e-30, 0.0, 1e-30, 1e-7, 0.5, 1 - 1e-7, 1.0, 2.0, 20.0, 200.0, 1e6]


@every_layer
def test_it_is_what_its_name_says(name):
    layer, function = LAYERS[name]
    x = images().sigmoid() if name == "Logit" else images()
    torch.testing.assert_close(layer(x), function(x))


@every_layer
@pytest.mark.parametrize("direction", ["forward_and_log_det", "inverse_and_log_det"])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_values_log_determinants_and_gradients_are_finite_at_both_ends(name, direction, dtype):
    layer, _ = LAYERS[name]
    x = torch.tensor(ENDS, dtype=torch.float64)
    x = x.clamp(-6e4, 6e4).to(dtype)[:, None].requires_grad_()
    y, log_det = getattr(layer, direction)(x)
    (gradient,) = torch.autograd.grad(y.double().sum() + log_det.double().sum(), x)
    assert y.isfinite().all()
    assert log_det.isfinite().all()
    if dtype not in (torch.float16, torch.bfloat16):  # which can't hold 1 / 1e-30
        assert gradient.isfinite().all()


@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_comes_out_can_go_back(name, dtype):
    layer, _ = LAYERS[name]
    x = torch.tensor(ENDS, dtype=dtype)[:, None]
    y = layer(x)
    assert layer.inverse(y).isfinite().all()
    torch.testing.assert_close(layer(layer.inverse(y)), y)


def test_softplus_is_right_in_float64_where_torch_takes_it_for_the_identity():
    x = torch.tensor([[21.0]], dtype=torch.float64)
    y = Softplus()(x)
    assert 7e-10 < (y - x).item() < 8e-10


@every_layer
@pytest.mark.parametrize(
    "way", ["forward", "inverse", "forward_and_log_det", "inverse_and_log_det"]
)
def test_rebuilding_is_right_where_the_output_has_forgotten_the_input(name, way):
    layer, _ = LAYERS[name]
    x = (30 * images()).requires_grad_()

    def loss(network):
        results = getattr(network, way)(x)
        y, log_det = results if "log_det" in way else (results, torch.zeros(()))
        return (y.atan() * y.sigmoid()).sum() + log_det.sum() / 100

    assert_same_gradients(
        both(lambda: InvertibleSequential(Scale(4), layer, Scale(4)).double()), loss
    )


@every_layer
def test_numbers_that_are_not_real_are_refused(name):
    layer, _ = LAYERS[name]
    with pytest.raises(TypeError, match=f"{name} computes with its input and takes floating"):
        layer(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match=f"{name}'s inverse computes with real numbers"):
        layer.inverse(torch.zeros(2, 2, dtype=torch.complex64))
