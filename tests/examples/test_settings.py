import json
from dataclasses import replace
from pathlib import Path

import pytest

from errors import RunError
from experiment.settings import Config, parse, recipe
from presets import PRESETS

STEPS = 5  # in an epoch


def rates(config, iterations):
    return [config.learning_rate(iteration, STEPS) for iteration in iterations]


def test_each_preset_has_a_recipe():
    for preset in PRESETS:
        assert recipe(preset).preset == preset
        assert parse(["--preset", preset]) == recipe(preset)


def test_flags_complete_the_recipe_of_the_preset():
    assert parse([]) == recipe("digits")
    assert parse(["--data", "x"]) == replace(recipe("b"), data="x")
    assert parse(["--data=x", "--preset", "a"]) == replace(recipe("a"), data="x")
    cifar = parse(["--preset=cifar10", "--data", "x", "--lr", "0.2"])
    assert cifar == replace(recipe("cifar10"), data="x", lr=0.2)


def test_the_recipes_for_imagenet_are_those_of_the_code_and_the_paper():
    code, paper = (parse(["--data", "x", "--recipe", name]) for name in ("code", "paper"))
    assert (code.epochs, code.milestones, code.iterations) == (128, (32, 64, 96), None)
    assert paper.iterations == 600_000
    assert paper.milestones == (160_000, 320_000, 480_000)
    assert code.jitter == paper.jitter == (0.87, 0.5, 0.5, 0.2)
    changed = {"recipe": "code", "iterations": None, "milestones": (32, 64, 96)}
    assert replace(paper, **changed) == code


def test_a_preset_for_small_images_has_one_recipe():
    with pytest.raises(RunError, match="--recipe paper is for the networks for ImageNet, not for"):
        parse(["--recipe", "paper"])


@pytest.mark.parametrize(
    ("words", "quantum"),
    [([], 2**-16), (["--quantum", "2**-10"], 2**-10), (["--quantum", "none"], None)],
)
def test_a_quantum_is_a_power_of_two_or_none(words, quantum):
    assert parse(words).quantum == quantum


@pytest.mark.parametrize("words", ["some", "2**x"])
def test_what_is_no_number_is_refused(capsys, words):
    with pytest.raises(SystemExit):
        parse(["--quantum", words])
    assert "--quantum" in capsys.readouterr().err


def test_the_learning_rate_falls_at_each_milestone():
    epochs = (0, 31, 32, 63, 64, 96, 127)
    found = rates(Config(), [STEPS * epoch for epoch in epochs])
    assert found == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.0001, 0.0001])


def test_milestones_count_steps_if_the_length_does():
    config = Config(iterations=10, milestones=(4, 8))
    assert rates(config, (0, 3, 4, 7, 8)) == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001])


def test_the_learning_rate_first_rises():
    config = Config(epochs=4, warmup=2)
    assert rates(config, (0, 4, 9, 10)) == pytest.approx([0.01, 0.05, 0.1, 0.1])


def test_one_cycle_rises_and_falls_in_lines_to_zero():
    config = Config(epochs=4, warmup=2, schedule="one-cycle")
    assert rates(config, (0, 9, 10, 15, 19, 20)) == pytest.approx([0.01, 0.1, 0.1, 0.05, 0.01, 0])


def test_a_cosine_falls_to_zero():
    config = Config(epochs=4, schedule="cosine")
    assert rates(config, (0, 5, 10, 15, 20)) == pytest.approx(
        [0.1, 0.1 * (1 + 0.5**0.5) / 2, 0.05, 0.1 * (1 - 0.5**0.5) / 2, 0]
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--iterations", "0"], "--iterations must be at least 1, got 0"),
        (["--log-every", "0"], "--log-every must be at least 1"),
        (["--accumulate", "0"], "--accumulate must be at least 1"),
        (["--lr", "-1"], "--lr must be at least 0, got -1.0"),
        (["--save-every", "-1"], "--save-every must be at least 0"),
        (["--momentum", "2"], "--momentum must be at most 1, got 2.0"),
        (["--label-smoothing", "2"], "--label-smoothing must be at most 1"),
        (["--lr-factor", "-1"], "--lr-factor must be at least 0"),
        (["--epochs", "5", "--warmup", "5"], "--warmup must be at most 4, got 5"),
        (["--jitter", "1", "1", "-1", "0"], "--jitter must be at least 0, got -1.0"),
        (["--jitter", "1", "1", "1", "0.6"], "--jitter takes a hue of at most 0.5"),
        (["--std", "0"], "--mean and --std take one number a channel"),
        (["--mean", "0", "0"], "--mean and --std take one number a channel"),
        (["--mean", "nan"], "--mean must be at most 1e+38, got nan"),
        (["--lr", "inf"], "--lr must be at most 1e+38, got inf"),
        (["--seed", str(2**64)], "--seed must be at most "),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--ema", "1"], "--ema must be at most 0.999999"),
        (["--mixup", "-1"], "--mixup must be at least 0"),
        (["--epochs", "3", "--iterations", "9"], "--epochs and the 9 --iterations exclude"),
    ],
)
def test_settings_out_of_range_are_refused(words, message):
    with pytest.raises(RunError) as error:
        parse(words)
    assert str(error.value).startswith(message)


