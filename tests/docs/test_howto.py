"""The scripts that how-to guides show run, those for other libraries where these are installed."""

import copy
import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

SCRIPTS = Path(__file__).parents[2] / "docs" / "howto" / "scripts"
shards = pytest.mark.skipif(torch.__version__ < (2, 7), reason="no fully_shard on a CPU")
PEERS = {"memcnn": "memcnn", "revtorch": "revtorch", "revlib": "revlib", "freia": "FrEIA"}


@pytest.mark.skipif(not distributed.is_available() or sys.platform == "win32", reason="needs gloo")
@pytest.mark.parametrize("name", ["ddp", pytest.param("fsdp", marks=shards)])
def test_a_script_trains_on_two_processes(name):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    result = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", SCRIPTS / f"{name}.py"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("step") == 3


# Dynamo warns of what it does itself.
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf",
)
def test_the_compiled_script_has_the_gradients_of_the_plain_network():
    torch._dynamo.reset()
    runpy.run_path(str(SCRIPTS / "compiled.py"), run_name="__main__")
    torch._dynamo.reset()


def residual() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))


def output_and_gradients(network, residuals, x):
    # A view stands for the output of a stem: MemCNN counts the gradient of a leaf twice.
    y = network(x.clone().requires_grad_().view_as(x))
    y = y[0] if isinstance(y, tuple) else y  # FrEIA returns a log-determinant besides
    y.sin().sum().backward()
    return [y.detach(), *(p.grad for f in residuals for p in f.parameters())]


@pytest.mark.parametrize("name", ["torch_checkpoint", *PEERS])
@pytest.mark.filterwarnings("ignore")  # what another library does with torch is its own affair
def test_the_networks_that_a_guide_puts_side_by_side_compute_the_same(name):
    if name in PEERS and importlib.util.find_spec(PEERS[name]) is None:
        pytest.skip(f"{PEERS[name]} is not installed")
    networks = runpy.run_path(str(SCRIPTS / "same_network.py"))
    ours = [residual() for _ in range(4)]
    theirs = copy.deepcopy(ours)
    x = torch.randn(4, 16)
    found = output_and_gradients(networks["invertible"](ours), ours, x)
    expected = output_and_gradients(networks[name](theirs), theirs, x)
    torch.testing.assert_close(found, expected)
