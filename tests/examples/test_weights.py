"""Networks in files: ours, converted ones and those of the released code."""

import json
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from errors import RunError
from experiment.settings import recipe
from networks.released import released_names
from presets import PRESETS
from trainer.weights import Network, build_model, fill, load_network, read_weights, save_weights

CPU = torch.device("cpu")
TEN = tuple("0123456789")
DIGITS = replace(recipe("digits"), blocks=(1, 2, 1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = build_model(DIGITS, classes=10)
    model(torch.randn(4, 1, 16, 16))  # statistics of its own
    return model.eval()


@pytest.fixture
def network(model):
    return Network(model, DIGITS, TEN, "made up")


@pytest.fixture
def checkpoint(model):
    return {
        "config": DIGITS.as_dict(),
        "classes": list(TEN),
        "epoch": 3,
        "step": 0,
        "model": model.state_dict(),
        "rng": [{"cpu": torch.get_rng_state(), "cuda": None}],
    }


def assert_equal(model, other):
    state, other_state = model.state_dict(), other.state_dict()
    assert state.keys() == other_state.keys()
    assert all(torch.equal(state[key], other_state[key]) for key in state)
    x = torch.randn(2, 1, 16, 16)
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("place", ["", "checkpoint.pt", "best.pt"])
def test_a_run_is_loaded_from_its_folder_or_a_checkpoint_in_it(tmp_path, checkpoint, model, place):
    torch.save(checkpoint, tmp_path / (place or "checkpoint.pt"))
    found = load_network(tmp_path / place, CPU)
    assert_equal(found.model, model)
    assert not found.model.training
    assert found.config == DIGITS
    assert found.classes == TEN
    assert found.origin.endswith(f"{place or 'checkpoint.pt'}: digits, epochs trained: 3")


def test_the_latest_run_is_loaded_by_default(tmp_path, checkpoint, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, epoch in (("9", 1), ("10", 2), ("latest", 3)):
        folder = Path("runs/irevnet") / number
        folder.mkdir(parents=True)
        torch.save(checkpoint | {"epoch": epoch}, folder / "checkpoint.pt")
    assert (
        load_network(None, CPU).origin == "runs/irevnet/10/checkpoint.pt: digits, epochs trained: 2"
    )


def test_without_a_run_there_is_no_latest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="no run under runs/irevnet: train one, or give --weights"):
        load_network(None, CPU)


def test_what_is_saved_is_loaded(tmp_path, network):
    save_weights(tmp_path / "it.safetensors", network)
    found = load_network(tmp_path / "it.safetensors", CPU)
    assert_equal(found.model, network.model)
    assert found.classes == network.classes
    assert found.config == network.config
    assert found.origin.endswith("it.safetensors: digits, made of made up")
    assert [path.name for path in tmp_path.iterdir()] == ["it.safetensors"]


def test_the_metadata_say_which_network_it_is(tmp_path, network):
    path = tmp_path / "it.safetensors"
    save_weights(path, network)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert {key: metadata[key] for key in ("preset", "classes", "origin")} == {
        "preset": "digits",
        "classes": json.dumps(TEN),
        "origin": "made up",
    }
    assert json.loads(metadata["settings"])["blocks"] == [1, 2, 1]


def test_tensors_that_share_memory_are_saved_one_by_one(tmp_path, network):
    network.model.norm.bias = network.model.norm.weight
    save_weights(tmp_path / "tied.safetensors", network)
    assert_equal(load_network(tmp_path / "tied.safetensors", CPU).model, network.model)


def test_a_failed_write_leaves_what_was_there(tmp_path, network, monkeypatch):
    path = tmp_path / "it.safetensors"
    save_weights(path, network)
    before = path.read_bytes()

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(RunError, match=r"cannot write .*it.safetensors: disk full"):
        save_weights(path, network)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [before]


def released_checkpoint(model, **more):
    """As the released code saves it, behind ``DataParallel``."""
    state = model.state_dict()
    names = released_names(model)
    published = OrderedDict((f"module.{key}", state[name]) for key, name in names.items())
    return {
        "epoch": 110,
        "arch": "iRevNet",
        "state_dict": OrderedDict(
            (k, v) for k, v in published.items() if not k.endswith("num_batches_tracked")
        ),
        "best_prec1": torch.tensor(74.018),
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]},
    } | more


@pytest.fixture(scope="module")
def cifar10():
    torch.manual_seed(0)
    return PRESETS["cifar10"].build(quantum=None).eval()


