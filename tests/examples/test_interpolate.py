import json
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from starting import start

import interpolate
from analysis import images, in_mode
from errors import RunError
from interpolate import Settings, decode_line, distances, evenly_along, mix
from networks.irevnet import IRevNet
from trainer.weights import load_network

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(digits_run):
    return load_network(digits_run, CPU)


@pytest.fixture(scope="module")
def model(trained):
    return in_mode(trained, "float64")


@pytest.fixture(scope="module")
def pair(trained):
    return images(trained, "test").at_most(2).joined().double()


def line(model, pair, **changes):
    names = ("t", "decoded", "straight", "off")
    found = decode_line(model, *pair, Settings(steps=5, **changes))
    return SimpleNamespace(**dict(zip(names, found, strict=True)))


def travelled(t):
    """A curve that has travelled ``t**2`` of its length 3."""
    return (3 * t**2)[:, None, None, None]


def test_mixing_gives_the_very_ends_and_what_is_between():
    ends = torch.randn(2, 3, 4, 4)
    mixed = mix(ends, torch.tensor([0.0, 0.25, 1.0]))
    assert torch.equal(mixed[0], ends[0])
    assert torch.equal(mixed[2], ends[1])
    torch.testing.assert_close(mixed[1], 0.25 * ends[1] + 0.75 * ends[0])


@pytest.mark.parametrize("spacing", ["t", "pixels"])
def test_the_ends_of_a_line_are_the_images(model, pair, spacing):
    decoded = line(model, pair, spacing=spacing, dense=64).decoded
    torch.testing.assert_close(decoded[-1], pair[0], rtol=0, atol=1e-13)
    torch.testing.assert_close(decoded[0], pair[1], rtol=0, atol=1e-13)


def test_a_line_has_the_mixed_features(model, pair):
    found = line(model, pair)
    phi = model.features(pair)
    for t, image in zip(found.t, found.decoded, strict=True):
        features = model.features(image[None])[0]
        torch.testing.assert_close(features, t * phi[0] + (1 - t) * phi[1])
    assert found.off.max() < 1e-13


def test_the_line_in_pixel_space_is_straight_and_has_the_same_t(model, pair):
    found = line(model, pair, spacing="pixels", dense=64)
    for t, image in zip(found.t, found.straight, strict=True):
        torch.testing.assert_close(image, t * pair[0] + (1 - t) * pair[1])


def test_steps_are_even_in_t(model, pair):
    np.testing.assert_allclose(line(model, pair).t, [0, 0.25, 0.5, 0.75, 1])


def test_steps_along_a_curve_travel_equal_lengths():
    t = evenly_along(travelled, torch.linspace(0, 1, 5, dtype=torch.float64), dense=1000)
    np.testing.assert_allclose(distances(travelled(t)), 3 / 4, rtol=1e-5)
    assert t[0] == 0
    assert t[-1] == 1


def test_decoded_steps_are_equally_long_along_the_curve(model, pair):
    t = line(model, pair, spacing="pixels", dense=512).t
    ends = model.features(pair).flip(0)

    def length(start, stop):
        points = torch.linspace(start, stop, 200, dtype=torch.float64)
        return distances(model.inverse(mix(ends, points))).sum().item()

    with torch.no_grad():
        lengths = [length(*part) for part in pairwise(t)]
        uneven = [length(i / 4, (i + 1) / 4) for i in range(4)]
    assert max(lengths) / min(lengths) < 1.01 < max(uneven) / min(uneven)


def test_a_curve_that_is_not_finite_is_an_error():
    with pytest.raises(RunError, match="not finite: take --spacing t"):
        evenly_along(lambda t: travelled(t) / 0, torch.linspace(0, 1, 3), dense=10)


def test_between_images_an_injective_network_decodes_other_features_and_says_so():
    torch.manual_seed(0)
    model = IRevNet(
        10, blocks=(2,), strides=(1,), widths=(4,), downsampling=1, quantum=None, checkpoint=False
    )
    model.double().eval()
    found = line(model, torch.randn(2, 3, 4, 4, dtype=torch.float64))
    assert found.off[[0, -1]].max() < 1e-12
    assert found.off[1:-1].min() > 1e-6


@pytest.mark.parametrize("spacing", ["t", "pixels"])
def test_the_script_writes_lines_whose_ends_are_right(digits_run, tmp_path, spacing):
    flags = ["--pairs", "2", "--steps", "4", "--dense", "16", "--threads", "1"]
    flags += ["--weights", digits_run, "--out", tmp_path, "--spacing", spacing]
    assert start(interpolate.main, *flags) == 0
    assert (tmp_path / "interpolate.png").exists()
    assert (tmp_path / "interpolate.pdf").exists()
    lines = json.loads((tmp_path / "interpolate.json").read_text())["lines"]
    assert len(lines) == 2
    for found in lines:
        assert len(found["t"]) == 4
        assert max(found["relative_error_at_ends"]) < 1e-13


@pytest.mark.parametrize(("flag", "least"), [("--pairs", 1), ("--steps", 2), ("--dense", 2)])
def test_too_few_are_an_error(capsys, flag, least):
    assert start(interpolate.main, flag, least - 1) == 1
    expected = f"error: {flag} must be at least {least}, got {least - 1}."
    assert expected in capsys.readouterr().err
