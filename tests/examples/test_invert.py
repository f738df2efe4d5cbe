import json

import numpy as np
import pytest
import torch
from starting import start

import invert
from analysis import images
from invert import noise
from trainer.weights import Network, load_network, save_weights

CPU = torch.device("cpu")
FLAGS = ["--limit", "40", "--noises", "30", "--float64-limit", "20", "--threads", "1"]


@pytest.fixture(scope="module", autouse=True)
def _few_images_in_the_picture():  # to draw it takes most of the time
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(invert, "SHOWN", 2)
        yield


@pytest.fixture(scope="module")
def found(digits_run, tmp_path_factory):
    """What the script writes about the tiny network, and the folder."""
    out = tmp_path_factory.mktemp("invert")
    assert start(invert.main, "--weights", digits_run, "--out", out, *FLAGS) == 0
    return json.loads((out / "invert.json").read_text()), out


def pixels(**changes):
    options = {"count": 10, "mode": "L", "side": 8, "seed": 0} | changes
    mode = options.pop("mode")
    found = noise(**options)
    return np.stack([np.asarray(found.read(index, mode)) for index in range(len(found))])


def test_noise_is_the_same_each_time_and_another_for_another_seed():
    assert np.array_equal(pixels(), pixels())
    assert not np.array_equal(pixels(), pixels(seed=1))
    assert pixels(mode="RGB").shape == (10, 8, 8, 3)


def test_noise_is_uniform():
    found = pixels(count=400)
    assert found.shape == (400, 8, 8)
    assert found.dtype == np.uint8
    counts = np.bincount(found.flatten(), minlength=256)
    # 100 of each value are expected: six deviations to either side.
    assert counts.min() > 40
    assert counts.max() < 160


def test_noise_which_is_of_no_class_has_no_accuracy(found):
    results, _ = found
    assert {mode["accuracy"] for mode in results["noises"].values()} == {None}
    assert all(0 <= mode["accuracy"] <= 1 for mode in results["test images"].values())


@pytest.mark.slow
def test_every_image_and_noise_is_decoded_bit_for_bit_in_the_exact_mode(found):
    results, _ = found
    for name, count in {"test images": 40, "noises": 30}.items():
        assert results[name]["exact"]["images"] == count
        assert results[name]["exact"]["bit_for_bit"] == count


@pytest.mark.slow
def test_the_error_of_the_exact_mode_is_the_rounding_of_what_was_read(found, digits_run):
    results, _ = found
    trained = load_network(digits_run, CPU)
    x = images(trained, "test").at_most(40).joined()
    rounding = x - (x * 2**16).round() / 2**16
    errors = rounding.flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)
    measured = results["test images"]["exact"]
    assert measured["relative_error"] == pytest.approx(errors.mean().item(), rel=1e-3)
    assert measured["worst_error"] == pytest.approx(errors.max().item(), rel=1e-3)


@pytest.mark.slow
def test_float64_is_far_more_precise_than_float32(found):
    results, _ = found
    for name in ("test images", "noises"):
        single, double = results[name]["float32"], results[name]["float64"]
        assert 0 < double["worst_error"] < 1e-12 < single["relative_error"] < 1e-4
        assert single["relative_error"] <= single["worst_error"]


@pytest.mark.slow
def test_float64_decodes_no_more_than_it_is_allowed(found):
    results, _ = found
    assert results["test images"]["float64"]["images"] == 20
    assert results["noises"]["float64"]["images"] == 20


@pytest.mark.slow
def test_the_results_are_a_figure_and_numbers_that_say_their_origin(found, digits_run):
    results, out = found
    assert {path.name for path in out.iterdir()} == {"invert.png", "invert.pdf", "invert.json"}
    assert results["settings"]["noises"] == 30
    assert str(digits_run) in results["weights"]


@pytest.mark.slow
def test_one_mode_alone_can_be_asked_for(digits_run, tmp_path, capsys):
    flags = ["--weights", digits_run, "--out", tmp_path, *FLAGS, "--modes", "float32"]
    assert start(invert.main, *flags) == 0
    assert "exact" not in capsys.readouterr().out
    assert list(json.loads((tmp_path / "invert.json").read_text())["noises"]) == ["float32"]


@pytest.mark.parametrize("flag", ["--noises", "--float64-limit", "--limit"])
def test_none_to_decode_is_an_error(digits_run, tmp_path, capsys, flag):
    assert start(invert.main, "--weights", digits_run, "--out", tmp_path, flag, 0) == 1
    assert f"error: {flag} must be at least 1, got 0." in capsys.readouterr().err


def test_features_beyond_the_range_of_exact_sums_are_explained(digits_run, tmp_path, capsys):
    trained = load_network(digits_run, CPU)
    with torch.no_grad():
        for weight in trained.model.body.parameters():
            weight *= 100
    weights = tmp_path / "large.safetensors"
    save_weights(weights, Network(trained.model, trained.config, trained.classes, "large weights"))
    assert start(invert.main, "--weights", weights, "--out", tmp_path, *FLAGS) == 1
    assert "Leave the exact mode out: --modes float32 float64" in capsys.readouterr().err
