"""The accuracy of trained networks."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from starting import start
from torch.nn import functional as F

import analysis
import evaluate
from experiment.settings import recipe
from images.batches import plain
from images.readers import open_images
from trainer.weights import Network, build_model, load_network, save_weights

CPU = torch.device("cpu")


@pytest.fixture
def digits(tmp_path):
    """An untrained network for the digits, in a file."""
    torch.manual_seed(0)
    config = replace(recipe("resnet-digits"), blocks=(1, 1, 1))
    path = tmp_path / "digits.safetensors"
    save_weights(
        path, Network(build_model(config, 10).eval(), config, tuple("0123456789"), "made up")
    )
    return path


def run(*flags):
    return start(evaluate.main, *flags, "--workers", 0, "--threads", 1)


def test_the_numbers_are_those_counted_by_hand(tmp_path, digits, capsys):
    network = load_network(digits, CPU)
    config = network.config
    images, labels = map(
        torch.cat, zip(*plain(open_images(config, "test"), config, CPU).epoch(), strict=True)
    )
    with torch.no_grad():
        logits = network.model(images)
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)

    assert run("--weights", digits, "--batch-size", 100, "--json", tmp_path / "new/x.json") == 0
    found = json.loads((tmp_path / "new/x.json").read_text())
    assert found["images"] == len(labels) == 360
    assert found["accuracy"] == pytest.approx((ranks < 1).float().mean().item())
    assert found["top5_accuracy"] == pytest.approx((ranks < 5).float().mean().item())
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert (found["preset"], found["data"]) == ("resnet-digits", "digits")
    printed = capsys.readouterr().out
    assert "made up" in printed
    assert f"top5_accuracy: {round(found['top5_accuracy'], 4)}" in printed


def image_folder(folder, classes):
    """Grey squares, as bright as the number of their class says."""
    for part in ("train", "val"):
        for number, name in enumerate(classes):
            (folder / part / name).mkdir(parents=True)
            for i in range(2):
                grey = np.full((16, 16), 20 * number, dtype=np.uint8)
                Image.fromarray(grey).save(folder / part / name / f"{i}.png")
    return folder


class Bright(torch.nn.Module):
    """Knows the classes of :func:`image_folder` in the order of their names."""

    in_channels, stride = 1, 1

    def __init__(self, classes):
        super().__init__()
        self.levels = torch.nn.Parameter(20 / 255 * torch.arange(classes))

    def forward(self, x):
        return -(x.mean((1, 2, 3))[:, None] - self.levels).abs()


def test_the_classes_of_a_folder_are_in_the_order_of_their_names(tmp_path, monkeypatch):
    classes = ("n0001", "n0002", "n0010")
    config = replace(recipe("digits"), mean=(0.0,), std=(1.0,))
    network = Network(Bright(3), config, classes, "made up")
    monkeypatch.setattr(analysis, "load_network", lambda *_: network)
    data = image_folder(tmp_path / "data", classes)
    out = tmp_path / "x.json", tmp_path / "x.csv"
    assert run("--data", data, "--json", out[0], "--predictions", out[1]) == 0
    found = json.loads(out[0].read_text())
    assert (found["images"], found["accuracy"]) == (6, 1.0)
    assert found["accuracy_by_class"] == dict.fromkeys(classes, 1.0)
    first, *_, last = csv.DictReader(out[1].read_text().splitlines())
    assert (first["image"], first["class"]) == ("n0001/0.png", "n0001")
    assert (last["image"], last["class"], last["found"]) == ("n0010/1.png", *2 * ["n0010"])
    assert 1 / 3 < float(last["probability"]) < 1


def test_classes_of_other_names_are_refused(tmp_path, monkeypatch, capsys):
    config = replace(recipe("digits"), mean=(0.0,), std=(1.0,))
    network = Network(Bright(2), config, ("cat", "dog"), "made up")
    monkeypatch.setattr(analysis, "load_network", lambda *_: network)
    data = image_folder(tmp_path / "data", ("dog", "cat", "cow")[:2])
    assert run("--data", image_folder(tmp_path / "others", ("ant", "dog"))) == 1
    assert "other classes than the network: class 0 was 'cat', is 'ant'" in capsys.readouterr().err
    assert run("--data", data) == 0


@pytest.mark.parametrize("flag", ["--json", "--predictions"])
def test_results_that_cannot_be_written_are_told_first(tmp_path, capsys, flag):
    (tmp_path / "file").touch()
    assert run("--weights", "none", flag, tmp_path / "file/x") == 1
    assert "error: cannot write " in capsys.readouterr().err


@pytest.mark.parametrize("classes", [9, 11])
def test_images_of_other_classes_are_refused(tmp_path, digits, capsys, classes):
    data = image_folder(tmp_path / "data", [f"class{i:02}" for i in range(classes)])
    assert run("--weights", digits, "--data", data) == 1
    error = capsys.readouterr().err
    assert f"{data} has other classes than the network: 10 classes were trained, and" in error


def test_half_the_bits_give_about_the_same(tmp_path, digits):
    for precision in ("float32", "bfloat16"):
        out = tmp_path / f"{precision}.json"
        assert run("--weights", digits, "--precision", precision, "--json", out) == 0
    full, half = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("float32", "bfloat16")
    )
    assert full["loss"] != half["loss"]
    assert full["loss"] == pytest.approx(half["loss"], rel=0.05)


def test_weights_that_are_not_there_are_named(tmp_path, capsys):
    assert run("--weights", tmp_path / "none.pt") == 1
    assert f"error: there is no {tmp_path / 'none.pt'}" in capsys.readouterr().err
