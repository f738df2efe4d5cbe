"""Exact networks compiled, exported and transformed: right gradients, and no silent overflow."""

import copy

import pytest
import torch
from torch import nn
from toys import Function

from invertible import (
    AdditiveCoupling,
    HaarWavelet,
    Inverse,
    InvertibleSequential,
    Merge,
    PairRotation,
    PairScaling,
    Quantize,
    ReversibleBlock,
    Split,
    Swap,
)

# Dynamo, and torch's own jvp, warn of what they do themselves.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:.torch.jit.script. is deprecated",
    "ignore:The .grad attribute of a Tensor that is not a leaf",
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
Q = 2**-12  # room up to 4096 in float32


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Residual(nn.Module):
    """Somebody's own module, which might draw for all that the library knows."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)
        self.linear = nn.Linear(channels, channels)

    def forward(self, x):
        return self.linear(self.norm(x).relu())


def torchs_own(channels):
    return nn.Sequential(
        nn.BatchNorm1d(channels), nn.ReLU(), nn.Linear(channels, channels), nn.Tanh()
    )


def network(f=torchs_own, **options):
    torch.manual_seed(0)
    layers = [Split(), AdditiveCoupling(f(4), quantum=Q), Swap()]
    return InvertibleSequential(Quantize(Q), *layers, Merge(), **options)


def lifting():
    """Everything that can be exact, on images with 2 channels."""
    torch.manual_seed(0)
    rotation, scaling = PairRotation(8, quantum=Q), PairScaling(8, quantum=Q)
    nn.init.normal_(rotation.angle)
    nn.init.normal_(scaling.log_scale, std=0.3)
    haar = [HaarWavelet(quantum=Q), HaarWavelet(quantum=Q, orthonormal=True)]
    f, g = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
    block = ReversibleBlock(f, g, quantum=Q)
    return InvertibleSequential(Quantize(Q), haar[0], rotation, scaling, haar[1], Split(), block)


def numbers(dtype=torch.float32, shape=(5, 8)):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


def one_graph(function):
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def gradients(model, x, call):
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = call(x)
    y.sin().sum().backward()
    # An exported program may list them in another order.
    return [y.detach(), x.grad, *(p.grad.clone() for _, p in sorted(model.named_parameters()))]


def assert_one_graph(model, x):
    """Both directions, in training; without code generation, whose sums round in another order."""
    twin = copy.deepcopy(model)
    assert all(map(torch.equal, gradients(model, x, one_graph(model)), gradients(twin, x, twin)))
    assert all(map(torch.equal, model.buffers(), twin.buffers()))
    before = [b.clone() for b in model.buffers()]
    y = twin(x).detach()
    found = gradients(model, y, one_graph(model.inverse))
    assert all(map(torch.equal, found, gradients(twin, y, twin.inverse)))
    assert torch.equal(found[0], Quantize(Q)(x))
    assert all(map(torch.equal, model.buffers(), before))


@DTYPES
def test_training_compiles_to_one_graph_in_both_directions(dtype):
    assert_one_graph(network().to(dtype).train(), numbers(dtype))


@DTYPES
def test_all_exact_layers_compile_to_one_graph(dtype):
    model = InvertibleSequential(lifting(), Merge()).to(dtype)
    assert_one_graph(model, numbers(dtype, (2, 2, 8, 8)))


@pytest.mark.parametrize("method", ["inverse", "inverse_and_log_det", "forward_and_log_det"])
def test_a_network_of_own_modules_compiles_in_eval_mode(method):
    run = getattr(network(Residual).eval(), method)
    torch.testing.assert_close(one_graph(run)(numbers()), run(numbers()), rtol=0, atol=0)


def test_the_inverse_as_a_layer_compiles_to_one_graph():
    model = network().eval()
    y = model(numbers()).detach()
    assert torch.equal(one_graph(Inverse(model).eval())(y), Quantize(Q)(numbers()))


# --- what can't raise


FAR = 1e6  # in float32; float64 has room
BESIDE = Q / 3


def shifting(value):
    return AdditiveCoupling(Function(lambda x: torch.full_like(x, value)), quantum=Q)


def there_and_back(**options):
    return InvertibleSequential(shifting(5000.0), Swap(), Swap(), shifting(-5000.0), **options)


def test_what_leaves_the_range_in_a_graph_becomes_nan():
    model = network().eval()
    forward, inverse = one_graph(model), one_graph(model.inverse)
    assert forward(numbers()).isfinite().all()
    assert forward(numbers() + FAR).isnan().all()
    assert inverse(torch.full((5, 8), FAR)).isnan().all()
    # Going backward, what is beside the grid is rounded, as in eager mode.
    y = torch.randn(5, 8)
    assert torch.equal(inverse(y), model.inverse(y))


def test_what_is_beside_the_grid_in_a_graph_becomes_nan():
    model = network()[1:].eval()
    assert one_graph(model)(torch.zeros(5, 8)).isfinite().all()
    assert one_graph(model)(torch.full((5, 8), BESIDE)).isnan().all()


def test_check_layers_works_in_a_graph():
    x = torch.ones(2, 2), torch.ones(2, 2)
    for check_layers in (False, True):
        y1, _ = one_graph(there_and_back(check_layers=check_layers))(x)
        assert y1.isnan().all() == check_layers
    inside = InvertibleSequential(PairScaling(2, quantum=Q), check_layers=True)
    assert one_graph(inside)(torch.full((2, 2), 3000.0)).isnan().all()
    assert one_graph(inside)(torch.full((2, 2), 1000.0)).isfinite().all()


@pytest.mark.parametrize("transform", ["vmap", "jvp", "grad"])
def test_what_leaves_the_range_under_a_transform_becomes_nan(transform):
    model = network().eval()
    runs = {
        "vmap": lambda x: torch.func.vmap(lambda part: model(part[None])[0])(x),
        "jvp": lambda x: torch.func.jvp(model, (x,), (torch.ones_like(x),))[0],
        "grad": lambda x: torch.func.grad_and_value(lambda x: model(x).sum())(x)[1],
    }
    run = runs[transform]
    torch.testing.assert_close(run(numbers()).sum(), model(numbers()).sum(), rtol=1e-4, atol=1e-2)
    assert run(numbers() + FAR).isnan().all()
    # One example under vmap is one state.
    if transform == "vmap":
        mixed = torch.stack([numbers()[0], numbers()[1] + FAR])
        assert run(mixed)[0].isfinite().all()
        assert run(mixed)[1].isnan().all()


# --- gradients that go straight through


def linear_network():
    torch.manual_seed(0)
    layers = [Split(), AdditiveCoupling(nn.Linear(8, 8), quantum=Q), Swap()]
    layers += [AdditiveCoupling(nn.Tanh(), quantum=Q), Merge(), PairScaling(16, quantum=Q)]
    return InvertibleSequential(Quantize(Q), *layers)


@DTYPES
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("inverted", [False, True])
def test_an_exported_program_has_the_gradients_of_the_network(inverted, strict, dtype):
    model = linear_network().to(dtype)
    x = torch.randn(4, 16, dtype=dtype)
    x = model(x).detach() if inverted else x
    layer = Inverse(model) if inverted else model
    program = torch.export.export(layer, (x,), strict=strict).module()
    expected, found = gradients(layer, x, layer), gradients(program, x, program)
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))
    assert found[-1].abs().sum() > 0
    assert program(x + 2.0**53 * Q).isnan().all()


@DTYPES
@pytest.mark.parametrize("inverted", [False, True])
def test_a_compiled_jvp_is_the_one_of_eager_mode(inverted, dtype):
    model = linear_network().to(dtype)
    x = torch.randn(4, 16, dtype=dtype)
    run = model.inverse if inverted else model

    def jvp(x):
        return torch.func.jvp(run, (x,), (torch.ones_like(x),))[1]

    expected = jvp(x)
    assert expected.abs().sum() > 0
    assert torch.equal(torch.compile(jvp, backend="aot_eager")(x), expected)


@pytest.mark.parametrize("inverted", [False, True])
def test_all_ways_to_a_jacobian_agree(inverted):
    model = linear_network().double()
    x = torch.randn(2, 16, dtype=torch.float64)
    run = model.inverse if inverted else model
    found = [
        torch.autograd.functional.jacobian(run, x),
        torch.func.jacrev(run)(x),
        torch.func.jacfwd(run)(x),
        torch.autograd.functional.jacobian(run, x, vectorize=True, strategy="forward-mode"),
    ]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])
    matrix = found[0].view(32, 32)
    torch.testing.assert_close(matrix.det().abs(), torch.ones((), dtype=torch.float64))


def test_second_derivatives_agree():
    model = linear_network().double()
    x = torch.randn(2, 16, dtype=torch.float64)

    def loss(x):
        return model(x).sin().sum()

    expected = torch.autograd.functional.hessian(loss, x)
    torch.testing.assert_close(torch.func.hessian(loss)(x), expected)
    assert expected.abs().sum() > 0


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_network_turns_what_leaves_the_range_into_nan():
    model = network().eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, (numbers(),))
        assert torch.equal(traced(numbers() + 1), model(numbers() + 1))
        assert traced(numbers() + FAR).isnan().all()
