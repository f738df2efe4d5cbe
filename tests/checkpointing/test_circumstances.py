"""A layer is run again under the circumstances that it ran in: buffers, generators, autocast."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations
from toys import (
    Probe,
    assert_as_without,
    assert_same_gradients,
    assert_same_step,
    batch_norm_net,
    body,
    both,
    bottleneck,
    couplings,
    linear,
    memory_of,
    pair,
    probes,
    step,
)
from toys import body_images as images

from invertible import (
    AdditiveCoupling,
    Inverse,
    InvertibleSequential,
    PixelUnshuffle,
    Split,
    Swap,
)
from invertible._support.survey import survey
from invertible.checkpointing.circumstances import Circumstances, autocast_settings

# --- buffers


class RunningMean(nn.Module):
    """Uses a buffer, and then replaces or changes it."""

    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        y = (x - self.mean).tanh()
        if self.training and self.in_place:
            self.mean += x.detach().mean()
        elif self.training:
            self.mean = self.mean + x.detach().mean()
        return y


def spectral_norm():
    return nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(4, 4, 3, padding=1)), nn.Tanh())


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize(
    "make",
    [lambda: RunningMean(True), lambda: RunningMean(False), spectral_norm],
    ids=["changed in place", "replaced", "spectral norm"],
)
@pytest.mark.parametrize("shared", [True, False])
def test_buffers_are_seen_as_the_first_run_saw_them(make, shared, direction):
    f = make()
    stored, rebuilt = both(
        lambda: body(3, lambda: nn.Sequential(f if shared else make(), nn.Conv2d(4, 4, 1)))[1:]
    )
    x = PixelUnshuffle(2)(images())
    for _ in range(2):
        expected = step(getattr(stored, direction), x)
        assert_same_step(step(getattr(rebuilt, direction), x), expected)


def test_buffers_are_the_same_objects_afterwards():
    network = body(checkpoint=True)
    before = dict(network.named_buffers())
    network(images()).sum().backward()
    assert all(value is before[name] for name, value in network.named_buffers())


class Table(nn.Module):
    """Looks up in a large buffer, which it leaves alone."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.ones(100_000, dtype=torch.float64))

    def forward(self, x):
        return x.tanh() * self.table[0]


def test_copies_of_buffers_that_did_not_change_are_not_kept():
    network = body(3, Table, checkpoint=True)
    x = images().requires_grad_()
    assert memory_of(lambda: network(x)).held < 8 * 100_000


# --- random generators


@pytest.fixture
def generator_calls(monkeypatch):
    """How often the generator of the CPU was read or set."""
    calls = []
    for name in ("get_rng_state", "set_rng_state"):
        original = getattr(torch, name)

        def counted(*given, name=name, original=original):
            calls.append(name)
            return original(*given)

        monkeypatch.setattr(torch, name, counted)
    return calls


class Unknown(nn.Module):
    """A class that the library doesn't know: it might draw."""

    def forward(self, x):
        return x.tanh()


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize(
    ("f", "touches"),
    [(lambda: batch_norm_net(4), False), (Unknown, True), (nn.Dropout, True)],
)
def test_generators_rest_where_no_layer_can_draw(generator_calls, f, touches, direction):
    network = body(2, f, checkpoint=True)[1:]
    getattr(network, direction)(PixelUnshuffle(2)(images()).requires_grad_()).sum().backward()
    assert bool(generator_calls) is touches


def test_a_layer_that_draws_does_so_with_the_same_numbers():
    def record(_, x):
        return torch.rand(2, dtype=x.dtype)

    network = body(3, lambda: Probe(nn.Conv2d(4, 4, 1), record), checkpoint=True)
    y = network(images())
    torch.rand(5)
    y.sum().backward()
    for probe in probes(network):
        first, again = probe.seen
        assert torch.equal(first, again)


# --- autocast, strides


