"""The benchmark of training steps runs. No times: those are for reading."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import training_step
from comparing.meters import Memory, Spread


@pytest.fixture
def measured(tmp_path, capsys):
    """Runs the command with these flags; gives its records and what it prints."""

    def run(*flags):
        small = {"batch-size": 4, "image-size": 16, "device": "cpu", "rounds": 2, "seconds": 0}
        words = [word for name, value in small.items() for word in (f"--{name}", str(value))]
        training_step.main([*words, *flags, "--out", str(tmp_path / "new" / "x.json")])
        return json.loads((tmp_path / "new" / "x.json").read_text()), capsys.readouterr().out

    return run


def test_the_command_prints_and_writes_each_kind(measured):
    found, printed = measured("--preset", "digits")
    (record,) = found.values()
    assert list(record["rows"]) == list(training_step.KINDS)
    assert all(len(row["times"]) == 2 for row in record["rows"].values())
    assert all(kind in printed for kind in training_step.KINDS)
    assert record["about"]["config"]["preset"] == "digits"


def test_rebuilding_takes_less_memory_at_the_peak(measured):
    (record,) = measured("--preset", "digits", "--batch-size", "16")[0].values()
    peaks = {kind: row["memory"]["peak"] for kind, row in record["rows"].items()}
    assert peaks["rebuilt, float"] < peaks["stored, float"]
    assert peaks["rebuilt, exact"] < peaks["stored, exact"]


def test_records_stand_side_by_side_and_are_replaced(measured):
    measured("--preset", "resnet-digits", "--image-size", "8")
    measured("--preset", "resnet-digits", "--rounds", "3")
    found, _ = measured("--preset", "resnet-digits")
    sizes = [record["about"]["config"]["image_size"] for record in found.values()]
    assert sizes == [8, 16]
    for record in found.values():
        assert len(record["rows"]["stored, float"]["times"]) == 2


def test_a_state_is_weights_gradients_momentum_and_statistics():
    config = training_step.Config(preset="resnet-digits", batch_size=2, image_size=16, device="cpu")
    training = training_step.Training(config, {})
    training.run()
    held = [*training.model.parameters(), *training.model.buffers()]
    held += [p.grad for p in training.model.parameters()]
    held += [state["momentum_buffer"] for state in training.optimizer.state.values()]
    assert training.state_bytes() == sum(x.nbytes for x in held)


def test_the_projection_counts_all_images_of_all_epochs(monkeypatch):
    times = [training_step.StepTimes(1.0, 2.0, 1.0)] * 2
    monkeypatch.setattr(
        training_step, "interleave", lambda tasks, *_, **__: dict.fromkeys(tasks, times)
    )
    monkeypatch.setattr(training_step.Training, "memory", lambda _: Memory(0, 0, 0))
    config = training_step.Config(
        preset="resnet-digits", batch_size=16, image_size=16, device="cpu", epochs=90, gpus=8
    )
    (row,) = training_step.measure(config).values()
    assert row.step == Spread(4.0, 4.0, 4.0)
    assert row.images_per_second == 4
    assert row.projected_hours == pytest.approx(90 * 1_281_167 / 32 / 3600)


def test_a_profile_says_what_share_of_the_time_is_outside_of_operators(measured):
    found, printed = measured("--preset", "digits", "--profile")
    (record,) = found.values()
    assert record["profile"]["kind"] == "rebuilt, exact"
    assert 0 < record["profile"]["share_outside"] < 1
    assert "convolution" in record["profile"]["table"]
    assert "of a step no kernel runs" in printed
