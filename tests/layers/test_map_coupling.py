"""Couplings with an elementwise map: one more evaluation of f, errors, dtypes, compilers."""

import copy
import math
import re

import pytest
import torch
from torch import nn
from toys import (
    AddsContext,
    Counting,
    Function,
    assert_same_gradients,
    both,
    bottleneck,
    evaluations,
    images,
    memory_of,
    pair,
)

from invertible import (
    Affine,
    AffineCoupling,
    Coupling,
    ElementwiseMap,
    Inverse,
    InvertibleSequential,
    LogisticMixture,
    OnStreams,
    RationalQuadraticSpline,
    Rebuild,
    ScaledShift,
    Shift,
    SplineCoupling,
    Swap,
    is_rebuilding,
)

MAPS = {
    "Shift": Shift,
    "ScaledShift": lambda: ScaledShift(0.9, learned=True),
    "Affine": Affine,
    "Affine, shift first": lambda: Affine("glow", shift_first=True),
    "spline": RationalQuadraticSpline,
    "mixture": lambda: LogisticMixture(2),
    "spline on a circle": lambda: RationalQuadraticSpline(circular=True),
}
WAYS = ["forward", "inverse", "forward_and_log_det", "inverse_and_log_det"]
every_map = pytest.mark.parametrize("make_map", MAPS.values(), ids=MAPS.keys())
all_four_ways = pytest.mark.parametrize("way", WAYS)


class Widen(nn.Module):
    """A sub-network with batch statistics and dropout, from 2 channels to parameters for 2."""

    def __init__(self, bijection, dropout=0.3, context=False):
        super().__init__()
        self.body = bottleneck(2, dropout=dropout)
        self.head = nn.Conv2d(2, 2 * bijection.parameters_per_value, 1)
        self.context = AddsContext(2) if context else None

    def forward(self, x, context=None):
        x = self.body(x)
        if self.context is not None:
            x = self.context(x, context)
        return self.head(x)


def coupling(make_map, conditional=False, **options):
    bijection = make_map()
    f = Counting(Widen(bijection, context=conditional, **options))
    return Coupling(f, bijection, conditional=conditional)


def loss_of(way, *inputs):
    """A number of what one of the four methods returns."""

    def loss(network):
        results = getattr(network, way)(*inputs)
        state, log_det = results if "log_det" in way else (results, None)
        total = sum((part.sin() * part).sum() for part in state)
        return total if log_det is None else total + log_det.square().sum()

    return loss


def inputs(dtype=torch.float64):
    return tuple(part.requires_grad_() for part in pair(dtype=dtype))


@every_map
@all_four_ways
@pytest.mark.parametrize("conditional", [False, True])
def test_f_is_evaluated_once_more_where_activations_are_rebuilt(make_map, way, conditional):
    networks = both(
        lambda: InvertibleSequential(
            coupling(make_map, conditional), Swap(), coupling(make_map, conditional)
        ).double()
    )
    context = [torch.tensor([0.5, 2.0], dtype=torch.float64)] if conditional else []
    # A composition of several that draw inverts their masks in the other order.
    loss = loss_of(way, inputs(), *context)
    assert_same_gradients(networks, loss)
    assert evaluations(networks[0]) == [1, 1]
    assert evaluations(networks[1]) == [2, 2]


@every_map
@all_four_ways
def test_rebuilding_is_right_under_autocast(make_map, way):
    def loss(network):
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(way, inputs(torch.float32))(network)

    networks = both(lambda: InvertibleSequential(coupling(make_map), Swap(), coupling(make_map)))
    assert_same_gradients(networks, loss, tolerance=2e-2)
    assert evaluations(networks[1]) == [2, 2]


@every_map
def test_nested_couplings_are_rebuilt_with_one_evaluation_more(make_map):
    def make():
        inner = InvertibleSequential(coupling(make_map), Inverse(coupling(make_map)), Swap())
        return InvertibleSequential(
            OnStreams((2, 0), inner), OnStreams((1, 2), Inverse(inner)), OnStreams((0, 1), inner)
        ).double()

    x = tuple(part.requires_grad_() for part in images(2, 6, 2, 2).chunk(3, dim=1))
    networks = both(make)
    assert_same_gradients(networks, loss_of("forward_and_log_det", x))
    assert all(
        found == 2 * expected
        for found, expected in zip(evaluations(networks[1]), evaluations(networks[0]), strict=True)
    )


