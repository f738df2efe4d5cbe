"""What can't be rebuilt is an error that says so, and leaves no trace."""

import copy
import re
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from toys import (
    AddsContext,
    Affine,
    Keep,
    assert_same_step,
    batch_norm_net,
    body,
    body_images,
    copied_in_both_ways,
    images,
    pair,
    step,
)

from invertible import (
    AdditiveCoupling,
    InvertibleModule,
    InvertibleSequential,
    Merge,
    OnStreams,
    PixelUnshuffle,
    Rebuild,
    Split,
    Swap,
)

# --- changed between the passes


def test_a_changed_parameter_is_an_error():
    network = body(checkpoint=True)
    loss = network(body_images()).sum()
    with torch.no_grad():
        network[4].f[2].weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"parameter of layer 4 \(AdditiveCoupling\)"):
        loss.backward()


@pytest.mark.parametrize("end", [None, -1])
def test_a_changed_output_is_an_error(end):
    network = body(checkpoint=True)[:end]
    y = network(body_images())
    loss = sum(part.sum() for part in y)
    with torch.no_grad():
        y[0].add_(1)
    with pytest.raises(RuntimeError, match=r"output of a composition.*changed in place"):
        loss.backward()


def test_a_changed_anchor_is_an_error():
    network = InvertibleSequential(Affine(), checkpoint=Rebuild(anchor_every=1))
    x = images().requires_grad_() * 1
    loss = network(x).sum()
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match=r"state of a composition.*changed in place"):
        loss.backward()


def test_a_changed_context_is_an_error():
    network = InvertibleSequential(
        Split(), AdditiveCoupling(AddsContext(2).double(), conditional=True), checkpoint=True
    )
    context = torch.ones(2, dtype=torch.float64)
    loss = network(images(), context)[0].sum()
    context.zero_()
    with pytest.raises(RuntimeError, match="context was changed in place"):
        loss.backward()


# --- another run than before


class OutOfTurn(nn.Module):
    """Does something else when it is evaluated for the second time."""

    def __init__(self, first, second):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.acts = iter([first, second])

    def forward(self, x):
        return next(self.acts)(self.conv(x))


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (lambda y: y, torch.tanh, "saved other tensors"),
        (torch.tanh, lambda y: y, "saved other tensors"),
        (lambda y: y + torch.rand(1), lambda y: y + torch.rand(2)[1], "was not rebuilt as it ran"),
        (lambda y: y, lambda y: y[:, :2], "must return a tensor of the first stream's shape"),
    ],
)
def test_a_sub_network_that_does_something_else_is_an_error(first, second, message):
    network = body(1, lambda: OutOfTurn(first, second), checkpoint=True)
    with pytest.raises((RuntimeError, ValueError), match=message) as caught:
        network(body_images()).sum().backward()
    assert "In layer" not in "".join(getattr(caught.value, "__notes__", []))


def test_a_tensor_that_its_gradient_needs_changed_in_place_is_an_error():
    class Bad(nn.Module):
        def forward(self, x):
            return x.sigmoid().mul_(2)

    network = body(1, Bad, checkpoint=True)
    with pytest.raises(RuntimeError, match="changes a tensor in place that its gradient needs"):
        network(body_images().requires_grad_()).sum().backward()


class ForgetsShape(Keep):
    def forward(self, x):
        return x.clone()

    def inverse(self, y):
        return y[:, :1]


class ForgetsDtype(ForgetsShape):
    def inverse(self, y):
        return y.float()


@pytest.mark.parametrize("layer", [ForgetsShape, ForgetsDtype])
def test_an_input_that_comes_back_as_another_is_an_error(layer):
    network = InvertibleSequential(
        Split(), AdditiveCoupling(nn.Tanh()), Merge(), layer(), checkpoint=True
    )
    with pytest.raises(RuntimeError, match=r"layer 3 \(Forgets.*and was rebuilt with"):
        network(images().requires_grad_()).sum().backward()


# --- errors of sub-networks


class Failing(nn.Module):
    """Fails when it is run for the given time."""

    def __init__(self, time=100):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.time = time
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls == self.time:
            raise ArithmeticError("on purpose")
        return self.norm(self.conv(x))


