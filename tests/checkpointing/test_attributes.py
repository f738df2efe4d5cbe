"""Sub-networks that keep tensors: what they keep is that of the forward pass."""

import gc
import weakref

import pytest
import torch
from torch import nn
from toys import TwiceEvaluated, both, images, linear, memory_of

from invertible import AdditiveCoupling, InvertibleSequential, Merge, Split, Swap


class Keeping(nn.Module):
    """Keeps an activation and an auxiliary loss: as they are, in a list, in a dictionary."""

    def __init__(self, width: int = 2, out: int | None = None):
        super().__init__()
        self.f = linear(width, out or width)
        self.kept = []
        self.named = {}

    def forward(self, x):
        h = self.f(x)
        self.h = h
        self.aux = h.square().mean()
        self.both = (h, self.aux)
        self.kept.append(h.mean())
        self.named["h"] = h
        return h


def network(make=Keeping, coupling=AdditiveCoupling, depth=3):
    layers = [layer for _ in range(depth) for layer in (coupling(make()), Swap())]
    return InvertibleSequential(Split(), *layers, Merge()).double()


def parts(net, kind=Keeping):
    return [part for part in net.modules() if isinstance(part, kind)]


KEPT = {
    "an auxiliary loss": lambda part: part.aux,
    "an activation": lambda part: part.h.sin().sum(),
    "a pair": lambda part: part.both[0].sum() * part.both[1],
    "a list": lambda part: sum(part.kept),
    "a dictionary": lambda part: part.named["h"].exp().sum(),
}


def twice_evaluated(f):
    return TwiceEvaluated(f)


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize(
    ("make", "coupling"),
    [(Keeping, AdditiveCoupling), (lambda: Keeping(2, 4), TwiceEvaluated)],
    ids=["one evaluation", "two evaluations"],
)
@pytest.mark.parametrize("when", ["with the loss", "later"])
def test_a_loss_of_what_a_sub_network_keeps_has_the_gradients_of_storing(
    name, make, coupling, when
):
    found = []
    for net in both(lambda: network(make, coupling)):
        loss = net(images(5, 4)).sin().sum()
        if when == "later":
            loss.backward(retain_graph=True)
            sum(map(KEPT[name], parts(net))).backward()
        else:
            (loss + sum(map(KEPT[name], parts(net)))).backward()
        found.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_what_is_kept_is_that_of_the_forward_pass():
    _, net = both(network)
    net(images(5, 4)).sum().backward()
    for part in parts(net):
        assert len(part.kept) == 1
        assert part.both[0] is part.h is part.named["h"]
    before = [part.h for part in parts(net)]
    y = net(images(5, 4))
    during = [part.h for part in parts(net)]
    y.sum().backward()
    assert all(part.h is h for part, h in zip(parts(net), during, strict=True))
    assert not any(one is other for one, other in zip(before, during, strict=True))


def test_what_was_taken_away_between_the_passes_stays_away():
    _, net = both(network)
    y = net(images(5, 4))
    taken = [part.__dict__.pop("h") for part in parts(net)]
    y.sum().backward()
    assert len(taken) == 3
    assert not any(hasattr(part, "h") for part in parts(net))


def test_numbers_in_attributes_are_left_as_they_are():
    class Counts(nn.Module):
        count = 0

        def forward(self, x):
            self.count += 1
            return x.tanh()

    _, net = both(lambda: network(Counts))
    net(images(5, 4).requires_grad_()).sum().backward()
    assert [part.count for part in parts(net, Counts)] == [2, 2, 2]


def test_a_hook_on_a_part_of_a_sub_network_keeps_that_of_the_forward_pass():
    def keep(module, _, output):
        module.seen = output

    found = []
    for net in both(lambda: network(linear)):
        for part in parts(net, nn.Linear):
            part.register_forward_hook(keep)
        net(images(5, 4)).sin().sum().backward(retain_graph=True)
        sum(part.seen.square().sum() for part in parts(net, nn.Linear)).backward()
        found.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_a_tensor_of_the_second_run_says_that_its_graph_is_gone():
    losses = []

    class Lists(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = linear()

        def forward(self, x):
            h = self.f(x)
            losses.append(h.square().mean())
            return h

    net = InvertibleSequential(*network(Lists), checkpoint=True).double()
    net(images(5, 4)).sum().backward(retain_graph=True)
    sum(losses[:3]).backward()  # of the forward pass
    for loss in losses[3:6]:
        with pytest.raises(RuntimeError, match=r"its graph is\s+gone.*is_rebuilding"):
            loss.backward()


@pytest.mark.parametrize("where", ["attribute", "list", "outer list"])
def test_nothing_of_the_second_run_outlives_its_layer(where):
    width, batch, outer = 64, 256, []

    class Holds(Keeping):
        def forward(self, x):
            h = self.f(x)
            kept = h.square().mean()
            if where == "attribute":
                self.aux = kept
            else:
                (self.kept if where == "list" else outer).append(kept)
            return h

    held = []
    for depth in (3, 9):
        _, net = both(lambda depth=depth: network(lambda: Holds(width), depth=depth))
        net.float()
        x = torch.randn(batch, 2 * width)

        def run(net=net, x=x):
            loss = net(x).square().mean()
            if where == "attribute":
                loss = loss + sum(part.aux for part in parts(net, Holds))
            loss.backward()

        run()  # makes the gradients
        gc.collect()
        held.append(memory_of(run).held)
    assert held[1] - held[0] < batch * width  # a quarter of a stream, for samples


def test_no_activation_is_reached_from_what_a_list_outside_keeps():
    kept, refs = [], []

    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = linear()

        def forward(self, x):
            h = self.f(x)
            refs.extend((weakref.ref(x), weakref.ref(h)))
            kept.append(h.square().sum())
            return h

    net = InvertibleSequential(*network(Holds), checkpoint=True).double()
    net(images(5, 4)).sum().backward()
    gc.collect()
    assert len(kept) == 6
    del kept[:3]  # of the forward pass, whose graph leads to the rebuilt tensors
    assert [ref() for ref in refs[6:]] == [None] * 6
