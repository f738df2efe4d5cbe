"""Layers as transforms of torch, and transforms of torch as layers."""

import copy

import pytest
import torch
from torch import nn
from torch.distributions import (
    AbsTransform,
    AffineTransform,
    ComposeTransform,
    ExpTransform,
    Independent,
    IndependentTransform,
    LowerCholeskyTransform,
    Normal,
    SigmoidTransform,
    StickBreakingTransform,
    TransformedDistribution,
    transforms,
)

from invertible import (
    ActNorm,
    AffineCoupling,
    AsTransform,
    Flatten,
    Flow,
    FromTransform,
    InjectivePad,
    InvertibleLinear,
    InvertibleSequential,
    Merge,
    PixelUnshuffle,
    Scale,
    Split,
    Swap,
)


def couplings(**options):
    torch.manual_seed(0)
    layers = [AffineCoupling(nn.Linear(2, 4)), Swap(), AffineCoupling(nn.Linear(2, 4))]
    return InvertibleSequential(Split(), *layers, Merge(), **options).double()


def normal(*shape):
    return Normal(torch.zeros(shape, dtype=torch.float64), 1.0)


def points(*shape):
    return torch.randn(*shape, 4, dtype=torch.float64)


# --- layers as transforms


@pytest.mark.parametrize("cache_size", [0, 1])
def test_a_transformed_distribution_is_the_flow(cache_size):
    layer = couplings()
    transform = AsTransform(layer, event_dim=1, cache_size=cache_size)
    found = TransformedDistribution(normal(4), transform.inv)
    flow, x = Flow(layer, normal(4)), points(2, 3)
    torch.testing.assert_close(found.log_prob(x), flow().log_prob(x))
    assert found.sample((5,)).shape == (5, 4)
    x = found.rsample((5,))
    torch.testing.assert_close(found.log_prob(x), flow.log_prob(x))


def test_both_directions_and_their_log_determinants():
    layer, x = couplings(), points(2, 3)
    transform = AsTransform(layer, event_dim=1)
    y, log_det = layer.forward_and_log_det(x.flatten(0, 1))
    torch.testing.assert_close(transform(x), y.reshape(2, 3, 4))
    torch.testing.assert_close(transform.inv(transform(x)), x)
    expected = log_det.reshape(2, 3)
    torch.testing.assert_close(transform.log_abs_det_jacobian(x, transform(x)), expected)
    torch.testing.assert_close(transform.inv.log_abs_det_jacobian(transform(x), x), -expected)


@pytest.mark.parametrize(("cache_size", "evaluations"), [(0, 2), (1, 1)])
def test_with_a_cache_the_layer_runs_once(cache_size, evaluations):
    layer, count = couplings(), []
    layer[1].f.register_forward_hook(lambda *_: count.append(1))
    transform = AsTransform(layer, event_dim=1).with_cache(cache_size)
    found = TransformedDistribution(normal(4), transform.inv)
    count.clear()
    found.log_prob(points(3))
    assert len(count) == evaluations
    x = points(3)
    y = transform(x)
    other = transform.log_abs_det_jacobian(points(3), y)  # no value of the cache
    assert not torch.equal(other, transform.log_abs_det_jacobian(x, y))


def test_it_composes_with_torchs_transforms():
    whole = ComposeTransform(
        [IndependentTransform(SigmoidTransform().inv, 1), AsTransform(couplings(), 1)]
    )
    found = TransformedDistribution(normal(4), whole.inv)
    x = found.sample((6,))
    assert ((x > 0) & (x < 1)).all()
    assert found.log_prob(x).shape == (6,)
    assert whole.domain.event_dim == 1


def test_shapes_go_through():
    transform = AsTransform(PixelUnshuffle(2), event_dim=3)
    assert transform.forward_shape((7, 3, 8, 8)) == (7, 12, 4, 4)
    assert transform.inverse_shape((12, 4, 4)) == (3, 8, 8)
    assert transform(torch.randn(2, 7, 3, 8, 8)).shape == (2, 7, 12, 4, 4)
    with pytest.raises(ValueError, match=r"events of 3 dimensions, got a shape of \(8, 8\)"):
        transform(torch.randn(8, 8))


def test_an_event_may_get_another_number_of_dimensions():
    layer = InvertibleSequential(Flatten((3, 2, 2)), Scale(12)).double()
    base = Independent(normal(12), 1)
    transform = AsTransform(layer, event_dim=3, codomain_event_dim=1)
    assert (transform.domain.event_dim, transform.codomain.event_dim) == (3, 1)
    found = TransformedDistribution(base, transform.with_cache().inv)
    assert found.event_shape == (3, 2, 2)
    x = found.sample((5, 6))
    torch.testing.assert_close(found.log_prob(x), Flow(layer, base)().log_prob(x))


def test_it_trains_flat_in_memory():
    def gradients(checkpoint):
        layer = couplings(checkpoint=checkpoint)
        found = TransformedDistribution(normal(4), AsTransform(layer, 1, cache_size=1).inv)
        torch.manual_seed(1)
        found.log_prob(points(5)).sum().backward()
        return [p.grad for p in layer.parameters()]

    torch.testing.assert_close(gradients(True), gradients(False))


@pytest.mark.parametrize(
    ("layer", "event_dim", "error", "message"),
    [
        (nn.Linear(2, 2), 1, TypeError, "takes a layer of this library, got a Linear"),
        (InjectivePad(1), 1, TypeError, "InjectivePad is not bijective"),
        (
            AffineCoupling(nn.Bilinear(1, 1, 2), conditional=True),
            1,
            TypeError,
            "AffineCoupling takes one",
        ),
        (ActNorm(2), 0, ValueError, "an event_dim of at least 1, got 0"),
    ],
)
def test_what_is_no_transform_is_an_error(layer, event_dim, error, message):
    with pytest.raises(error, match=message):
        AsTransform(layer, event_dim)


