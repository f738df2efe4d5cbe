import json
import math
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console

from analyses.analysis import (
    Settings,
    images,
    in_arithmetic,
    progress,
    provenance,
    run_script,
    save,
)
from experiment.folder import RunError
from experiment.settings import RECIPES
from networks.presets import PRESETS
from trainer.weights import Network, load_network

CPU = torch.device("cpu")


def network(preset, **overrides):
    model = PRESETS[preset](10, **overrides)
    return Network(model, RECIPES[preset], 10, "untrained")


def test_images_are_those_that_the_network_was_trained_on(digits_run):
    trained = load_network(digits_run, CPU)
    test = images(trained, None, "test", CPU, None)
    assert test.count == 360
    assert len(test) == len(list(test))
    x, _ = images(trained, None, "train", CPU, 50).together()
    assert x.shape == (50, 1, 16, 16)
    # Its own mean and deviation.
    assert abs(x.mean()) < 0.1
    assert abs(x.std() - 1) < 0.1


def test_fewer_images_are_spread_evenly_over_all(digits_run):
    trained = load_network(digits_run, CPU)
    x, labels = images(trained, None, "test", CPU, None).together()
    some, their_labels = images(trained, None, "test", CPU, 200).together()
    places = [i * 360 // 200 for i in range(200)]
    assert torch.equal(some, x[places])
    assert torch.equal(their_labels, labels[places])


def test_other_images_can_be_asked_for(digits_run):
    with pytest.raises(RunError, match="nowhere"):
        images(load_network(digits_run, CPU), "nowhere", "test", CPU, None)


def test_more_images_than_there_are_is_all(digits_run):
    assert images(load_network(digits_run, CPU), None, "test", CPU, 1000).count == 360


def test_no_images_is_an_error(digits_run):
    with pytest.raises(RunError, match="--limit must be at least 1, got 0"):
        images(load_network(digits_run, CPU), None, "test", CPU, 0)


@pytest.mark.parametrize("quantum", [None, 2**-16])
def test_a_copy_in_other_arithmetic_computes_the_same_up_to_rounding(digits_run, quantum):
    trained = load_network(digits_run, CPU)
    x, _ = images(trained, None, "test", CPU, 4).together()
    copy = in_arithmetic(trained, dtype=torch.float64, quantum=quantum)
    with torch.no_grad():
        torch.testing.assert_close(
            copy(x.double()), trained.model(x).double(), rtol=1e-3, atol=1e-3
        )


def test_a_copy_computes_on_its_grid_or_on_none(digits_run):
    trained = load_network(digits_run, CPU)
    x, _ = images(trained, None, "test", CPU, 1).together()
    with torch.no_grad():
        on_grid = in_arithmetic(trained, dtype=torch.float32, quantum=2**-8).features(x) * 2**8
        on_none = in_arithmetic(trained, dtype=torch.float32, quantum=None).features(x) * 2**8
    assert torch.equal(on_grid, on_grid.round())
    assert not torch.equal(on_none, on_none.round())


def test_only_i_revnets_have_copies_in_other_arithmetic():
    with pytest.raises(
        RunError, match="only an i-RevNet can be decoded, got --preset resnet-digits"
    ):
        in_arithmetic(network("resnet-digits"), dtype=torch.float64, quantum=None)


def test_results_are_a_figure_in_two_formats_and_numbers(tmp_path):
    numbers = {"a": torch.tensor([1.5, math.nan]), "b": {"c": (Path("x"), math.inf, 2)}}
    paths = save(tmp_path / "deep" / "er", "name", Figure(layout="constrained"), numbers)
    assert [path.name for path in paths] == ["name.png", "name.pdf", "name.json"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert paths[1].read_bytes().startswith(b"%PDF")
    assert json.loads(paths[2].read_text()) == {"a": [1.5, None], "b": {"c": ["x", None, 2]}}


def test_results_that_cannot_be_written_are_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot write"):
        save(tmp_path / "file", "name", Figure(), {})


def test_numbers_say_where_they_come_from(digits_run):
    found = provenance(Settings(seed=3), load_network(digits_run, CPU))
    assert found["settings"]["seed"] == 3
    assert str(digits_run) in found["weights"]
    assert found["data"] == "digits"


def test_progress_gives_every_item():
    assert list(progress((i for i in range(3)), "counting", Console(), 3)) == [0, 1, 2]


def test_a_script_reads_its_flags_and_seeds_torch():
    drawn = []

    def body(settings, device, _):
        drawn.append((settings, device, torch.rand(1)))

    for _ in range(2):
        assert run_script(Settings, body, ["--seed", "7", "--data", "x", "--device", "cpu"]) == 0
    assert drawn[0] == drawn[1]
    assert drawn[0][:2] == (Settings(seed=7, data="x", device="cpu"), CPU)


def test_what_can_be_mended_is_one_line(capsys):
    def body(*_):
        raise RunError("do this.")

    assert run_script(Settings, body, []) == 1
    assert capsys.readouterr().err == "error: do this.\n"


def test_ctrl_c_stops_a_script(capsys):
    def body(*_):
        raise KeyboardInterrupt

    assert run_script(Settings, body, []) == 130
    assert "Stopped" in capsys.readouterr().err