@pytest.mark.parametrize(
    ("time", "note"), [(1, "In layer 2"), (2, "While layer 2 .* was rebuilt in the backward pass")]
)
def test_an_error_in_a_sub_network_names_the_layer_and_leaves_no_trace(time, note):
    network = body(2, Failing, checkpoint=True)
    network[2].f.time = time
    with pytest.raises(ArithmeticError, match="on purpose") as caught:
        network(body_images()).sum().backward()
    assert re.search(note, "".join(caught.value.__notes__))
    # and the next step is an ordinary one
    stored = copy.deepcopy(network)
    stored.checkpoint = False
    assert_same_step(step(network, body_images()), step(stored, body_images()))


# --- the same errors with and without


class Named(NamedTuple):
    a: Tensor
    b: Tensor


class Returns(InvertibleModule):
    """Returns what it is told to make of its state."""

    def __init__(self, make):
        super().__init__()
        self.make = make
        self.w = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.make(x[0] * self.w, x[1])

    inverse = forward


@pytest.fixture(params=[False, True], ids=["stored", "rebuilt"])
def checkpoint(request):
    return request.param


@pytest.mark.parametrize("method", ["forward", "inverse"])
@pytest.mark.parametrize(
    "make",
    [
        lambda a, b: {"a": a, "b": b},
        lambda a, b: [a, b],
        Named,
        lambda a, _: (a, 3),
        lambda a, b: (a, [b]),
        lambda *_: (),
        lambda *_: None,
    ],
    ids=["dict", "list", "named tuple", "a number", "a list inside", "empty", "nothing"],
)
def test_a_layer_that_returns_no_state_is_refused(make, checkpoint, method):
    network = InvertibleSequential(Swap(), Returns(make), Swap(), checkpoint=checkpoint)
    with pytest.raises(
        TypeError, match=r"^Returns must return a tensor or a plain tuple of tensors, got "
    ) as caught:
        getattr(network, method)(pair())
    assert caught.value.__notes__ == ["In layer 1 (Returns) of InvertibleSequential."]


@pytest.mark.parametrize("inner", [Swap, lambda: InvertibleSequential(Swap())])
def test_a_hook_that_makes_no_state_is_refused(inner, checkpoint):
    network = InvertibleSequential(Swap(), inner(), Swap(), checkpoint=checkpoint)
    network[1].register_forward_hook(lambda *given: list(given[-1]))
    with pytest.raises(TypeError, match="must return a tensor or a plain tuple of tensors, got a"):
        network(pair())


@pytest.mark.parametrize("method", ["forward", "inverse"])
@pytest.mark.parametrize("make", [lambda a, b: {"a": a, "b": b}, lambda a, b: [a, b], Named])
@pytest.mark.parametrize(
    "network", [lambda: InvertibleSequential(Keep()), lambda: OnStreams(0, Keep())]
)
def test_no_state_of_another_type_passes(network, make, checkpoint, method):
    network = network()
    network.checkpoint = checkpoint
    x = make(*(part.requires_grad_() for part in pair()))
    with pytest.raises(TypeError, match=r"tuple of tensors, got .*tuple\(x"):
        getattr(network, method)(x)


def test_an_error_is_noted_alike(checkpoint):
    inner = InvertibleSequential(Swap(), OnStreams(1, PixelUnshuffle(2)))
    network = InvertibleSequential(Split(), inner, checkpoint=checkpoint)
    with pytest.raises(ValueError, match="multiples of its factor 2") as caught:
        network(torch.randn(1, 4, 3, 3, requires_grad=True))
    assert caught.value.__notes__ == [
        "In layer 1.1.layer (PixelUnshuffle) of InvertibleSequential."
    ]


def test_an_error_in_a_sub_network_is_noted_alike(checkpoint):
    network = InvertibleSequential(
        Split(), AdditiveCoupling(batch_norm_net(3)).double(), checkpoint=checkpoint
    )
    with pytest.raises(RuntimeError, match="should contain 2 elements not 3") as caught:
        network(images())
    assert caught.value.__notes__ == [
        "In AdditiveCoupling's f (Sequential), given a second stream of shape (2, 2, 2, 2), "
        "torch.float64 on cpu.",
        "In layer 1 (AdditiveCoupling) of InvertibleSequential.",
    ]


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="anchor_every of at least 1, got 0"):
        Rebuild(anchor_every=0)
    with pytest.raises(TypeError, match=r"Rebuild\(anchor_every=4\), got 4"):
        InvertibleSequential(Swap(), checkpoint=4)


@copied_in_both_ways
def test_settings_are_values(again):
    assert again(Rebuild(anchor_every=3)) == Rebuild(anchor_every=3) != Rebuild()
