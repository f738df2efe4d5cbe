import pytest
import torch
from torch import nn

from experiment.folder import RunError
from trainer.precision import Precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "device", "expected"),
    [
        ("auto", "cpu", torch.float32),
        ("auto", "cuda", torch.bfloat16),
        ("float32", "cuda", torch.float32),
        ("bfloat16", "cpu", torch.bfloat16),
        ("float16", "cuda", torch.float16),
    ],
)
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_the_type_fits_the_device(name, device, expected):
    precision = Precision(name, torch.device(device))
    assert precision.type is expected


def test_float16_is_refused_on_the_cpu():
    with pytest.raises(RunError, match=r"--precision float16 is for GPUs, .*: take float32"):
        Precision("float16", CPU)


@pytest.mark.parametrize(
    ("name", "seen"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_layers_run_in_the_type_and_weights_stay_float32(name, seen):
    precision = Precision(name, CPU)
    layer = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    before = layer.weight.clone()
    with precision.autocast():
        y = layer(torch.ones(1, 2))
    precision.backward(y.float().sum())
    precision.step(optimizer)
    assert y.dtype is seen
    torch.testing.assert_close(layer.weight, before - 0.5)
    assert precision.scaler.state_dict() == {}


def test_scaled_gradients_change_the_weights_as_others_do():
    # The scaler of float16, whose arithmetic itself needs a GPU.
    precision = Precision("float32", CPU)
    precision.scaler = torch.amp.GradScaler("cpu", enabled=True)
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.5, fused=True)
    precision.backward((weight * torch.tensor([1.0, 2.0])).sum())
    precision.step(optimizer)
    torch.testing.assert_close(weight.data, torch.tensor([0.5, 0.0]))
    optimizer.zero_grad()
    precision.backward((weight * torch.inf).sum())
    precision.step(optimizer)
    torch.testing.assert_close(weight.data, torch.tensor([0.5, 0.0]))
