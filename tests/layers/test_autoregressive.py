"""Autoregressive layers: who sees what, what each direction costs, how they are rebuilt."""

import copy
import itertools
import math
import re

import pytest
import torch
from torch import nn
from toys import Counting, Function, assert_same_gradients, both, evaluations, images, memory_of

from invertible import (
    MADE,
    ActNorm,
    Affine,
    CausalTransformer,
    Flatten,
    Inverse,
    InvertibleLinear,
    InvertibleSequential,
    MaskedAutoregressive,
    Permute,
    RationalQuadraticSpline,
    RebuildError,
    Reshape,
    ScaledShift,
    Shift,
)
from invertible.testing import InversecheckError, inversecheck

WAYS = ["forward", "inverse", "forward_and_log_det", "inverse_and_log_det"]
all_four_ways = pytest.mark.parametrize("way", WAYS)


def drawn(f, std=0.4):
    """A sub-network that does something from the beginning."""
    for parameter in f.parameters():
        nn.init.normal_(parameter, std=std)
    return f.double()


def made(channels=4, bijection=None, order="natural", context=None, **options):
    bijection = bijection or Affine()
    f = drawn(MADE(channels, bijection.parameters_per_value, (9,), context=context, **options))
    return MaskedAutoregressive(
        Counting(f), bijection, order=order, conditional=context is not None
    ).double()


def transformed(order="natural", tokens=5, **options):
    f = drawn(CausalTransformer(3, 2, tokens, width=8, depth=2, heads=2, **options))
    conditional = bool(options.get("context"))
    return MaskedAutoregressive(Counting(f), Affine(), order=order, conditional=conditional)


class Leaks(nn.Module):
    """A causal sub-network that also sees the value itself, or only the one after it."""

    def __init__(self, offset):
        super().__init__()
        self.offset = offset

    def forward(self, x):
        seen = x.cumsum(1) - x + 0.1 * x.roll(-self.offset, 1)
        return torch.cat([seen, seen.tanh()], 1)


@pytest.mark.parametrize("context", [None, 2])
@pytest.mark.parametrize("hidden", [(16,), (5, 7), (16, 16, 16), (2,)])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_made_sees_the_values_before_and_no_others(channels, hidden, context):
    f = drawn(MADE(channels, 3, hidden, context=context, activation=nn.Tanh))
    x = images(1, channels)
    given = (x,) if context is None else (x, images(1, 2))
    jacobian = torch.autograd.functional.jacobian(f, given)[0].view(3, channels, channels)
    assert torch.equal(jacobian, jacobian.tril(-1))
    if min(hidden) >= channels:
        assert (jacobian != 0).sum() == 3 * channels * (channels - 1) / 2
    if context:
        of_context = torch.autograd.functional.jacobian(f, given)[1]
        assert (of_context != 0).all()


def test_a_transformer_sees_the_tokens_before_and_no_others():
    f = drawn(CausalTransformer(3, 2, 6, width=8, heads=2, context=2))
    x, context = images(1, 5, 3), images(1, 2)
    seen, of_context = torch.autograd.functional.jacobian(f, (x, context))
    seen = seen[0, :, :, 0].abs().amax((1, 3))  # by token, of token
    assert torch.equal(seen != 0, torch.ones(5, 5).tril(-1).bool())
    assert (of_context != 0).any(-1).all()


@pytest.mark.parametrize("f", [MADE(4, 2), CausalTransformer(3, 2, 5)])
def test_what_is_ready_made_begins_as_the_identity(f):
    x = torch.randn(2, 4) if isinstance(f, MADE) else torch.randn(2, 5, 3)
    y, log_det = MaskedAutoregressive(f, Affine()).forward_and_log_det(x)
    assert torch.equal(y, x)
    assert not log_det.any()


@pytest.mark.parametrize("order", ["natural", "reversed", [2, 0, 3, 1]], ids=str)
@pytest.mark.parametrize("context", [None, 2])
@pytest.mark.parametrize("bijection", [Affine(), RationalQuadraticSpline(4), Shift()], ids=str)
def test_vectors_keep_the_laws_in_any_order(bijection, context, order):
    layer = made(4, bijection, order, context, activation=nn.Tanh)
    inversecheck(layer, images(3, 4), None if context is None else images(3, 2))


@pytest.mark.parametrize("order", ["natural", "reversed", [2, 0, 4, 3, 1]], ids=str)
def test_tokens_keep_the_laws_in_any_order(order):
    inversecheck(transformed(order, context=2), images(3, 5, 3), images(3, 2))


