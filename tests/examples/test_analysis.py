import importlib
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from rich import get_console
from starting import start

from analysis import (
    Settings,
    images,
    in_mode,
    print_table,
    progress,
    provenance,
    save,
    table,
)
from errors import RunError
from experiment.settings import recipe
from presets import PRESETS
from scripts import script
from trainer.weights import Network, load_network

CPU = torch.device("cpu")


def network(preset, **overrides):
    model = PRESETS[preset].build(10, **overrides)
    return Network(model, recipe(preset), tuple("0123456789"), "untrained")


@pytest.fixture
def trained(digits_run):
    return load_network(digits_run, CPU)


def test_images_are_those_that_the_network_was_trained_on(trained):
    test = images(trained, "test")
    assert len(test.images) == 360
    assert len(test) == len(list(test.epoch()))
    x = images(trained, "train").at_most(50).joined()
    assert x.shape == (50, 1, 16, 16)
    # Its own mean and deviation.
    assert abs(x.mean()) < 0.1
    assert abs(x.std() - 1) < 0.1


def test_fewer_images_are_spread_evenly_over_all(trained):
    every, some = (
        images(trained, "test").at_most(1000).joined(),
        images(trained, "test").at_most(200).joined(),
    )
    assert len(every) == 360
    assert torch.equal(some, every[[i * 360 // 200 for i in range(200)]])


def test_other_images_can_be_asked_for(digits_run, tmp_path):
    network = Settings(weights=digits_run, data=str(tmp_path / "nowhere")).load()
    with pytest.raises(RunError, match="nowhere"):
        images(network, "test")


@pytest.mark.parametrize("mode", ["float32", "float64", "exact"])
def test_a_copy_in_another_mode_computes_the_same_up_to_rounding(trained, mode):
    x = images(trained, "test").at_most(4).joined()
    copy = in_mode(trained, mode)
    dtype = torch.float64 if mode == "float64" else torch.float32
    with torch.no_grad():
        found = copy(x.to(dtype))
        torch.testing.assert_close(found, trained.model(x).to(dtype), rtol=1e-3, atol=1e-3)


def test_only_the_exact_mode_computes_on_the_grid_of_the_training(trained):
    x = images(trained, "test").at_most(1).joined()
    coarse = replace(trained, config=replace(trained.config, quantum=2**-8))
    with torch.no_grad():
        on_grid = in_mode(coarse, "exact").features(x) * 2**8
        on_none = in_mode(coarse, "float32").features(x) * 2**8
    assert torch.equal(on_grid, on_grid.round())
    assert not torch.equal(on_none, on_none.round())
    assert in_mode(trained, "exact").body.quantum == 2**-16
    assert in_mode(trained, "float32").body.quantum is None


@pytest.mark.parametrize("mode", ["float32", "exact"])
def test_only_i_revnets_have_copies_in_other_modes(mode):
    with pytest.raises(
        RunError, match="only an i-RevNet can be decoded, got --preset resnet-digits"
    ):
        in_mode(network("resnet-digits"), mode)


def test_results_are_a_figure_in_two_formats_and_numbers(tmp_path):
    numbers = {"a": torch.tensor([1.5, math.nan]), "b": {"c": (Path("x"), math.inf, 2)}}
    save(tmp_path, "name", Figure(layout="constrained"), numbers)
    assert (tmp_path / "name.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "name.pdf").read_bytes().startswith(b"%PDF")
    found = json.loads((tmp_path / "name.json").read_text())
    assert found == {"a": [1.5, None], "b": {"c": ["x", None, 2]}}


def test_results_that_cannot_be_written_are_told_first(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot write"):
        Settings(out=tmp_path / "file/x").begin()


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_that_not_all_take_are_refused(tmp_path, seed):
    with pytest.raises(RunError, match=r"--seed must be at (least 0|most 4294967295), got"):
        Settings(out=tmp_path, seed=seed).begin()


def test_a_table_has_values_below_their_names_and_of_arrays_the_extremes():
    shown = table([{"a_b": "x", "c": 0.123456, "d": None, "e": torch.tensor([1.0, 2.0]), "f": 7}])
    assert [column.header for column in shown.columns] == ["a b", "c", "d", "e", "f"]
    cells = [next(iter(column.cells)) for column in shown.columns]
    assert cells == ["x", "0.1235", "-", "1 to 2", "7"]


def test_no_number_is_cut_off_in_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setattr(get_console(), "width", 20)
    numbers = {f"column {i}": 1.2345e-7 * 10**-i for i in range(8)}
    print_table([numbers], "A title")
    printed = capsys.readouterr().out
    assert all(f"{number:.4g}" in printed for number in numbers.values())


def test_numbers_say_where_they_come_from(trained, digits_run):
    found = provenance(Settings(seed=3), trained)
    assert found["settings"]["seed"] == 3
    assert str(digits_run) in found["weights"]
    assert found["data"] == "digits"
    assert found["classes"] == tuple("0123456789")


def test_progress_gives_every_item():
    assert list(progress((i for i in range(3)), "counting", 3)) == [0, 1, 2]


def test_a_script_reads_its_flags():
    seen = []

    @script
    def main(settings: Settings):
        seen.append(settings)

    assert start(main, "--seed", 7, "--data", "x", "--device", "cpu") == 0
    assert seen == [Settings(seed=7, data="x", device="cpu")]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [(RunError("do this."), 1, "error: do this.\n"), (KeyboardInterrupt(), 130, "Stopped")],
)
def test_what_can_be_mended_and_ctrl_c_are_one_line(capsys, error, status, message):
    @script
    def main(_: Settings):
        raise error

    assert start(main) == status
    assert capsys.readouterr().err.startswith(message)


SCRIPTS = [
    "train_imagenet",
    "evaluate",
    "convert",
    "curves",
    "invert",
    "interpolate",
    "spectrum",
    "separation",
    "dimensionality",
]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_plain_text(name, capsys):
    assert start(importlib.import_module(name).main, "--help") == 0
    shown = capsys.readouterr().out
    assert "::" not in shown
    assert "``" not in shown
    assert "type: ignore" not in shown
    assert max(map(len, shown.splitlines()[1:])) <= 100