@pytest.mark.parametrize("backward_in_autocast", [False, True])
def test_autocast_is_that_of_the_forward_pass(backward_in_autocast):
    def record(_, x):
        with torch.no_grad():
            return torch.is_autocast_enabled("cpu"), (x @ x.mT).dtype

    network = body(3, lambda: Probe(bottleneck(4), record), checkpoint=True).float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = network(images().float()).sum()
    with torch.autocast("cpu", torch.float16, enabled=backward_in_autocast):
        loss.backward()
    for probe in probes(network):
        assert probe.seen == [(True, torch.bfloat16)] * 2


def test_gradients_under_autocast_are_those_of_ordinary_training():
    gradients = []
    for network in both(lambda: body(2).float()):
        with torch.autocast("cpu", torch.bfloat16):
            y = network(images().float())
        assert y.dtype == torch.float32
        y.sin().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    error = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert error < 1e-2  # a state error of 1e-7 can flip the last bit of a bfloat16


def test_strides_and_requires_grad_of_states_are_restored():
    def look(_, x):
        return x.stride(), x.requires_grad, x.shape

    network = body(3, lambda: Probe(bottleneck(4), look), checkpoint=True)
    network[2].requires_grad_(False)
    for x in (images(), images().to(memory_format=torch.channels_last), images(1)):
        network(x).sum().backward()
        for probe in probes(network):
            assert len(probe.seen) in (1, 2)
            assert probe.seen[0] == probe.seen[-1]
            probe.seen.clear()


def test_an_expanded_input_is_restored():
    x1, x2 = torch.randn(1, 4, 5, 5, dtype=torch.float64), torch.randn(1, 4, 1, 1).double()
    expanded = x1.expand(3, 4, 5, 5), x2.expand(3, 4, 5, 5)
    assert_same_gradients(both(lambda: body()[2:]), lambda net: net(expanded).sin().sum())


def test_one_tensor_may_be_both_streams():
    x = images()[:, :, :4].requires_grad_()
    networks = both(lambda: InvertibleSequential(*body(3, lambda: bottleneck(2))[2:-1]).double())
    assert_same_gradients(networks, lambda net: sum(part.sin().sum() for part in net((x, x))))


def test_networks_without_numbers_can_be_run():
    with torch.device("meta"):
        network = body(2, lambda: nn.Sequential(*bottleneck(4), nn.Dropout(0.5)), checkpoint=True)
        x = torch.empty(2, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    assert network(x).shape == (2, 8, 4, 4)
    assert network.inverse(network(x)).shape == x.shape


# --- members that run the other way


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("log_det", [False, True])
@pytest.mark.parametrize("as_a_whole", [False, True])
def test_an_inverse_leaves_no_trace_whatever_its_members_run(checkpoint, log_det, as_a_whole):
    """A member ``Inverse(layer)`` runs the layer's forward there."""
    f = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2), nn.Dropout(0.5))
    turned = Inverse(AdditiveCoupling(f))
    if as_a_whole:
        turned.register_forward_hook(lambda *_: None)
    network = InvertibleSequential(Swap(), turned, checkpoint=checkpoint).double()
    before, state = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    x = network.inverse_and_log_det(pair(5, 4))[0] if log_det else network.inverse(pair(5, 4))
    for _ in range(2):  # also when it is rebuilt, and only rebuilt
        torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
        assert torch.equal(torch.get_rng_state(), state)
        sum(part.sum() for part in x).backward(retain_graph=True)


# --- Circumstances by themselves


class Restless(nn.Module):
    """Draws, and changes one buffer of two."""

    def __init__(self, fails=False):
        super().__init__()
        self.fails = fails
        self.register_buffer("moves", torch.zeros(2))
        self.register_buffer("rests", torch.zeros(2))

    def forward(self):
        drawn = torch.rand(2)
        self.moves += drawn
        if self.fails:
            raise ArithmeticError
        return self.moves.clone(), drawn


def circumstances(module):
    return Circumstances(survey(module), [], autocast_settings([]), None)