@every_map
def test_memory_does_not_grow_with_depth(make_map):
    def held(depth):
        layers = [layer for _ in range(depth) for layer in (coupling(make_map), Swap())]
        network = InvertibleSequential(*layers, checkpoint=True)
        x = tuple(part.requires_grad_() for part in pair(8, 4, 16, 16, dtype=torch.float32))
        return memory_of(lambda: network.forward_and_log_det(x)).held

    # A generator's state a layer is 5 kB.
    assert held(8) < held(2) + 6 * 8_000


def test_the_run_without_its_activations_knows_that_it_is_one():
    seen = []

    def f(x):
        seen.append(is_rebuilding())
        return torch.cat([x, x], 1)

    network = InvertibleSequential(AffineCoupling(Function(f)), checkpoint=True)
    y1, y2 = network(inputs())
    (y1 * y2).sum().backward()
    assert seen == [False, True]


def test_parameters_come_in_blocks_shift_first():
    f = Function(lambda _: torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    (y1, _), log_det = AffineCoupling(f).forward_and_log_det((torch.ones(1, 2), torch.ones(1, 2)))
    log_scale = torch.tensor([[3.0, 4.0]]).tanh()
    torch.testing.assert_close(y1, log_scale.exp() + torch.tensor([[1.0, 2.0]]))
    torch.testing.assert_close(log_det, log_scale.sum(1))


def test_streams_may_differ_in_channels():
    x = images(2, 3, 4, 4), images(2, 5, 4, 4)
    layer = SplineCoupling(nn.Conv2d(5, 3 * 11, 1), bins=4).double()
    torch.testing.assert_close(layer.inverse(layer(x)), x)


@pytest.mark.parametrize("dim", [2, -1])
def test_tokens_have_their_channels_last(dim):
    x = images(2, 5, 3), images(2, 5, 4)
    layer = AffineCoupling(nn.Linear(4, 6), dim=dim).double()
    (y1, _), log_det = layer.forward_and_log_det(x)
    shift, raw = layer.f(x[1]).chunk(2, dim=-1)
    torch.testing.assert_close(y1, x[0] * raw.tanh().exp() + shift)
    torch.testing.assert_close(log_det, raw.tanh().sum((1, 2)))
    torch.testing.assert_close(layer.inverse(layer(x)), x)


@pytest.mark.parametrize("scale", ["soft-clamp", "jet", "irn"])
def test_a_coupling_whose_last_layer_is_zero_is_the_identity(scale):
    f = nn.Conv2d(2, 4, 1).double()
    nn.init.zeros_(f.weight)
    nn.init.zeros_(f.bias)
    y, log_det = AffineCoupling(f, scale=scale).forward_and_log_det(pair())
    torch.testing.assert_close(y, pair(), rtol=0, atol=1e-15)
    assert not log_det.any()


@every_map
@pytest.mark.parametrize("size", [1e3, 1e6])
@all_four_ways
def test_states_and_gradients_are_finite_for_large_inputs_and_large_results_of_f(
    make_map, way, size
):
    bijection = make_map()
    head = nn.Conv2d(2, 2 * bijection.parameters_per_value, 1)
    f = nn.Sequential(nn.Tanh(), head, Function(lambda x: x * size))
    x = tuple((size * part).requires_grad_() for part in pair(dtype=torch.float32))
    # On a circle large values have lost the digits that are compared.
    for checkpoint in (False, Rebuild(tolerance=math.inf)):
        network = InvertibleSequential(Coupling(f, bijection), checkpoint=checkpoint)
        results = getattr(network, way)(x)
        state, log_det = results if "log_det" in way else (results, torch.zeros(()))
        total = sum(part.sum() for part in state) + log_det.sum()
        gradients = torch.autograd.grad(total, [*x, *network.parameters()])
        for found in (*state, log_det, *gradients):
            assert found.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_log_determinant_of_a_state_in_low_precision_is_float32(dtype):
    layer = AffineCoupling(nn.Conv2d(2, 4, 1)).to(dtype)
    x = pair(dtype=dtype)
    y, log_det = layer.forward_and_log_det(x)
    assert {part.dtype for part in y} == {dtype}
    assert log_det.dtype == torch.float32
    assert layer.inverse_and_log_det(y)[1].dtype == torch.float32


# FrEIA and others are off by 0.09 to 0.9 at 8 blocks.
@every_map
def test_autocast_adds_no_error_to_what_f_returned(make_map):
    f = coupling(make_map, dropout=0.0).f
    returned = []
    f.register_forward_hook(lambda *results: returned.append(results[-1]))
    layers = [layer for _ in range(8) for layer in (Coupling(f, make_map()), Swap())]
    network = InvertibleSequential(*layers)
    x = pair(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        y, log_det = network.forward_and_log_det(x)
    assert {part.dtype for part in (*y, log_det)} == {torch.float32}
    assert {part.dtype for part in returned} == {torch.bfloat16}
    again = iter(returned)
    given = Function(lambda _: next(again).double())
    layers = [layer for _ in range(8) for layer in (Coupling(given, make_map().double()), Swap())]
    exact = InvertibleSequential(*layers)
    expected, expected_log_det = exact.forward_and_log_det(tuple(part.double() for part in x))
    torch.testing.assert_close(
        (*y, log_det), (*expected, expected_log_det), rtol=1e-5, atol=1e-5, check_dtype=False
    )


@pytest.mark.parametrize(
    ("f", "bijection", "says"),
    [
        (nn.Conv2d(2, 2, 1), Affine(),
         "Coupling's f (Conv2d) must return 2 x 2 = 4 channels along dimension 1, as Affine takes "
         "2 for each of the stream's 2: a tensor of shape (2, 4, 2, 2), got a tensor of shape (2, "
         "2, 2, 2)."),
        (nn.Conv2d(2, 4, 1), RationalQuadraticSpline(), "must return 23 x 2 = 46 channels"),
        (nn.Conv2d(2, 4, 2), Affine(), "got a tensor of shape (2, 4, 1, 1)."),
        (Function(lambda x: (x, x)), Shift(), "got a tuple of 2"),
        (Function(lambda x: x[:1]), Shift(), "got a tensor of shape (1, 2, 2, 2)."),
        (Function(lambda x: x.double()), Shift(), "returned torch.float64, which is wider than the "
         "torch.float32 that a stream of torch.float32 is computed in. Cast f or the state."),
    ],
)  # fmt: skip
@pytest.mark.parametrize("way", ["forward", "inverse_and_log_det"])
def test_what_f_returns_is_checked(f, bijection, says, way):
    with pytest.raises(ValueError, match=re.escape(says)):
        getattr(Coupling(f, bijection), way)(pair(dtype=torch.float32))


def test_what_is_no_map_no_module_and_no_dimension_is_refused():
    with pytest.raises(
        TypeError, match=r"Coupling takes an elementwise map such as Affine\(\), got"
    ):
        Coupling(nn.Identity(), nn.Tanh())
    with pytest.raises(TypeError, match=r"got the class Affine, not an instance of it"):
        Coupling(nn.Identity(), Affine)
    with pytest.raises(TypeError, match=r"AffineCoupling takes a torch.nn.Module, got a function"):
        AffineCoupling(lambda x: x)
    with pytest.raises(ValueError, match=r"Coupling cannot take dim=0, the batch"):
        Coupling(nn.Identity(), Shift(), dim=0)


# FrEIA#38, glow-pytorch#25, normflows#67, flowtorch#85, bayesflow#253.
def test_an_inverse_that_explodes_is_an_error_that_names_the_layer():
    layers = []
    for _ in range(40):
        f = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 16))
        for parameter in f.parameters():
            parameter.data *= 5
        layers += [AffineCoupling(f), Swap()]
    network = InvertibleSequential(*layers)
    x = torch.randn(16, 8), torch.randn(16, 8)
    with torch.no_grad():
        y = network(x)
        with pytest.raises(
            OverflowError, match=r"AffineCoupling's inverse made \d+ of 128"
        ) as caught:
            network.inverse(y)
    assert re.match(r"In layer \d+ \(AffineCoupling\) of Inv", caught.value.__notes__[0])


