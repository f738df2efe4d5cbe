"""i-RevNet against golden values, which the released i-RevNet code computed in float64.

The networks are small: `config` in each file of `golden/` has the arguments of the released
constructor. `state_dict.*` are its weights, `eval.*` what it computes from `input` in evaluation
mode; `train.*` are logits, representation, loss and gradients (as float32) of one step in
training mode, and `train.buffer_after.*` the buffers after it. Of the representations, the first
image's are kept.
"""

import copy
import doctest
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from invertible import AdditiveCoupling
from invertible.testing import LAWS, inversecheck
from networks import irevnet
from networks.irevnet import IRevNet
from networks.released import faults, released_names
from presets import PRESETS

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.npz"))
SMALL = {"blocks": (1, 2), "strides": (1, 2), "widths": (8, 32), "downsampling": 2}


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem, scope="module")
def golden(request):
    with np.load(request.param) as values:
        config = json.loads(str(values["config"]))
        tensors = {name: torch.from_numpy(values[name]) for name in values if name != "config"}
    return SimpleNamespace(config=config, **grouped(tensors))


def grouped(tensors):
    """Weights, gradients and buffers by their released names; the rest by attribute names."""
    groups = {"state_dict": {}, "grad": {}, "buffer_after": {}}
    for name, tensor in tensors.items():
        for group, members in groups.items():
            if f"{group}." in name:
                members[name.split(f"{group}.")[1]] = tensor
                break
        else:
            groups[name.replace(".", "_")] = tensor
    return groups


@pytest.fixture
def network(golden):
    # In floating point and storing all, as the released code does.
    return released_network(golden, checkpoint=False, quantum=None)


def released_network(golden, **options):
    config = golden.config
    network = IRevNet(
        config["nClasses"],
        blocks=config["nBlocks"],
        strides=config["nStrides"],
        widths=config["nChannels"],
        downsampling=config["init_ds"] or 1,
        kernel_sizes=(3, 3, 3),
        **options,
    ).double()
    ours = released_names(network)
    network.load_state_dict({ours[name]: value for name, value in golden.state_dict.items()})
    return network


def released(network, values):
    """Values under our names, under the released ones."""
    return {name: values[ours] for name, ours in released_names(network).items() if ours in values}


def assert_equal_to_rounding(actual, expected, tolerance=1e-12):
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).norm()
    assert error <= tolerance * expected.double().norm()


def test_three_golden_files_are_there():
    assert [path.stem for path in GOLDEN] == [
        "irevnet_bijective",
        "irevnet_cifar",
        "irevnet_injective",
    ]


def test_evaluation_agrees_with_the_released_code(network, golden):
    network.eval()
    phi = network.features(golden.input)
    assert_equal_to_rounding(phi[:1], golden.eval_representation)
    assert_equal_to_rounding(network(golden.input), golden.eval_logits)
    assert_equal_to_rounding(network.inverse(phi), golden.eval_inverse)


def test_a_training_step_agrees_with_the_released_code(network, golden):
    network.train()
    seen = []
    network.body.register_forward_hook(lambda *call: seen.append(call[-1]))
    logits = network(golden.input)
    loss = F.cross_entropy(logits, golden.target)
    loss.backward()
    assert_equal_to_rounding(seen[0][:1], golden.train_representation)
    assert_equal_to_rounding(logits, golden.train_logits)
    assert_equal_to_rounding(loss, golden.train_loss)
    gradients = released(network, {name: p.grad for name, p in network.named_parameters()})
    assert gradients.keys() == golden.grad.keys()
    for name, gradient in golden.grad.items():
        assert_equal_to_rounding(gradients[name], gradient, 2e-7)  # stored in float32
    buffers = released(network, dict(network.named_buffers()))
    assert buffers.keys() == golden.buffer_after.keys()
    for name, buffer in golden.buffer_after.items():
        assert_equal_to_rounding(buffers[name], buffer)


def test_a_preset_takes_other_settings():
    network = PRESETS["b-released"].build(7, blocks=(1, 1, 1, 1), dropout=0.5)
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert sum(isinstance(layer, AdditiveCoupling) for layer in network.body) == 4
    assert {part.p for part in network.modules() if isinstance(part, torch.nn.Dropout)} == {0.5}