@pytest.mark.parametrize("fails", [False, True])
def test_all_is_as_before_inside_and_as_now_outside(fails, monkeypatch):
    # A compiler that ran before may have left one, of tqdm, which could have drawn.
    monkeypatch.setattr("threading.active_count", lambda: 1)
    module = Restless()
    found = circumstances(module)
    before, first = torch.get_rng_state(), module()
    found.close(drawing_shows=True)
    assert found.rng_before is not None
    module()  # later, all moves on
    now = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    module.fails = fails
    found.enter(SimpleNamespace(place="layer 0"))
    try:
        assert torch.equal(torch.get_rng_state(), before)
        torch.testing.assert_close(module(), first, rtol=0, atol=0)
        found.rewind()
        torch.testing.assert_close(module(), first, rtol=0, atol=0)
    except ArithmeticError:
        assert fails
    finally:
        found.leave()
    torch.testing.assert_close(module.state_dict(), now[0], rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), now[1])


def test_a_layer_that_drew_nothing_is_known_by_its_generator():
    module = Unknown()
    found = circumstances(module)
    module(torch.zeros(1))
    found.close(drawing_shows=True)
    assert found.rng_before is None
    # An inverse puts generators back: what it drew in between does not show.
    found = circumstances(module)
    found.close(drawing_shows=False)
    assert found.rng_before is not None


def test_a_state_of_the_generator_is_kept_once():
    module = Restless()
    first = circumstances(module)
    first.close(drawing_shows=True)
    second = Circumstances(survey(module), [], autocast_settings([]), first.rng)
    assert second.rng is first.rng
    module()
    second.close(drawing_shows=True)
    assert second.rng is not first.rng


def test_a_changed_parameter_is_named():
    f = linear()
    found = circumstances(f)
    found.close(drawing_shows=True)
    with torch.no_grad():
        f[0].bias.mul_(2)
    with pytest.raises(RuntimeError, match=r"a parameter of layer 3 \(F\), of shape \(2,\), was"):
        found.enter(SimpleNamespace(place="layer 3 (F)"))


# --- what is exchanged between the passes


def linears(network):
    return [part for part in network.modules() if isinstance(part, nn.Linear)]


def set_data(network):
    for part in linears(network):
        part.weight.data = torch.randn_like(part.weight)


def assign(network):
    network.load_state_dict({k: v + 1 for k, v in network.state_dict().items()}, assign=True)


def replace_parameters(network):
    for part in linears(network):
        part.weight = nn.Parameter(part.weight + 1)


def replace_modules(network):
    for part in network:
        if isinstance(part, AdditiveCoupling):
            part.f = nn.Linear(4, 4).double()


@pytest.mark.parametrize(
    "exchange",
    [set_data, assign, replace_parameters, replace_modules, nn.Module.half, nn.Module.eval],
)
def test_a_layer_runs_again_with_what_it_had(exchange):
    def train(network, x):
        loss = network(x).sin().sum()
        exchange(network)
        return loss

    assert_as_without(lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Tanh()), train)


def test_lent_parameters_are_those_that_are_used():
    def train(network, x):
        lent = {name: 2 * p for name, p in network.named_parameters()}
        return torch.func.functional_call(network, lent, x).sin().sum()

    assert_as_without(linear_4, train)


def linear_4():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh())


def both_modes(network, x):
    y, z = network.eval()(x), network.train()(3 * x + 1)
    return y.sin().sum() + z.sin().sum()


def both_directions(network, x):
    y, z = network.inverse(x), network(3 * x + 1)
    return y.sin().sum() + z.sin().sum()


@pytest.mark.parametrize("train", [both_modes, both_directions])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)),
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Tanh()),
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout()),
        lambda: RunningMean(True),
        lambda: RunningMean(False),
    ],
)
def test_a_step_may_run_a_network_in_two_ways(make, train):
    assert_as_without(lambda: nn.Sequential(nn.Linear(4, 4), make()), train)