@pytest.mark.slow
@pytest.mark.parametrize("zipped", [True, False])
def test_released_weights_are_loaded_in_the_format_of_their_time_too(tmp_path, cifar10, zipped):
    path = tmp_path / "cifar.pth.tar"
    torch.save(released_checkpoint(cifar10), path, _use_new_zipfile_serialization=zipped)
    found = load_network(path, CPU, "cifar10")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(found.model(x), cifar10(x))
    assert found.config == replace(recipe("cifar10"), quantum=None)
    assert (found.classes, found.origin) == (TEN, f"{path}: cifar10")


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (print, ("the trap has sprung",))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(tmp_path, checkpoint, capsys, zipped):
    torch.save(
        checkpoint | {"trap": Trap()}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(RunError, match=r"x.pt holds more than tensors .*\n.*import torch\n"):
        load_network(tmp_path / "x.pt", CPU)
    assert "sprung" not in capsys.readouterr().out


@pytest.mark.slow
def test_weights_that_do_not_fit_are_refused_with_their_names(tmp_path, checkpoint, cifar10):
    checkpoint["model"]["strange"] = checkpoint["model"].pop("classifier.bias")
    torch.save(checkpoint, tmp_path / "ours.pt")
    with pytest.raises(RunError, match=r"classifier.bias missing; strange unexpected"):
        load_network(tmp_path / "ours.pt", CPU)
    released = released_checkpoint(cifar10)
    del released["state_dict"]["module.bn1.weight"]
    torch.save(released, tmp_path / "released.pt")
    with pytest.raises(RunError, match=r"not fit --preset cifar10: norm.weight missing. Say with"):
        load_network(tmp_path / "released.pt", CPU, "cifar10")
    with pytest.raises(RunError, match=r"not fit --preset b-released: .* Say with --preset which"):
        load_network(tmp_path / "released.pt", CPU)


def test_bare_weights_are_those_of_the_preset_that_is_given(tmp_path):
    bare = {name: value.contiguous() for name, value in build(10).state_dict().items()}
    torch.save(bare, tmp_path / "bare.pt")
    save_file(bare, tmp_path / "bare.safetensors")
    for name in ("bare.pt", "bare.safetensors"):
        found = load_network(tmp_path / name, CPU, "resnet-digits")
        assert_equal(found.model, build(10).eval())
        with pytest.raises(RunError, match="Say with --preset which network they are of"):
            load_network(tmp_path / name, CPU, "resnet50")


def test_nothing_begins_with_weights_of_another_kind_of_network(tmp_path, model):
    torch.save(build(7).state_dict(), tmp_path / "bare.pt")
    with pytest.raises(RunError, match="does not fit --preset digits: "):
        fill(model, read_weights(tmp_path / "bare.pt"), "digits", TEN)


def build(classes):
    torch.manual_seed(1)
    return PRESETS["resnet-digits"].build(classes)


@pytest.mark.parametrize("at", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", ["it.pt", "it.safetensors"])
def test_files_whose_bytes_have_changed_are_refused(tmp_path, network, checkpoint, name, at):
    path = tmp_path / name
    save_weights(path, network) if path.suffix == ".safetensors" else torch.save(checkpoint, path)
    damaged = bytearray(path.read_bytes())
    middle = int(len(damaged) * at)
    damaged[middle : middle + 8] = b"\xff" * 8
    path.write_bytes(damaged)
    with pytest.raises(RunError, match="cannot read"):
        load_network(path, CPU)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, checkpoint, value):
    checkpoint["model"]["norm.bias"][0] = value
    torch.save(checkpoint, tmp_path / "x.pt")
    with pytest.raises(RunError, match=r"has weights that are not finite: norm.bias"):
        load_network(tmp_path / "x.pt", CPU)


def test_the_average_is_taken_and_a_better_checkpoint_named(tmp_path, checkpoint):
    average = {name: value + 1 for name, value in checkpoint["model"].items()}
    torch.save(checkpoint | {"average": average, "best_epoch": 2}, tmp_path / "checkpoint.pt")
    torch.save(checkpoint, tmp_path / "best.pt")
    found = load_network(tmp_path, CPU)
    assert torch.equal(found.model.norm.bias, average["norm.bias"])
    assert "best.pt beside it, of epoch 2, was better in the test" in found.origin


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight": torch.zeros(2)}, "has no classifier: it holds weight"),
        ({"weight": 3}, r"holds weight \(int\); weights are in"),
        ({}, "holds a dict; weights are in"),
        (torch.zeros(2), "holds a Tensor; weights are in"),
        ({"state_dict": [torch.zeros(2)]}, r"holds state_dict \(list\); weights are in"),
        (
            {"epoch": 1, "state_dict": {1: torch.zeros(2)}},
            r"holds epoch \(int\), state_dict",
        ),
    ],
)
def test_other_checkpoints_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(RunError, match=message):
        load_network(tmp_path / "x.pt", CPU)


def test_files_that_cannot_be_read_are_named(tmp_path, checkpoint):
    for content in (b"<!DOCTYPE html>", b"text", b""):
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(
            RunError, match=f"bad.pt: it is no file of torch, it begins with {content}"
        ):
            load_network(tmp_path / "bad.pt", CPU)
        (tmp_path / "bad.safetensors").write_bytes(content)
        with pytest.raises(RunError, match=r"cannot read .*bad.safetensors"):
            load_network(tmp_path / "bad.safetensors", CPU)
    with pytest.raises(RunError, match=r"there is no .*none.pt: weights are in a run's folder"):
        load_network(tmp_path / "none.pt", CPU)
    checkpoint["config"]["colour"] = "blue"
    torch.save(checkpoint, tmp_path / "later.pt")
    with pytest.raises(RunError, match=r"settings of another version: .*colour"):
        load_network(tmp_path / "later.pt", CPU)