def test_bottlenecks_have_a_quarter_of_the_width_or_what_is_given():
    def inner(**settings):
        network = IRevNet(10, **SMALL, **settings)
        parts = [part for part in network.modules() if isinstance(part, irevnet.Bottleneck)]
        return [
            [conv.out_channels for conv in part if isinstance(conv, nn.Conv2d)] for part in parts
        ]

    assert inner() == [[2, 2, 8], [8, 8, 32], [8, 8, 32]]
    assert inner(inner_widths=(12, 5)) == [[12, 12, 8], [5, 5, 32], [5, 5, 32]]


def test_only_networks_without_padding_are_bijective():
    """From the grid on: Quantize, at the entrance, keeps what is on it."""
    assert PRESETS["digits"].build().body[1:].bijective
    assert PRESETS["digits"].build().body.surjective
    assert not IRevNet(2, **SMALL).body.surjective


def test_a_fine_quantum_agrees_with_the_released_code_to_its_order(golden):
    network = released_network(golden, checkpoint=True, quantum=2**-40).eval()
    phi = network.features(golden.input)
    logits = network.classify(phi)
    assert (phi[:1] - golden.eval_representation).abs().max() < 30 * 2**-40
    assert_equal_to_rounding(logits, golden.eval_logits, 30 * 2**-40)
    assert torch.equal(network.inverse(phi), network.as_read(golden.input))


def test_a_rounded_training_step_agrees_with_the_released_code_to_the_order_of_the_quantum(golden):
    network = released_network(golden, checkpoint=True, quantum=2**-40).train()
    loss = F.cross_entropy(network(golden.input), golden.target)
    loss.backward()
    assert_equal_to_rounding(loss, golden.train_loss, 1e-9)
    gradients = released(network, {name: p.grad for name, p in network.named_parameters()})
    for name, gradient in golden.grad.items():
        assert_equal_to_rounding(gradients[name], gradient, 1e-5)


def training_step(network, x):
    """Gradients and buffers after a step, and the rebuilt image."""
    network.zero_grad()
    torch.manual_seed(1)
    phi = network.features(x)
    network.classify(phi).square().sum().backward()
    return [p.grad for p in network.parameters()] + [b.clone() for b in network.buffers()]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch", [2, 64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_images_come_back_bit_for_bit_whatever_the_features_lie_like(
    training, batch, memory_format
):
    network = PRESETS["digits"].build().train(training)
    x = torch.randn(batch, 1, 16, 16)
    with torch.no_grad():
        phi = network.features(x)
        copies = phi, phi.contiguous(memory_format=memory_format), phi.double().float()
        assert all(torch.equal(network.inverse(copy), network.as_read(x)) for copy in copies)
    assert torch.equal(network.inverse(network.features(x)), network.as_read(x))


@pytest.mark.slow
def test_the_cifar_network_trains_without_stored_activations():
    # At the beginning most channels are constant: batch statistics would divide rounding errors
    # in them by next to nothing. So the first states are stored, or come back in every bit.
    x = torch.randn(8, 3, 16, 16)
    errors = {}
    for quantum in (None, 2**-16):
        torch.manual_seed(0)
        stored = PRESETS["cifar10"].build(checkpoint=False, quantum=quantum, dropout=0.0)
        rebuilt = copy.deepcopy(stored)
        rebuilt.body.checkpoint = True
        expected, found = training_step(stored, x), training_step(rebuilt, x)
        errors[quantum] = max(
            ((one - other).norm() / other.norm().clamp_min(1e-12)).item()
            for one, other in zip(found, expected, strict=True)
            if one.is_floating_point()
        )
        assert quantum is None or all(map(torch.equal, found, expected))
    assert errors[None] < 0.2  # 100 times the gradient where nothing is stored
    assert errors[2**-16] == 0


@pytest.mark.slow
def test_a_step_of_the_imagenet_network_is_that_of_ordinary_training_bit_for_bit():
    torch.manual_seed(0)
    stored = PRESETS["b"].build(checkpoint=False)
    rebuilt = copy.deepcopy(stored)
    rebuilt.body.checkpoint = True
    x = torch.randn(1, 3, 64, 64)
    assert all(map(torch.equal, training_step(rebuilt, x), training_step(stored, x)))
    phi = rebuilt.features(x)
    assert torch.equal(rebuilt.inverse(phi), rebuilt.as_read(x))


