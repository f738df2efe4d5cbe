"""Drift is measured, and anchors stop it."""

import pytest
import torch
from torch import nn
from toys import Affine, AffineCoupling, assert_same_gradients, body, linear, pair
from toys import body_images as images

from invertible import (
    AdditiveCoupling,
    InvertibleModule,
    InvertibleSequential,
    Merge,
    Parallel,
    Rebuild,
    Split,
    Swap,
    measure_drift,
    reversible_checkpoint,
)
from invertible.testing import InversecheckError, inversecheck


def test_drift_is_measured_for_every_rebuilt_layer():
    network = body(4, checkpoint=True)
    with measure_drift() as drift:
        network(images()).sum().backward()
    names = [f"layer {i} (AdditiveCoupling)" for i in (2, 4, 6, 8)]
    assert [row.layer for row in drift.rows] == names
    assert 0 < drift.worst.error < 1e-14
    assert "relative error" in str(drift)
    assert all(name in str(drift) for name in names)


def test_nothing_is_measured_where_nothing_is_rebuilt():
    with measure_drift() as drift:
        body()(images()).sum().backward()
    assert drift.rows == []
    assert drift.worst is None


def test_too_much_drift_is_warned_of():
    network = body(6, checkpoint=True).float()
    with pytest.warns(RuntimeWarning, match=r"layer 2 .* more than 1e-12"), measure_drift(1e-12):
        network(images().float()).sum().backward()


def test_gradients_are_those_without_measuring():
    network = body(3, checkpoint=True)
    network(images()).sin().sum().backward()
    expected = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    with measure_drift():
        network(images()).sin().sum().backward()
    for p, gradient in zip(network.parameters(), expected, strict=True):
        assert torch.equal(p.grad, gradient)


def test_anchors_stop_drift():
    network = body(6, checkpoint=True).float()
    errors = []
    for every in (None, 4, 1):
        network.checkpoint = Rebuild(anchor_every=every)
        with measure_drift() as drift:
            network(images().float()).sum().backward()
        errors.append(drift.worst.error)
    assert errors[0] > errors[1] > errors[2] == 0


# --- anchors of compositions inside


def affine(count):
    """Layers whose input comes back with rounding errors."""
    return [Affine(0.3, 0.7) for _ in range(count)]


def rebuilt_exactly(run):
    """Which layers of a network were rebuilt from a state that was stored."""
    with measure_drift() as drift:
        run().sin().sum().backward()
    return [row.layer.split()[1] for row in drift.rows if row.error == 0]


@pytest.mark.parametrize(
    ("outer", "anchors"), [(False, []), (True, []), (Rebuild(anchor_every=3), ["0", "4"])]
)
def test_a_composition_inside_keeps_its_anchors(outer, anchors):
    inner = InvertibleSequential(*affine(5), checkpoint=Rebuild(anchor_every=2))
    # The outer anchors are counted over its own layers, 0, 2, 3, 4 and 5.
    network = InvertibleSequential(*affine(1), inner, *affine(4), checkpoint=outer).double()
    found = rebuilt_exactly(lambda: network(images()))
    assert found == sorted([*anchors, "1.0", "1.2", "1.4"])


def test_a_composition_inside_that_asks_for_no_more_shares_the_anchors_around_it():
    inner = InvertibleSequential(*affine(3), checkpoint=True)
    network = InvertibleSequential(
        *affine(1), inner, *affine(2), checkpoint=Rebuild(anchor_every=2)
    ).double()
    assert rebuilt_exactly(lambda: network(images())) == ["0", "1.1", "2"]


def test_a_branch_keeps_its_anchors():
    branch = InvertibleSequential(*affine(5), checkpoint=Rebuild(anchor_every=2))
    both = Parallel(branch, InvertibleSequential(*affine(5)))
    network = InvertibleSequential(Split(), both, Merge(), checkpoint=True).double()
    assert rebuilt_exactly(lambda: network(images())) == ["1.0.0", "1.0.2", "1.0.4"]


@pytest.mark.parametrize(
    ("own", "anchors"),
    [(False, ["0", "2", "4"]), (True, ["0", "2", "4"]), (Rebuild(anchor_every=4), ["0", "4"])],
)
def test_the_anchors_of_a_call_are_those_of_the_setting(own, anchors):
    network = InvertibleSequential(*affine(5), checkpoint=own).double()
    every_second = Rebuild(anchor_every=2)
    found = rebuilt_exactly(lambda: reversible_checkpoint(network, images(), rebuild=every_second))
    assert found == anchors


def test_anchors_in_a_nest_have_the_gradients_of_ordinary_training():
    def network(inner, outer):
        torch.manual_seed(0)
        part = InvertibleSequential(
            *(AdditiveCoupling(nn.Sequential(nn.Dropout(0.2), *linear())), Swap()) * 3,
            checkpoint=inner,
        )
        return InvertibleSequential(
            AffineCoupling(linear(out=4)), part, Swap(), checkpoint=outer
        ).double()

    networks = [
        network(False, False),
        network(Rebuild(anchor_every=2), True),
        network(True, Rebuild(anchor_every=2)),
        network(Rebuild(anchor_every=1), Rebuild(anchor_every=3)),
    ]
    assert_same_gradients(networks, lambda net: net(pair(6, 4))[0].sin().sum())


class Turned(InvertibleModule):
    """A complex factor, and an inverse that is off by an imaginary number."""

    def __init__(self, off: complex):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(8, dtype=torch.complex128))
        self.off = off

    def forward(self, x):
        return x * self.factor

    def inverse(self, y):
        return y / self.factor + self.off


@pytest.mark.parametrize("off", [0j, 0.5j, 0.5, -0.3 + 0.4j])
def test_drift_of_complex_states_has_both_parts(off):
    network = InvertibleSequential(Turned(off), Turned(off), checkpoint=True)
    x = torch.ones(4, 8, dtype=torch.complex128)
    with measure_drift(bound=2) as drift:
        network(x).abs().mean().backward()
    assert [row.error for row in drift.rows] == pytest.approx([2 * abs(off), abs(off)])


@pytest.mark.parametrize("off", [0.5j, 1e-4j])
def test_an_imaginary_error_is_no_inverse(off):
    x = torch.complex(torch.randn(4, 8), torch.randn(4, 8)).to(torch.complex128)
    inversecheck(Turned(0), x)
    with pytest.raises(InversecheckError, match="inverse undoes forward"):
        inversecheck(Turned(off), x)
