"""Reversible checkpointing within one graph of torch.compile; without code generation."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from toys import Affine, Function, couplings, linear

import invertible
from invertible import (
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    Elementwise,
    InjectivePad,
    Inverse,
    InvertibleLinear,
    InvertibleModule,
    InvertibleSequential,
    Merge,
    OnStreams,
    Parallel,
    PixelUnshuffle,
    Rebuild,
    RebuildError,
    ReversibleBlock,
    Split,
    Swap,
    keep_matmuls,
)

pytestmark = [
    pytest.mark.slow,
    # Dynamo warns of what it does itself.
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning",
        "ignore::FutureWarning",
        "ignore:The .grad attribute of a Tensor that is not a leaf",
    ),
    pytest.mark.skipif(
        torch.__version__ < (2, 13), reason="older compilers can't trace what rebuilds"
    ),
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(network, backend="aot_eager", **options):
    return torch.compile(network, backend=backend, fullgraph=True, **options)


def norm_net(channels=4, out=None):
    return nn.Sequential(nn.BatchNorm1d(channels), nn.Linear(channels, out or channels), nn.Tanh())


def twins(make):
    """A network that stores, and one that rebuilds, with the same weights."""
    torch.manual_seed(0)
    rebuilt = make().double()
    for parameter in rebuilt.parameters():
        nn.init.normal_(parameter, std=0.4)
    stored = copy.deepcopy(rebuilt)
    for part in stored.modules():
        if getattr(part, "checkpoint", False):
            part.checkpoint = False
    return stored, rebuilt


def step(network, call, x, context=()):
    """Results, gradients and buffers of a step."""
    results = tree_leaves(call(x, *context))
    loss = sum((y * torch.linspace(1, 2, y.numel()).view(y.shape)).sin().sum() for y in results)
    inputs = [x for x in tree_leaves((x, context)) if isinstance(x, torch.Tensor)]
    inputs += [p for p in network.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, inputs)
    return [y.detach() for y in results], gradients, list(network.buffers())


def states(batch=5):
    return torch.linspace(-1, 1, batch * 8).sin().view(batch, 8).double().requires_grad_()


class Conditioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4 + 3, 4)

    def forward(self, x, context):
        return self.linear(torch.cat((x, context["label"]), 1)).tanh() * context["scales"][0]


def nested():
    inner = InvertibleSequential(*couplings(2, norm_net), checkpoint=Rebuild(anchor_every=3))
    return InvertibleSequential(
        Affine(),
        Split(),
        inner,
        ReversibleBlock(norm_net(), linear(4)),
        OnStreams(0, Affine()),
        Parallel(Affine(), Inverse(Affine())),
        OnStreams((1, 0), AffineCoupling(norm_net(4, 8))),
        Inverse(AffineCoupling(linear(4, 8))),
        Merge(),
        checkpoint=True,
    )


def flow():
    torch.manual_seed(0)
    return InvertibleSequential(
        ActNorm(8, initialised=True),
        InvertibleLinear(8),
        Elementwise(invertible.Affine(), channels=8),
        Split(),
        AdditiveCoupling(Conditioned(), conditional=True),
        Swap(),
        AdditiveCoupling(Conditioned(), conditional=True),
        AdditiveCoupling(linear(4)),
        Merge(),
        checkpoint=True,
    )


def context():
    label = torch.linspace(-1, 1, 15).view(5, 3).double().requires_grad_()
    return ({"label": label, "scales": [torch.ones((), dtype=label.dtype, requires_grad=True), 2]},)


@pytest.mark.parametrize(
    ("make", "context", "way"),
    [
        (nested, tuple, "forward_and_log_det"),
        (nested, tuple, "inverse"),
        (flow, context, "forward"),
        (flow, context, "inverse_and_log_det"),
    ],
)
def test_gradients_and_buffers_are_those_of_storing(make, context, way):
    stored, rebuilt = twins(make)
    x, given = (0.5 * states()).detach().requires_grad_(), context()
    expected = step(stored, getattr(stored, way), x, given)
    run = rebuilt if way == "forward" else getattr(rebuilt, way)
    torch.testing.assert_close(step(rebuilt, compiled(run), x, given), expected)


def test_channels_last_images_with_tied_and_frozen_parts_have_the_gradients_of_storing():
    def make():
        shared = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
        layers = [AdditiveCoupling(shared), Swap(), AdditiveCoupling(shared), Swap()]
        frozen = AdditiveCoupling(nn.Conv2d(4, 4, 1)).requires_grad_(False)
        return InvertibleSequential(
            PixelUnshuffle(2), Split(), *layers, frozen, Merge(), checkpoint=True
        )

    stored, rebuilt = twins(make)
    rebuilt = rebuilt.to(memory_format=torch.channels_last)
    x = torch.randn(3, 2, 6, 6).double().to(memory_format=torch.channels_last).requires_grad_()
    expected = step(stored, stored, x)
    torch.testing.assert_close(step(rebuilt, compiled(rebuilt), x), expected)


def chain(*fs, checkpoint=True):
    layers = [layer for f in fs for layer in (AdditiveCoupling(f), Swap())]
    return InvertibleSequential(Split(), *layers, Merge(), checkpoint=checkpoint)


class Model(nn.Module):
    """A chain within a network, beside one that stores."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.body = InvertibleSequential(chain(linear(4)), chain(linear(4), checkpoint=False))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(self.stem(x).relu()) + 1)


