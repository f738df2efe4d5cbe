import pytest
import torch
from torch import nn

from errors import RunError
from experiment.settings import Config
from trainer.optimisation import autocast, build_optimizer, move_average

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
    assert autocast(name, torch.device(device)).fast_dtype is expected


def test_float16_is_refused_on_the_cpu():
    with pytest.raises(RunError, match=r"--precision float16 is for GPUs, .*: take float32"):
        autocast("float16", CPU)


@pytest.mark.parametrize(
    ("name", "seen"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_layers_run_in_the_type_again_and_again(name, seen):
    context, layer = autocast(name, CPU), nn.Linear(2, 1)
    for _ in range(2):
        with context:
            assert layer(torch.ones(1, 2)).dtype is seen
        assert layer(torch.ones(1, 2)).dtype is torch.float32


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_norms_and_biases_decay_unless_it_is_refused(name, kind):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    for decay_norms, decays in ((True, {0.1: 4}), (False, {0.1: 1, 0.0: 3})):
        config = Config(optimizer=name, weight_decay=0.1, decay_norms=decay_norms, lr=0.5)
        optimizer = build_optimizer(model, config, fused=False)
        assert isinstance(optimizer, kind)
        groups = optimizer.param_groups
        assert {group["weight_decay"]: len(group["params"]) for group in groups} == decays
        assert {group["lr"] for group in groups} == {0.5}


def test_an_average_follows_the_weights():
    model, average = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    expected = torch.ones(2)
    for step in range(1, 20):
        model.weight.data.fill_(step)
        move_average(average, model, 0.5, step)
        decay = min(0.5, step / (step + 9))
        expected = decay * expected + (1 - decay) * step
    torch.testing.assert_close(average.weight.data, expected)
    assert model.weight.data.tolist() == [19, 19]
