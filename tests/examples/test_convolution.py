"""Convolutions, and whether what computes them on a CPU is right for all networks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from networks.convolution import StridedPointwise, convolution

CHILD = Path(__file__).with_name("channels_last_gradients.py")
# The instruction sets between which oneDNN chooses: what the machine has, and an older one.
INSTRUCTIONS = [{}, {"ONEDNN_MAX_CPU_ISA": "AVX2"}]


@pytest.mark.parametrize("kernel_size", [1, 3, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_has_torchs_numbers_gradients_and_names(kernel_size, stride):
    ours = convolution(3, 4, kernel_size, stride).double()
    padding = kernel_size // 2
    torchs = nn.Conv2d(3, 4, kernel_size, stride, padding=padding, bias=False).double()
    torchs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 6, 9, dtype=torch.float64)
    results = []
    for layer in (ours, torchs):
        image = x.clone().requires_grad_()
        y = layer(image)
        results.append((y, *torch.autograd.grad(y.square().sum(), [image, layer.weight])))
    torch.testing.assert_close(*results)


def test_only_pointwise_convolutions_with_a_stride_are_computed_otherwise():
    kinds = {(k, s): type(convolution(1, 1, k, s)) for k in (1, 3) for s in (1, 2)}
    assert kinds == {
        (1, 1): nn.Conv2d,
        (1, 2): StridedPointwise,
        (3, 1): nn.Conv2d,
        (3, 2): nn.Conv2d,
    }


# In a process of its own, for a wrong kernel may end it or never end.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("instructions", "threads"),
    list(zip(INSTRUCTIONS, (1, 2), strict=True)),
    ids=["native", "avx2"],
)
def test_gradients_are_those_of_contiguous_images_for_all_networks(instructions, threads):
    child = subprocess.run(
        [sys.executable, CHILD, str(threads)],
        env=os.environ
        | instructions
        # On a busy core, threads that wait actively for each other take five times as long.
        | {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert child.returncode == 0, child.stdout + child.stderr
