"""ReversibleBlock is two couplings, one on each stream."""

import pytest
import torch
from hypothesis import given
from torch import nn
from toys import (
    AddsContext,
    Counting,
    Function,
    assert_same_gradients,
    batch_norm_net,
    both,
    bottleneck,
    copied_in_both_ways,
    evaluations,
    images,
    linear,
    pair,
)

from invertible import (
    AdditiveCoupling,
    Inverse,
    InvertibleSequential,
    Merge,
    Quantize,
    ReversibleBlock,
    Split,
    Swap,
)
from invertible.testing.strategies import pairs


def block(**options):
    return ReversibleBlock(AddsContext(2), AddsContext(2), **options).double()


@given(x=pairs())
def test_both_streams_are_shifted_the_second_by_the_new_first(x):
    c1, c2 = (stream.shape[1] for stream in x)
    f, g = nn.Conv2d(c2, c1, 1).double(), nn.Conv2d(c1, c2, 1).double()
    y1, y2 = ReversibleBlock(f, g)(x)
    torch.testing.assert_close(y1, x[0] + f(x[1]), rtol=0, atol=0)
    torch.testing.assert_close(y2, x[1] + g(y1), rtol=0, atol=0)


def test_it_is_two_couplings_and_two_swaps():
    f, g = bottleneck(2), bottleneck(2)
    layers = (AdditiveCoupling(f), Swap(), AdditiveCoupling(g), Swap())
    ours, theirs = ReversibleBlock(f, g).double().eval(), InvertibleSequential(*layers).eval()
    for method in ("forward", "inverse"):
        found, expected = (getattr(net, method)(pair()) for net in (ours, theirs))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_parameters_are_named_after_f_and_g_and_are_there_once():
    block = ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2))
    assert [name for name, _ in block.named_parameters()] == [
        *("f.weight", "f.bias"),
        *("g.weight", "g.bias"),
    ]
    assert list(block.state_dict()) == [name for name, _ in block.named_parameters()]


def test_f_and_g_may_be_one():
    f = linear().double()
    block, x = ReversibleBlock(f, f), pair(3, 4)
    assert len(list(block.parameters())) == 2
    torch.testing.assert_close(block.inverse(block(x)), x)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("name", ["f", "g"])
def test_f_and_g_may_be_replaced(name, checkpoint):
    block = ReversibleBlock(nn.Tanh(), nn.Tanh())
    network = InvertibleSequential(block, checkpoint=checkpoint)
    x = tuple(part.requires_grad_() for part in pair())
    network(x)
    f, g = nn.Tanh(), nn.Tanh()
    other = nn.Sequential(nn.Sigmoid())
    setattr(block, name, other)
    f, g = (other, g) if name == "f" else (f, other)
    y1 = x[0] + f(x[1])
    for net in (block, network):
        torch.testing.assert_close(net(x), (y1, x[1] + g(y1)), rtol=0, atol=0)
        torch.testing.assert_close(net.inverse(net(x)), x)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_parts_of_f_may_be_replaced(checkpoint):
    block = ReversibleBlock(nn.Sequential(nn.Tanh()), nn.Tanh())
    network = InvertibleSequential(block, checkpoint=checkpoint)
    network(pair())
    block.f[0] = nn.Linear(2, 2).double()
    x = pair()
    y = network(x)
    torch.testing.assert_close(y[0], x[0] + block.f(x[1]))
    y[1].sum().backward()
    assert block.f[0].weight.grad is not None


@pytest.mark.parametrize("conditional", [True, (True, True), (True, False), (False, True)])
def test_a_context_reaches_those_that_take_one(conditional):
    takes = conditional if isinstance(conditional, tuple) else (conditional,) * 2
    f, g = (AddsContext(2) if one else bottleneck(2) for one in takes)
    block = ReversibleBlock(f, g, conditional=conditional).double().eval()
    context, (x1, x2) = torch.tensor([0.5, 2.0], dtype=torch.float64), pair()
    y1 = x1 + (f(x2, context) if takes[0] else f(x2))
    y2 = x2 + (g(y1, context) if takes[1] else g(y1))
    assert block.conditional
    assert block.requires_context
    torch.testing.assert_close(block((x1, x2), context), (y1, y2), rtol=0, atol=0)
    torch.testing.assert_close(block.inverse((y1, y2), context), (x1, x2))
    with pytest.raises(TypeError, match="ReversibleBlock is conditional and got no context"):
        block((x1, x2))


@pytest.mark.parametrize("conditional", [True, (True, False), (False, True)])
def test_a_context_gets_the_gradients_of_ordinary_training(conditional):
    takes = conditional if isinstance(conditional, tuple) else (conditional,) * 2

    def make():
        f, g = (AddsContext(2) if one else bottleneck(2) for one in takes)
        return InvertibleSequential(
            *(2 * [ReversibleBlock(f, g, conditional=conditional)])
        ).double()

    networks = both(make)
    contexts = {
        net: torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True) for net in networks
    }
    assert_same_gradients(networks, lambda net: net(pair(), contexts[net])[1].sin().sum())
    torch.testing.assert_close(*(context.grad for context in contexts.values()))


def test_a_context_that_nothing_would_use_is_refused():
    plain = ReversibleBlock(nn.Tanh(), nn.Tanh())
    assert not plain.conditional
    with pytest.raises(
        TypeError, match=r"ReversibleBlock got a context .* nothing in it would use"
    ):
        plain(pair(), images())


@pytest.mark.parametrize("training", [True, False])
def test_each_part_is_evaluated_once_more_with_a_checkpoint_of_its_own(training):
    block = ReversibleBlock(*(Counting(batch_norm_net()) for _ in "fg")).double().train(training)
    block.checkpoint = True
    block(pair())[1].sum().backward()
    assert evaluations(block) == [2, 2]
    assert block.f.f[0].num_batches_tracked == int(training)


