"""A plan lists the layers of a composition in running order, through all compositions in it."""

import pytest
import torch
from torch import nn
from toys import Affine, Chained, Double, Keep, linear

from invertible import (
    AdditiveCoupling,
    InjectivePad,
    Inverse,
    InvertibleModule,
    InvertibleSequential,
    Merge,
    OnStreams,
    PairScaling,
    Parallel,
    Permute,
    Quantize,
    Rebuild,
    ReversibleBlock,
    Split,
    Swap,
)
from invertible.checkpointing.plan import Branches, Plan
from invertible.direction import Direction

FORWARD, INVERSE = Direction(), Direction(inverted=True)


def steps_of(plan_or_steps):
    """The steps, those in branches among them."""
    for step in getattr(plan_or_steps, "steps", plan_or_steps):
        if isinstance(step, Branches):
            for _, inner in step.members:
                yield from steps_of(inner)
        else:
            yield step


def names(module, direction=FORWARD):
    return [step.name for step in steps_of(Plan(module, direction))]


def runs(module, direction=FORWARD):
    return [(step.layer, step.direction.inverted) for step in steps_of(Plan(module, direction))]


def coupling():
    return AdditiveCoupling(linear())


def nest():
    """Every composition in another."""
    branch = InvertibleSequential(Split(), coupling(), Merge())
    both = Parallel(Inverse(branch), Keep())
    return InvertibleSequential(
        Split(), both, OnStreams((1, 0), Inverse(Inverse(coupling()))), Chained(Swap(), Merge())
    )


@pytest.mark.parametrize("direction", [FORWARD, INVERSE])
def test_names_lead_to_the_layers(direction):
    network = nest()
    for step in steps_of(Plan(network, direction)):
        assert network.get_submodule(step.name) is step.layer
        assert step.place == f"layer {step.name} ({type(step.layer).__name__})"


def test_layers_stand_in_running_order_with_their_direction():
    network = nest()
    expected = [
        ("0", False),
        *(("1.0.layer.2", True), ("1.0.layer.1", True), ("1.0.layer.0", True), ("1.1", False)),
        ("2.layer.layer.layer", False),
        *(("3.parts.0", False), ("3.parts.1", False)),
    ]
    found = Plan(network, FORWARD)
    assert [(step.name, step.direction.inverted) for step in steps_of(found)] == expected
    assert found.layers == [step.layer for step in steps_of(found)]
    back = [(step.name, step.direction.inverted) for step in steps_of(Plan(network, INVERSE))]
    assert sorted(back) == sorted((name, not inverted) for name, inverted in expected)
    assert back[:2] == [("3.parts.1", True), ("3.parts.0", True)]
    assert back[-1] == ("0", True)


@pytest.mark.parametrize("direction", [FORWARD, INVERSE])
def test_the_way_back_through_one_branch_is_the_reverse(direction):
    network = InvertibleSequential(*nest()[0:1], *nest()[2:])
    there, back = runs(network, direction), runs(network, Direction(not direction.inverted))
    assert back == [(layer, not inverted) for layer, inverted in reversed(there)]


def test_turning_twice_is_no_turn():
    layer = Affine()
    assert runs(Inverse(Inverse(Inverse(layer)))) == [(layer, True)]
    assert runs(Inverse(Inverse(layer)), INVERSE) == [(layer, True)]


@pytest.mark.parametrize("log_det", [False, True])
def test_all_layers_compute_log_determinants_or_none(log_det):
    plan = Plan(nest(), Direction(False, log_det))
    assert {step.direction.log_det for step in steps_of(plan)} == {log_det}


def test_a_block_is_its_couplings():
    block = ReversibleBlock(nn.Tanh(), nn.Sigmoid())
    kinds = [type(layer) for layer, _ in runs(InvertibleSequential(block))]
    assert kinds == [AdditiveCoupling, Swap, AdditiveCoupling, Swap]
    assert names(InvertibleSequential(block))[0::2] == ["0.f", "0.g"]


def test_a_layer_by_itself_is_one_step():
    layer = Affine()
    assert runs(layer, INVERSE) == [(layer, True)]


def test_branches_know_their_streams():
    plan = Plan(InvertibleSequential(Split(), Parallel(Keep(), Double())), FORWARD)
    (branches,) = (step for step in plan.steps if isinstance(step, Branches))
    assert [member.streams for member, _ in branches.members] == [0, 1]
    assert branches.stream_count == 2


