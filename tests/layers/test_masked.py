"""Masked treats each padded sequence as its layer treats that sequence by itself."""

import re
from operator import itemgetter

import pytest
import torch
from torch import nn
from toys import (
    Counting,
    assert_same_gradients,
    both,
    copied_in_both_ways,
    evaluations,
    images,
    memory_of,
)

from invertible import (
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    Coupling,
    InvertibleLinear,
    InvertibleSequential,
    Logit,
    Masked,
    Merge,
    OnStreams,
    Padded,
    Permute,
    Quantize,
    RationalQuadraticSpline,
    Split,
    Swap,
)
from invertible.testing import inversecheck

LENGTHS = torch.tensor([5, 2, 1])


def mask_of(lengths=LENGTHS, steps=5):
    return torch.arange(steps) < lengths[:, None]


class Convolutions(nn.Module):
    """Two convolutions that see nothing of the padding, as those of VITS."""

    def __init__(self, channels, out):
        super().__init__()
        self.first = nn.Conv1d(channels, 6, 3, padding=1)
        self.last = nn.Conv1d(6, out, 3, padding=1)

    def forward(self, x, mask):
        hidden = self.first(x).tanh() * mask[:, None]
        return self.last(hidden)


class Attention(nn.Module):
    """Each place (N, T, C) looks at all valid ones."""

    def __init__(self, channels, out):
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, 1, batch_first=True)
        self.last = nn.Linear(channels, out)

    def forward(self, x, mask):
        found, _ = self.attention(x, x, x, key_padding_mask=~mask, need_weights=False)
        return self.last(found)


def step(wrap):
    """ActNorm, a 1x1 convolution and couplings with each kind of map."""
    return InvertibleSequential(
        ActNorm(4),
        InvertibleLinear(4),
        Split(dim=1),
        AffineCoupling(wrap(Convolutions(2, 4)), scale="glow", shift_first=True, conditional=True),
        Swap(),
        Coupling(wrap(Convolutions(2, 22)), RationalQuadraticSpline(4), conditional=True),
        AdditiveCoupling(nn.Conv1d(2, 2, 1)),
        Merge(dim=1),
    )


def of_tokens(wrap):
    return InvertibleSequential(
        ActNorm(4, dim=-1),
        Split(dim=-1),
        AffineCoupling(wrap(Attention(2, 4)), conditional=True, dim=-1),
        Merge(dim=-1),
    )


def networks(make, dim=1):
    """The same network for padded sequences, and for one sequence."""
    torch.manual_seed(0)
    padded = make(lambda f: Padded(f, dim=dim)).double()
    torch.manual_seed(0)
    return Masked(padded, dim=dim), make(lambda f: f).double()


def sequences(dim=1):
    return images(3, 4, 5) if dim == 1 else images(3, 5, 4)


@pytest.mark.parametrize(("make", "dim"), [(step, 1), (of_tokens, -1)])
@pytest.mark.parametrize("way", ["forward_and_log_det", "inverse_and_log_det"])
def test_padded_sequences_are_treated_as_each_by_itself(make, dim, way):
    masked, single = networks(make, dim)
    x, mask = sequences(dim), mask_of()
    time = 2 if dim == 1 else 1
    masked(x, mask)
    single.load_state_dict(
        {name.replace("f.f.", "f."): value for name, value in masked.layer.state_dict().items()}
    )
    found, expected = (part.requires_grad_() for part in (x.clone(), x.clone()))
    y, log_det = getattr(masked, way)(found, mask)
    (y.sin().sum() + log_det @ log_det.new_tensor([1, 2, 3])).backward()
    for i, length in enumerate(LENGTHS.tolist()):
        alone = expected[i : i + 1].narrow(time, 0, length)
        z, of_one = getattr(single, way)(alone, mask[i : i + 1, :length])
        (z.sin().sum() + (i + 1) * of_one.sum()).backward()
        torch.testing.assert_close(y[i : i + 1].narrow(time, 0, length), z)
        torch.testing.assert_close(log_det[i], of_one[0])
    invalid = ~mask.unsqueeze(dim).expand_as(x)
    assert torch.equal(y[invalid], x[invalid])
    expected.grad += invalid * x.cos()  # of the padding, which was left out above
    torch.testing.assert_close(found.grad, expected.grad)
    torch.testing.assert_close(
        [p.grad for p in masked.parameters()], [p.grad for p in single.parameters()]
    )


def test_statistics_are_those_of_valid_places():
    x, mask = images(3, 4, 5), mask_of()
    x[~mask[:, None].expand_as(x)] = 1e6
    layer = Masked(ActNorm(4).double())
    y = layer(x, mask)
    valid = y.movedim(1, -1)[mask]
    torch.testing.assert_close(valid.mean(0), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(valid.std(0, correction=0), torch.ones(4, dtype=torch.float64))


def test_what_stands_in_the_padding_makes_no_difference():
    masked, _ = networks(step)
    x, mask = images(3, 4, 5).abs(), mask_of()
    masked = Masked(InvertibleSequential(Logit(), masked.layer))
    inside = x / (1 + x)
    results = []
    for padding in (0.0, 1e30, torch.nan):
        z = inside.masked_fill(~mask[:, None], padding).requires_grad_()
        y, log_det = masked.forward_and_log_det(z, mask)
        valid = y.movedim(1, -1)[mask]
        [gradient] = torch.autograd.grad(valid.sum() + log_det.sum(), z)
        results.append((valid, log_det, gradient))
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], rtol=0, atol=0)


