import json
from dataclasses import replace
from pathlib import Path

import pytest

from experiment.folder import RunError
from experiment.settings import RECIPES, Config, parse
from networks.presets import PRESETS

STEPS = 5  # in an epoch


def rates(config, iterations):
    return [config.learning_rate(iteration, STEPS) for iteration in iterations]


def test_each_preset_has_a_recipe():
    assert RECIPES.keys() == PRESETS.keys()
    for preset, recipe in RECIPES.items():
        assert recipe.preset == preset
        assert parse(["--preset", preset]) == recipe


def test_flags_complete_the_recipe_of_the_preset():
    assert parse([]) == RECIPES["digits"]
    assert parse(["--data", "x"]) == replace(RECIPES["b"], data="x")
    assert parse(["--data=x", "--preset", "a"]) == replace(RECIPES["a"], data="x")
    cifar = parse(["--preset=cifar10", "--data", "x", "--lr", "0.2"])
    assert cifar == replace(RECIPES["cifar10"], data="x", lr=0.2)


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


def test_other_quanta_are_refused(capsys):
    with pytest.raises(SystemExit):
        parse(["--quantum", "0.1"])
    assert "power of two such as 2**-16" in " ".join(capsys.readouterr().err.split())


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
        (["--lr", "-1"], "--lr cannot be negative, got -1.0"),
        (["--save-every", "-1"], "--save-every cannot be negative"),
        (["--momentum", "2"], "--momentum is 0 to 1, got 2.0"),
        (["--label-smoothing", "2"], "--label-smoothing is 0 to 1"),
        (["--lr-factor", "-1"], "--lr-factor is 0 to 1"),
        (["--epochs", "5", "--warmup", "5"], "--warmup must be below the 5 of the run, got 5"),
        (["--jitter", "1", "1", "-1", "0"], "--jitter cannot be negative"),
        (["--jitter", "1", "1", "1", "0.6"], "--jitter takes a hue of at most 0.5"),
        (["--std", "0"], "--mean and --std take one number a channel"),
        (["--mean", "0", "0"], "--mean and --std take one number a channel"),
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
    assert Config.from_dict(json.loads(json.dumps(config.as_dict()))) == config
    assert Config.from_dict(config.as_dict()).out == Path("run")


def test_a_resumed_run_may_change_where_it_runs_but_not_what():
    saved = Config(data="here").as_dict()
    free = Config(data="there", device="cuda", workers=8, threads=3, out=Path("run"), resume=True)
    free = replace(free, log_every=7, save_every=1.0, parallel="fsdp", compile=True, epochs=200)
    assert free.differences(saved) == []
    assert Config(lr=0.5, seed=1).differences(saved) == [
        "--lr was 0.1, is 0.5",
        "--seed was 0, is 1",
    ]


@pytest.mark.parametrize("schedule", ["cosine", "one-cycle"])
def test_the_length_is_free_only_if_no_learning_rate_depends_on_it(schedule):
    saved = Config(schedule=schedule).as_dict()
    longer = Config(schedule=schedule, epochs=200)
    assert longer.differences(saved) == ["--epochs was 128, is 200"]