# --- what stays whole


def hooked(register):
    inner = InvertibleSequential(Keep())
    getattr(inner, register)(lambda *_: None)
    return inner


class Own(InvertibleSequential):
    def forward(self, x, context=None):
        return super().forward(x, context)


class OwnLogDet(InvertibleSequential):
    def forward_and_log_det(self, x, context=None):
        return super().forward_and_log_det(x, context)


@pytest.mark.parametrize(
    ("make", "way", "whole"),
    [
        (lambda: hooked("register_forward_hook"), FORWARD, True),
        (lambda: hooked("register_forward_pre_hook"), FORWARD, True),
        (lambda: hooked("register_full_backward_hook"), FORWARD, True),
        (lambda: hooked("register_forward_hook"), INVERSE, False),  # which is no call
        (lambda: hooked("register_forward_hook"), Direction(log_det=True), False),
        (lambda: Own(Keep()), FORWARD, True),
        (lambda: Own(Keep()), INVERSE, False),
        (lambda: OwnLogDet(Keep()), FORWARD, False),
        (lambda: OwnLogDet(Keep()), Direction(log_det=True), True),
        (lambda: InvertibleSequential(Keep()), FORWARD, False),
    ],
)
@pytest.mark.parametrize(
    "around", [InvertibleSequential, Inverse, lambda inner: Parallel(inner, Keep())]
)
def test_what_a_method_does_besides_keeps_a_composition_whole(make, way, whole, around):
    inner = make()
    if around is Inverse:
        way = Direction(not way.inverted, way.log_det)
    step = next(
        step
        for step in steps_of(Plan(InvertibleSequential(around(inner)), way))
        if step.layer is inner or step.layer is inner[0]
    )
    assert step.is_whole is whole
    assert (step.layer is inner) is whole


def test_the_outermost_is_taken_apart_whatever_it_has():
    """It is called, so that all that is running by now."""
    network = hooked("register_forward_hook")
    assert names(network) == ["0"]
    assert names(Own(Keep())) == ["0"]


# --- what is rebuilt, and from what


def rebuilt(module, asked=None, rebuilds=True):
    """Names of the layers that are rebuilt, anchors with a star."""
    return [
        step.name + "*" * step.stores_input
        for step in steps_of(Plan(module, FORWARD, rebuilds, asked))
        if step.rebuild is not None
    ]


def three(**options):
    return InvertibleSequential(Affine(), Affine(), Affine(), **options)


@pytest.mark.parametrize(
    ("network", "asked", "expected"),
    [
        (lambda: three(), None, ""),
        (lambda: three(), Rebuild(), "0 1 2"),
        (lambda: three(checkpoint=True), None, "0 1 2"),
        (lambda: three(checkpoint=True), Rebuild(anchor_every=2), "0* 1 2*"),
        (lambda: three(checkpoint=Rebuild(anchor_every=2)), None, "0* 1 2*"),
        (lambda: three(checkpoint=Rebuild(anchor_every=2)), Rebuild(anchor_every=1), "0* 1 2*"),
        (lambda: InvertibleSequential(Affine(), three(checkpoint=True)), None, "1.0 1.1 1.2"),
        (
            lambda: InvertibleSequential(
                Affine(), three(checkpoint=Rebuild(anchor_every=2)), Affine(), checkpoint=True
            ),
            None,
            "0 1.0* 1.1 1.2* 2",
        ),
        (
            lambda: InvertibleSequential(
                Affine(), three(checkpoint=Rebuild(anchor_every=1)), Affine()
            ),
            Rebuild(anchor_every=2),
            "0* 1.0* 1.1* 1.2* 2",
        ),
        (
            lambda: InvertibleSequential(
                three(), three(checkpoint=True), checkpoint=Rebuild(anchor_every=2)
            ),
            None,
            "0.0* 0.1 0.2* 1.0 1.1* 1.2",
        ),
        (
            lambda: InvertibleSequential(
                Parallel(three(checkpoint=Rebuild(anchor_every=2)), three()), checkpoint=True
            ),
            None,
            "0.0.0* 0.0.1 0.0.2* 0.1.0 0.1.1 0.1.2",
        ),
        (
            lambda: Inverse(three(checkpoint=Rebuild(anchor_every=2))),
            None,
            "layer.2* layer.1 layer.0*",
        ),
    ],
)
def test_settings_reach_as_far_as_their_composition(network, asked, expected):
    plan = Plan(network(), FORWARD, True, asked)
    assert rebuilt(network(), asked) == expected.split()
    assert plan.rebuilds is bool(expected)
    assert rebuilt(network(), asked, rebuilds=False) == []