def test_a_mask_of_all_places_changes_nothing():
    masked, single = networks(step)
    x, mask = images(3, 4, 5), torch.ones(3, 5, dtype=torch.bool)
    torch.testing.assert_close(
        masked.forward_and_log_det(x, mask), single.forward_and_log_det(x, mask)
    )


def test_images_and_rows_can_be_masked():
    x = images(2, 3, 4, 4).to(memory_format=torch.channels_last)
    mask = images(2, 4, 4) > 0
    layer = Masked(Permute([2, 0, 1]))
    y = layer(x, mask)
    torch.testing.assert_close(y, torch.where(mask[:, None], x[:, [2, 0, 1]], x), rtol=0, atol=0)
    assert y.is_contiguous(memory_format=torch.channels_last)
    rows, valid = images(4, 3), torch.tensor([True, False, True, True])
    y = layer(rows, valid)
    torch.testing.assert_close(y[valid], rows[valid][:, [2, 0, 1]], rtol=0, atol=0)
    assert torch.equal(y[1], rows[1])


def test_the_mask_can_be_a_part_of_the_context():
    class WithTime(Convolutions):
        def forward(self, x, context):
            return super().forward(x, context["mask"]) + context["time"][:, None, None]

    select = itemgetter("mask")
    inner = AffineCoupling(Padded(WithTime(2, 4), select), conditional=True)
    layer = Masked(InvertibleSequential(Split(dim=1), inner, Merge(dim=1)), select).double()
    mask, time = mask_of(), images(3)
    context = {"mask": mask, "time": time}
    x = images(3, 4, 5)
    y = layer(x, context)
    one = layer(x[:1], {"mask": mask[:1], "time": time[:1]})
    torch.testing.assert_close(y[:1], one)
    assert not torch.equal(layer(x, {"mask": mask, "time": time + 1}), y)
    torch.testing.assert_close(layer.inverse(y, context), x)


def test_sequences_without_a_valid_place_go_through():
    masked, _ = networks(step)
    x = images(3, 4, 5)
    masked(x, mask_of())
    y, log_det = masked.forward_and_log_det(x, mask_of(torch.tensor([3, 0, 0])))
    assert torch.equal(y[1:], x[1:])
    assert log_det[1:].tolist() == [0, 0]


@pytest.mark.parametrize("dim", [1, -1])
def test_it_keeps_the_laws(dim):
    masked, _ = networks(step if dim == 1 else of_tokens, dim)
    x = sequences(dim)
    masked(x, mask_of())
    inversecheck(masked, x, mask_of())


def test_a_layer_alone_that_takes_no_context_is_masked():
    x, mask = images(3, 4, 5), mask_of()
    layer = Masked(InvertibleLinear(4).double())
    _, log_det = layer.forward_and_log_det(x, mask)
    assert layer.conditional
    torch.testing.assert_close(log_det, LENGTHS * layer.layer.matrix().slogdet()[1])


# --- rebuilding


@pytest.mark.parametrize("way", ["forward_and_log_det", "inverse_and_log_det"])
@pytest.mark.parametrize("outside", [True, False])
def test_gradients_are_those_of_stored_activations_with_one_evaluation_more(way, outside):
    def make():
        masked, _ = networks(lambda wrap: step(lambda f: wrap(Counting(f))))
        masked(sequences(), mask_of())
        return InvertibleSequential(masked, Permute([1, 2, 3, 0])) if outside else masked

    def loss(network):
        y, log_det = getattr(network, way)(sequences(), mask_of())
        return y.sin().sum() + (log_det * torch.tensor([1.0, 2.0, 3.0])).sum()

    stored, rebuilt = both(make)
    before = evaluations(stored)
    assert_same_gradients([stored, rebuilt], loss)
    assert [now - then for now, then in zip(evaluations(stored), before, strict=True)] == [1, 1]
    assert [now - then for now, then in zip(evaluations(rebuilt), before, strict=True)] == [2, 2]


def test_an_additive_network_is_exact():
    q = 2**-10
    f = Padded(Convolutions(2, 2))
    inner = [Split(dim=1), AdditiveCoupling(f, conditional=True, quantum=q), Swap(), Merge(dim=1)]
    layer = Masked(InvertibleSequential(*inner, Permute([1, 0, 3, 2]), *inner)).double()
    assert layer.quantum == q
    x = (images(3, 4, 5) / q).round() * q
    y = layer(x, mask_of())
    assert not torch.equal(y, x)
    assert torch.equal(layer.inverse(y, mask_of()), x)


