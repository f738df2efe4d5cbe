"""RevNet: reversible within a stage, stored where the stride or the width changes."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from invertible import InvertibleSequential
from invertible.testing import inversecheck
from networks import revnet
from networks.revnet import RevNet, StoredUnit
from presets import PRESETS

SMALL = {
    "blocks": (3, 2),
    "strides": (1, 2),
    "widths": (32, 64),
    "downsampling": 1,
}


def small(**settings):
    torch.manual_seed(0)
    return RevNet(5, **SMALL | settings)


def test_there_are_56_layers():
    with torch.device("meta"):
        network = PRESETS["revnet56"].build(quantum=None)
    residuals = [part for part in network.modules() if isinstance(part, revnet.Bottleneck)]
    assert len(residuals) == 18
    convolutions = sum(isinstance(m, nn.Conv2d) for part in residuals for m in part)
    assert convolutions + 2 == 56  # with the stem and the classifier
    assert network.features(torch.zeros(1, 3, 64, 64, device="meta")).shape == (1, 3328, 2, 2)


def test_a_unit_is_that_of_the_paper():
    network = small(quantum=None).eval()
    _, unit, *_ = network.reversible[0]
    x1, x2 = torch.randn(2, 32, 8, 8).chunk(2, 1)
    y1 = x1 + unit.f(x2)
    y2 = x2 + unit.g(y1)
    assert all(map(torch.equal, unit((x1, x2)), (y1, y2)))


def test_a_stored_unit_maps_the_halves_before_it_adds():
    unit = StoredUnit(16, 32, stride=2, first=False).eval()
    x = torch.randn(2, 16, 8, 8)
    y1, y2 = unit(x).chunk(2, 1)
    assert y1.shape == (2, 16, 4, 4)
    torch.testing.assert_close(y1, unit.project1(x[:, :8]) + unit.f(x[:, 8:]))
    torch.testing.assert_close(y2, unit.project2(x[:, 8:]) + unit.g(y1))


def test_only_the_first_residual_has_no_relu_before_it():
    network = small()
    residuals = [part for part in network.modules() if isinstance(part, revnet.Bottleneck)]
    bare = [isinstance(part[0], nn.Conv2d) for part in residuals]
    assert bare == [True] + [False] * (len(bare) - 1)
    assert isinstance(network.stored[0].f[0], nn.Conv2d)


def test_each_stage_keeps_the_laws_of_a_layer():
    network = small().double().eval()
    for stage, channels in zip(network.reversible, SMALL["widths"], strict=True):
        inversecheck(stage, stage[0](torch.randn(2, channels, 4, 4).double()))


def training_step(network, x):
    torch.manual_seed(1)
    F.cross_entropy(network(x), torch.arange(4)).backward()
    return [p.grad for p in network.parameters()] + list(network.buffers())


def test_rebuilding_activations_gives_the_gradients_of_storing_them_bit_for_bit():
    stored = small(checkpoint=False)
    rebuilt = copy.deepcopy(stored)
    for stage in rebuilt.reversible:
        stage.checkpoint = True
    x = torch.randn(4, 3, 8, 8)
    assert all(map(torch.equal, training_step(rebuilt, x), training_step(stored, x)))


def test_rebuilding_activations_in_floating_point_gives_nearly_the_same():
    stored = small(checkpoint=False, quantum=None).double()
    rebuilt = copy.deepcopy(stored)
    for stage in rebuilt.reversible:
        stage.checkpoint = True
    x = torch.randn(4, 3, 8, 8).double()
    for one, other in zip(training_step(rebuilt, x), training_step(stored, x), strict=True):
        torch.testing.assert_close(one, other)


def saved_bytes(blocks, **settings):
    """What the graph holds between forward and backward."""
    network = small(blocks=blocks, **settings)
    own = {p.untyped_storage().data_ptr() for p in (*network.parameters(), *network.buffers())}
    storages = {}

    def note(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = x  # kept, so that the address stays its own
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        network(torch.randn(2, 3, 16, 16))
    return sum(x.untyped_storage().nbytes() for x in storages.values())


def test_more_reversible_units_hold_no_more_memory():
    growth = saved_bytes((12, 12), checkpoint=True) / saved_bytes((3, 3), checkpoint=True)
    assert growth < 1.05
    assert saved_bytes((12, 12), checkpoint=False) > 2.5 * saved_bytes((3, 3), checkpoint=False)


def test_states_keep_the_type_of_the_images_under_autocast():
    network = small().train()
    with torch.autocast("cpu", torch.bfloat16):
        phi = network.features(torch.randn(4, 3, 8, 8))
        loss = F.cross_entropy(network.classify(phi), torch.arange(4))
    assert phi.dtype == torch.float32
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in network.parameters())


def test_each_stage_is_put_on_the_grid():
    network = small(quantum=2**-8).eval()
    on_grid = [
        not (state * 2**8).frac().any() for state in network.each_block(torch.randn(2, 3, 8, 8))
    ]
    assert on_grid == [True] * 5
    assert {
        part.quantum for part in network.modules() if isinstance(part, InvertibleSequential)
    } == {2**-8}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": (32, 60)}, r"multiples of 8, got widths=\(32, 60\)"),
        ({"strides": (1, 3)}, r"RevNet takes .* stride of 1 or 2 .*strides=\(1, 3\)"),
        ({"downsampling": 2}, "downsampling of 4 or 1, got 2"),
        ({"quantum": 0.3}, "power of two"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        RevNet(**{"num_classes": 10} | SMALL | change)