def test_one_graph_serves_batches_of_all_sizes():
    stored, rebuilt = twins(Model)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    call = compiled(rebuilt, backend)
    for batch in (4, 5, 9):
        expected = step(stored, stored, states(batch))
        torch.testing.assert_close(step(rebuilt, call, states(batch)), expected)
    assert len(graphs) == 2, "of one size, and of all others"
    assert call(states(1)).shape == (1, 3)
    assert call(states(0)).shape == (0, 3)


def test_sub_networks_run_again_under_the_same_autocast():
    stored, rebuilt = (net.float() for net in twins(lambda: chain(linear(4), linear(4))))
    x = states().detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        expected = step(stored, stored, x)
        found = step(rebuilt, compiled(rebuilt), x)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def held(y):
    """Bytes that a graph holds besides parameters, which these networks share."""
    seen, nodes, todo = {}, set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in nodes:
            continue
        nodes.add(node)
        todo += [before for before, _ in node.next_functions]
        for x in getattr(node, "saved_tensors", ()):
            if x is not None and not isinstance(x, nn.Parameter):
                seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return sum(seen.values())


def test_what_is_held_does_not_grow_with_depth():
    f = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    x = torch.randn(512, 128, requires_grad=True)
    found = {}
    for checkpoint in (False, True):
        for depth in (2, 4):
            network = chain(*[f] * depth, checkpoint=checkpoint)
            # With the partitioner of the default backend, which chooses what is saved.
            y = compiled(network, "aot_eager_decomp_partition")(x)
            found[checkpoint, depth] = held(y)
    assert found[True, 4] < 1.01 * found[True, 2] < 1.1 * x.nbytes
    assert found[False, 4] > 1.7 * found[False, 2]


class Counter(nn.Module):
    """Reads a buffer that it changes."""

    def __init__(self, replaces):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.replaces = replaces

    def forward(self, x):
        if self.replaces:
            self.count = self.count + 1
        else:
            self.count += 1
        return self.linear(x) * self.count


def hooked():
    network = chain(linear(4), linear(4))
    network[1].register_forward_hook(lambda _m, _x, y: (y[0] * 1.5, y[1]))
    return network


def of_another(x):
    return F.linear(x, OTHER)


OTHER = torch.eye(4, dtype=torch.float64).requires_grad_()