def test_values_that_come_in_infinite_go_out_so():
    layer = AffineCoupling(nn.Linear(2, 4))
    with torch.no_grad():
        x1, _ = layer.inverse((torch.tensor([[torch.inf, 0.0]]), torch.zeros(1, 2)))
    assert x1[0, 0] == torch.inf


def test_many_couplings_stay_invertible_where_f_is_moderate():
    layers = []
    for _ in range(64):
        f = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 16))
        f[-1].weight.data /= 4
        layers += [AffineCoupling(f), Swap()]
    network = InvertibleSequential(*layers)
    x = torch.randn(64, 8), torch.randn(64, 8)
    with torch.no_grad():
        y = network(x)
        back = network.inverse(y)
    assert max(part.abs().max() for part in y) < 1e3
    torch.testing.assert_close(back, x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool], ids=str)
def test_only_floating_point_numbers_are_taken(dtype):
    x = torch.ones(2, 2, dtype=dtype)
    with pytest.raises(TypeError, match=r"AffineCoupling computes with"):
        AffineCoupling(nn.Identity())((x, x))


def test_a_context_that_is_missing_or_superfluous_is_refused():
    with pytest.raises(TypeError, match="conditional and got no context"):
        Coupling(AddsContext(2), Shift(), conditional=True)(pair())
    with pytest.raises(TypeError, match="that nothing in it would use"):
        Coupling(nn.Identity(), Shift())(pair(), torch.ones(2))