# --- transforms as layers

CASES = {
    "Exp": (ExpTransform(), torch.randn(3, 4)),
    "Affine": (AffineTransform(torch.randn(4), torch.rand(4) + 0.5), torch.randn(3, 4)),
    "of vectors": (
        AffineTransform(torch.randn(4), torch.rand(4) + 0.5, event_dim=1),
        torch.randn(3, 2, 4),
    ),
    "CumulativeDistribution": (
        transforms.CumulativeDistributionTransform(Normal(torch.zeros(4), 2.0)),
        torch.randn(3, 4),
    ),
    "Reshape": (transforms.ReshapeTransform((4,), (2, 2)), torch.randn(3, 4)),
    "inverse": (ExpTransform().inv, torch.rand(3, 4) + 0.1),
}


@pytest.mark.parametrize(("transform", "x"), CASES.values(), ids=CASES.keys())
def test_a_layer_is_the_transform(transform, x):
    x, layer = x.double(), FromTransform(transform).double()
    y, log_det = layer.forward_and_log_det(x)
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x).sum(0).flatten(), x)
    square = jacobian.movedim(1, 0).reshape(len(x), x[0].numel(), x[0].numel())
    torch.testing.assert_close(log_det, square.slogdet()[1])
    torch.testing.assert_close(layer.inverse(y), x)
    torch.testing.assert_close(layer.inverse_and_log_det(y), (x, -log_det))


def test_a_copy_knows_what_it_is_the_inverse_of():
    inverse = ComposeTransform([AffineTransform(torch.zeros(4), 2.0).inv, ExpTransform().inv])
    layer, x = FromTransform(inverse), torch.rand(3, 4) + 0.1
    torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x))
    torch.testing.assert_close(copy.deepcopy(layer).double()(x.double()), layer(x).double())


def test_its_tensors_move_with_the_layer_and_are_saved():
    layer = FromTransform(AffineTransform(torch.ones(4), 2 * torch.ones(4)))
    assert not list(layer.parameters())
    assert len(layer.state_dict()) == 2
    assert layer.double()(torch.ones(1, 4).double()).dtype == torch.float64
    x = points(2)
    torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x))


def test_a_transform_that_is_a_module_is_learned():
    class Learned(transforms.AffineTransform, nn.Module):
        def __init__(self):
            nn.Module.__init__(self)
            scale = nn.Parameter(torch.full((4,), 2.0))
            transforms.AffineTransform.__init__(self, nn.Parameter(torch.zeros(4)), scale)

        def with_cache(self, _=1):
            return self

        __hash__ = nn.Module.__hash__

    layer = FromTransform(Learned())
    layer(torch.randn(2, 4)).sum().backward()
    assert len(list(layer.parameters())) == 2
    assert all(p.grad is not None for p in layer.parameters())


def test_a_cache_is_not_used():
    layer = FromTransform(ExpTransform(cache_size=1))
    x = torch.randn(3, 4)
    layer(x)
    assert layer.transform._cache_size == 0


def test_it_trains_within_a_chain():
    def gradients(checkpoint):
        torch.manual_seed(0)
        affine = FromTransform(AffineTransform(torch.ones(4), 2 * torch.ones(4)))
        layers = [InvertibleLinear(4), affine, InvertibleLinear(4)]
        network = InvertibleSequential(*layers, checkpoint=checkpoint).double()
        torch.manual_seed(1)
        network(points(5)).square().sum().backward()
        return [p.grad for p in network.parameters()]

    torch.testing.assert_close(gradients(True), gradients(False))


@pytest.mark.parametrize(
    ("transform", "error", "message"),
    [
        (torch.exp, TypeError, "takes a torch.distributions.Transform, got"),
        (AbsTransform(), ValueError, r"takes bijections, and AbsTransform\(\) is none"),
        (
            AffineTransform(nn.Parameter(torch.zeros(2)), 1.0),
            ValueError,
            "made of tensors that require grad",
        ),
    ],
)
def test_what_is_no_bijection_is_an_error(transform, error, message):
    with pytest.raises(error, match=message):
        FromTransform(transform)


def test_values_outside_of_the_domain_are_errors():
    layer = FromTransform(ExpTransform())
    with pytest.raises(ValueError, match=r"FromTransform's inverse takes values within Greater"):
        layer.inverse(torch.tensor([[1.0, -1.0]]))
    with pytest.raises(ValueError, match="the domain of"):
        FromTransform(ExpTransform().inv)(torch.zeros(1, 2))


def test_a_layer_of_several_streams_is_no_transform():
    with pytest.raises(TypeError, match=r"Split returned a tuple of 2 .* put Merge behind"):
        AsTransform(Split(), 1)(torch.randn(3, 4))


@pytest.mark.parametrize("inverse", [False, True])
def test_a_shape_that_torch_would_broadcast_is_an_error(inverse):
    layer = FromTransform(AffineTransform(torch.zeros(3, 5), 1.0))
    for x in (torch.randn(3, 1), torch.randn(1, 5)):
        with pytest.raises(ValueError, match=r"does not fit .* would be broadcast to \(3, 5\)"):
            layer.inverse(x) if inverse else layer(x)


@pytest.mark.parametrize("transform", [StickBreakingTransform(), LowerCholeskyTransform()])
def test_transforms_without_a_square_jacobian(transform):
    if not transform.bijective:
        with pytest.raises(ValueError, match="takes bijections"):
            FromTransform(transform)
        return
    layer, x = FromTransform(transform), torch.randn(3, 3, 3)
    torch.testing.assert_close(layer.inverse(layer(x)), x, rtol=1e-3, atol=1e-3)
