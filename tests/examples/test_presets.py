"""What all networks have in common."""

import weakref

import pytest
import torch
from torch.nn import functional as F

from invertible import InvertibleSequential
from presets import PRESETS, is_invertible

PARAMETERS = {
    "a": 180_999_016,
    "b": 29_201_092,
    "b-released": 125_120_356,
    "cifar10": 6_274_826,
    "cifar10-small": 1_075_458,
    "digits": 538_758,
    "resnet50": 25_557_032,
    "resnet-cifar10": 1_052_890,
    "resnet-digits": 545_722,
    "revnet56": 27_553_128,
    "revnet-cifar10": 1_034_202,
    "revnet-digits": 539_642,
}
BLOCKS = {
    "cifar10": 54,
    "cifar10-small": 15,
    "digits": 24,
    "resnet-cifar10": 12,
    "resnet-digits": 9,
    "revnet-cifar10": 12,
    "revnet-digits": 9,
}


@pytest.fixture(params=BLOCKS)
def name(request):
    return request.param


def network_and_images(name, **settings):
    torch.manual_seed(0)
    network = PRESETS[name].build(**settings)
    return network, torch.randn(4, network.in_channels, 32, 32)


@pytest.mark.slow
def test_each_preset_has_its_number_of_parameters():
    with torch.device("meta"):
        networks = {name: preset.build() for name, preset in PRESETS.items()}
    counts = {name: sum(p.numel() for p in net.parameters()) for name, net in networks.items()}
    assert counts == PARAMETERS


def test_the_logits_are_those_of_the_features(name):
    network, x = network_and_images(name, num_classes=7)
    phi = network.eval().features(x)
    assert phi.shape[2:] == (32 // network.stride, 32 // network.stride)
    assert torch.equal(network.classify(phi), network(x))
    assert network(x).shape == (4, 7)


@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_the_state_behind_the_last_block_is_the_features(name, training):
    network, x = network_and_images(name, **({"dropout": 0.0} if name == "cifar10" else {}))
    states = list(network.train(training).each_block(x))
    assert len(states) == BLOCKS[name]
    assert all(state.dim() == 4 for state in states)
    assert torch.equal(states[-1], network.features(x))


@torch.no_grad()
def test_states_are_freed_on_the_way(name):
    network, x = network_and_images(name)
    seen = []

    def note(_, __, output):
        seen.extend(weakref.ref(x) for x in (output if isinstance(output, tuple) else [output]))

    for part in network.modules():
        part.register_forward_hook(note)
    alive = [
        len({id(ref()) for ref in seen if ref() is not None}) for _ in network.eval().each_block(x)
    ]
    assert max(alive) <= 3  # two streams, and behind Split the tensor that they are views of


def test_a_step_gives_every_weight_a_gradient(name):
    network, x = network_and_images(name)
    F.cross_entropy(network.train()(x), torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("name", ["cifar10-small", "revnet-cifar10"])
def test_activations_are_rebuilt_unless_it_is_refused(name):
    for asked in ({}, {"checkpoint": True}, {"checkpoint": False}):
        parts = [
            p for p in PRESETS[name].build(**asked).modules() if isinstance(p, InvertibleSequential)
        ]
        assert {part.checkpoint for part in parts} == {asked.get("checkpoint", True)}


def test_images_of_other_channels_and_sides_are_refused(name):
    network, x = network_and_images(name)
    channels = network.in_channels
    with pytest.raises(ValueError, match=rf"shape \(N, {channels}, H, W\), got \(4, 2, 32, 32\)"):
        network(torch.zeros(4, 2, 32, 32))
    with pytest.raises(ValueError, match=f"multiples of {network.stride}, got 32x31"):
        next(network.each_block(x[..., :31]))
    with pytest.raises(ValueError, match="floating point"):
        network.features(x.byte())


def test_only_irevnets_can_decode():
    found = {name for name in BLOCKS if is_invertible(PRESETS[name].build())}
    assert found == {"cifar10", "cifar10-small", "digits"}