@torch.no_grad()
def test_images_of_the_imagenet_network_are_decoded():
    network = PRESETS["b"].build(quantum=None).eval()
    x = torch.randn(1, 3, 224, 224)
    phi = network.features(x)
    assert phi.shape == (1, 3072, 7, 7)
    # 100 additions and as many subtractions of float32 numbers.
    assert_equal_to_rounding(network.inverse(phi), x, 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("quantum", [None, 2**-16])
@pytest.mark.parametrize("preset", ["b", "cifar10", "cifar10-small", "digits"])
def test_networks_keep_the_laws_of_a_layer(preset, quantum):
    stages = len(PRESETS[preset].settings["blocks"])
    network = PRESETS[preset].build(blocks=(2, 1, 1, 1)[:stages], quantum=quantum).double().eval()
    x = torch.randn(2, network.in_channels, network.stride, network.stride).double()
    # Padded zeros come back as 1e-17, on the other side of a ReLU's kink.
    smooth = quantum is not None or network.body.surjective
    laws = [law for law in LAWS if smooth or law != "differentiable"]
    inversecheck(network.body, network.as_read(x), laws=laws)


@pytest.mark.parametrize("quantum", [None, 2**-16])
def test_a_network_in_training_keeps_the_laws_of_a_layer(quantum):
    network = IRevNet(3, **SMALL, quantum=quantum).double().train()
    inversecheck(network.body, network.as_read(torch.randn(4, 3, 8, 8).double()))


def test_channels_last_and_float64_go_through():
    network = IRevNet(3, **SMALL).double().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8).double().to(memory_format=torch.channels_last)
    phi = network.features(x)
    assert phi.dtype == torch.float64
    assert phi.is_contiguous(memory_format=torch.channels_last)


def test_the_docstring_example_runs():
    assert doctest.testmod(irevnet, extraglobs={"torch": torch}).failed == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": (1, 2, 3)}, r"for each stage, got blocks=\(1, 2, 3\), strides=\(1, 2\)"),
        ({"blocks": (), "strides": (), "widths": ()}, "for each stage"),
        ({"blocks": (0, 1)}, r"at least 1 block, .* got blocks=\(0, 1\)"),
        ({"strides": (1, 3)}, r"stride of 1 or 2 .*strides=\(1, 3\)"),
        ({"widths": (8, 16)}, "stride 2 behind a width of 8, so its width must be 32, got 16"),
        ({"strides": (1, 1)}, "stride 1 behind a width of 8, so its width must be 8, got 32"),
        ({"widths": (4, 16)}, r"gets 12 channels, from 3 .* may have more.* Got widths\[0\]=4"),
        ({"strides": (2, 2)}, r"gets 48 channels, from 3 .* evenly .* Got widths\[0\]=8"),
        ({"downsampling": 0}, r"downsampling of at least 1 \(none\), got 0"),
        ({"dropout": 1.5}, "dropout probability has to be between 0 and 1, but got 1.5"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, message):
    settings = {"num_classes": 10} | SMALL | change
    with pytest.raises(ValueError, match=message):
        IRevNet(**settings)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 1, 8, 8), r"shape \(N, 3, H, W\), got \(2, 1, 8, 8\)"),
        (torch.zeros(3, 8, 8), r"shape \(N, 3, H, W\), got \(3, 8, 8\)"),
        (torch.zeros(2, 3, 8, 6), "multiples of 4, got 8x6. Resize, crop or pad"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"got torch.uint8.*x.float\(\) / 255"),
    ],
)
def test_images_that_do_not_fit_are_refused(x, message):
    with pytest.raises(ValueError, match=message):
        IRevNet(2, **SMALL)(x)


def test_features_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"shape \(N, 64, H, W\), got \(2, 60, 2, 2\)"):
        IRevNet(2, **SMALL).inverse(torch.zeros(2, 60, 2, 2))


def released_weights(network):
    return released(network, network.state_dict())


def test_weights_of_the_same_network_fit_with_or_without_counts_of_batches():
    weights = released_weights(IRevNet(2, **SMALL))
    published = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
    assert len(published) < len(weights)
    assert faults(weights, weights) == faults(weights, published) == ""


def test_every_fault_of_weights_is_told():
    expected = released_weights(IRevNet(2, **SMALL))
    weights = dict(expected)
    weights["linear.weight"] = torch.zeros(5, 64)
    weights["stack.9.bottleneck_block.0.weight"] = weights.pop("stack.2.bottleneck_block.0.weight")
    message = faults(expected, weights)
    assert "stack.2.bottleneck_block.0.weight missing" in message
    assert "stack.9.bottleneck_block.0.weight unexpected" in message
    assert "linear.weight (5, 64) instead of (2, 64) of another shape" in message
    assert re.search(r"and \d+ more missing", faults(expected, {}))