@pytest.mark.parametrize("make", [made, transformed])
def test_an_order_is_a_permutation_before_and_its_inverse_behind(make):
    count = 4 if make is made else 5
    x = images(2, 4) if make is made else images(2, 5, 3)
    order = torch.randperm(count).tolist()
    layer = make(order=order)
    y, log_det = layer.forward_and_log_det(x)
    natural = MaskedAutoregressive(layer.f, layer.map)
    turn = Permute(order)
    expected, expected_log_det = natural.forward_and_log_det(turn(x))
    torch.testing.assert_close(y, turn.inverse(expected))
    torch.testing.assert_close(log_det, expected_log_det)
    backwards = MaskedAutoregressive(layer.f, layer.map, order=list(range(count))[::-1])
    reverse = MaskedAutoregressive(layer.f, layer.map, order="reversed")
    assert torch.equal(backwards(x), reverse(x))


def test_an_order_is_saved_with_the_network():
    layer = made(order=[2, 0, 3, 1])
    other = made(order=[0, 1, 2, 3])
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(images(2, 4)), layer(images(2, 4)))


def test_what_a_map_has_for_each_channel_stays_with_the_channel():
    factors = [0.5, 1.0, 2.0, 4.0]
    layer = MaskedAutoregressive(MADE(4, 1), ScaledShift(factors), order=[3, 1, 0, 2])
    y = layer(torch.ones(1, 4))
    assert y.tolist() == [factors]
    assert layer.inverse(y).tolist() == [[1.0] * 4]


def test_the_sequential_direction_maps_a_value_at_a_time():
    sizes = []

    class Watched(Affine):
        def inverse_and_log_det(self, y, parameters):
            sizes.append((y.shape, parameters.shape))
            return super().inverse_and_log_det(y, parameters)

    made(order=[2, 0, 3, 1], bijection=Watched()).inverse(images(3, 4))
    assert sizes == [((3, 1), (2, 3, 1))] * 3 + [((3, 4), (2, 3, 4))]


@pytest.mark.parametrize(
    ("make", "x", "steps"), [(made, images(2, 4), 4), (transformed, images(2, 5, 3), 5)]
)
def test_one_direction_is_parallel_and_inverse_swaps_them(make, x, steps):
    layer = make()
    layer.forward_and_log_det(x)
    assert evaluations(layer) == [1]
    layer.inverse_and_log_det(x)
    assert evaluations(layer) == [1 + steps]
    Inverse(layer).inverse_and_log_det(x)
    assert evaluations(layer) == [2 + steps]


def stack(make, turned):
    """Two layers in different orders; the inverse is parallel if they are turned."""
    layers = [make(order="natural"), make(order="reversed")]
    return InvertibleSequential(*map(Inverse, layers) if turned else layers).double()


@all_four_ways
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("kind", ["made", "made with dropout", "transformer"])
def test_gradients_are_those_of_stored_activations(kind, turned, way):
    def make(order):
        if kind == "transformer":
            return transformed(order)
        layer = made(order=order, context=2)
        if kind == "made with dropout":
            layer.f.f.activations[0] = nn.Sequential(nn.Tanh(), nn.Dropout(0.3))
        return layer

    networks = both(lambda: stack(make, turned))
    x = (images(3, 5, 3) if kind == "transformer" else images(3, 4)).requires_grad_()
    context = [] if kind == "transformer" else [images(3, 2).requires_grad_()]

    def loss(network):
        results = getattr(network, way)(x, *context)
        y, log_det = results if "log_det" in way else (results, torch.zeros(()))
        return (y.sin() * y).sum() + log_det.square().sum()

    assert_same_gradients(networks, loss)
    once = 1 if turned is ("inverse" in way) else x.shape[1]
    assert evaluations(networks[0]) == [once, once]
    assert evaluations(networks[1]) == [2 * once, 2 * once]


def test_dropout_draws_one_mask_for_all_evaluations_of_an_inverse():
    layer = made(8)
    layer.f.f.activations[0] = nn.Dropout(0.5)
    before = torch.get_rng_state()
    x = images(3, 8)
    y = layer(x)
    torch.set_rng_state(before)
    torch.testing.assert_close(layer.inverse(y), x)
    assert torch.equal(torch.get_rng_state(), before)


def test_held_memory_grows_by_one_state_a_layer():
    x = torch.randn(64, 32, requires_grad=True)

    def held(depth):
        layers = [MaskedAutoregressive(MADE(32, 2), Affine()) for _ in range(depth)]
        network = InvertibleSequential(*layers, checkpoint=True)
        return memory_of(lambda: network.forward_and_log_det(x)).held

    state = 4 * x.numel()
    assert held(8) - held(2) < 6 * (state + 4_000)


