"""The scripts that how-to guides show run, those for other libraries where these are installed."""

import copy
import gc
import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
import torch
from processes import free_port, run_two
from torch import distributed, nn

from invertible import (
    HaarWavelet,
    InvertibleSequential,
    Merge,
    Permute,
    PixelUnshuffle,
    ReversibleBlock,
    Split,
)

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


# What another library does with torch is its own affair.
others = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "32-true"},
        {"precision": "bf16-mixed"},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
    ],
    ids=lambda settings: next(iter(settings)),
)
@others
def test_lightning_trains_to_the_weights_of_stored_activations(settings):
    pytest.importorskip("lightning")
    script = runpy.run_path(str(SCRIPTS / "with_lightning.py"))
    weights = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        model = script["Classifier"](checkpoint)
        script["train"](model, **settings, enable_progress_bar=False, enable_model_summary=False)
        weights.append(model.state_dict())
    torch.testing.assert_close(*weights)


@others
def test_the_switch_of_transformers_has_activations_rebuilt():
    pytest.importorskip("transformers")
    script = runpy.run_path(str(SCRIPTS / "with_transformers.py"))
    model = script["Model"](script["Config"]())
    x, labels = torch.randn(4, 10, 16), torch.tensor([0, 1, 2, 0])
    model(x, labels)["loss"].backward()
    stored = [p.grad for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    assert model.stack.layers.checkpoint is True
    model.train()(x, labels)["loss"].backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], stored)
    model.gradient_checkpointing_disable()
    assert model.stack.layers.checkpoint is False


def test_pretrained_blocks_become_reversible_near_what_they_were():
    script = runpy.run_path(str(SCRIPTS / "from_pretrained.py"))
    torch.manual_seed(0)
    blocks = [
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True, norm_first=True)
        for _ in range(4)
    ]
    mask = torch.ones(6, 6, dtype=torch.bool).triu(1)
    x = expected = torch.randn(3, 6, 8)
    for block in blocks:
        expected = block(expected, src_mask=mask)
    gradients = []
    for checkpoint in (False, True):
        near = script["WithMomentum"](blocks, gamma=0.003, checkpoint=checkpoint)
        y1 = near(x, src_mask=mask)
        torch.testing.assert_close(y1, expected, rtol=0, atol=1e-2)
        y2 = script["Midpoint"](blocks, checkpoint=checkpoint)(x, src_mask=mask)
        assert (y2 - expected).norm() < 0.5 * (expected - x).norm()
        loss = y1.sin().sum() + y2.sin().sum()
        gradients.append(torch.autograd.grad(loss, list(near.parameters())))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@others
def test_a_pretrained_gpt2_becomes_reversible_near_what_it_was():
    pytest.importorskip("transformers")
    script = runpy.run_path(str(SCRIPTS / "from_pretrained.py"))
    text = bytes(range(256)) * 4
    model = script["pretrained"](layers=4, width=16, steps=5, text=text)
    tokens = next(iter(script["batches"](text, seed=1)))
    reversible = script["make_reversible"](model, script["WithMomentum"], gamma=0.003)
    with torch.no_grad():
        found, expected = reversible(tokens).logits, model(tokens).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-2)
    memory = script["measure_memory"](script["Logits"](reversible), tokens)
    assert memory.as_set.held < memory.stored.held / 2
    before = script["evaluate"](reversible, text, count=1)
    script["train"](reversible, text, steps=5, lr=1e-3)
    assert script["evaluate"](reversible, text, count=1) < before


def residual() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))


def output_and_gradients(network, residuals, x):
    # A view stands for the output of a stem: MemCNN counts the gradient of a leaf twice.
    y = network(x.clone().requires_grad_().view_as(x))
    y = y[0] if isinstance(y, tuple) else y  # FrEIA returns a log-determinant besides
    y.sin().sum().backward()
    return [y.detach(), *(p.grad for f in residuals for p in f.parameters())]


def scripts_with(name):
    """The networks that a guide puts side by side, if the library that one needs is there."""
    if name in PEERS and importlib.util.find_spec(PEERS[name]) is None:
        pytest.skip(f"{PEERS[name]} is not installed")
    return runpy.run_path(str(SCRIPTS / "same_network.py"))