def test_log_determinants_are_zero():
    for method in ("forward_and_log_det", "inverse_and_log_det"):
        assert getattr(ReversibleBlock(nn.Tanh(), nn.Tanh()), method)(pair())[1].tolist() == [0, 0]


def test_with_a_quantum_it_is_exact():
    q = 2**-10
    block = ReversibleBlock(bottleneck(2), bottleneck(2), quantum=q).eval()
    assert block.exact
    assert block.quantum == q
    network = InvertibleSequential(Quantize(q), Split(), block, Inverse(block), block, Merge())
    x = images(dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(network.inverse(network(x)), Quantize(q)(x))


@copied_in_both_ways
def test_copies_and_state_dicts_carry_f_and_g(again):
    block = ReversibleBlock(linear(), linear()).double()
    expected = block(pair(3, 4))
    other = ReversibleBlock(linear(), linear()).double()
    other.load_state_dict(block.state_dict())
    for same in (other, again(block)):
        torch.testing.assert_close(same(pair(3, 4)), expected, rtol=0, atol=0)
    twin = again(block)
    with torch.no_grad():
        twin.f[0].bias.add_(1)
    assert not torch.equal(twin(pair(3, 4))[0], expected[0])


def test_its_parts_are_shown():
    assert repr(ReversibleBlock(nn.Tanh(), nn.ReLU())) == (
        "ReversibleBlock(\n  (f): Tanh()\n  (g): ReLU()\n)"
    )


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ReversibleBlock(torch.tanh, nn.Tanh()), TypeError, "Module as f, got a"),
        (lambda: ReversibleBlock(nn.Tanh(), None), TypeError, "Module as g, got None"),
        (
            lambda: ReversibleBlock(nn.Tanh(), nn.Tanh(), conditional=(True,)),
            ValueError,
            r"conditional as a bool or a pair of them, got \(True,\)",
        ),
        (
            lambda: ReversibleBlock(nn.Tanh(), nn.Tanh(), quantum=0.3),
            ValueError,
            "takes a power of two as quantum",
        ),
    ],
)
def test_a_mistake_is_told_when_it_is_made(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("checkpoint", [False, True])
def test_an_error_says_whether_it_was_in_f_or_g(checkpoint):
    block = ReversibleBlock(nn.Tanh(), nn.Linear(3, 2))
    block.checkpoint = checkpoint
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught:
        block(pair(3, 4, dtype=torch.float32))
    assert caught.value.__notes__[-1] == "In layer g (AdditiveCoupling) of ReversibleBlock."
    with pytest.raises(TypeError, match="takes a pair of tensors, got a tensor"):
        block(images())


# --- contexts that may be missing


class MayDoWithout(nn.Module):
    """Uses a context if there is one."""

    def forward(self, x, context=None):
        return x if context is None else x + context.view(-1, 1, 1, 1)


CONTEXT = torch.tensor([1.0, 2.0], dtype=torch.float64)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("method", ["forward", "inverse", "forward_and_log_det"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: AdditiveCoupling(MayDoWithout(), conditional=True),
        lambda: ReversibleBlock(MayDoWithout(), MayDoWithout(), conditional=True),
        lambda: ReversibleBlock(MayDoWithout(), nn.Tanh(), conditional=(True, False)),
        lambda: InvertibleSequential(
            AdditiveCoupling(MayDoWithout(), conditional=True), Swap(), AdditiveCoupling(nn.Tanh())
        ),
        lambda: Inverse(InvertibleSequential(AdditiveCoupling(MayDoWithout(), conditional=True))),
        lambda: AdditiveCoupling(
            Function(lambda x, context=None: x if context is None else 2 * x), conditional=True
        ),
    ],
)
def test_a_context_may_be_missing_where_f_has_a_default(make, method, checkpoint):
    network = InvertibleSequential(make(), checkpoint=checkpoint)
    assert network.conditional
    assert not network.requires_context
    layer = make()
    x = tuple(part.requires_grad_() for part in pair())
    for context in ((), (CONTEXT,)):
        expected = getattr(layer, method)(x, *context)
        found = getattr(network, method)(x, *context)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        y = (
            found[0]
            if method == "forward"
            else found[0][0]
            if isinstance(found[0], tuple)
            else found[0]
        )
        y.sum().backward()
    with_context, without = layer(x, CONTEXT), layer(x)
    assert not torch.equal(with_context[0], without[0]) or not torch.equal(
        with_context[1], without[1]
    )


@pytest.mark.parametrize("method", ["forward", "inverse", "forward_and_log_det"])
def test_one_layer_that_requires_a_context_is_enough(method):
    network = InvertibleSequential(
        AdditiveCoupling(MayDoWithout(), conditional=True),
        Swap(),
        AdditiveCoupling(AddsContext(2), conditional=True),
    ).double()
    assert network.requires_context
    getattr(network, method)(pair(), CONTEXT)
    with pytest.raises(TypeError, match="InvertibleSequential is conditional and got no context"):
        getattr(network, method)(pair())
    with pytest.raises(TypeError, match="ReversibleBlock is conditional and got no context"):
        ReversibleBlock(AddsContext(2), MayDoWithout(), conditional=True)(pair())


def test_an_f_without_a_default_requires_its_context():
    takes_all = Function(lambda *inputs: sum(inputs))
    for f in (AddsContext(2), Function(lambda x, context: x + context)):
        assert AdditiveCoupling(f, conditional=True).requires_context
    assert not AdditiveCoupling(nn.Tanh()).requires_context
    assert AdditiveCoupling(takes_all, conditional=True).conditional