@pytest.mark.parametrize("outside", [True, False])
def test_gradients_of_an_exact_network_are_those_of_stored_activations_bit_for_bit(outside):
    def make():
        couplings = [
            layer
            for _ in range(3)
            for layer in (
                AdditiveCoupling(Padded(Convolutions(2, 2)), conditional=True, quantum=2**-16),
                Swap(),
            )
        ]
        masked = Masked(InvertibleSequential(Split(dim=1), *couplings, Merge(dim=1)))
        return InvertibleSequential(Quantize(2**-16), masked, Permute([3, 2, 1, 0]))

    stored, rebuilt = both(make)
    rebuilt.checkpoint = outside
    results = []
    for network in (stored, rebuilt):
        network(sequences().float(), mask_of()).sin().sum().backward()
        results.append([p.grad for p in network.parameters()])
    assert all(map(torch.equal, *results))


def test_memory_is_flat_in_what_is_inside():
    x, mask = torch.randn(16, 8, 200), mask_of(torch.arange(50, 210, 10), 200)

    def held(depth, checkpoint):
        couplings = [
            layer
            for _ in range(depth)
            for layer in (AffineCoupling(Padded(Convolutions(4, 8)), conditional=True), Swap())
        ]
        inner = InvertibleSequential(Split(dim=1), *couplings, Merge(dim=1), checkpoint=checkpoint)
        masked = Masked(inner)
        return memory_of(lambda: masked.forward_and_log_det(x, mask)).held / x.nbytes

    assert held(16, True) < held(2, True) + 0.5
    assert held(16, False) > 5 * held(2, False)


# --- what is refused

X = torch.zeros(3, 4, 5)


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda: Masked(nn.ReLU()), TypeError,
         "Masked takes an invertible layer, got a ReLU. Around a sub-network of a coupling put "
         "Padded."),
        (lambda: Masked(Swap(), dim=0), ValueError, "Masked cannot take dim=0, the batch"),
        (lambda: Masked(Permute([0]))(X), TypeError,
         "Masked is conditional and got no context. Call it as layer(x, context)."),
        (lambda: Masked(Permute([0]))(X, mask_of().float()), TypeError,
         "Masked takes a mask of bools, True where a place is valid, got a tensor of shape (3, 5) "
         "of torch.float32. By default the context is the mask; mask= says how to take it from "
         'another, for instance operator.itemgetter("mask").'),
        (lambda: Masked(Permute([0]))(X, {"mask": mask_of()}), TypeError, "got a dict. By default"),
        (lambda: Masked(Permute([0])).inverse(X, mask_of()[:, None]), ValueError,
         "Masked's inverse takes a mask of shape (3, 5), the input's (3, 4, 5) without its "
         "channels (dimension 1), got (3, 1, 5)."),
        (lambda: Masked(Permute([0]), dim=-1)(X, mask_of()), ValueError,
         "Masked takes a mask of shape (3, 4), the input's (3, 4, 5) without its channels "
         "(dimension -1), got (3, 5)."),
        (lambda: Masked(Swap())((X, X), mask_of()), TypeError, "Masked takes a tensor, got a tupl"),
        (lambda: Masked(Split(dim=1))(X, mask_of()), ValueError,
         "Masked hands its layer (Split) valid places of shape (8, 4, 1) and takes the same shape "
         "back, got a tuple of 2 (a tensor of shape (8, 2, 1), a tensor of shape (8, 2, 1)). Put "
         "Merge behind Split, and layers that change shapes outside."),
        (lambda: Padded(print), TypeError, "Padded takes a torch.nn.Module, got a builtin_functi"),
        (lambda: Padded(nn.ReLU(), dim=0), ValueError, "Padded cannot take dim=0, the batch"),
        (lambda: Padded(Convolutions(4, 4))(X, mask_of()), ValueError,
         "Padded takes the 8 valid places of a mask of shape (3, 5), each as an example of its "
         "own, got a tensor of shape (3, 4, 5). Put Masked around the network that it is in."),
        (lambda: Padded(nn.Identity())(X[:, :, :1], {}), TypeError, "Padded takes a mask of bools"),
        (lambda: Padded(Shorter())(torch.zeros(8, 4, 1), mask_of()), ValueError,
         "Padded's f (Shorter) must return a tensor whose places are those of the mask, (3, 5) "
         "without channels (dimension 1), got a tensor of shape (3, 4, 4)."),
    ],
)  # fmt: skip
def test_a_mistake_is_told(run, error, message):
    with pytest.raises(error, match=re.escape(message)):
        run()


class Shorter(nn.Module):
    def forward(self, x, _):
        return x[..., 1:]


@copied_in_both_ways
def test_copies_carry_layer_and_mask(again):
    select = itemgetter(0)
    layer = Masked(InvertibleLinear(4), select).double()
    x, context = images(3, 4, 5), (mask_of(), None)
    torch.testing.assert_close(again(layer)(x, context), layer(x, context), rtol=0, atol=0)


def test_it_runs_on_some_streams():
    x, mask = (images(3, 4, 5), images(3, 2)), mask_of()
    layer = OnStreams(0, Masked(Permute([1, 2, 3, 0])))
    assert torch.equal(layer(x, mask)[1], x[1])
    torch.testing.assert_close(layer.inverse(layer(x, mask), mask), x, rtol=0, atol=0)