@pytest.mark.parametrize("name", ["torch_checkpoint", *PEERS])
@others
def test_the_networks_that_a_guide_puts_side_by_side_compute_the_same(name):
    networks = scripts_with(name)
    ours = [residual() for _ in range(4)]
    theirs = copy.deepcopy(ours)
    x = torch.randn(4, 16)
    found = output_and_gradients(networks["invertible"](ours), ours, x)
    expected = output_and_gradients(networks[name](theirs), theirs, x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", PEERS)
@others
def test_weights_of_another_library_are_loaded_under_other_names(name):
    networks = scripts_with(name)
    fs, theirs = [residual() for _ in range(4)], [residual() for _ in range(4)]
    trained = networks[name](theirs).state_dict()
    networks["invertible"](fs).load_state_dict(networks["renamed"](trained, name))
    for ours, their in zip(fs, theirs, strict=True):
        assert all(map(torch.equal, ours.parameters(), their.parameters()))


@others
def test_the_momentum_network_of_a_guide_is_that_of_revlib():
    networks = scripts_with("revlib")
    from revlib.utils import momentum_net

    ours = [residual() for _ in range(3)]
    theirs = copy.deepcopy(ours)
    x = torch.randn(4, 16)
    found = output_and_gradients(networks["momentum_net"](ours), ours, x)
    torch.testing.assert_close(found, output_and_gradients(momentum_net(*theirs), theirs, x))


@pytest.mark.parametrize("name", ["memcnn", "revtorch", "freia"])
@others
def test_odd_channels_are_cut_into_the_sizes_that_a_guide_names(name):
    networks = scripts_with(name)
    sizes = (2, 3) if name == "freia" else (3, 2)
    f, g = nn.Linear(sizes[1], sizes[0]), nn.Linear(*sizes)
    theirs = networks[name]([f, g], 5) if name == "freia" else networks[name]([f, g])
    x = torch.randn(4, 5)
    block = InvertibleSequential(Split(sizes), ReversibleBlock(f, g), Merge(sizes))
    expected = output_and_gradients(theirs, [], x)
    torch.testing.assert_close(output_and_gradients(block, [], x), expected)


@others
def test_wrappers_of_memcnn_in_a_row_are_one_composition_of_ours():
    networks = scripts_with("memcnn")

    def states_held(network):
        x = torch.randn(4096, 16)
        gc.collect()  # or what other tests left is freed meanwhile
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
            y = network(x)
        held = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
        return round(held / y.nbytes)

    blocks = [[residual(), residual()] for _ in range(8)]
    compositions = [networks["invertible"](block) for block in blocks]
    assert states_held(networks["memcnn"]([f for block in blocks for f in block])) == 1
    assert states_held(networks["invertible"]([f for block in blocks for f in block])) == 1
    assert states_held(nn.Sequential(*compositions)) == 8
    assert states_held(InvertibleSequential(*compositions)) == 1


@others
def test_layers_of_freia_are_those_that_a_guide_names():
    scripts_with("freia")
    from FrEIA import modules

    x = torch.randn(2, 3, 8, 6)
    sizes = [(3, 8, 6)]
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0])
    for legacy, order in (False, "channel-major"), (True, "offset-major"):
        (expected,), _ = modules.IRevNetDownsampling(sizes, legacy_backend=legacy)([x])
        assert torch.equal(PixelUnshuffle(2, order=order)(x), expected)
        (expected,), _ = modules.HaarDownsampling(sizes, order_by_wavelet=legacy)([x])
        factors = signs.repeat_interleave(3) if legacy else signs.repeat(3)
        found = HaarWavelet(orthonormal=True, order=order)(x) * factors.view(-1, 1, 1)
        torch.testing.assert_close(found, expected)
    permute = modules.PermuteRandom([(16,)], seed=3)
    y = torch.randn(4, 16)
    assert torch.equal(Permute(permute.perm.tolist())(y), permute([y])[0][0])