def test_a_coupling_that_shifts_preserves_volume():
    assert Coupling(nn.Identity(), Shift()).volume_preserving
    assert not AffineCoupling(nn.Identity()).volume_preserving
    _, log_det = Coupling(nn.Identity(), Shift()).forward_and_log_det(pair())
    assert torch.equal(log_det, torch.zeros(2, dtype=torch.float64))


def test_copies_and_state_dicts_carry_f_and_what_the_map_learns():
    layer = Coupling(nn.Conv2d(2, 2, 1), ScaledShift([0.5, -2.0], learned=True))
    assert set(layer.state_dict()) == {
        "f.weight",
        "f.bias",
        "map.sign",
        "map.raw_factor",
    }
    torch.testing.assert_close(
        copy.deepcopy(layer)(pair(dtype=torch.float32)), layer(pair(dtype=torch.float32))
    )


class Cubic(ElementwiseMap):
    """A map of somebody else: the root of a cubic undoes it."""

    parameters_per_value = 1

    def forward_and_log_det(self, x, parameters):
        z = x + parameters[0]
        return z + z**3, (1 + 3 * z**2).log()

    def inverse_and_log_det(self, y, parameters):
        z = (2 / 3**0.5) * ((1.5 * 3**0.5 * y).asinh() / 3).sinh()
        return z - parameters[0], -(1 + 3 * z**2).log()


@all_four_ways
def test_a_map_of_ones_own_is_all_that_a_new_coupling_needs(way):
    networks = both(lambda: InvertibleSequential(coupling(Cubic), Swap(), coupling(Cubic)).double())
    assert_same_gradients(networks, loss_of(way, inputs()))
    assert evaluations(networks[1]) == [2, 2]


@every_map
def test_second_derivatives_are_right(make_map):
    layer = Coupling(nn.Linear(2, 2 * make_map().parameters_per_value), make_map()).double()
    x = tuple(torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def run(*x):
        (y1, _), log_det = layer.forward_and_log_det(x)
        return y1, log_det

    assert torch.autograd.gradgradcheck(run, x)


# Torch scripts something when it differentiates forward, and warns of that itself.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@every_map
def test_transforms_of_torch_func_see_the_same_jacobian(make_map):
    layer = Coupling(nn.Linear(2, 2 * make_map().parameters_per_value), make_map()).double()
    x1, x2 = (torch.randn(2, dtype=torch.float64) for _ in range(2))

    def first(x1):
        return layer((x1[None], x2[None]))[0][0]

    for transform in (torch.func.jacrev, torch.func.jacfwd):
        _, log_det = layer.forward_and_log_det((x1[None], x2[None]))
        torch.testing.assert_close(transform(first)(x1).slogdet().logabsdet[None], log_det)
