"""ResNet, whose names and numbers are torchvision's."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from networks.resnet import ResNet
from presets import PRESETS

SMALL = {
    "blocks": (1, 2),
    "strides": (1, 2),
    "widths": (4, 8),
    "downsampling": 1,
}


@pytest.fixture
def fifty():
    with torch.device("meta"):
        return PRESETS["resnet50"].build()


def test_the_names_are_those_of_torchvision(fifty):
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    names = ["conv1.weight", *(f"bn1.{name}" for name in norm)]
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        for block in range(blocks):
            place = f"layer{stage}.{block}"
            for i in (1, 2, 3):
                names += [f"{place}.conv{i}.weight", *(f"{place}.bn{i}.{name}" for name in norm)]
            if block == 0:
                names.append(f"{place}.downsample.0.weight")
                names += [f"{place}.downsample.1.{name}" for name in norm]
    names += ["fc.weight", "fc.bias"]
    assert list(fifty.state_dict()) == names
    assert len(names) == 320


def test_the_shapes_are_those_of_torchvision(fifty):
    shapes = {name: tuple(value.shape) for name, value in fifty.state_dict().items()}
    assert shapes["conv1.weight"] == (64, 3, 7, 7)
    assert shapes["layer1.0.downsample.0.weight"] == (256, 64, 1, 1)
    assert shapes["layer2.0.conv1.weight"] == (128, 256, 1, 1)
    assert shapes["layer2.0.conv2.weight"] == (128, 128, 3, 3)
    assert shapes["layer4.2.conv3.weight"] == (2048, 512, 1, 1)
    assert shapes["fc.weight"] == (1000, 2048)


def test_the_3x3_convolutions_have_the_stride(fifty):
    strides = {name: m.stride for name, m in fifty.named_modules() if isinstance(m, nn.Conv2d)}
    assert {name for name, stride in strides.items() if stride == (2, 2)} == {
        "conv1",
        *(f"layer{stage}.0.conv2" for stage in (2, 3, 4)),
        *(f"layer{stage}.0.downsample.0" for stage in (2, 3, 4)),
    }


def test_the_stem_halves_images_twice(fifty):
    assert fifty.stride == 32
    x = torch.zeros(1, 3, 64, 96, device="meta")
    assert next(fifty.each_block(x)).shape == (1, 256, 16, 24)
    assert fifty.features(x).shape == (1, 2048, 2, 3)


def test_a_block_adds_before_the_last_relu():
    network = ResNet(2, **SMALL).eval()
    block = network.layer2[1]
    x = torch.randn(2, 32, 4, 4)
    y = F.relu(block.bn1(block.conv1(x)))
    y = F.relu(block.bn2(block.conv2(y)))
    y = block.bn3(block.conv3(y))
    assert torch.equal(block(x), F.relu(x + y))


def test_convolutions_keep_the_variance_of_gradients():
    weight = PRESETS["resnet-digits"].build().layer3[1].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (9 * weight.shape[0])) ** 0.5, rel=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": (1, 2, 3)}, r"for each stage, got blocks=\(1, 2, 3\), strides=\(1, 2\)"),
        ({"blocks": (1, 0)}, r"at least 1 block, .* got blocks=\(1, 0\)"),
        ({"strides": (1, 4)}, r"ResNet takes .* stride of 1 or 2 .*strides=\(1, 4\)"),
        ({"downsampling": 2}, "downsampling of 4 or 1, got 2"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ResNet(**{"num_classes": 10, "in_channels": 3} | SMALL | change)
