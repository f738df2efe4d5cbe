"""``Flow``: densities and samples of data that a layer maps to latents."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.distributions import (
    Categorical,
    ContinuousBernoulli,
    Distribution,
    Exponential,
    Independent,
    Laplace,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    Uniform,
)
from toys import memory_of

from invertible import (
    ActNorm,
    AffineCoupling,
    Augment,
    Elementwise,
    FactorOut,
    Flow,
    FlowDistribution,
    Identity,
    InjectivePad,
    InvertibleLinear,
    InvertibleSequential,
    Masked,
    Merge,
    OnStreams,
    Quantize,
    RationalQuadraticSpline,
    Scale,
    Split,
    Swap,
)


class Conditioner(nn.Module):
    """From half of the features, and a context, to shifts and scales."""

    def __init__(self, half, context=0):
        super().__init__()
        self.first, self.last = nn.Linear(half + context, 16), nn.Linear(16, 2 * half)

    def forward(self, x, context=None):
        x = x if context is None else torch.cat([x, context], 1)
        return self.last(self.first(x).tanh())


def couplings(features=4, depth=4, context=0, **options):
    layers = [Split()]
    for _ in range(depth):
        f = Conditioner(features // 2, context)
        layers += [AffineCoupling(f, conditional=context > 0), Swap()]
    return InvertibleSequential(*layers, Merge(), **options)


def conditional(**options):
    torch.manual_seed(0)
    return Flow(couplings(context=3, **options), event_shape=(4,))


# --- densities and samples agree


def test_log_prob_is_the_base_and_the_log_determinant():
    torch.manual_seed(0)
    layer = couplings()
    x = torch.randn(7, 4)
    z, log_det = layer.forward_and_log_det(x)
    expected = Normal(0.0, 1.0).log_prob(z).sum(1) + log_det
    torch.testing.assert_close(Flow(layer).log_prob(x), expected)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,)])
def test_samples_have_the_density_that_comes_with_them(shape):
    torch.manual_seed(0)
    flow = Flow(couplings(), event_shape=(4,))
    x, log_prob = flow.rsample_and_log_prob(shape)
    assert x.shape == (*shape, 4)
    assert log_prob.shape == shape
    torch.testing.assert_close(flow.log_prob(x.reshape(-1, 4)).reshape(shape), log_prob)
    assert flow.sample(shape).shape == x.shape


def test_a_density_of_one_dimension_integrates_to_one():
    torch.manual_seed(0)
    layer = InvertibleSequential(
        Scale(1), Elementwise(RationalQuadraticSpline(), channels=1), Scale(1)
    )
    flow = Flow(layer)
    x = torch.linspace(-30, 30, 20_001)[:, None]
    total = torch.trapezoid(flow.log_prob(x).exp(), x[:, 0])
    torch.testing.assert_close(total, torch.tensor(1.0), rtol=0, atol=1e-3)


def test_a_density_of_two_dimensions_integrates_to_one():
    torch.manual_seed(0)
    flow = Flow(couplings(2, depth=4), event_shape=(2,))
    axis = torch.linspace(-12, 12, 601)
    x = torch.cartesian_prod(axis, axis)
    total = flow.log_prob(x).exp().sum() * (axis[1] - axis[0]) ** 2
    torch.testing.assert_close(total, torch.tensor(1.0), rtol=0, atol=1e-3)


def test_samples_are_distributed_as_their_density_says():
    torch.manual_seed(0)
    flow = Flow(couplings(2), event_shape=(2,))
    x = flow.sample((20_000,))
    axis = torch.linspace(-12, 12, 601)
    grid = torch.cartesian_prod(axis, axis)
    weight = flow.log_prob(grid).softmax(0)[:, None]
    mean = (weight * grid).sum(0)
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.05)
    deviation = (weight * (grid - mean).square()).sum(0).sqrt()
    torch.testing.assert_close(x.std(0), deviation, rtol=0.05, atol=0)


def test_bits_per_dimension_by_hand():
    # A standard normal has log2(2 pi e) / 2 bits for the deviation of 1 that x = 1 is off.
    flow, x = Flow(Identity(), event_shape=(2, 3)), torch.ones(5, 2, 3)
    bits = 0.5 * math.log2(2 * math.pi * math.e)
    torch.testing.assert_close(flow.bits_per_dim(x), torch.full((5,), bits))
    # Twice the scale is a bit less.
    double = Scale(2)
    nn.init.constant_(double.log_scale, math.log(2))
    found = Flow(double).bits_per_dim(x / 2)
    torch.testing.assert_close(found, torch.full((5,), bits - 1))


def test_samples_are_seeded_by_torch():
    flow = Flow(couplings(), event_shape=(4,))
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(flow.sample((2,)))
    assert torch.equal(*found)


def test_half_precision_is_not_lost_in_the_sum():
    x = torch.randn(6, 512).bfloat16()
    found, expected = Flow(Identity()).bfloat16().log_prob(x), Flow(Identity()).log_prob(x.float())
    torch.testing.assert_close(found, expected)
    base = Independent(Normal(torch.zeros(512), torch.ones(512)), 1)
    torch.testing.assert_close(Flow(Identity(), base).bfloat16().log_prob(x), expected)


# --- training, in both directions


@pytest.mark.parametrize("way", ["likelihood", "reverse"])
def test_it_trains_as_with_stored_activations(way):
    def gradients(checkpoint):
        torch.manual_seed(0)
        flow = Flow(couplings(checkpoint=checkpoint), event_shape=(4,)).double()
        if way == "likelihood":
            loss = -flow.log_prob(torch.randn(6, 4, dtype=torch.float64)).mean()
        else:
            x, log_prob = flow.rsample_and_log_prob((6,))
            loss = (log_prob + x.square().sum(1)).mean()
        loss.backward()
        return [p.grad for p in flow.parameters()]

    torch.testing.assert_close(gradients(True), gradients(False))


@pytest.mark.parametrize("way", ["likelihood", "reverse", "rsample"])
def test_memory_is_flat_in_depth(way):
    def held(depth, checkpoint):
        flow, x = Flow(couplings(depth=depth, checkpoint=checkpoint), event_shape=(4,)), data
        run = {
            "likelihood": lambda: flow.log_prob(x),
            "reverse": lambda: flow.rsample_and_log_prob((len(x),)),
            "rsample": lambda: flow().rsample((len(x),)),
        }[way]
        run()  # finds the shapes
        return memory_of(run).held / x.nbytes

    torch.manual_seed(0)
    data = torch.randn(4096, 4)
    assert held(16, True) < held(2, True) + 1
    assert held(16, False) > 5 * held(2, False)


def test_reverse_kl_finds_a_shifted_normal():
    torch.manual_seed(0)
    target = Independent(Normal(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 2.0])), 1)
    flow = Flow(ActNorm(2, initialised=True), event_shape=(2,))
    optimizer = torch.optim.Adam(flow.parameters(), 0.05)
    for _ in range(300):
        x, log_prob = flow.rsample_and_log_prob((64,))
        loss = (log_prob - target.log_prob(x)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert abs(loss) < 0.02


# --- bases


def test_a_distribution_moves_with_the_flow_and_is_saved():
    base = Independent(Normal(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 3.0])), 1)
    flow = Flow(Identity(), base)
    x = torch.randn(4, 2)
    torch.testing.assert_close(flow.log_prob(x), base.log_prob(x))
    assert flow.double().sample().dtype == torch.float64
    assert len(flow.state_dict()) == 2
    assert not list(flow.parameters())
    for twin in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        torch.testing.assert_close(twin.log_prob(x.double()), flow.log_prob(x.double()))
    assert flow.to("meta").sample((3,)).device.type == "meta"


def test_a_distribution_that_was_given_is_no_part_of_the_flow():
    given = Normal(torch.zeros(3), 1.0)  # whose scale torch expands
    first, second = Flow(Identity(), given), Flow(Identity(), given)
    shifted = {name: value + 1 for name, value in first.state_dict().items()}
    first.load_state_dict(shifted)
    x = torch.randn(4, 3)
    torch.testing.assert_close(first.log_prob(x), Normal(1.0, 2.0).log_prob(x).sum(1))
    torch.testing.assert_close(second.log_prob(x), given.log_prob(x).sum(1))


def test_what_a_base_derived_from_its_tensors_follows_them():
    few, many = ContinuousBernoulli(torch.full((3,), 0.2)), ContinuousBernoulli(torch.tensor(0.7))
    flow, x = Flow(Identity(), few), torch.rand(4, 3)
    torch.testing.assert_close(flow.log_prob(x), few.log_prob(x).sum(1))
    flow.load_state_dict({name: torch.full((3,), 0.7) for name in flow.state_dict()})
    torch.testing.assert_close(flow.log_prob(x), many.log_prob(x).sum(1))


@pytest.mark.parametrize(
    "base",
    [
        Normal(torch.zeros(3), torch.ones(3)),
        Independent(Laplace(torch.zeros(3), torch.ones(3)), 1),
        MultivariateNormal(torch.zeros(3), 2 * torch.eye(3)),
        MixtureSameFamily(
            Categorical(torch.ones(2)), Independent(Normal(torch.randn(2, 3), torch.ones(2, 3)), 1)
        ),
        Uniform(-10 * torch.ones(3), 10 * torch.ones(3)),
    ],
    ids=lambda base: type(base).__name__,
)
def test_bases_of_torch(base):
    flow, x = Flow(Identity(), base), torch.randn(5, 3)
    expected = base.log_prob(x)
    torch.testing.assert_close(
        flow.log_prob(x), expected.sum(1) if expected.dim() > 1 else expected
    )
    assert flow.sample((2, 4)).shape == (2, 4, 3)
    assert flow.event_shape == (3,)
    assert flow.double().log_prob(x.double()).dtype == torch.float64


class Learned(nn.Module):
    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.ones(4))

    def forward(self):
        return Independent(Normal(self.loc, 1.0), 1)


class Given(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, context):
        return Normal(self.linear(context), 1.0)


def test_a_base_may_be_learned():
    flow = Flow(couplings(), Learned())
    flow.log_prob(torch.randn(5, 4)).sum().backward()
    assert flow.bases[0].module.loc.grad is not None
    assert flow.sample((3,)).shape == (3, 4)


def test_a_base_may_be_conditional():
    torch.manual_seed(0)
    flow = Flow(couplings(), Given(), event_shape=(4,))
    context = torch.randn(5, 3)
    x, log_prob = flow.rsample_and_log_prob((2,), context)
    assert x.shape == (2, 5, 4)
    torch.testing.assert_close(flow(context).log_prob(x), log_prob)
    for call in (flow, flow.sample, lambda: flow.log_prob(x[0])):
        with pytest.raises(TypeError, match="is conditional and got no context"):
            call()


def test_a_flow_may_be_a_base():
    torch.manual_seed(0)
    first, second = couplings(), couplings()
    nested = Flow(first, Flow(second, event_shape=(4,)))
    whole = Flow(InvertibleSequential(first, second), event_shape=(4,))
    x = torch.randn(5, 4)
    torch.testing.assert_close(nested.log_prob(x), whole.log_prob(x))
    assert nested.sample((2,)).shape == (2, 4)


def test_one_base_for_each_stream():
    first, second = Normal(torch.zeros(2), 1.0), Normal(torch.ones(2), 2.0)
    flow = Flow(Split(), [first, second])
    x = torch.randn(5, 4)
    expected = first.log_prob(x[:, :2]).sum(1) + second.log_prob(x[:, 2:]).sum(1)
    torch.testing.assert_close(flow.log_prob(x), expected)
    assert flow.sample((3,)).shape == (3, 4)
    assert flow.event_shape == (4,)


def test_standard_normals_for_any_streams_of_any_shape():
    layer = InvertibleSequential(FactorOut(), OnStreams(0, InvertibleLinear(2)), FactorOut())
    flow = Flow(layer, event_shape=(4, 3, 3)).double()
    assert flow.sample((2,)).shape == (2, 4, 3, 3)
    assert flow.sample((2,)).dtype == torch.float64
    assert flow.log_prob(torch.randn(5, 4, 3, 3)).shape == (5,)


def test_samples_are_of_the_layers_dtype_from_the_start():
    assert Flow(couplings().double(), event_shape=(4,)).sample().dtype == torch.float64


def test_finding_shapes_initialises_nothing_and_draws_nothing():
    norm = ActNorm(4)
    flow = Flow(InvertibleSequential(norm, InvertibleLinear(4)), event_shape=(4,))
    with pytest.raises(RuntimeError, match="ActNorm begins with the statistics of a first batch"):
        flow.sample()
    assert not norm.initialised
    flow.log_prob(torch.randn(8, 4))
    assert flow.sample((2,)).shape == (2, 4)


# --- contexts


def test_one_context_for_many_examples():
    flow, x, context = conditional(), torch.randn(6, 4), torch.randn(1, 3)
    torch.testing.assert_close(flow.log_prob(x, context), flow.log_prob(x, context.expand(6, 3)))
    torch.testing.assert_close(flow(context).log_prob(x), flow.log_prob(x, context))


def test_samples_are_drawn_for_each_example_of_the_context():
    flow, context = conditional(), torch.randn(3, 3)
    torch.manual_seed(1)
    x = flow.sample((2,), context)
    assert x.shape == (2, 3, 4)
    torch.manual_seed(1)
    z = torch.randn(6, 4)
    expected = flow.layer.inverse(z, context.repeat(2, 1)).reshape(2, 3, 4)
    torch.testing.assert_close(x, expected)
    assert flow.sample((), context).shape == (3, 4)


def test_a_context_may_be_a_dict():
    class FromDict(Conditioner):
        def forward(self, x, context):
            return super().forward(x, context["features"] * context["scale"])

    layer = InvertibleSequential(Split(), AffineCoupling(FromDict(2, 3), conditional=True), Merge())
    flow = Flow(layer, event_shape=(4,))
    context = {"features": torch.randn(1, 3), "scale": torch.tensor(2.0)}
    assert flow.log_prob(torch.randn(5, 4), context).shape == (5,)
    assert flow.sample((2,), context).shape == (2, 1, 4)


def test_a_context_without_tensors_is_for_all():
    class Power(nn.Module):
        def forward(self, x, context):
            return torch.cat([x**context.degree, x], 1)

    class Task:
        degree = 2

    layer = InvertibleSequential(Split(), AffineCoupling(Power(), conditional=True), Merge())
    assert Flow(layer, event_shape=(4,)).sample((2,), Task()).shape == (2, 4)


def test_contexts_that_do_not_fit_are_errors():
    flow, x = conditional(), torch.randn(6, 4)
    with pytest.raises(TypeError, match=r"this Flow got a context \(a tensor of shape \(6, 3\)\)"):
        Flow(couplings()).log_prob(x, torch.randn(6, 3))
    with pytest.raises(ValueError, match="a context of 5 examples, and 6 examples of data"):
        flow.log_prob(x, torch.randn(5, 3))
    with pytest.raises(ValueError, match="got 5 and 6 entries"):
        flow.sample((), [torch.randn(5, 3), torch.randn(6, 3)])


# --- the distribution


def test_called_it_is_a_distribution():
    flow = Flow(couplings(), event_shape=(4,))
    found = flow()
    assert isinstance(found, FlowDistribution)
    assert isinstance(found, Distribution)
    assert found.batch_shape == ()
    assert found.event_shape == (4,)
    assert found.has_rsample
    assert found.support.event_dim == 1
    assert repr(found) == "FlowDistribution(batch (), event (4,))"
    assert found.sample((2, 3)).shape == (2, 3, 4)
    assert found.rsample((2,)).requires_grad
    assert found.log_prob(torch.randn(2, 3, 4)).shape == (2, 3)
    assert found.log_prob(torch.randn(4)).shape == ()
    with pytest.raises(ValueError, match=r"takes values of shape \(\*, 4\), got a tensor"):
        found.log_prob(torch.randn(2, 3))


def test_given_a_context_it_has_its_batch():
    found = conditional()(torch.randn(3, 3))
    assert found.batch_shape == (3,)
    assert found.log_prob(torch.randn(2, 3, 4)).shape == (2, 3)
    assert found.log_prob(torch.randn(3, 4)).shape == (3,)
    with pytest.raises(ValueError, match=r"takes values of shape \(\*, 3, 4\)"):
        found.log_prob(torch.randn(2, 4))


def test_values_are_broadcast_with_contexts():
    flow, contexts = conditional(), torch.randn(3, 3)
    found, x = flow(contexts), torch.randn(5, 1, 4)
    expected = flow.log_prob(x.expand(5, 3, 4).reshape(15, 4), contexts.repeat(5, 1))
    torch.testing.assert_close(found.log_prob(x), expected.reshape(5, 3))
    torch.testing.assert_close(found.log_prob(x[0, 0]), expected[:3])
    assert flow(contexts[:1]).log_prob(x[0, 0]).shape == (1,)
    mixture = MixtureSameFamily(Categorical(torch.ones(3)), found)
    torch.testing.assert_close(
        mixture.log_prob(x[:, 0]), expected.reshape(5, 3).logsumexp(1) - math.log(3)
    )


def test_the_event_is_found_from_the_base():
    assert Flow(couplings(), Normal(torch.zeros(4), 1.0))().event_shape == (4,)
    with pytest.raises(ValueError, match="called for a distribution if it knows the shape"):
        Flow(couplings())()


def test_data_of_several_streams_are_no_distribution():
    flow = Flow(Swap(), event_shape=((2,), (3,)))
    x, log_prob = flow.rsample_and_log_prob((5,))
    torch.testing.assert_close(flow.log_prob(x), log_prob)
    assert [part.shape for part in flow.sample()] == [(2,), (3,)]
    with pytest.raises(TypeError, match="data have 2 streams"):
        flow()


# --- temperature


def test_temperature_scales_the_deviation():
    flow = Flow(Identity(), event_shape=(3,))
    torch.manual_seed(0)
    hot = flow.sample((4,))
    torch.manual_seed(0)
    torch.testing.assert_close(flow.sample((4,), temperature=0.5), 0.5 * hot)
    around = Flow(Identity(), MultivariateNormal(torch.ones(3), torch.eye(3)))
    torch.testing.assert_close(around.sample((2,), temperature=0), torch.ones(2, 3))


def test_no_temperature_of_what_is_not_normal():
    flow = Flow(Identity(), Laplace(torch.zeros(3), 1.0))
    with pytest.raises(TypeError, match="for normal distributions, and Flow's base is of Laplace"):
        flow.sample(temperature=0.5)
    with pytest.raises(ValueError, match="a finite temperature, at least 0, got -1"):
        flow.sample(temperature=-1)
    with pytest.raises(ValueError, match="a finite temperature, at least 0, got inf"):
        flow.sample(temperature=math.inf)


# --- errors


@pytest.mark.parametrize(
    ("base", "error", "message"),
    [
        (3, TypeError, "Flow takes as base a torch.distributions.Distribution, .* got an int"),
        ([Normal(0.0, 1.0), "x"], TypeError, "Flow takes as base .* got a str"),
        ([], TypeError, "Flow takes as base .* got a list of 0"),
        (Normal, TypeError, "the class Normal, not an instance"),
        (Normal(nn.Parameter(torch.zeros(4)), 1.0), ValueError, "tensors that require grad"),
        (Flow(Identity(), event_shape=(4,))(), ValueError, "with a module in it"),
    ],
)
def test_what_is_no_base_is_an_error(base, error, message):
    with pytest.raises(error, match=message):
        Flow(couplings(), base)


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        (nn.Linear(2, 2), TypeError, "takes a layer of this library, got a Linear"),
        (InvertibleSequential(InjectivePad(1)), ValueError, "InjectivePad has no log-determinant"),
        (InvertibleSequential(Quantize(1.0)), ValueError, "Quantize is not injective"),
    ],
)
def test_what_has_no_density_is_an_error(layer, error, message):
    with pytest.raises(error, match=message):
        Flow(layer)


def test_standard_normals_would_count_padding():
    with pytest.raises(ValueError, match="standard normals would count the padding"):
        Flow(InvertibleSequential(Masked(Scale(4))), event_shape=(4, 5))


def test_a_module_that_returns_no_distribution_is_an_error():
    with pytest.raises(TypeError, match=r"Flow's base \(Identity\) must return a torch.distrib"):
        Flow(couplings(context=3), nn.Identity()).log_prob(torch.randn(2, 4), torch.randn(2, 3))


def test_a_conditional_base_without_a_batch_is_an_error():
    class Forgets(nn.Module):
        def forward(self, _):
            return Normal(torch.zeros(4), 1.0)

    flow = Flow(couplings(), Forgets(), event_shape=(4,))
    with pytest.raises(ValueError, match="for each of the 6 examples of its context"):
        flow.sample((2,), torch.randn(3, 3))
    with pytest.raises(ValueError, match="of latents of shape"):
        flow.log_prob(torch.randn(3, 4), torch.randn(3, 3))


def test_shapes_that_do_not_fit_are_errors():
    with pytest.raises(ValueError, match=r"data of its event_shape behind a batch, \(N, 4,\)"):
        Flow(couplings(), event_shape=(4,)).log_prob(torch.randn(4))
    with pytest.raises(ValueError, match=r"latents of shape \(3,\), and the layer made"):
        Flow(couplings(), Normal(torch.zeros(3), 1.0)).log_prob(torch.randn(5, 4))
    with pytest.raises(ValueError, match="made latents of 2 streams, and its base is for 1"):
        Flow(Split(), Normal(torch.zeros(4), 1.0)).log_prob(torch.randn(5, 4))
    with pytest.raises(ValueError, match="knows the shape of data"):
        Flow(couplings()).sample()
    with pytest.raises(ValueError, match=r"made examples of shape \(3,\) of its latents"):
        Flow(Identity(), Normal(torch.zeros(3), 1.0), event_shape=(4,)).sample()


@pytest.mark.parametrize("shape", [(-4,), (4.0,), 4, "4", (2, (3,))])
def test_what_is_no_shape_is_an_error(shape):
    with pytest.raises(TypeError, match="Flow takes as event_shape the shape of one example"):
        Flow(couplings(), event_shape=shape)


def test_a_number_of_samples_is_no_shape():
    with pytest.raises(TypeError, match=r"the shape of samples as a tuple, \(5,\), got 5"):
        Flow(couplings(), event_shape=(4,)).sample(5)


def test_a_base_without_gradients_says_so():
    base = MixtureSameFamily(Categorical(torch.ones(2)), Normal(torch.randn(2), torch.ones(2)))
    flow = Flow(Identity(), base.expand((3,)))
    assert not flow().has_rsample
    with pytest.raises(NotImplementedError, match="MixtureSameFamily, can't be sampled"):
        flow.rsample_and_log_prob()
    assert Flow(Identity(), Exponential(torch.ones(2)))().has_rsample
    assert not Flow(Augment(channels=2), event_shape=(4,))().has_rsample


def test_an_event_shape_that_does_not_fit_is_named():
    with pytest.raises(RuntimeError) as caught:
        Flow(couplings(), event_shape=(6,)).sample()
    assert "While the shape (6,) was followed through a flow." in caught.value.__notes__


# --- numerics


def test_32_couplings_with_weights_times_3_stay_finite_or_say_where():
    torch.manual_seed(0)
    layer = couplings(depth=32)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(3)
    flow, x = Flow(layer, event_shape=(4,)), torch.randn(64, 4)
    assert flow.log_prob(x).isfinite().all()
    assert flow.sample((64,)).isfinite().all()


@pytest.mark.slow
def test_log_prob_compiles_into_one_graph():
    flow = Flow(couplings(), event_shape=(4,))
    x = torch.randn(5, 4)
    compiled = torch.compile(flow.log_prob, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), flow.log_prob(x))
