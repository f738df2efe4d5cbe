"""The scripts that how-to guides show run, those for other libraries where these are installed."""

import copy
import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
import torch
from processes import free_port, run_two
from torch import distributed, nn

SCRIPTS = Path(__file__).parents[2] / "docs" / "howto" / "scripts"
SHARDS = torch.__version__ >= (2, 7)  # before, fully_shard needs a GPU
PEERS = {"memcnn": "memcnn", "revtorch": "revtorch", "revlib": "revlib", "freia": "FrEIA"}


# Both in the same processes, which take seconds to import torch.
ONE_BY_ONE = """
import os, runpy, sys
for script, port in zip(sys.argv[1::2], sys.argv[2::2]):
    os.environ["MASTER_PORT"] = port
    runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_available() or sys.platform == "win32", reason="needs gloo")
def test_the_scripts_train_on_two_processes():
    names = ["ddp", "fsdp"] if SHARDS else ["ddp"]
    scripts = [part for name in names for part in (str(SCRIPTS / f"{name}.py"), free_port())]
    ran = run_two("-c", ONE_BY_ONE, *scripts)
    assert [status for status, *_ in ran] == [0, 0], ran
    assert [output.count("step") for _, output, _ in ran] == [len(names) * 3, 0]


# Dynamo warns of what it does itself.
@pytest.mark.slow
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
