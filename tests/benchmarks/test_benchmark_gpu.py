"""The command for GPUs runs, here on the CPU. No times: those are for reading."""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import gpu
import gpu_parts
from comparing.sides import OURS, PLAIN, SIDES, quiet_peers

SMALL = replace(gpu_parts.SCALES["cpu"], sizes=((2, 4, 4),), depths=(2,))


@pytest.fixture(autouse=True)
def _quiet_peers():
    with quiet_peers():
        yield


def _run(name, out, seconds):
    gpu_parts.run(name, SMALL, out, seconds)
    return json.loads((out / f"{name}.json").read_text())


def test_a_part_records_all_it_measures_and_what_with(tmp_path, capsys, monkeypatch):
    sides = {name: SIDES[name] for name in (PLAIN, OURS)}
    monkeypatch.setattr(gpu_parts, "importable_sides", lambda: (sides, {"MemCNN": "not here"}))
    record = _run("sizes", tmp_path, seconds=8)  # on a busy machine 4 end too soon
    assert record["missing"] == []
    assert record["failed"] == {}
    rows = record["found"]["2x4x4x4"]["rows"]
    assert rows[PLAIN]["over_plain"]["median"] == 1
    assert rows[OURS]["over_limit"]["median"] > 0
    assert record["found"]["without grad"]["2x4x4x4"]["ratio"]["median"] > 0
    assert record["about"]["versions"]["torch"] == torch.__version__
    assert "commit" in record["about"]
    printed = capsys.readouterr().out
    assert "skipped MemCNN: not here" in printed
    assert "over plain" in printed


def test_a_part_goes_on_behind_what_fails_and_stops_in_time(tmp_path, capsys, monkeypatch):
    def broken(_):
        raise OSError("out of order")

    units = [
        gpu_parts.Unit("first", broken),
        gpu_parts.Unit("second", lambda _: time.sleep(0.5)),
        gpu_parts.Unit("third", broken),
    ]
    monkeypatch.setitem(gpu_parts.PARTS, "sizes", gpu_parts.Part("", 1, lambda _: units))
    record = _run("sizes", tmp_path, seconds=0.4)
    assert record["failed"] == {"first": "OSError: out of order"}
    assert record["found"] == {"second": None}
    assert record["missing"] == ["third"]
    printed = capsys.readouterr()
    assert "no time for third" in printed.out
    assert "out of order" in printed.err


def test_cudnn_is_set_for_a_while():
    before = torch.backends.cudnn.deterministic
    with gpu_parts._cudnn({"benchmark": True, "deterministic": True}):
        assert torch.backends.cudnn.benchmark
        assert torch.backends.cudnn.deterministic
    assert torch.backends.cudnn.deterministic == before


@pytest.mark.parametrize("name", gpu_parts.PARTS)
def test_every_part_has_something_to_measure_on_each_device(name):
    for scale in gpu_parts.SCALES.values():
        names = [unit.name for unit in gpu_parts.PARTS[name].units(scale)]
        assert names
        assert len(names) == len(set(names))


def test_a_process_that_ends_well_fails_or_takes_too_long(tmp_path, capsys):
    text = tmp_path / "x.txt"

    def run(script, seconds=30.0):
        return gpu.run([sys.executable, "-u", "-c", script], seconds, text)

    assert run("print('well')").startswith("done after")
    assert text.read_text().startswith("well\ndone after")
    assert run("print('half'); raise SystemExit(3)").startswith("failed with status 3 after")
    assert run("import time; print('slow'); time.sleep(60)", 2.0).startswith("out of time after")
    assert text.read_text().startswith("slow\nout of time")
    assert capsys.readouterr().out == "well\nhalf\nslow\n"


def test_the_parts_share_the_time_and_none_stops_the_next(tmp_path, capsys, monkeypatch):
    given = {}

    def run(command, seconds, text):
        given[text.stem] = seconds
        assert float(command[-1]) == pytest.approx(0.8 * seconds, abs=0.5)
        return "failed with status 1 after 0 s" if text.stem == "sizes" else "done after 0 s"

    monkeypatch.setattr(gpu, "run", run)
    parts = ["--parts", "sizes", "stacks", "compiled"]
    assert gpu.main([*parts, "--seconds", "300", "--out", str(tmp_path)])
    assert list(given) == ["sizes", "stacks", "compiled"]
    # Each of the first two took no time, and left its share to those behind it.
    assert given["sizes"] == pytest.approx(100, rel=0.3)
    assert given["stacks"] == pytest.approx(150, rel=0.3)
    assert given["compiled"] == pytest.approx(300, rel=0.01)
    assert "failed with status 1" in capsys.readouterr().out
    assert not gpu.main(["--parts", "stacks", "--seconds", "6000", "--out", str(tmp_path)])
    assert given["stacks"] == gpu.LONGEST


def test_the_script_of_a_part_starts_without_tyro(tmp_path, monkeypatch):
    (tmp_path / "tyro.py").write_text("raise ImportError('no tyro')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    command = [*gpu.SCRIPT, "sizes", "cpu", str(tmp_path), "0"]
    assert gpu.run(command, 120, tmp_path / "sizes.txt").startswith("done")
    assert "no time for 2x8x4x4; " in (tmp_path / "sizes.txt").read_text()
    assert json.loads((tmp_path / "sizes.json").read_text())["found"] == {}


def test_the_list_says_what_the_parts_are(capsys):
    assert not gpu.main(["--list"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in gpu_parts.PARTS)
