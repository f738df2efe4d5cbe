"""Conversion to safetensors."""

from dataclasses import replace

import pytest
import torch
from starting import start

import convert
from experiment.settings import recipe
from trainer.weights import build_model, load_network

CONFIG = replace(recipe("digits"), blocks=(1, 1, 1))


@pytest.fixture
def run(tmp_path):
    """A run's folder."""
    torch.manual_seed(0)
    model = build_model(CONFIG, classes=10)
    model(torch.randn(8, 1, 16, 16))
    state = {
        "config": CONFIG.as_dict(),
        "classes": list("0123456789"),
        "epoch": 2,
        "model": model.state_dict(),
    }
    (tmp_path / "run").mkdir()
    torch.save(state, tmp_path / "run" / "checkpoint.pt")
    return tmp_path / "run"


def logits(path):
    torch.manual_seed(1)
    return load_network(path, torch.device("cpu")).model(torch.randn(4, 1, 16, 16))


def test_a_converted_network_computes_the_same_logits_bit_for_bit(tmp_path, run, capsys):
    target = tmp_path / "it.safetensors"
    assert start(convert.main, run, target) == 0
    assert torch.equal(logits(target), logits(run))
    assert "digits, epochs trained: 2" in capsys.readouterr().out
    again = tmp_path / "again.safetensors"
    assert start(convert.main, target, again) == 0
    assert torch.equal(logits(again), logits(run))


def test_a_file_is_replaced_only_when_asked_for(tmp_path, run, capsys):
    target = tmp_path / "it.safetensors"
    target.write_bytes(b"precious")
    assert start(convert.main, run, target) == 1
    assert f"error: {target} exists" in capsys.readouterr().err
    assert target.read_bytes() == b"precious"
    assert start(convert.main, run, target, "--overwrite") == 0
    assert torch.equal(logits(target), logits(run))


def test_the_target_must_be_a_safetensors_file(tmp_path, run, capsys):
    assert start(convert.main, run, tmp_path / "it.pt") == 1
    assert "must end in .safetensors" in capsys.readouterr().err


def test_a_source_that_is_not_there_is_named(tmp_path, capsys):
    assert start(convert.main, tmp_path / "none", tmp_path / "it.safetensors") == 1
    assert f"error: there is no {tmp_path / 'none'}" in capsys.readouterr().err


def test_a_target_that_cannot_be_written_is_told_first(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert start(convert.main, tmp_path / "none", tmp_path / "file/it.safetensors") == 1
    assert "error: cannot write " in capsys.readouterr().err
