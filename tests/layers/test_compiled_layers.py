"""Layers with log-determinants compile to one graph, and are exported, in both directions."""

import copy

import pytest
import torch
from torch import nn

from invertible import (
    MADE,
    ActNorm,
    Affine,
    AffineCoupling,
    CausalTransformer,
    Coupling,
    Elementwise,
    InvertibleLinear,
    InvertibleSequential,
    LogisticMixture,
    MaskedAutoregressive,
    RationalQuadraticSpline,
    Scale,
    Sigmoid,
    Softplus,
    SplineCoupling,
    Tanh,
)

# Dynamo warns of what it does itself.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

X = torch.Generator().manual_seed(0)
IMAGES = torch.randn(5, 4, 3, 3, generator=X)
PAIR = torch.randn(5, 4, generator=X), torch.randn(5, 3, generator=X)
TWO_TOKENS = torch.randn(5, 2, 3, generator=X)  # the sequential direction compiles a step for each


def f(parameters):
    return nn.Sequential(
        nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4 * parameters)
    )


LAYERS = {
    "ActNorm": (lambda: ActNorm(4, initialised=True), (IMAGES,)),
    "AffineCoupling": (lambda: AffineCoupling(f(2)), (PAIR,)),
    "Coupling as in Glow": (lambda: Coupling(f(2), Affine("glow", shift_first=True)), (PAIR,)),
    "Coupling of mixtures": (lambda: Coupling(f(8), LogisticMixture(2)), (PAIR,)),
    "Coupling on a circle": (
        lambda: Coupling(f(24), RationalQuadraticSpline(circular=True)),
        (PAIR,),
    ),
    "Elementwise": (lambda: Elementwise(RationalQuadraticSpline(), channels=4), (IMAGES,)),
    "Elementwise from the context": (lambda: Elementwise(Affine(), f(2)), (IMAGES, PAIR[1])),
    "InvertibleLinear": (lambda: InvertibleLinear(4), (IMAGES,)),
    "InvertibleLinear, orthogonal": (lambda: InvertibleLinear(4, "orthogonal"), (IMAGES,)),
    "MaskedAutoregressive": (
        lambda: MaskedAutoregressive(MADE(2, 23), RationalQuadraticSpline(), order="reversed"),
        (PAIR[0][:, :2],),
    ),
    "MaskedAutoregressive of tokens": (
        lambda: MaskedAutoregressive(CausalTransformer(3, 2, 2), Affine(), order=[1, 0]),
        (TWO_TOKENS,),
    ),
    "Scale": (lambda: Scale(4), (IMAGES,)),
    "Sigmoid": (Sigmoid, (IMAGES,)),
    "Softplus": (Softplus, (IMAGES.abs() + 0.1,)),
    "SplineCoupling": (lambda: SplineCoupling(f(23)), (PAIR,)),
    "Tanh": (Tanh, (IMAGES.tanh(),)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
in_all_four_ways = pytest.mark.parametrize(
    "way", ["forward", "inverse", "forward_and_log_det", "inverse_and_log_det"]
)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def made(name):
    torch.manual_seed(0)
    make, inputs = LAYERS[name]
    layer = make().eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer, inputs


def skip_what_torch_cannot(layer, way):
    """An inverse with a sub-network needs a context manager, which older compilers can't trace."""
    if "inverse" in way and getattr(layer, "f", None) and torch.__version__ < (2, 7):
        pytest.skip("Dynamo takes no context manager that is a generator before torch 2.7")


@every_layer
@in_all_four_ways
def test_a_layer_compiles_to_one_graph(name, way):
    layer, inputs = made(name)
    skip_what_torch_cannot(layer, way)
    run = getattr(layer, way)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), run(*inputs))


@pytest.mark.parametrize("name", ["AffineCoupling", "SplineCoupling"])
def test_compiled_sub_networks_have_the_same_gradients(name):
    layer, (x,) = made(name)
    gradients = []
    for compiles in (False, True):
        network = InvertibleSequential(copy.deepcopy(layer), checkpoint=compiles)
        if compiles:
            network.compile_subnetworks(backend="aot_eager")
        (y1, y2), log_det = network.forward_and_log_det(x)
        loss = (y1 * y1).sum() + y2.sum() - log_det.sum()
        gradients.append(torch.autograd.grad(loss, list(network.parameters())))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


class Method(nn.Module):
    """One of a layer's methods, as a module for export."""

    def __init__(self, layer, way):
        super().__init__()
        self.layer = layer
        self.way = way

    def forward(self, *inputs):
        return getattr(self.layer, self.way)(*inputs)


@every_layer
@in_all_four_ways
def test_a_layer_is_exported(name, way):
    layer, inputs = made(name)
    skip_what_torch_cannot(layer, way)
    exported = torch.export.export(Method(layer, way), inputs).module()
    torch.testing.assert_close(exported(*inputs), getattr(layer, way)(*inputs))


def test_an_act_norm_that_has_not_begun_compiles_and_begins_outside_of_the_graph():
    layer = ActNorm(4)
    compiled = torch.compile(layer, backend="aot_eager")
    y = compiled(IMAGES)
    assert layer.initialised
    torch.testing.assert_close(y, layer(IMAGES))
    torch.testing.assert_close(compiled(2 * IMAGES), layer(2 * IMAGES))
