"""A layer that runs again gets the context that it got the first time."""

import collections
import dataclasses
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from toys import both, couplings, images, pair

from invertible import AdditiveCoupling, InvertibleSequential, Swap
from invertible.checkpointing.contexts import KeptContext


class Uses(nn.Module):
    """A sub-network that gets numbers out of a context."""

    def __init__(self, get):
        super().__init__()
        self.f, self.get = nn.Linear(2, 2), get

    def forward(self, x, context):
        return self.f(x).tanh() + self.get(context)


def numbers() -> Tensor:
    return torch.randn(4, 2, dtype=torch.float64)


def gradients(make, get, change):
    """Of a network with rebuilt activations, and of one with stored ones."""
    found = []

    def layers():
        return [
            x for _ in range(3) for x in (AdditiveCoupling(Uses(get), conditional=True), Swap())
        ]

    for network in both(lambda: InvertibleSequential(*layers()).double()):
        torch.manual_seed(0)
        context = make()
        y1, y2 = network(pair(4, 4), context)
        change(context)
        (y1 * y2).sum().backward()
        found.append([p.grad for p in network.parameters()])
    return found


def nested():
    return {"a": numbers(), "b": [numbers(), {"c": numbers()}], "scale": 2.0}


def from_nested(context):
    return context["a"] + context["b"][0] * context["b"][1]["c"] * context["scale"]


@pytest.mark.parametrize(
    "change",
    [
        lambda context: context.update(more=numbers()),
        lambda context: context.update(a=numbers()),
        lambda context: context.update(scale=5.0),
        lambda context: context["b"].append(numbers()),
        lambda context: context["b"].__setitem__(0, numbers()),
        lambda context: context["b"][1].update(c=numbers()),
        lambda context: context["b"].clear(),
        lambda context: context.clear(),
    ],
)
def test_dicts_and_lists_may_change_afterwards(change):
    torch.testing.assert_close(*gradients(nested, from_nested, change))


@dataclasses.dataclass
class Record:
    a: object
    b: object = None


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    a: object


class Plain:
    def __init__(self, a):
        self.a = a


class Named(NamedTuple):
    a: object
    b: object = None


OBJECTS = [Record, Frozen, Plain, lambda a: SimpleNamespace(a=a)]


@pytest.mark.parametrize("make", OBJECTS)
def test_attributes_may_change_afterwards(make):
    def replace(context):
        object.__setattr__(context, "a", numbers())

    torch.testing.assert_close(*gradients(lambda: make(numbers()), lambda c: c.a, replace))
    torch.testing.assert_close(
        *gradients(lambda: make([numbers()]), lambda c: c.a[0], lambda c: c.a.clear())
    )


@pytest.mark.parametrize(
    ("make", "get", "change"),
    [
        (lambda: Named(numbers(), [numbers()]), lambda c: c.a + c.b[0], lambda c: c.b.clear()),
        (
            lambda: collections.defaultdict(list, a=numbers()),
            lambda c: c["a"],
            lambda c: c.update(a=numbers()),
        ),
        (
            lambda: collections.UserDict(a=numbers()),
            lambda c: c["a"],
            lambda c: c.update(a=numbers()),
        ),
        (lambda: collections.deque([numbers()]), lambda c: c[0], lambda c: c.clear()),
        (
            lambda: torch.distributions.Normal(numbers(), 1),
            lambda c: c.mean,
            lambda c: setattr(c, "loc", numbers()),
        ),
    ],
)
def test_other_containers_may_change_afterwards(make, get, change):
    torch.testing.assert_close(*gradients(make, get, change))


def packed():
    lengths = torch.tensor([3, 2, 1, 1])
    return nn.utils.rnn.pack_padded_sequence(
        torch.randn(4, 3, 2, dtype=torch.float64), lengths, batch_first=True
    )


def from_packed(context):
    return nn.utils.rnn.pad_packed_sequence(context, batch_first=True)[0].sum(1)


def jagged():
    parts = [torch.randn(i + 1, 2, dtype=torch.float64) for i in range(4)]
    return torch.nested.nested_tensor(parts, layout=torch.jagged)


@pytest.mark.parametrize(
    ("make", "get", "change"),
    [
        (numbers, lambda c: c, lambda c: c.mul_(2)),
        (nested, from_nested, lambda c: c["b"][1]["c"].mul_(2)),
        *(
            (lambda make=make: make(numbers()), lambda c: c.a, lambda c: c.a.mul_(2))
            for make in OBJECTS
        ),
        (lambda: Named(numbers()), lambda c: c.a, lambda c: c.a.mul_(2)),
        (packed, from_packed, lambda c: c.data.mul_(2)),
        (jagged, lambda c: c.to_padded_tensor(0.0)[:, 0], lambda c: c.mul_(2)),
        (
            lambda: nn.ParameterDict({"a": nn.Parameter(numbers(), requires_grad=False)}),
            lambda c: c["a"],
            lambda c: c["a"].mul_(2),
        ),
    ],
)
def test_a_tensor_that_changed_in_place_is_an_error(make, get, change):
    with pytest.raises(RuntimeError, match="context was changed in place"):
        gradients(make, get, change)


@pytest.mark.parametrize(
    ("make", "get"), [(packed, from_packed), (jagged, lambda c: c.to_padded_tensor(0.0)[:, 0])]
)
def test_contexts_may_be_of_types_of_their_own(make, get):
    torch.testing.assert_close(*gradients(make, get, lambda _: None))


def caches(context):
    if "doubled" not in context:
        context["doubled"] = 2 * context["a"]
    return context["doubled"]


def counts(context):
    context["calls"] = context.get("calls", 0) + 1
    return context["a"] * context["calls"]


@pytest.mark.parametrize("get", [caches, counts])
def test_each_layer_gets_what_those_before_left_of_it(get):
    torch.testing.assert_close(*gradients(lambda: {"a": numbers()}, get, lambda _: None))


def test_layers_without_context_do_not_mind_what_becomes_of_it():
    plain = couplings(1, lambda: nn.Linear(2, 2))
    conditional = AdditiveCoupling(Uses(lambda c: c), conditional=True)
    network = InvertibleSequential(conditional, Swap(), *plain, checkpoint=True).double()
    context = numbers()
    y1, y2 = network(pair(4, 4), context)
    context.mul_(2)
    (y1 + y2).sin().sum().backward(inputs=list(plain[0].parameters()))


def test_only_containers_are_copied():
    shared = images()
    given = {"a": shared, "b": (1, shared), "c": [object]}
    again = KeptContext(given).again()
    assert again == given
    assert again is not given
    assert again["a"] is shared
    assert again["b"] is given["b"]
    assert again["c"] is not given["c"]


def test_what_an_object_refers_to_is_not_searched():
    inner = Plain([numbers()])
    assert KeptContext(Plain(inner)).again().a is inner


def test_a_container_may_contain_itself():
    context = {"a": numbers()}
    context["itself"] = context
    again = KeptContext(context).again()
    assert again["itself"] is again
