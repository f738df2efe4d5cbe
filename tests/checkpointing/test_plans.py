"""A plan is kept for as long as its module stays what it is, and no longer."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from toys import (
    Affine,
    Chained,
    Double,
    Keep,
    assert_same_step,
    both,
    copied_in_both_ways,
    images,
    linear,
    pair,
    step,
)

from invertible import (
    AdditiveCoupling,
    InvertibleSequential,
    Merge,
    OnStreams,
    Rebuild,
    Split,
    Swap,
    measure_drift,
    reversible_checkpoint,
)
from invertible.checkpointing.plans import plan_for
from invertible.direction import Direction


def network(**options):
    inner = InvertibleSequential(Split(), AdditiveCoupling(linear()), Swap(), Merge())
    return InvertibleSequential(inner, Affine(), **options)


FORWARD = Direction()


def plan_of(module, direction=FORWARD, rebuilds=True, asked=None):
    return plan_for(module, direction, rebuilds, asked)


def test_a_plan_is_made_once():
    module = network(checkpoint=True)
    assert plan_of(module) is plan_of(module)
    assert plan_of(module, Direction(True)) is plan_of(module, Direction(True))
    assert plan_of(module) is not plan_of(module, Direction(True))
    assert plan_of(module, rebuilds=False) is not plan_of(module)
    asked = Rebuild(anchor_every=2)
    assert plan_of(module, asked=asked) is not plan_of(module)


CHANGES = {
    "a layer replaced": lambda net: net.__setitem__(1, Keep()),
    "a layer added": lambda net: net.append(Keep()),
    "a layer taken out": lambda net: net.pop(),
    "two layers exchanged": lambda net: net[0].insert(2, net[0].pop(3)),
    "a layer inside replaced": lambda net: net[0].__setitem__(1, AdditiveCoupling(linear())),
    "f replaced": lambda net: setattr(net[0][1], "f", nn.Tanh()),
    "a part of f replaced": lambda net: net[0][1].f.__setitem__(1, nn.Dropout(0.5)),
    "a parameter replaced": lambda net: setattr(
        net[0][1].f[0], "bias", nn.Parameter(torch.zeros(2))
    ),
    "checkpoint": lambda net: setattr(net, "checkpoint", False),
    "settings": lambda net: setattr(net, "checkpoint", Rebuild(anchor_every=2)),
    "checkpoint inside": lambda net: setattr(net[0], "checkpoint", Rebuild(anchor_every=2)),
    "check_layers inside": lambda net: setattr(net[0], "check_layers", True),
    "a hook on a composition": lambda net: net[0].register_forward_hook(print),
    "a hook on f": lambda net: net[0][1].f.register_forward_pre_hook(print),
    "a forward of its own": lambda net: setattr(net[0], "forward", lambda x: x),
    "an inverse of its own": lambda net: setattr(net[1], "inverse", lambda x: x),
    "compiled": lambda net: net.compile_subnetworks(backend="eager"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_plan_is_made_anew_when_something_changed(name):
    module = network(checkpoint=True)
    before = plan_of(module)
    CHANGES[name](module)
    after = plan_of(module)
    assert after is not before
    assert plan_of(module) is after


class Changing(Double):
    """A layer whose claims about itself are settings."""

    factor, takes_context, is_bijective, only_moves, q = 2.0, False, True, False, None
    conditional = property(lambda self: self.takes_context)
    bijective = property(lambda self: self.is_bijective)
    moves_only = property(lambda self: self.only_moves)
    quantum = property(lambda self: self.q)

    def __init__(self):
        super().__init__()
        self.__dict__.update(takes_context=False, is_bijective=True, only_moves=False, q=None)

    def forward(self, x, context=None):
        return x if self.only_moves else self.factor * x + (0 if context is None else context)

    def inverse(self, y, context=None):
        return y if self.only_moves else (y - (0 if context is None else context)) / self.factor


@pytest.mark.parametrize(
    ("name", "value"),
    [("takes_context", True), ("only_moves", True), ("is_bijective", False), ("q", 0.5)],
)
def test_a_layer_of_ones_own_may_change_what_it_claims(name, value):
    module = InvertibleSequential(Affine(), Changing(), checkpoint=True)
    before = plan_of(module)
    setattr(module[1], name, value)
    assert plan_of(module) is not before


def test_a_layer_that_takes_a_context_from_now_on_gets_it():
    stored, rebuilt = both(lambda: InvertibleSequential(Affine(), Changing(), Affine()).double())
    assert_same_step(step(rebuilt, images(3, 4)), step(stored, images(3, 4)))
    stored[1].takes_context = rebuilt[1].takes_context = True
    context = images(3, 4).exp()
    assert_same_step(step(rebuilt, images(3, 4), context), step(stored, images(3, 4), context))
    for net in (stored, rebuilt):
        net[1].takes_context, net[1].only_moves = False, True
    assert_same_step(step(rebuilt, images(3, 4)), step(stored, images(3, 4)))


def test_taking_a_hook_away_is_seen():
    module = network(checkpoint=True)
    hook = module[0].register_forward_hook(lambda *_: None)
    assert len(plan_of(module).steps) == 2
    hook.remove()
    assert len(plan_of(module).steps) == 5


@pytest.mark.parametrize("change", [lambda net: net.double(), lambda net: net.eval()])
def test_what_changes_no_member_keeps_the_plan(change):
    module = network(checkpoint=True)
    before = plan_of(module)
    change(module)
    assert plan_of(module) is before


def test_other_streams_are_seen():
    module = InvertibleSequential(OnStreams(0, Double()))
    x = pair()
    torch.testing.assert_close(module(x), (2 * x[0], x[1]), rtol=0, atol=0)
    module[0].streams = 1
    torch.testing.assert_close(module(x), (x[0], 2 * x[1]), rtol=0, atol=0)


def test_containers_of_ones_own_may_list_others_in_each_run():
    module = Chained(Double(), Keep())
    x = images()
    assert torch.equal(module(x), 2 * x)
    module.members = lambda: Chained.members(module)[1:]
    assert torch.equal(module(x), x)
    del module.members
    assert torch.equal(InvertibleSequential(module)(x), 2 * x)


def test_anchors_follow_the_setting():
    module = InvertibleSequential(*(Affine(0.3, 0.7) for _ in range(4))).double()
    for every, anchors in ((2, 2), (1, 4), (None, 0), (2, 2)):
        module.checkpoint = Rebuild(anchor_every=every)
        with measure_drift() as drift:
            module(images()).sin().sum().backward()
        assert sum(row.error == 0 for row in drift.rows) == anchors


# --- copies, and the end


@copied_in_both_ways
def test_a_copy_runs_its_own_layers(again):
    module = network(checkpoint=True).double()
    x = images(3, 4)
    y = module(x)
    twin = again(module)
    with torch.no_grad():
        twin[1].shift.add_(1)
    torch.testing.assert_close(twin(x), y + 1)
    torch.testing.assert_close(module(x), y, rtol=0, atol=0)


@pytest.mark.parametrize("shallow", [copy.copy, lambda m: m._replicate_for_data_parallel()])
def test_shallow_copies_with_other_layers_run_them(shallow):
    """As ``nn.DataParallel`` makes its replicas."""
    module = network(checkpoint=True)
    module[1] = Affine(0.0, 5.0)
    x = images(3, 4, dtype=torch.float32)
    y = module(x)
    twins = [shallow(module) for _ in range(2)]
    for i, twin in enumerate(twins):
        twin._modules = dict(module._modules) | {"1": Affine(0.0, float(i))}
    for i, twin in enumerate(twins):
        torch.testing.assert_close(twin(x), y - module[1].shift + i)
    torch.testing.assert_close(module(x), y, rtol=0, atol=0)


def test_state_dicts_and_pickles_carry_no_plans():
    module = network(checkpoint=True)
    module(images(3, 4, dtype=torch.float32))
    assert not [name for name in module.__getstate__() if "plan" in name]
    assert list(module.state_dict()) == list(network().state_dict())


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_network_goes_as_soon_as_nobody_needs_it(checkpoint):
    gc.collect()
    gc.disable()
    try:
        module = network(checkpoint=checkpoint)
        module(images(3, 4, dtype=torch.float32)).sum().backward()
        weight = weakref.ref(module[1].shift)
        del module
        assert weight() is None
    finally:
        gc.enable()


def test_a_network_that_its_hooks_refer_to_goes_too():
    """As those of ``fully_shard`` do."""
    module = network(checkpoint=True)
    module[0].register_forward_hook(lambda *_, whole=module: whole.training and None)
    module(images(3, 4, dtype=torch.float32)).sum().backward()
    weight = weakref.ref(module[1].shift)
    del module
    gc.collect()
    assert weight() is None


def test_a_layer_by_itself_goes_too():
    layer = Affine()
    reversible_checkpoint(layer, images(3, 4)).sum().backward()
    weight = weakref.ref(layer.shift)
    del layer
    assert weight() is None