def test_a_second_run_that_computes_something_else_is_an_error():
    counter = itertools.count(1)
    f = Function(lambda x: next(counter) * (x.cumsum(1) - x).sin())
    layer = MaskedAutoregressive(f, Shift())
    network = InvertibleSequential(Inverse(Permute([1, 0])), layer, checkpoint=True)
    y = network(images(3, 2).requires_grad_())
    with pytest.raises(RebuildError, match="MaskedAutoregressive"):
        y.square().sum().backward()


@pytest.mark.parametrize("f", [nn.Linear(4, 8), Leaks(0), Leaks(1)], ids=["all", "own", "next"])
def test_a_sub_network_that_is_not_causal_is_found(f):
    layer = MaskedAutoregressive(f, Affine()).double()
    says = rf"MaskedAutoregressive's f \({type(f).__name__}\) is not causal: what it returned"
    with torch.no_grad(), pytest.raises(ValueError, match=says):
        layer.inverse(images(3, 4))
    with pytest.raises(InversecheckError):
        inversecheck(layer, images(3, 4))
    # Also where forward alone is looked at, as the Jacobian is not triangular.
    with pytest.raises(InversecheckError):
        inversecheck(layer, images(3, 4), laws=["log-determinant"])


def test_a_sub_network_that_never_returns_the_same_is_found():
    counter = itertools.count(1)
    layer = MaskedAutoregressive(Function(lambda x: next(counter) + 0 * x), Shift())
    with torch.no_grad(), pytest.raises(ValueError, match=r"the same when it is called again\."):
        layer.inverse(images(3, 4))


