"""InvertibleLinear multiplies channels by a matrix that stays invertible."""

import math
import re

import pytest
import torch
from torch import nn
from toys import assert_same_gradients, both, images

from invertible import InvertibleLinear, InvertibleSequential

both_parametrizations = pytest.mark.parametrize("parametrization", ["plu", "orthogonal"])


@both_parametrizations
@pytest.mark.parametrize(
    "shape", [(5, 4), (5, 4, 3), (5, 4, 3, 2), (2, 4, 3, 2, 2), (2, 4, *[2] * 4)]
)
def test_it_is_a_convolution_of_one_pixel_in_any_number_of_dimensions(parametrization, shape):
    layer = InvertibleLinear(4, parametrization).double()
    x = images(*shape)
    y, log_det = layer.forward_and_log_det(x)
    expected = torch.einsum("ij,nj...->ni...", layer.matrix(), x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(layer.inverse(y), x)
    places = math.prod(shape[2:])
    torch.testing.assert_close(log_det, (places * layer.matrix().slogdet()[1]).expand(shape[0]))
    # FrEIA's Fixed1x1Conv returns no batch.
    assert log_det.shape == (shape[0],)


@both_parametrizations
@pytest.mark.parametrize("channels", [1, 2, 7, 32])
def test_it_begins_as_a_rotation_that_torch_s_seed_decides(parametrization, channels):
    def matrix(seed):
        torch.manual_seed(seed)
        return InvertibleLinear(channels, parametrization).matrix()

    one, again, other = matrix(0), matrix(0), matrix(1)
    torch.testing.assert_close(one @ one.T, torch.eye(channels), atol=1e-4, rtol=0)
    assert torch.equal(one, again)
    assert channels == 1 or not torch.equal(one, other)


# survae_flows#5: a 1x1 convolution became singular.
@pytest.mark.parametrize("size", [1.0, 1e3, 1e6])
def test_the_determinant_stays_away_from_zero_for_any_parameters(size):
    layer = InvertibleLinear(4).double()
    nn.init.normal_(layer.raw_diagonal, std=size)
    _, log_det = layer.forward_and_log_det(images())
    assert log_det.abs().max() < 4 * 4 * 7.001
    assert layer.inverse(images()).isfinite().all()


@pytest.mark.parametrize("size", [1.0, 1e3, 1e6])
def test_a_product_of_reflections_is_orthogonal_for_any_parameters(size):
    layer = InvertibleLinear(16, "orthogonal")
    nn.init.normal_(layer.vectors, std=size)
    matrix = layer.matrix()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(16), atol=1e-5, rtol=0)
    assert layer.volume_preserving
    torch.testing.assert_close(layer.inverse_matrix(), matrix.T)


@both_parametrizations
def test_the_inverse_matrix_is_that(parametrization):
    layer = InvertibleLinear(6, parametrization).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    one = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(layer.inverse_matrix() @ layer.matrix(), one)


@both_parametrizations
def test_autocast_leaves_it_in_float32(parametrization):
    layer = InvertibleLinear(4, parametrization)
    x = images(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, log_det = layer.forward_and_log_det(x)
        back = layer.inverse(y)
        matrix = layer.matrix()
    assert y.dtype == log_det.dtype == back.dtype == torch.float32
    assert torch.equal(matrix, layer.matrix())
    torch.testing.assert_close(y, layer(x), rtol=0, atol=0)
    torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-4)


@both_parametrizations
@pytest.mark.parametrize(
    "way", ["forward", "inverse", "forward_and_log_det", "inverse_and_log_det"]
)
def test_rebuilding_is_right_under_autocast(parametrization, way):
    x = images(2, 4, 4, 4, dtype=torch.float32).requires_grad_()

    def loss(network):
        with torch.autocast("cpu", torch.bfloat16):
            results = getattr(network, way)(x)
        y, log_det = results if "log_det" in way else (results, torch.zeros(()))
        return (y.sin() * y).sum() + log_det.sum()

    layers = lambda: [InvertibleLinear(4, parametrization) for _ in range(3)]  # noqa: E731
    assert_same_gradients(both(lambda: InvertibleSequential(*layers())), loss, tolerance=1e-3)


@pytest.mark.parametrize("parametrization", ["plu"])
def test_what_does_not_learn_is_kept_in_the_state_dict(parametrization):
    layer, other = InvertibleLinear(5, parametrization), InvertibleLinear(5, parametrization)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 5)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(other.inverse(x), layer.inverse(x))


def test_what_it_does_not_take_is_refused():
    with pytest.raises(ValueError, match="InvertibleLinear takes channels of at least 1, got 0"):
        InvertibleLinear(0)
    message = "takes a parametrization of ('plu', 'orthogonal'), got 'qr'."
    with pytest.raises(ValueError, match=re.escape(message)):
        InvertibleLinear(3, "qr")
    with pytest.raises(ValueError, match="InvertibleLinear's inverse takes 3 channels along dim"):
        InvertibleLinear(3).inverse(images())
    with pytest.raises(ValueError, match="InvertibleLinear cannot take dim=0"):
        InvertibleLinear(3, dim=0)
    with pytest.raises(TypeError, match="InvertibleLinear computes with its input and takes float"):
        InvertibleLinear(3)(torch.zeros(2, 3, dtype=torch.int64))
