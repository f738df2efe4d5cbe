import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from starting import start

import curves
from analysis import short_names
from curves import draw_curves, smoothed


def write_run(folder, losses, preset="digits"):
    """A run of these losses, tested behind every 150th step."""
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps({"preset": preset}))
    lines = []
    for first in range(0, len(losses), 50):
        batch = losses[first : first + 50]
        lines.append({"iteration": first + len(batch), "losses": list(batch)})
        if (first + 50) % 150 == 0:
            lines.append({"iteration": first + 50, "test_accuracy": 0.5})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_loss_is_a_moving_average_over_100_steps():
    losses = np.random.default_rng(0).random(250).tolist()
    steps, means = smoothed(losses)
    assert (steps[0], steps[-1], len(steps)) == (100, 250, 151)
    assert means[0] == pytest.approx(np.mean(losses[:100]))
    assert means[-1] == pytest.approx(np.mean(losses[-100:]))


@pytest.mark.parametrize("count", [1, 3, 99, 100, 199])
def test_a_short_run_has_a_point_for_each_step(tmp_path, count):
    steps, losses = smoothed(list(range(count)))
    assert (list(steps), list(losses)) == (list(range(1, count + 1)), list(range(count)))
    run = write_run(tmp_path / "run", [1.0] * count)
    draw_curves([run], tmp_path / "x.png")
    pixels = np.array(Image.open(tmp_path / "x.png").convert("RGB")).reshape(-1, 3)
    assert (pixels == [31, 119, 180]).all(1).sum() >= 4


def test_a_run_without_steps_has_no_curve():
    steps, means = smoothed([])
    assert len(steps) == len(means) == 0


def test_runs_are_drawn_over_one_another(tmp_path, capsys):
    one, two = write_run(tmp_path / "1", [2.0] * 300), write_run(tmp_path / "2", [1.0] * 300)
    pictures = {}
    for name, folders in (("one", [one]), ("both", [one, two])):
        path = tmp_path / f"{name}.png"
        assert start(curves.main, *folders, "--out", path) == 0
        assert f"Drawn: {path}" in capsys.readouterr().out
        pictures[name] = np.array(Image.open(path).convert("RGB")).reshape(-1, 3)
    orange = [255, 127, 14]
    assert (pictures["both"] == orange).all(1).any()
    assert not (pictures["one"] == orange).all(1).any()


def test_a_folder_without_a_log_is_named(tmp_path, capsys):
    assert start(curves.main, tmp_path) == 1
    assert "error: cannot read " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["x.jsn", "x"])
def test_a_picture_that_cannot_be_drawn_is_told_with_those_that_can(tmp_path, capsys, name):
    run = write_run(tmp_path / "run", [1.0])
    assert start(curves.main, run, "--out", tmp_path / name) == 1
    assert re.search(rf"cannot draw .*{name}: its name must end in .*png", capsys.readouterr().err)


def test_runs_of_one_preset_have_names_that_tell_them_apart():
    assert short_names([("b", Path("runs/1")), ("a", Path("runs/1"))]) == ["b", "a"]
    long = [("b", Path(f"/very/long/path/of/the/run/{i}/checkpoint.pt")) for i in (1, 2)]
    assert short_names(long) == ["b (1)", "b (2)"]
    assert short_names([("b", Path("x/1")), ("b", Path("y/1"))]) == ["b (1) #1", "b (1) #2"]
    assert max(map(len, short_names([("b", Path("x" * 99)), ("b", Path("y" * 99))]))) < 30


def test_a_picture_that_cannot_be_written_is_named(tmp_path, capsys):
    run = write_run(tmp_path / "run", [1.0])
    assert start(curves.main, run, "--out", run / "log.jsonl/curves.png") == 1
    assert "error: cannot write " in capsys.readouterr().err