class Rounding(InvertibleModule):
    """Somebody's own layer whose inverse gives back other numbers than it was given."""

    bijective = injective = False
    surjective = True

    def forward(self, x):
        return x.round()

    def inverse(self, y):
        return y


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        # A coarse Quantize behind what computes, and what somebody says to throw away.
        ([Affine(), Quantize(0.5)], [False, True]),
        ([Rounding(), Affine()], [True, False]),
        # At the entrance nothing needs what is rounded, ...
        ([Split(), Merge(), Quantize(0.5), Affine()], [False] * 4),
        # ... and behind others an exact composition has nothing to round.
        ([Quantize(0.5), PairScaling(4, quantum=0.5), Quantize(0.5)], [False] * 3),
        ([PairScaling(4, quantum=0.25), Quantize(0.5)], [False, True]),
    ],
)
def test_a_layer_that_throws_digits_away_stores_its_input(layers, expected):
    network = InvertibleSequential(*layers, checkpoint=True)
    assert [step.stores_input for step in steps_of(Plan(network, FORWARD, True))] == expected
    assert not any(step.stores_input for step in steps_of(Plan(network, INVERSE, True)))


def test_an_inverse_that_crops_stores_its_input():
    network = InvertibleSequential(Affine(), InjectivePad(1), Affine(), checkpoint=True)
    found = Plan(network, INVERSE, True)
    assert [step.stores_input for step in steps_of(found)] == [False, True, False]
    assert [step.stores_input for step in steps_of(Plan(network, FORWARD, True))] == [False] * 3


def test_what_is_cropped_first_is_not_stored():
    network = InvertibleSequential(Affine(), InjectivePad(1), checkpoint=True)
    found = Plan(network, INVERSE, True)
    assert [step.stores_input for step in steps_of(found)] == [False, False]


def test_a_layer_may_ask_that_its_input_is_stored():
    class Costly(Affine):
        stores_input = True

        def inverse(self, y):
            raise AssertionError(f"called on {y}")

    layers = Affine(), Costly(), Affine()
    network = InvertibleSequential(*layers, checkpoint=True)
    assert [step.stores_input for step in steps_of(Plan(network, FORWARD, True))] == [
        False,
        True,
        False,
    ]
    gradients = []
    for run in (network, InvertibleSequential(*layers)):
        x = torch.ones(2, 2, requires_grad=True)
        gradients.append(torch.autograd.grad(run(x).sin().sum(), [x, *network.parameters()]))
    torch.testing.assert_close(*gradients)


def test_forwards_within_an_inverse_are_told_apart():
    network = InvertibleSequential(Affine(), Inverse(Affine()))
    assert [step.untraced for step in steps_of(Plan(network, INVERSE))] == [True, False]
    assert [step.untraced for step in steps_of(Plan(network, FORWARD))] == [False, False]


def test_check_layers_reaches_the_layers_of_its_composition():
    q = 2**-8
    inner = InvertibleSequential(AdditiveCoupling(linear(), quantum=q), Swap(), check_layers=True)
    network = InvertibleSequential(AdditiveCoupling(linear(), quantum=q), inner)
    grids = [step.grid and step.grid.quantum for step in steps_of(Plan(network, FORWARD))]
    assert grids == [None, q, q]


@pytest.mark.parametrize("around", [lambda empty: empty, Chained, Inverse, Parallel])
def test_nothing_to_run_is_an_error(around):
    with pytest.raises(ValueError, match="InvertibleSequential has no layers to run: append some"):
        Plan(around(InvertibleSequential()), FORWARD)


def test_a_permutation_is_only_moved():
    network = InvertibleSequential(Permute.random(4, seed=0), Affine())
    assert [step.layer.moves_only for step in steps_of(Plan(network, FORWARD))] == [True, False]