def test_a_sub_network_of_ones_own_may_be_anything_causal():
    f = nn.Sequential(nn.ConstantPad1d((2, -1), 0.0), nn.Conv1d(1, 2, 2))

    class Before(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = f

        def forward(self, x):
            return self.f(x[:, None]).flatten(1)

    inversecheck(MaskedAutoregressive(Before(), Affine()).double(), images(3, 6))


def maf():
    """ActNorm and MADE in alternate orders."""
    layers = [[ActNorm(4, initialised=True), made(4, order=o)] for o in ("natural", "reversed")]
    return InvertibleSequential(*itertools.chain(*layers), made(4, order=[1, 3, 0, 2]))


def iaf():
    return InvertibleSequential(*[Inverse(made(4, order=o)) for o in ("natural", "reversed")])


def mixed():
    """Splines, and a rotation between."""
    spline = RationalQuadraticSpline(4)
    return InvertibleSequential(made(4, spline), InvertibleLinear(4, "orthogonal"), made(4, spline))


def tar_flow():
    """Patches of 2x2 pixels as tokens, in turns from the first and from the last."""
    places = torch.arange(2 * 4 * 6).view(2, 2, 2, 3, 2)  # channels, then rows and columns of both
    patches = Permute(places.permute(1, 3, 0, 2, 4).flatten().tolist())
    blocks = [transformed(order, tokens=6, context=2) for order in ("natural", "reversed")]
    for block in blocks:
        block.f.f.embed = nn.Linear(8, 8)
        block.f.f.last = nn.Linear(8, 16)
    return InvertibleSequential(Flatten((2, 4, 6)), patches, Reshape((48,), (6, 8)), *blocks)


@pytest.mark.parametrize(
    ("make", "x", "context"),
    [
        (maf, images(3, 4), None),
        (iaf, images(3, 4), None),
        (mixed, images(3, 4), None),
        (tar_flow, images(2, 2, 4, 6), images(2, 2)),
    ],
)
def test_flows_of_the_literature_keep_the_laws(make, x, context):
    inversecheck(make().double(), x, context)


def test_the_tokens_of_a_tar_flow_are_patches():
    x = images(1, 2, 4, 6)
    tokens = tar_flow()[:3](x)
    assert torch.equal(tokens[0, 4].view(2, 2, 2), x[0, :, 2:4, 2:4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bijection", [Affine(), RationalQuadraticSpline()], ids=str)
def test_a_round_trip_of_many_layers_is_near_the_precision_of_the_dtype(bijection, dtype):
    layers = [made(16, bijection, order) for order in ("natural", "reversed") * 3]
    for layer in layers:  # moderate, as errors add up from value to value
        layer.f.f.layers[-1].weight.data /= 8
    network = InvertibleSequential(*layers).to(dtype)
    x = images(32, 16, dtype=dtype)
    with torch.no_grad():
        y, log_det = network.forward_and_log_det(x)
        back, opposite = network.inverse_and_log_det(y)
    allowed = 1e4 * torch.finfo(dtype).eps
    torch.testing.assert_close(back, x, rtol=allowed, atol=allowed)
    torch.testing.assert_close(opposite, -log_det, rtol=10 * allowed, atol=10 * allowed)


def test_an_inverse_that_explodes_is_an_error_that_names_the_layer():
    f = Function(lambda x: torch.cat([1e30 * (x.cumsum(1) - x), 0 * x], 1))
    layer = MaskedAutoregressive(f, Affine())
    with torch.no_grad(), pytest.raises(OverflowError, match="MaskedAutoregressive's inverse made"):
        layer.inverse(torch.ones(2, 6))


def test_a_layer_that_shifts_preserves_volume():
    assert made(bijection=Shift()).volume_preserving
    assert not made().volume_preserving


def test_copies_are_the_same_layer():
    layer = made(order=[1, 0, 2, 3])
    assert torch.equal(copy.deepcopy(layer)(images(2, 4)), layer(images(2, 4)))


@pytest.mark.parametrize("order", ["backwards", "permuted", [0, 2], [0, 0], [], [0.5, 0]], ids=str)
def test_what_is_no_order_is_refused(order):
    says = 'MaskedAutoregressive takes an order of "natural", "reversed" or the numbers 0 to D - 1'
    with pytest.raises(ValueError, match=re.escape(f"{says}, got {order!r}.")):
        MaskedAutoregressive(nn.Identity(), Shift(), order=order)


@pytest.mark.parametrize("way", WAYS)
def test_other_states_are_refused(way):
    layer = MaskedAutoregressive(nn.Identity(), Shift(), order=[1, 0, 2])
    run = getattr(layer, way)
    with pytest.raises(ValueError, match=r"takes vectors \(N, D\) or tokens \(N, T, C\), got a te"):
        run(images())
    with pytest.raises(ValueError, match=r"has an order of 3 along dimension 1, got 4 \(input sha"):
        run(images(2, 4))
    with pytest.raises(TypeError, match=r"computes with its input and takes floating-point num"):
        run(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"of at least 2 dimensions, batch and channels first"):
        run(torch.zeros(3))


def test_what_f_returns_is_checked():
    message = (
        "MaskedAutoregressive's f (Linear) must return 2 x 4 = 8 channels along dimension -1, as "
        "Affine takes 2 for each of the stream's 4: a tensor of shape (3, 8), got a tensor of "
        "shape (3, 4)."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        MaskedAutoregressive(nn.Linear(4, 4), Affine())(torch.zeros(3, 4))
    with pytest.raises(RuntimeError) as caught:
        MaskedAutoregressive(nn.Linear(3, 8), Affine())(torch.zeros(3, 4))
    assert caught.value.__notes__ == [
        "In MaskedAutoregressive's f (Linear), given a state of shape (3, 4), torch.float32 on cpu."
    ]


def test_a_context_that_is_missing_or_superfluous_is_refused():
    with pytest.raises(TypeError, match="that nothing in it would use"):
        made()(images(2, 4), images(2, 2))
    for layer, x in ((made(context=2), images(2, 4)), (transformed(context=2), images(2, 5, 3))):
        with pytest.raises(TypeError, match="MaskedAutoregressive is conditional and got no conte"):
            layer(x)
        layer.f = layer.f.f  # which has a default, as it may be made without a context
        with pytest.raises(TypeError, match=r"with context=2, and got None as the context"):
            layer(x)
    layer = MaskedAutoregressive(MADE(4, 2), Affine(), conditional=True)
    with pytest.raises(TypeError, match=r"context=None, and got a tensor of shape \(2, 2\) as the"):
        layer(torch.zeros(2, 4), torch.zeros(2, 2))


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"MADE takes channels of at least 1, got \[0\]"):
        MADE(0, 2)
    with pytest.raises(ValueError, match=r"MADE takes hidden of at least 1, got \[\]"):
        MADE(2, 2, ())
    with pytest.raises(ValueError, match=r"CausalTransformer takes numbers of at least 1, got"):
        CausalTransformer(2, 2, 0)
    with pytest.raises(ValueError, match=r"a width that is a multiple of heads, got 6 and 4"):
        CausalTransformer(2, 2, 3, width=6)
    with pytest.raises(ValueError, match=r"takes 5 tokens at most, got 6 \(input shape \(2, 6, 3"):
        CausalTransformer(3, 2, 5)(torch.zeros(2, 6, 3))


def test_a_density_is_learned():
    """Two values of which the second follows a curve of the first."""
    torch.manual_seed(0)
    x = torch.randn(512, 2)
    x[:, 1] = x[:, 0].square() + 0.1 * x[:, 1]
    layers = [
        MaskedAutoregressive(MADE(2, 2, (32, 32)), Affine(), order=o)
        for o in ("natural", "reversed") * 2
    ]
    flow = InvertibleSequential(*layers, checkpoint=True)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        z, log_det = flow.forward_and_log_det(x)
        loss = (z.square().sum(1) / 2 - log_det).mean() + math.log(2 * math.pi)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
