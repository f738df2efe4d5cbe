import json
import re
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_imagenet
import training
from runs import RunError, load_checkpoint, save_checkpoint
from settings import RECIPES, Config, parse
from train_imagenet import main

TINY = ["--blocks", "1", "1", "1", "--epochs", "2", "--batch-size", "479", "--milestones", "1"]
SCRIPT = Path(train_imagenet.__file__)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def images(tmp_path):
    """An image folder of two classes, a dark and a bright one."""
    random = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 3)):
        for brightness, name in enumerate(["day", "night"]):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(128 * brightness, 128 * (brightness + 1), (20, 24, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    return tmp_path / "images"


def on(images, *flags):
    small = ["--blocks", "1", "1", "1", "--epochs", "2", "--batch-size", "4", "--workers", "0"]
    small += ["--threads", "1"]
    return ["--data", str(images), "--preset", "cifar10", "--image-size", "16", *small, *flags]


def interrupt_at_step(monkeypatch, step):
    """Presses Ctrl-C while that training step runs."""
    steps = iter(range(1, step + 1))
    cross_entropy = training.F.cross_entropy

    def pressed(*args):
        if torch.is_grad_enabled() and next(steps) == step:
            raise KeyboardInterrupt
        return cross_entropy(*args)

    monkeypatch.setattr(training.F, "cross_entropy", pressed)


def records(folder):
    lines = (Path(folder) / "log.jsonl").read_text().splitlines()
    timing = {"seconds", "images_per_second"}
    return [{k: v for k, v in json.loads(line).items() if k not in timing} for line in lines]


def assert_same_state(left, right):
    left, right = load_checkpoint(Path(left)), load_checkpoint(Path(right))
    assert left.pop("config").keys() == right.pop("config").keys()
    torch.testing.assert_close(left, right, rtol=0, atol=0)


def test_the_demo_trains_on_digits_and_shows_them_twice(capsys):
    assert main(TINY) == 0
    output = capsys.readouterr().out
    assert output.startswith("No --data given: training on scikit-learn's 1,797 handwritten digits")
    for words in ("epoch 2/2", "test accuracy, top 1", "‖x - Φ⁻¹Φx‖", "worst pixel"):
        assert words in output
    assert re.search(r"as the network read them +│ (\d+) of \1 ", output)
    picture = np.array(Image.open("runs/irevnet/1/reconstructions.png").convert("L"))
    originals, decoded = halves(picture)
    assert originals.std() > 50  # neither is blank
    assert np.abs(originals - decoded).max() <= 1
    first, second = records("runs/irevnet/1")
    assert first.keys() == {
        *("epoch", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy")
    }
    assert (first["epoch"], first["lr"]) == (1, 0.1)
    assert (second["epoch"], second["lr"]) == (2, pytest.approx(0.01))


def halves(picture):
    """The two rows of images, cut out by their black pixels' bounds."""
    rows = np.flatnonzero((picture < 10).mean(1) > 0.1)
    gap = np.flatnonzero(np.diff(rows) > 1)
    [cut] = gap
    upper, lower = rows[: cut + 1], rows[cut + 1 :]
    return picture[upper[0] : upper[-1] + 1].astype(int), picture[lower[0] : lower[-1] + 1]


def test_runs_are_numbered_and_leave_each_other_alone():
    assert main([*TINY, "--epochs", "1"]) == 0
    before = Path("runs/irevnet/1/checkpoint.pt").read_bytes()
    assert main([*TINY, "--epochs", "1", "--seed", "1"]) == 0
    assert Path("runs/irevnet/1/checkpoint.pt").read_bytes() == before
    assert Path("runs/irevnet/2/checkpoint.pt").exists()


@pytest.mark.parametrize("step", [1, 4, 6])
def test_an_interrupted_and_resumed_run_equals_an_unbroken_one(images, monkeypatch, capsys, step):
    # Three steps an epoch; dropout, shifts, flips and shuffling draw random numbers.
    assert main(on(images, "--out", "unbroken")) == 0
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, step)
        assert main(on(images, "--out", "broken")) == 130
    assert "--resume --out broken" in capsys.readouterr().out
    assert load_checkpoint(Path("broken"))["epoch"] == (step - 1) // 3
    torch.manual_seed(99)
    assert main(on(images, "--out", "broken", "--resume")) == 0
    assert_same_state("unbroken", "broken")
    assert records("unbroken") == records("broken")


def test_random_crops_resume_too(images, monkeypatch):
    flags = on(images, "--augmentation", "resized-crop")
    assert main([*flags, "--out", "unbroken"]) == 0
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 5)
        assert main([*flags, "--out", "broken"]) == 130
    assert main([*flags, "--out", "broken", "--resume"]) == 0
    assert_same_state("unbroken", "broken")


def test_resuming_without_a_folder_takes_the_latest_run(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 5)
        assert main(TINY) == 130
    assert main([*TINY, "--resume"]) == 0
    assert "runs/irevnet/1, 1 of 2 epochs done" in capsys.readouterr().out


def test_a_finished_run_can_go_on(images):
    assert main(on(images, "--out", "run", "--epochs", "1")) == 0
    assert main(on(images, "--out", "run", "--epochs", "2", "--resume")) == 0
    assert main(on(images, "--out", "unbroken")) == 0
    assert_same_state("run", "unbroken")


def test_a_line_of_the_log_beyond_the_checkpoint_is_written_again(images):
    assert main(on(images, "--out", "run", "--epochs", "1")) == 0
    with Path("run/log.jsonl").open("a") as log:
        log.write('{"epoch": 2}\n')
    assert main(on(images, "--out", "run", "--resume")) == 0
    assert [record["epoch"] for record in records("run")] == [1, 2]


def test_worker_processes_give_the_same_run(images):
    flags = [*on(images, "--augmentation", "resized-crop", "--out", "run"), "--workers", "2"]
    ran = subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "training on 12 images of 2 classes in" in ran.stdout
    assert main(on(images, "--augmentation", "resized-crop", "--out", "same")) == 0
    assert_same_state("run", "same")
    assert records("run") == records("same")
    assert Path("run/reconstructions.png").exists()


def test_an_unreadable_image_is_one_line_also_from_a_worker(images):
    (images / "train/day/2.png").write_bytes(b"no image")
    flags = [*on(images, "--augmentation", "resized-crop"), "--workers", "1"]
    ran = subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True)
    assert ran.returncode == 1
    assert ran.stderr.startswith("error: cannot read the image ")
    assert "train/day/2.png" in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_control_c_from_the_keyboard_leaves_a_checkpoint():
    command = [sys.executable, SCRIPT, *TINY, "--epochs", "10000", "--out", "run"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("epoch"):
                break
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
    assert process.returncode == 130
    assert "--resume --out run" in rest
    assert load_checkpoint(Path("run"))["epoch"] >= 1
    assert sorted(path.name for path in Path("run").iterdir()) == ["checkpoint.pt", "log.jsonl"]


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    save_checkpoint(tmp_path, {"weights": torch.ones(3)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(RunError, match=r"cannot write .*checkpoint.pt: \[Errno 27\]"):
            save_checkpoint(tmp_path, {"weights": torch.randn(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torch.equal(load_checkpoint(tmp_path)["weights"], torch.ones(3))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def refused(capsys, *flags):
    """The one line that these flags are refused with."""
    assert main(flags) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "nowhere"], "there is no folder nowhere/train: --data takes"),
        (["--preset", "b"], "--preset b trains on a folder of images: give --data"),
        (["--resume"], "no checkpoint in runs/irevnet to resume: start without --resume"),
        (["--resume", "--out", "nowhere"], "no checkpoint in nowhere to resume"),
        (["--batch-size", "5000"], "--batch-size 5000 is above the 1437 training images"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--lr", "-1"], "--lr cannot be negative"),
        (["--momentum", "2"], "--momentum is 0 to 1"),
        (["--std", "0"], "--mean and --std take one number a channel"),
        (["--image-size", "20"], "--image-size must be a multiple of 16 for --preset digits"),
        (["--blocks", "1", "1"], "one stride and one width for each stage, got blocks=(1, 1)"),
        (["--device", "abacus"], "--device abacus cannot be used"),
    ],
)
def test_bad_settings_are_refused_in_one_line(capsys, flags, message):
    assert message in refused(capsys, *flags)
    assert not Path("runs").exists()


def test_a_folder_that_holds_something_is_refused(images, capsys):
    Path("busy").mkdir()
    Path("busy/thesis.tex").write_text("")
    Path("file").write_text("")
    for out in ("busy", "file"):
        message = refused(capsys, *TINY, "--out", out)
        assert f"{out} exists and is no empty folder: choose another --out" in message
    assert main(on(images, "--out", "run", "--epochs", "1")) == 0
    capsys.readouterr()
    assert "run holds a run: continue it with --resume" in refused(capsys, *TINY, "--out", "run")


def test_resuming_with_other_settings_is_refused_with_the_difference(images, capsys):
    assert main(on(images, "--out", "run", "--epochs", "1")) == 0
    capsys.readouterr()
    message = refused(capsys, *on(images, "--out", "run", "--resume", "--lr", "0.5"))
    assert "has other settings: --lr was 0.1, is 0.5." in message


def test_a_damaged_checkpoint_is_refused(capsys):
    Path("run").mkdir()
    Path("run/checkpoint.pt").write_bytes(b"damaged")
    message = refused(capsys, *TINY, "--out", "run", "--resume")
    assert "cannot read run/checkpoint.pt" in message


def test_a_missing_or_empty_part_of_the_data_is_named(images, capsys):
    (images / "train/dusk").mkdir()
    assert "there is no image in" in refused(capsys, *on(images))
    (images / "train/dusk").rmdir()
    (images / "val").rename(images / "test")
    assert f"there is no folder {images / 'val'}" in refused(capsys, *on(images))


def test_a_loss_that_explodes_stops_the_run(images, capsys):
    message = refused(capsys, *on(images, "--out", "run", "--lr", "1e30"))
    assert "training stops after 0 whole epochs: " in message
    assert "the network has diverged" in message
    assert load_checkpoint(Path("run"))["epoch"] == 0


def test_flags_complete_the_recipe_of_the_preset():
    assert parse([]) == RECIPES["digits"]
    assert parse(["--data", "x"]) == replace(Config(), data=Path("x"))
    assert parse(["--data=x", "--preset", "a"]) == Config(preset="a", data=Path("x"))
    cifar = parse(["--preset=cifar10", "--data", "x", "--lr", "0.2"])
    assert cifar == replace(RECIPES["cifar10"], data=Path("x"), lr=0.2)


def test_the_learning_rate_falls_at_each_milestone():
    rates = [Config().learning_rate(epoch) for epoch in (0, 31, 32, 63, 64, 96, 127)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.0001, 0.0001])