def test_unknown_presets_are_refused_with_those_there_are(capsys):
    with pytest.raises(SystemExit):
        parse(["--preset", "vgg"])
    assert "cifar10-small" in capsys.readouterr().err


def test_settings_survive_json():
    config = parse(["--data", "x", "--out", "run", "--blocks", "1", "2"])
    assert Config.from_dict(json.loads(json.dumps(config.as_dict())), Path("x")) == config
    assert Config.from_dict(config.as_dict(), Path("x")).out == Path("run")


def test_a_resumed_run_may_change_where_it_runs_but_not_what():
    saved = Config(data="here").as_dict()
    free = Config(data="there", device="cuda", workers=8, threads=3, out=Path("run"), resume="yes")
    free = replace(
        free,
        log_every=7,
        save_every=1.0,
        parallel="fsdp",
        compile=True,
        epochs=200,
        lr=0.5,
        clip_norm=1.0,
    )
    assert free.differences(saved) == []
    assert Config(momentum=0.5, seed=1).differences(saved) == [
        "--momentum was 0.9, is 0.5",
        "--seed was 0, is 1",
    ]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The folder of a run in the working folder, with its settings."""
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/irevnet/3")
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").touch()
    config = parse(["--preset", "cifar10", "--data", "x", "--lr", "0.3", "--blocks", "1", "2"])
    (folder / "settings.json").write_text(json.dumps(config.as_dict()))
    return folder, config


@pytest.mark.parametrize("words", [["--resume"], ["--resume", "--out", "runs/irevnet/3"]])
def test_a_resumed_run_has_its_settings_but_for_the_flags_given(run, words):
    folder, config = run
    assert parse(words) == replace(config, out=folder, resume="yes")
    assert parse([*words, "--lr", "1"]) == replace(config, out=folder, resume="yes", lr=1.0)


def test_auto_goes_on_if_it_can_and_begins_otherwise(run):
    folder, config = run
    found = parse(["--resume", "auto", "--out", str(folder)])
    assert found == replace(config, out=folder, resume="auto")
    fresh = parse(["--resume", "auto", "--out", "new", "--lr", "1"])
    assert fresh == replace(recipe("digits"), out=Path("new"), resume="auto", lr=1.0)
    with pytest.raises(RunError, match="--resume auto needs --out"):
        parse(["--resume", "auto"])


def test_what_torchrun_starts_again_goes_on(run, monkeypatch):
    folder, config = run
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert parse([]) == replace(config, out=folder, resume="auto")
    assert parse(["--out", "new"]).resume == "auto"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert parse([]) == recipe("digits")


def test_settings_of_another_version_are_refused(run):
    folder, _ = run
    (folder / "settings.json").write_text(json.dumps({"colour": "blue"}))
    with pytest.raises(RunError, match=r"has settings of another version: .*colour"):
        parse(["--resume"])


def test_data_that_is_there_is_found_from_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    assert parse(["--data", "here"]).data == str(tmp_path / "here")
    assert parse(["--data", "owner/name"]).data == "owner/name"


@pytest.mark.parametrize("schedule", ["cosine", "one-cycle"])
def test_the_length_is_free_only_if_no_learning_rate_depends_on_it(schedule):
    saved = Config(schedule=schedule).as_dict()
    longer = Config(schedule=schedule, epochs=200)
    assert longer.differences(saved) == ["--epochs was 128, is 200"]
