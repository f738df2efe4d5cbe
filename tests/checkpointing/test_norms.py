"""Normalizations of what is nearly constant are named when drift is measured."""

import pytest
import torch
from torch import nn
from toys import batch_norm_net, couplings

from invertible import (
    AdditiveCoupling,
    InvertibleSequential,
    Quantize,
    Rebuild,
    Split,
    Swap,
    measure_drift,
)

# How they are made, the shape of a stream, and the shape of what is drawn and repeated to fill it.
NORMS = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(32), (8, 32), (1, 32)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(32), (8, 32, 3, 3), (1, 32, 1, 1)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(32), (8, 32, 3, 3, 2), (1, 32, 1, 1, 1)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(4), (8, 4, 3), (8, 4, 1)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4), (8, 4, 3, 3), (8, 4, 1, 1)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (8, 4, 3, 3), (8, 1, 1, 1)),
    "LayerNorm": (lambda: nn.LayerNorm((4, 3)), (8, 2, 4, 3), (8, 2, 1, 1)),
}
# One that keeps no running statistics, and is no other in eval mode.
NORMS["BatchNorm1d without statistics"] = (
    lambda: nn.BatchNorm1d(32, track_running_stats=False).eval(),
    *((8, 32), (1, 32)),
)


class Bent(nn.Module):
    """A function of each number, so that constants stay constants."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.3))

    def forward(self, x):
        return (self.scale * x + 0.1).sin()


def network_with(norm, **options):
    torch.manual_seed(0)
    layers = couplings(4, lambda: nn.Sequential(norm(), nn.ReLU(), Bent()))
    return InvertibleSequential(*layers, **options).double()


def streams(drawn, shape):
    generator = torch.Generator().manual_seed(1)
    return tuple(
        torch.randn(drawn, generator=generator, dtype=torch.float64).expand(shape) for _ in "ab"
    )


def measured(network, x):
    with measure_drift() as drift:
        sum(part.sin().sum() for part in network(x)).backward()
    return drift


@pytest.mark.parametrize("name", NORMS)
def test_normalizations_of_constants_are_named(name):
    norm, shape, drawn = NORMS[name]
    network = network_with(norm, checkpoint=True)
    named = f"f.0 ({name.split()[0]})"
    with pytest.warns(RuntimeWarning) as caught:
        drift = measured(network, streams(drawn, shape))
    (row, *_) = found = drift.near_constants
    assert drift.worst.error < 1e-12
    assert row.layer in [f"layer {i} (AdditiveCoupling)" for i in (0, 2, 4)]
    assert row.norm == named
    assert row.channels >= 1
    assert f"{row.layer}: {named} has {row.channels} nearly constant channels" in str(drift)
    message = str(caught[0].message)
    assert f"{named} in {row.layer} normalizes {row.channels} channels that are nearly" in message
    assert (f"({len(found) - 1} more of the kind)" in message) == (len(found) > 1)
    assert not any(part._forward_pre_hooks for part in network.modules())


@pytest.mark.parametrize("name", NORMS)
def test_normalizations_of_what_varies_are_not_named(name):
    norm, shape, _ = NORMS[name]
    drift = measured(network_with(norm, checkpoint=True), streams(shape, shape))
    assert len(drift.rows) == 4
    assert drift.near_constants == []


def test_constant_channels_are_counted():
    torch.manual_seed(0)
    x = torch.randn(6, 8, 5, 5, dtype=torch.float64)
    x[:, 5:7] = 0.7
    parts = couplings(3, lambda: batch_norm_net(4))
    network = InvertibleSequential(Split(), *parts, checkpoint=True).double()
    with pytest.warns(RuntimeWarning, match=r"f\.0 \(BatchNorm2d\) in layer 1 .* 2 channels"):
        drift = measured(network, x)
    assert [row.channels for row in drift.near_constants] == [2]


@pytest.mark.parametrize("checkpoint", [Rebuild(anchor_every=1), False])
def test_constants_that_come_back_as_they_were_are_not_named(checkpoint):
    norm, shape, drawn = NORMS["BatchNorm1d"]
    drift = measured(network_with(norm, checkpoint=checkpoint), streams(drawn, shape))
    assert drift.near_constants == []


def test_exact_networks_have_the_gradients_of_stored_constants():
    q = 2.0**-16
    norm, shape, drawn = NORMS["BatchNorm1d"]
    layers = [
        AdditiveCoupling(part.f, quantum=q) if isinstance(part, AdditiveCoupling) else Swap()
        for part in network_with(norm)
    ]
    network = InvertibleSequential(*layers).double()
    x, gradients = tuple(map(Quantize(q), streams(drawn, shape))), []
    for checkpoint in (False, True):
        network.checkpoint = checkpoint
        network.zero_grad()
        drift = measured(network, x)
        gradients.append([p.grad for p in network.parameters()])
    assert all(map(torch.equal, *gradients))
    assert len(drift.rows) == 4
    assert drift.near_constants == []


def test_running_statistics_are_no_variances_of_the_input():
    norm, shape, drawn = NORMS["BatchNorm1d"]
    network = network_with(norm, checkpoint=True).eval()
    assert measured(network, streams(drawn, shape)).near_constants == []


def test_layers_that_are_run_twice_are_compared_by_their_last_run():
    class InvertedFirst(AdditiveCoupling):
        def rebuild(self, y, replay):
            x = replay.undo(y)
            replay.rerun(x)
            return x

    norm, shape, drawn = NORMS["BatchNorm1d"]
    layers = [
        InvertedFirst(part.f) if isinstance(part, AdditiveCoupling) else Swap()
        for part in network_with(norm)
    ]
    network = InvertibleSequential(*layers, checkpoint=True).double()
    assert measured(network, streams(shape, shape)).near_constants == []
    with pytest.warns(RuntimeWarning, match="nearly constant"):
        assert measured(network, streams(drawn, shape)).near_constants


def test_no_hook_is_left_when_a_step_fails():
    network = network_with(lambda: nn.BatchNorm1d(32), checkpoint=True)
    with pytest.raises(ValueError, match="expected 2D"), measure_drift():
        network(streams((3, 4, 2, 2), (3, 4, 2, 2)))
    assert not any(part._forward_pre_hooks for part in network.modules())