class Writes(nn.Module):
    """Changes its own weight when it runs in train mode."""

    def __init__(self, change):
        super().__init__()
        self.weight = nn.Parameter(3 * torch.randn(4, 4))
        self.change = change

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.change(self.weight)
        return (x @ self.weight).tanh()


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.copy_(w / w.norm(dim=1, keepdim=True)),
        lambda w: w.data.copy_(w / w.norm(dim=1, keepdim=True)),
        lambda w: w.mul_(0.9),
        lambda w: w.data.mul_(0.9),
    ],
)
def test_a_sub_network_may_change_its_own_parameters(change):
    def train(network, x):
        network.eval()(x)
        for _ in range(2):
            network.train()(x).sum().backward()
        return network(x).sin().sum()

    assert_as_without(lambda: Writes(change), train)


def test_lazy_parameters_are_made_once():
    f = nn.Sequential(nn.LazyLinear(6, dtype=torch.float64), nn.Dropout(), nn.Linear(6, 4).double())
    network = InvertibleSequential(AdditiveCoupling(f), Swap(), checkpoint=True)
    x = pair(5, 8)
    for _ in range(2):
        network(x)[1].sum().backward()
    assert f[0].weight.grad is not None


class OwnGenerator(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.generator = nn.Linear(4, 4), torch.Generator().manual_seed(3)

    def __deepcopy__(self, _):
        twin = OwnGenerator()
        twin.load_state_dict(self.state_dict())
        return twin

    def forward(self, x):
        return self.f(x) * torch.rand(4, generator=self.generator)


def test_a_generator_that_a_module_holds_is_rewound():
    assert_as_without(OwnGenerator, both_directions)


def test_a_large_buffer_that_changed_in_place_is_an_error():
    network = body(1, Table, checkpoint=True)
    loss = network(images().requires_grad_()).sum()
    network.get_submodule("2.f").table.fill_(2)
    with pytest.raises(RuntimeError, match=r"a buffer of layer 2 .* was changed in place"):
        loss.backward()


class Embedded(nn.Module):
    """Shortens its own embeddings as it runs."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(4, 2, max_norm=0.5)
        self.linear = nn.Linear(2, 2)

    def forward(self, x, labels):
        return self.linear(x) + self.embedding(labels)


def test_embeddings_may_shorten_themselves():
    def run(network):
        y1, y2 = network(pair(4, 4), torch.arange(4))
        return (y1 * y2).sum()

    layers = [x for _ in range(2) for x in (AdditiveCoupling(Embedded(), conditional=True), Swap())]
    assert_same_gradients(both(lambda: InvertibleSequential(*layers).double()), run)


def halve(network):
    vector = nn.utils.parameters_to_vector(network.parameters())
    nn.utils.vector_to_parameters(vector.detach() / 2, network.parameters())


def parametrize_weights(network):
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            nn.utils.parametrizations.weight_norm(layer)


@pytest.mark.parametrize("change", [halve, parametrize_weights])
def test_parameters_may_be_replaced_between_the_passes(change):
    network = InvertibleSequential(*couplings(4, linear)).double()
    parameters = [*network.parameters()]
    y1, y2 = network(pair(4, 4))
    expected = torch.autograd.grad((y1 * y2).sum(), parameters)
    network.checkpoint = True
    y1, y2 = network(pair(4, 4))
    change(network)
    found = torch.autograd.grad((y1 * y2).sum(), parameters)
    torch.testing.assert_close(found, expected)


def test_somebodys_module_with_parameters_runs_on_fake_tensors():
    class Mine(nn.Linear):
        pass

    with FakeTensorMode():
        network = InvertibleSequential(Split(), AdditiveCoupling(Mine(4, 4)), checkpoint=True)
        y1, y2 = network(torch.randn(2, 8))
        (y1 * y2).sum().backward()
    assert network[1].f.weight.grad.shape == (4, 4)