# What can't be had in a graph, with words of the error.
REFUSED = {
    "dropout": (lambda: chain(nn.Sequential(nn.Linear(4, 4), nn.Dropout()), linear(4)), "random"),
    "own random numbers": (lambda: chain(Function(lambda x: x * torch.rand_like(x))), "random"),
    "buffers written": (lambda: chain(Counter(replaces=False), linear(4)), "in place"),
    "buffers replaced": (lambda: chain(Counter(replaces=True), linear(4)), "Mutating"),
    "printing": (lambda: chain(Function(lambda x: print(end="") or x.sin())), "print"),
    "another's parameter": (lambda: chain(Function(of_another)), "needs a gradient"),
    "constants": (
        lambda: InvertibleSequential(
            InjectivePad(8), Split(), AdditiveCoupling(linear(8)), Merge(), checkpoint=True
        ),
        "constants",
    ),
    "hooks": (hooked, "hooks"),
    "a policy": (
        lambda: chain(linear(4), checkpoint=Rebuild(context_fn=keep_matmuls())),
        "context_fn",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_rebuilt_in_a_graph_breaks_it_and_is_right_without(name):
    make, words = REFUSED[name]
    network = make().double()
    twin = copy.deepcopy(network)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=words):
        compiled(copy.deepcopy(network))(states())
    torch._dynamo.reset()
    broken = torch.compile(network, backend="aot_eager")
    for _ in range(2):
        found = []
        for net, call in ((network, broken), (twin, twin)):
            torch.manual_seed(1)
            found.append(step(net, call, states()))
        torch.testing.assert_close(*found)


class Noting(nn.Module):
    """Leaves a tensor in its context."""

    def forward(self, x, context):
        if isinstance(context, list):
            context.append(x.mean())
        else:
            context.add_(1)
        return x * 0.5


@pytest.mark.parametrize(("context", "words"), [([], "list or dict"), (torch.zeros(3), "in place")])
def test_a_sub_network_that_changes_its_context_breaks_the_graph(context, words):
    layer = AdditiveCoupling(Noting(), conditional=True)
    network = InvertibleSequential(Split(), layer, Merge(), checkpoint=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=words):
        compiled(network)(states(), context)


class Elsewhere(InvertibleModule):
    """Has a log-determinant of somebody else's parameter."""

    def forward(self, x):
        return 2 * x

    def inverse(self, y):
        return y / 2

    def forward_and_log_det(self, x):
        return self(x), OTHER.sum().expand(len(x))


def test_a_log_determinant_of_another_parameter_breaks_the_graph():
    network = InvertibleSequential(Affine(), Elsewhere(), checkpoint=True).double()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="needs a gradient"):
        compiled(network.forward_and_log_det)(states())


def test_exact_mode_breaks_the_graph():
    layers = [AdditiveCoupling(linear(), quantum=2**-10), Swap()]
    network = InvertibleSequential(Split(), *layers, Merge(), checkpoint=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="exact mode"):
        compiled(network)(torch.zeros(3, 4, requires_grad=True))


class Wrong(InvertibleModule):
    """An inverse that is off by the same number everywhere."""

    def forward(self, x):
        return 1.5 * x

    def inverse(self, y):
        return y / 1.5 + 0.1


def test_a_wrong_inverse_is_an_error():
    network = InvertibleSequential(Affine(), Wrong(), checkpoint=True).double()
    y = compiled(network)(states())
    with pytest.raises(RebuildError, match=r"layer 1 \(Wrong\) was not rebuilt"):
        y.sum().backward()
    network.checkpoint = Rebuild(tolerance=0.5)
    compiled(network)(states()).sum().backward()


def test_a_state_of_zeros_is_rebuilt():
    network = chain(nn.Linear(4, 4, bias=False)).double()
    compiled(network)(torch.zeros_like(states()).requires_grad_()).sum().backward()


def test_an_output_that_was_changed_is_an_error():
    # The default backend's output may share memory with what is saved, and no version.
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        y = compiled(chain(linear(4)).double(), backend)(states())
        y[0, 0] = 2
        with pytest.raises(RuntimeError, match=r"in ?place"):
            y.sum().backward()


def test_a_second_derivative_is_an_error():
    x = states()
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        y = compiled(chain(linear(4)).double(), backend)(x)
        with pytest.raises(RuntimeError, match=r"double backward|does not require grad"):
            torch.autograd.grad(y.sin().sum(), x, create_graph=True)[0].sum().backward()
