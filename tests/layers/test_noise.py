"""Dequantize and Augment add noise, and a term to the likelihood that makes of it a bound."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from toys import assert_same_gradients, both, copied_in_both_ways, images, memory_of

from invertible import (
    AffineCoupling,
    Augment,
    Dequantize,
    Flow,
    Identity,
    Inverse,
    InvertibleSequential,
    Logit,
    Merge,
    Rebuild,
    Scale,
    Split,
    Swap,
)
from invertible.testing import inversecheck

LAWS = ["state", "dtype and device", "input untouched", "inverse undoes forward", "no trace"]


def whole(*shape, levels=256, dtype=torch.uint8):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(levels, shape or (3, 4, 2, 2), generator=generator).to(dtype)


class Gaussian(nn.Module):
    """Normal noise whose mean and deviation depend on the context, squashed if it is told to."""

    def __init__(self, channels, out, squash=None):
        super().__init__()
        self.f = nn.Linear(channels, 2 * out)
        self.squash = squash

    def rsample_and_log_prob(self, shape, context):
        mean, log_std = self.f(context.movedim(1, -1)).movedim(-1, 1).chunk(2, dim=1)
        noise = mean + log_std.exp() * torch.randn((*shape, *mean.shape), dtype=mean.dtype)
        normal = torch.distributions.Normal(mean, log_std.exp())
        log_prob = normal.log_prob(noise).flatten(1).sum(1)
        if self.squash is None:
            return noise, log_prob
        noise, log_det = self.squash.inverse_and_log_det(noise)
        return noise, log_prob - log_det


class Fixed(nn.Module):
    """The same noise everywhere."""

    def __init__(self, noise):
        super().__init__()
        self.noise = noise

    def rsample_and_log_prob(self, _, context):
        return torch.full_like(context, self.noise), context.new_zeros(len(context))


# --- whole numbers


@given(
    levels=st.sampled_from([2, 3, 5, 10, 49, 256, 1000, 65536]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    noise=st.sampled_from([0.0, 1e-30, 0.5, 1 - 2**-24, 1.0]),
)
def test_every_number_comes_back_whatever_is_rounded(levels, dtype, noise):
    layer = Dequantize(levels, Fixed(noise))
    x = torch.arange(levels, dtype=dtype)[None]
    y = layer(x)
    assert y.dtype == dtype
    assert y.min() >= 0
    assert y.max() < 1
    assert torch.equal(layer.inverse(y), x)


def test_uniform_noise_fills_the_space_between_whole_numbers():
    x = whole(1000, 4, levels=4)
    y = Dequantize(4)(x)
    assert y.dtype == torch.float32
    rest = 4 * y - x
    assert rest.min() >= 0
    assert rest.max() < 1
    assert rest.mean().item() == pytest.approx(0.5, abs=0.02)
    assert rest.var().item() == pytest.approx(1 / 12, abs=0.005)


@pytest.mark.parametrize("layer", [Dequantize(), Augment(channels=2)])
def test_noise_comes_from_torchs_generator(layer):
    x = whole() if isinstance(layer, Dequantize) else images()
    torch.manual_seed(0)
    first, second = layer(x), layer(x)
    torch.manual_seed(0)
    again = layer(x)
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    parts = (first, second) if isinstance(layer, Dequantize) else (first[1], second[1])
    assert not torch.equal(*parts)


def test_uniform_noise_is_never_zero_where_logit_would_be_far_out(monkeypatch):
    monkeypatch.setattr(torch, "rand_like", torch.zeros_like)
    y = InvertibleSequential(Dequantize(), Logit())(torch.zeros(1, 3))
    assert y.min() > -24


def test_integers_become_floats_of_the_default_dtype_and_floats_stay_what_they_are():
    for dtype in (torch.uint8, torch.int16, torch.int64):
        assert Dequantize()(whole(dtype=dtype)).dtype == torch.float32
    assert Dequantize()(whole(dtype=torch.float64)).dtype == torch.float64
    assert Dequantize().inverse(torch.rand(2, 3, dtype=torch.float64)).dtype == torch.float64


def test_samples_beyond_the_ends_become_the_nearest_whole_number():
    y = torch.tensor([[-3.0, -1e-9, 0.0, 0.999999, 1.0, 7.0]])
    assert Dequantize(4).inverse(y).tolist() == [[0, 0, 0, 3, 3, 3]]


def test_the_memory_format_goes_through():
    x = whole(2, 3, 4, 4).to(memory_format=torch.channels_last)
    y, _ = Dequantize().forward_and_log_det(x)
    assert y.is_contiguous(memory_format=torch.channels_last)


# --- the term of the likelihood


def test_the_term_of_uniform_noise_is_that_of_the_scale():
    _, term = Dequantize(8).forward_and_log_det(whole(5, 3, 2, 2, levels=8))
    torch.testing.assert_close(term, torch.full((5,), -12 * math.log(8)))


def test_a_density_that_is_constant_between_whole_numbers_makes_the_bound_exact():
    """With a uniform base the flow says that all images are alike: 8 bits a dimension."""
    y, term = Dequantize().forward_and_log_det(whole())
    log_prob = torch.distributions.Uniform(0.0, 1.0).log_prob(y).flatten(1).sum(1) + term
    torch.testing.assert_close(-log_prob / (16 * math.log(2)), torch.full((3,), 8.0))


class OfSlope(nn.Module):
    """The noise that a density 2 y has between the whole numbers of two levels."""

    def rsample_and_log_prob(self, _, context):
        x, v = 2 * context, torch.rand_like(context)
        u = torch.where(x == 0, v.sqrt(), (1 + 3 * v).sqrt() - 1)
        return u, torch.where(x == 0, 2 * u, (1 + u) * 2 / 3).log().sum(1)


def test_the_bound_is_exact_for_the_noise_that_the_flow_has_and_lower_for_other():
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64).repeat(500, 1)
    exact = torch.tensor([1 / 4, 3 / 4], dtype=torch.float64).log().repeat(500)

    def bound(layer):
        y, term = layer.forward_and_log_det(x)
        return (2 * y).log().sum(1) + term

    torch.testing.assert_close(bound(Dequantize(2, OfSlope())), exact)
    assert bound(Dequantize(2)).mean() < exact.mean() - 0.02


def test_the_term_of_a_flow_is_that_of_its_noise():
    flow = Gaussian(4, 4, Logit())
    x = whole(levels=8, dtype=torch.float32)
    torch.manual_seed(1)
    y, term = Dequantize(8, flow).forward_and_log_det(x)
    torch.manual_seed(1)
    noise, log_prob = flow.rsample_and_log_prob((), x / 8)
    torch.testing.assert_close(y, (x + noise) / 8)
    torch.testing.assert_close(term, -log_prob - 16 * math.log(8))


def test_augmented_normals_have_their_density():
    x = images(5, 2, 3, 3)
    (same, noise), term = Augment(channels=4).forward_and_log_det(x)
    assert same is x
    assert noise.shape == (5, 4, 3, 3)
    normal = torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(term, -normal.log_prob(noise).flatten(1).sum(1))
    assert Augment(channels=4, dim=-1)(x)[1].shape == (5, 2, 3, 4)


def test_an_augmented_flow_bounds_the_density_and_the_right_noise_makes_it_exact():
    """The pair is jointly normal, correlated: given x, noise is of mean 0.8 x and deviation 0.6."""

    class Given(nn.Module):
        def rsample_and_log_prob(self, _, context):
            normal = torch.distributions.Normal(0.8 * context, 0.6)
            noise = normal.rsample()
            return noise, normal.log_prob(noise).sum(1)

    x = images(400, 1)
    exact = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(1)

    def bound(layer):
        (x_, noise), term = layer.forward_and_log_det(x)
        z = (noise - 0.8 * x_) / 0.6
        normal = torch.distributions.Normal(0.0, 1.0)
        return (normal.log_prob(x_) + normal.log_prob(z) - math.log(0.6)).sum(1) + term

    torch.testing.assert_close(bound(Augment(Given())), exact)
    assert bound(Augment(channels=1)).mean() < exact.mean() - 0.1


@pytest.mark.parametrize("layer", [Dequantize(), Augment(channels=2)], ids=repr)
def test_a_sample_has_no_density(layer):
    name = type(layer).__name__
    network = InvertibleSequential(layer, Identity())
    x = whole() if isinstance(layer, Dequantize) else images()
    y = network(x)
    network.inverse(y)
    for run in (layer.inverse_and_log_det, network.inverse_and_log_det):
        with pytest.raises(NotImplementedError, match=f"{name}'s inverse forgets the noise"):
            run(y)
    assert not network.bijective
    assert network.injective
    with pytest.raises(ValueError, match=f"{name} has a left inverse only"):
        Inverse(layer)


def test_a_flow_of_augmented_data_counts_the_dimensions_of_the_data():
    torch.manual_seed(0)
    couplings = [AffineCoupling(nn.Linear(1, 2)), Swap(), AffineCoupling(nn.Linear(1, 2))]
    flow = Flow(InvertibleSequential(Augment(channels=1), *couplings), event_shape=(1,)).double()
    x = images(5, 1)
    torch.manual_seed(1)
    bits = flow.bits_per_dim(x)
    torch.manual_seed(1)
    torch.testing.assert_close(bits, -flow.log_prob(x) / math.log(2))
    assert flow.sample((3,)).shape == (3, 1)
    with pytest.raises(NotImplementedError, match="Augment's inverse forgets the noise"):
        flow.rsample_and_log_prob((3,))


# --- laws and rebuilding


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("flow", [None, Gaussian(4, 4, Logit()).double()])
def test_dequantize_keeps_the_laws_that_noise_leaves(flow, training):
    layer = Dequantize(flow=flow).train(training)
    inversecheck(layer, whole(dtype=torch.float64), laws=LAWS)


@pytest.mark.parametrize("layer", [Augment(channels=3), Augment(Gaussian(4, 2).double())], ids=repr)
def test_augment_keeps_the_laws_that_noise_leaves(layer):
    inversecheck(layer, images(), laws=[*LAWS, "differentiable", "derivative"])


def dequantizing_network():
    f = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 1))
    squash = InvertibleSequential(Logit(), Scale(4))
    return InvertibleSequential(
        Dequantize(flow=Gaussian(4, 4, squash)), Logit(), Split(), AffineCoupling(f), Merge()
    ).double()


def augmenting_network():
    def coupling():
        return AffineCoupling(nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Tanh()))

    return InvertibleSequential(
        Scale(4), Augment(Gaussian(4, 4)), coupling(), Swap(), coupling()
    ).double()


@pytest.mark.parametrize("log_det", [True, False])
@pytest.mark.parametrize(
    ("make", "x"),
    [
        (dequantizing_network, whole(dtype=torch.float64)),
        (augmenting_network, images()),
    ],
)
def test_gradients_are_those_of_stored_activations(make, x, log_det):
    def loss(network):
        if not log_det:
            y, term = network(x), torch.zeros(1)
        else:
            y, term = network.forward_and_log_det(x)
        parts = y if isinstance(y, tuple) else (y,)
        return sum((part.sin() * part).sum() for part in parts) + term.square().sum()

    networks = both(make)
    assert_same_gradients(networks, loss)
    networks[1].checkpoint = Rebuild(anchor_every=2)
    assert_same_gradients(networks, loss)


def test_the_input_gets_the_gradients_of_noise_that_depends_on_it():
    x = images()
    results = []
    for network in both(augmenting_network):
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        y, term = network.forward_and_log_det(leaf)
        (y[0].sin().sum() + y[1].square().sum() + term.sum()).backward()
        results.append((leaf.grad, torch.rand(2)))
    torch.testing.assert_close(results[1], results[0])


def test_images_are_stored_as_they_came():
    x = whole(8, 2, 32, 32)

    def held(checkpoint):
        couplings = [AffineCoupling(nn.Conv2d(1, 2, 1)), Swap()]
        network = InvertibleSequential(
            Dequantize(), Split(), *(8 * couplings), Merge(), checkpoint=checkpoint
        )
        return memory_of(lambda: network.forward_and_log_det(x)).held / (4 * x.numel())

    assert held(True) < 1.5  # the output
    assert held(False) > 5


def test_a_rounding_error_leads_to_no_other_whole_number():
    def make():
        flow = Gaussian(4, 4, Logit())
        nn.init.constant_(flow.f.bias[:4], -12.0)
        couplings = [AffineCoupling(nn.Conv2d(2, 4, 1)), Swap()]
        return InvertibleSequential(Dequantize(flow=flow), Split(), *(4 * couplings), Merge())

    x = whole(32, 4, 8, 8)
    assert_same_gradients(both(make), lambda network: network(x).square().sum(), 1e-3)


# --- what is refused


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda: Dequantize(1), ValueError,
         "Dequantize takes a whole number of levels, from 2 to 65536, got 1."),
        (lambda: Dequantize(256.0), ValueError, "from 2 to 65536, got 256.0."),
        (lambda: Dequantize(flow=nn.ReLU()), TypeError,
         "Dequantize takes a conditional Flow, got a ReLU."),
        (lambda: Augment(Logit()), TypeError, "Augment takes a conditional Flow, got a Logit."),
        (lambda: Dequantize()(torch.rand(2, 3)), ValueError,
         "Dequantize takes whole numbers from 0 to 255, got 0."),
        (lambda: Dequantize()(torch.full((2, 3), 0.5)), ValueError,
         "Dequantize takes whole numbers from 0 to 255, got 0.5 among them. Give images as they "
         "are stored, not scaled to 1, and as many levels as there are."),
        (lambda: Dequantize(16)(whole() // 16 * 16), ValueError, "from 0 to 15, got "),
        (lambda: Dequantize()(torch.tensor([[-1, 3]])), ValueError, "got -1 among them."),
        (lambda: Dequantize()(torch.tensor([[float("nan")]])), ValueError, "got nan among them."),
        (lambda: Dequantize()(whole(dtype=torch.bfloat16)), TypeError,
         "Dequantize takes whole numbers, as integers or in float32 or float64, in which there is "
         "room for noise between whole numbers, got torch.bfloat16."),
        (lambda: Dequantize().inverse(whole()), TypeError,
         "Dequantize's inverse takes numbers in float32 or float64, in which there is room for"),
        (lambda: Dequantize()(whole() > 3), TypeError, "got torch.bool."),
        (lambda: Dequantize()((whole(), whole())), TypeError, "Dequantize takes a tensor, got a t"),
        (lambda: Dequantize(flow=Gaussian(4, 4))(whole()), ValueError,
         "Dequantize's flow must return noise between 0 and 1, got "),
        (lambda: Dequantize(flow=Gaussian(4, 3, Logit()))(whole()), ValueError,
         "Dequantize's flow must return noise of the data's shape (3, 4, 2, 2), got a tensor of "
         "shape (3, 3, 2, 2)."),
        (lambda: Dequantize().forward_and_log_det(whole(), 1), TypeError, "got a context"),
        (lambda: Augment(), ValueError,
         "Augment takes either channels, for standard normals, or a flow of the noise; got "
         "flow=None and channels=None."),
        (lambda: Augment(Gaussian(1, 1), channels=2), ValueError, "and channels=2."),
        (lambda: Augment(channels=0), ValueError, "Augment takes channels of at least 1, got 0."),
        (lambda: Augment(channels=1, dim=0), ValueError, "Augment cannot take dim=0, the batch"),
        (lambda: Augment(channels=1)(whole()), TypeError, "takes floating-point numbers, got"),
        (lambda: Augment(channels=1).inverse(images()), TypeError,
         "Augment's inverse takes a pair of tensors"),
    ],
)  # fmt: skip
def test_a_mistake_is_told(run, error, message):
    with pytest.raises(error, match=re.escape(message)):
        run()


def test_wrong_numbers_become_nan_where_nothing_can_be_raised():
    x = torch.tensor([[3.0, 0.5], [1.0, 2.0]])
    y = torch.func.vmap(Dequantize(), randomness="different")(x)
    assert y.isnan().tolist() == [[False, True], [False, False]]


@copied_in_both_ways
def test_copies_carry_the_levels_and_the_flow(again):
    layer = again(Dequantize(8, Gaussian(4, 4, Logit())))
    assert layer.levels == 8
    assert list(layer.state_dict()) == ["flow.f.weight", "flow.f.bias"]
    layer(whole(levels=8))
