import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from pictures import write_folders
from PIL import Image

import train_imagenet
from experiment.settings import parse
from images.batches import load_training
from trainer import training
from trainer.distributed import Team
from trainer.weights import load_network

pytestmark = pytest.mark.usefixtures("_in_a_folder_of_its_own")

TINY = ["--blocks", "1", "1", "1", "--epochs", "2", "--batch-size", "479"]
CPU = torch.device("cpu")
SCRIPT = Path(train_imagenet.__file__)
PYPROJECT = SCRIPT.parents[2] / "pyproject.toml"
# Python 3.12 and later warn of processes that are forked beside threads, as torch has them.
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
LEFT = [".holder", "best.pt", "checkpoint.pt", "curves.png", "log.jsonl", "reconstructions.png"]
LEFT += ["settings.json"]
MEASURED = ("loss", "accuracy", "top5_accuracy")


@pytest.fixture
def images(tmp_path):
    return write_folders(tmp_path / "images")


def on(images, *flags, length=("--epochs", "2")):
    """Flags for three steps an epoch on these images; dropout draws from torch's generator."""
    small = ["--blocks", "1", "1", "1", "--batch-size", "4", "--workers", "0", "--threads", "1"]
    small += ["--image-size", "16", *length]
    return ["--data", str(images), "--preset", "cifar10", *small, *flags]


def main(flags):
    """The script, without the pictures: to draw them takes longer than a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_imagenet, "draw", lambda _: Figure((1, 1)))
        patch.setattr(train_imagenet, "draw_curves", lambda _, path: path.touch())
        return train_imagenet.main(flags)


class Crash(BaseException):
    """Ends a run as SIGKILL does: nothing is saved on the way out."""


def at_step(monkeypatch, step, act):
    """Calls ``act`` while that training step runs."""
    steps = iter(range(1, step + 1))
    loss = training.Training._loss

    def acting(*args):
        if next(steps, None) == step:
            act()
        return loss(*args)

    monkeypatch.setattr(training.Training, "_loss", acting)


def receive(number):
    return lambda: os.kill(os.getpid(), number)


def crash():
    raise Crash


def records(folder):
    """The lines of the log, without what depends on the machine."""
    machine = {"seconds", "data_seconds", "images_per_second", "peak_gpu_memory"}
    lines = (Path(folder) / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in machine} for line in lines]


def epochs(folder):
    return [record for record in records(folder) if "epoch" in record]


def checkpoint(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


def assert_same_state(left, right):
    left, right = checkpoint(left), checkpoint(right)
    assert left.pop("config").keys() == right.pop("config").keys()
    assert left.pop("classes") == right.pop("classes")
    torch.testing.assert_close(left, right, rtol=0, atol=0)


@pytest.mark.slow
def test_the_demo_trains_on_digits_and_shows_them_twice(capsys):
    assert train_imagenet.main(TINY) == 0
    output = capsys.readouterr().out
    assert output.startswith("No --data given: training on scikit-learn's handwritten digits")
    for words in ("epoch 2/2", "accuracy", "‖x - Φ⁻¹Φx‖", "bit for bit", "What next?"):
        assert words in output
    picture = np.array(Image.open("runs/irevnet/1/reconstructions.png").convert("L"))
    originals, decoded = halves(picture)
    assert originals.std() > 50  # neither is blank
    assert np.abs(originals - decoded).max() <= 1
    first, second = epochs("runs/irevnet/1")
    assert first.keys() == {
        *("epoch", "iteration", "lr"),
        *(f"{part}_{name}" for part in ("train", "test") for name in MEASURED),
    }
    assert (first["epoch"], first["lr"]) == (1, pytest.approx(0.075))
    assert (second["epoch"], second["lr"]) == (2, pytest.approx(0.0067, rel=1e-3))
    assert json.loads(Path("runs/irevnet/1/settings.json").read_text())["batch_size"] == 479
    assert Path("runs/irevnet/1/curves.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_demo_needs_no_more_packages_than_its_extra():
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    others = {*extras["examples"], *extras["datasets"]} - {"invertible[demo]"}
    hidden = sorted(others - {"scipy"})  # which scikit-learn needs
    run = f"import sys; sys.modules |= dict.fromkeys({hidden}); import train_imagenet as script; "
    run += f"sys.exit(script.main({[*TINY, '--epochs', '1']}))"
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", run], env=os.environ | path, check=True, timeout=300)


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


@pytest.mark.parametrize(("step", "number"), [(1, 15), (3, 2), (5, 1)])
def test_a_stopped_and_resumed_run_equals_an_unbroken_one(
    images, monkeypatch, capsys, step, number
):
    flags = on(images, "--log-every", "2")
    assert main([*flags, "--out", "unbroken"]) == 0
    with monkeypatch.context() as patch:
        at_step(patch, step, receive(number))
        assert main([*flags, "--out", "broken"]) == 128 + number
    assert f"behind step {step}: go on with --resume --out broken" in (capsys.readouterr().out)
    saved = checkpoint("broken")
    assert 3 * saved["epoch"] + saved["step"] == step
    torch.manual_seed(99)
    assert main(["--out", "broken", "--resume"]) == 0
    assert_same_state("unbroken", "broken")
    assert records("unbroken") == records("broken")


@pytest.mark.parametrize(("minutes", "kept"), [("0", 4), ("15", 3)])
def test_a_killed_run_goes_on_from_its_last_checkpoint(images, monkeypatch, minutes, kept):
    moving = ["--ema", "0.9", "--optimizer", "adamw", "--lr", "0.001", "--no-decay-norms"]
    flags = on(images, "--log-every", "1", "--save-every", minutes, *moving)
    flags += ["--clip-norm", "1", "--mixup", "0.5", "--resume", "auto"]
    assert main([*flags, "--out", "unbroken"]) == 0
    with monkeypatch.context() as patch:
        at_step(patch, 5, crash)
        with pytest.raises(Crash):
            main([*flags, "--out", "broken"])
    saved = checkpoint("broken")
    assert 3 * saved["epoch"] + saved["step"] == kept
    assert main([*flags, "--out", "broken"]) == 0
    assert_same_state("unbroken", "broken")
    assert records("unbroken") == records("broken")


def interrupt():
    raise KeyboardInterrupt


def test_a_second_control_c_leaves_at_once(images, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        at_step(patch, 5, interrupt)
        assert main(on(images, "--out", "run")) == 130
    assert "Stopped at once. run/checkpoint.pt holds the state saved last" in (
        capsys.readouterr().out
    )
    saved = checkpoint("run")
    assert (saved["epoch"], saved["step"]) == (1, 0)


@pytest.mark.parametrize("flags", [[], ["--ema", "0.9"]])
def test_a_run_stopped_in_a_test_repeats_it(images, monkeypatch, flags):
    test = training.Training.test

    def stopped_in_a_test(*args):
        receive(signal.SIGTERM)()
        return test(*args)

    assert main(on(images, *flags, "--out", "unbroken")) == 0
    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "test", stopped_in_a_test)
        assert main(on(images, *flags, "--out", "broken")) == 143
    assert checkpoint("broken")["epoch"] == 0
    assert main(["--out", "broken", "--resume"]) == 0
    assert_same_state("unbroken", "broken")
    assert records("unbroken") == records("broken")


def test_what_was_killed_before_a_checkpoint_begins_anew(images, monkeypatch):
    folder = Path("run")
    folder.mkdir()
    for name in (".holder", "log.jsonl", "settings.json"):
        (folder / name).write_text("left behind")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # as torchrun starts it again
    assert main(on(images, "--out", "run", "--epochs", "1")) == 0
    assert [record["iteration"] for record in records("run")] == [3, 3]


def test_random_crops_resume_too(images, monkeypatch):
    flags = on(images, "--augmentation", "resized-crop", "--jitter", "0.5", "0.5", "0.5", "0.1")
    assert main([*flags, "--out", "unbroken"]) == 0
    with monkeypatch.context() as patch:
        at_step(patch, 5, receive(signal.SIGINT))
        assert main([*flags, "--out", "broken"]) == 130
    assert main([*flags, "--out", "broken", "--resume"]) == 0
    assert_same_state("unbroken", "broken")


def test_resuming_without_a_folder_takes_the_latest_run(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        at_step(patch, 5, receive(signal.SIGTERM))
        assert main(TINY) == 143
    assert main(["--resume"]) == 0
    assert "runs/irevnet/1, 1 of 2 epochs and 2 of 3 steps done" in capsys.readouterr().out


@pytest.mark.parametrize("momentum", ["0", "0.9"])
def test_a_finished_run_can_go_on(images, momentum):
    flags = on(images, "--momentum", momentum)
    assert main([*flags, "--out", "run", "--epochs", "1"]) == 0
    assert main(["--out", "run", "--epochs", "2", "--resume"]) == 0
    assert main([*flags, "--out", "unbroken"]) == 0
    assert_same_state("run", "unbroken")


def test_the_log_has_the_loss_of_each_step(images):
    assert main(on(images, "--out", "run", "--log-every", "2")) == 0
    lines = [record for record in records("run") if "losses" in record]
    assert [(line["iteration"], len(line["losses"])) for line in lines] == [
        *((2, 2), (3, 1), (4, 1), (6, 2))
    ]
    losses = [loss for line in lines for loss in line["losses"]]
    means = [record["train_loss"] for record in epochs("run")]
    assert [sum(losses[:3]) / 3, sum(losses[3:]) / 3] == pytest.approx(means, rel=1e-5)


def test_the_best_checkpoint_is_kept(images):
    assert main(on(images, "--out", "run", "--epochs", "4")) == 0
    accuracies = [record["test_accuracy"] for record in epochs("run")]
    best = torch.load("run/best.pt", weights_only=True)
    assert best["best_accuracy"] == max(accuracies)
    assert best["epoch"] == 1 + accuracies.index(max(accuracies)) < 4


def test_the_length_of_a_run_may_be_given_in_steps(images):
    flags = on(images, "--milestones", "2", "--out", "run", length=("--iterations", "4"))
    assert main(flags) == 0
    assert [(record["epoch"], record["iteration"]) for record in epochs("run")] == [(1, 3), (2, 4)]
    assert [record["lr"] for record in epochs("run")] == pytest.approx([0.02, 0.02])
    assert main([*flags, "--resume"]) == 0  # reports again


@pytest.mark.parametrize("preset", ["resnet-cifar10", "revnet-cifar10"])
def test_networks_to_compare_with_are_trained_too(images, capsys, preset):
    flags = ["--preset", preset, "--blocks", "1", "1", "1", "1", "--lr", "0.001"]
    assert main(on(images, *flags, "--warmup", "0", "--out", "run")) == 0
    assert "Best test accuracy, top 1: " in capsys.readouterr().out
    assert not Path("run/reconstructions.png").exists()


@forks
def test_worker_processes_give_the_same_run(images, capsys):
    flags = on(images, "--augmentation", "resized-crop")
    assert main([*flags, "--out", "run", "--workers", "2"]) == 0
    assert "12 images of 2 classes, tested on 6" in capsys.readouterr().out
    assert main([*flags, "--out", "same"]) == 0
    assert_same_state("run", "same")
    assert records("run") == records("same")
    assert Path("run/reconstructions.png").exists()


@forks
def test_an_unreadable_image_is_one_line_also_from_a_worker(images, capfd):
    (images / "train/day/2.png").write_bytes(b"no image")
    assert main([*on(images, "--augmentation", "resized-crop"), "--workers", "1"]) == 1
    # All of it is matched, so that a failure shows what else a worker said.
    message = r"error: cannot read the image \S*train/day/2\.png: it is empty or no image\.\n"
    assert re.fullmatch(message, capfd.readouterr().err)


@forks
def test_a_worker_killed_during_a_step_is_one_line(images, monkeypatch, capsys):
    def kill_workers():
        for worker in multiprocessing.active_children():
            worker.kill()
        time.sleep(1)  # in which torch learns of it, and raises an error here

    at_step(monkeypatch, 2, kill_workers)
    flags = on(images, "--augmentation", "resized-crop", "--out", "run")
    message = refused(capsys, *flags, "--workers", "1")
    assert "a process that reads images died" in message
    assert "Try fewer --workers." in message


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="has no process groups")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_stops_as_one_alone(images, number):
    flags = on(images, "--augmentation", "resized-crop", "--out", "run")
    command = [sys.executable, SCRIPT, *flags, "--workers", "1", "--epochs", "9999"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        for line in process.stdout:
            if line.startswith("epoch"):
                break
        os.killpg(process.pid, number)
        printed, errors = process.communicate()
    assert process.returncode == 128 + number
    assert "Stopped. run/checkpoint.pt holds the state behind step" in printed
    assert errors == ""


@pytest.mark.slow
def test_a_killed_process_leaves_a_checkpoint(images):
    command = [sys.executable, SCRIPT, *on(images, "--out", "run", "--epochs", "10000")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("epoch"):
                break
        process.kill()
    done = checkpoint("run")["epoch"]
    assert done >= 1
    again = ["--epochs", str(done + 1)]
    assert main([*again, "--out", "run", "--resume"]) == 0
    assert main([*on(images, *again), "--out", "unbroken"]) == 0
    assert_same_state("run", "unbroken")
    assert records("run") == records("unbroken")
    assert sorted(path.name for path in Path("run").iterdir()) == LEFT


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
        (["--resume"], "no checkpoint in runs/irevnet to resume: start without --resume"),
        (["--resume", "--out", "nowhere"], "no checkpoint in nowhere to resume"),
        (["--accumulate", "3"], "a multiple of 1 processes times --accumulate 3, got 64"),
        (["--image-size", "20"], "--image-size must be a multiple of 16 for --preset digits"),
        (["--blocks", "1", "1"], "for each stage, got blocks=(1, 1)"),
        (["--device", "abacus"], "--device abacus cannot be used"),
        (["--precision", "float16"], "--precision float16 is for GPUs"),
        (["--sync-batch-norm"], "--sync-batch-norm is for NVIDIA GPUs only"),
        (["--lr", "-1"], "--lr must be at least 0, got -1.0"),
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
    message = refused(capsys, *on(images, "--out", "run", "--resume", "--momentum", "0"))
    assert "has other settings: --momentum was 0.9, is 0.0." in message


def test_a_damaged_checkpoint_is_refused(images, capsys):
    assert main(on(images, "--out", "run", "--epochs", "1")) == 0
    capsys.readouterr()
    Path("run/checkpoint.pt").write_bytes(b"damaged")
    message = refused(capsys, "--out", "run", "--resume")
    assert "cannot read run/checkpoint.pt" in message


@pytest.mark.parametrize(
    ("lost", "message"),
    [("rng", "'rng' (KeyError)"), ("optimizer", "'optimizer' (KeyError)"), ("epoch", "'epoch'")],
)
def test_a_checkpoint_that_is_not_whole_is_refused(images, capsys, lost, message):
    assert main(on(images, "--out", "run", "--epochs", "1")) == 0
    capsys.readouterr()
    state = checkpoint("run")
    state.pop(lost)
    torch.save(state, "run/checkpoint.pt")
    assert f"not whole, or of another version: {message}" in refused(
        capsys, "--resume", "--out", "run"
    )
    torch.save(state | {lost: "lost"}, "run/checkpoint.pt")
    assert "not whole" in refused(capsys, "--resume", "--out", "run")


def remove(folder):
    (folder / "train/day/0.png").unlink()


def add(folder):
    shutil.copy(folder / "val/night/0.png", folder / "val/night/new.png")


def rename(folder):
    (folder / "train/day/0.png").rename(folder / "train/day/00.png")


def rename_class(folder):
    for part in ("train", "val"):
        (folder / part / "day").rename(folder / part / "zenith")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove, "train images were 12, are 11"),
        (add, "test images were 6, are 7"),
        (rename, "train images have other names or classes"),
        (rename_class, "class 0 was 'day', is 'night'"),
    ],
)
def test_resuming_on_other_images_is_refused_with_the_difference(images, capsys, change, message):
    assert main(on(images, "--out", "run", "--epochs", "1")) == 0
    change(images)
    capsys.readouterr()
    found = refused(capsys, "--resume", "--out", "run", "--epochs", "2")
    assert f"the run was on other images: {message}" in found
    assert "begin a new one on these, with --weights of this one" in found
    flags = on(images, "--weights", "run", "--out", "new", "--epochs", "1", "--batch-size", "11")
    assert main(flags) == 0


def test_images_may_move(images):
    assert main(on(images, "--out", "run", "--epochs", "1")) == 0
    shutil.move(images, "elsewhere")
    moved = ["--resume", "--out", "run", "--epochs", "2", "--data", "elsewhere"]
    assert main(moved) == 0


def test_a_run_that_did_no_step_leaves_nothing(images, capsys):
    broken = images / "train/day/2.png"
    whole = broken.read_bytes()
    broken.write_bytes(b"no image")
    flags = on(images, "--augmentation", "resized-crop", "--out", "run", "--batch-size", "12")
    refused(capsys, *flags)
    assert not Path("run").exists()
    broken.write_bytes(whole)
    assert main(flags) == 0


@pytest.mark.parametrize("flags", [["--batch-size", "1"], ["--accumulate", "4"]])
def test_statistics_of_one_value_are_explained(images, capsys, flags):
    small = ["--preset", "resnet-digits", "--image-size", "8", "--out", "run"]
    message = refused(capsys, *on(images, *flags, *small))
    assert "a part of 1 image leaves batch statistics one value" in message


def test_a_reader_who_goes_away_stops_the_run(images, monkeypatch):
    assert main(on(images, "--out", "unbroken")) == 0
    with monkeypatch.context() as patch:
        patch.setattr(train_imagenet.Terminal, "closed", 13)
        assert main(on(images, "--out", "broken")) == 128 + 13
    assert checkpoint("broken")["step"] == 1
    assert main(["--resume", "--out", "broken"]) == 0
    assert_same_state("unbroken", "broken")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="has no head")
def test_a_closed_output_saves_the_state(images):
    flags = on(images, "--out", "run", "--epochs", "9999")
    with subprocess.Popen([sys.executable, SCRIPT, *flags], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
    assert process.returncode == 141
    assert checkpoint("run")["step"] >= 1


def test_a_run_may_begin_with_the_weights_of_another(images):
    assert main(on(images, "--out", "one", "--epochs", "1")) == 0
    still = ["--lr", "0", "--weights", "one", "--epochs", "1"]
    assert main(on(images, *still, "--out", "same")) == 0
    for name, weight in checkpoint("one")["model"].items():
        if "running" not in name and "tracked" not in name:
            assert torch.equal(weight, checkpoint("same")["model"][name]), name
    (images / "train/day").rename(images / "train/dawn")
    (images / "val/day").rename(images / "val/dawn")
    assert main(on(images, *still, "--out", "others")) == 0
    one, others = checkpoint("one")["model"], checkpoint("others")["model"]
    assert torch.equal(one["body.3.f.0.weight"], others["body.3.f.0.weight"])
    assert not torch.equal(one["classifier.weight"], others["classifier.weight"])


def test_weights_that_do_not_fit_are_refused(images, capsys):
    assert main(on(images, "--out", "one", "--epochs", "1")) == 0
    capsys.readouterr()
    flags = ["--weights", "one", "--blocks", "2", "1", "1", "--out", "two"]
    assert "does not fit --preset cifar10: " in refused(capsys, *on(images, *flags))
    assert not Path("two").exists()


def test_the_average_is_tested_and_kept(images):
    assert main(on(images, "--ema", "0.999", "--epochs", "1", "--out", "run")) == 0
    state = checkpoint("run")
    [record] = epochs("run")
    data = load_training(parse(on(images)), CPU)
    alone = training.Training(parse(on(images)), data, Team(CPU))
    alone.model.load_state_dict(state["average"])
    assert alone.test(lambda: None).read()["loss"] == pytest.approx(record["test_loss"], rel=1e-5)
    network = load_network(Path("run"), CPU)
    assert torch.equal(network.model.norm.weight, state["average"]["norm.weight"])
    assert not torch.equal(state["model"]["norm.weight"], state["average"]["norm.weight"])
    assert network.classes == ("day", "night")


def alone(images, *flags):
    """A training on these images, outside of any folder."""
    config = parse(on(images, *flags))
    run = training.Training(config, load_training(config, CPU), Team(CPU))
    run.net.train()
    return run


def test_mixed_images_have_both_labels(images, monkeypatch):
    seen = []
    monkeypatch.setattr("random.Random.betavariate", lambda *_: 0.25)
    run = alone(images, "--mixup", "1")
    run.net.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    x = torch.randn(4, 3, 16, 16)
    run._train_on(x, torch.tensor([0, 1, 1, 0]))
    torch.testing.assert_close(seen[0], 0.25 * x + 0.75 * x.flip(0))


def change(images, *flags, scaler=None, spoilt=False):
    """What a step of SGD without momentum and decay does to the classifier's weights."""
    plain = ["--momentum", "0", "--weight-decay", "0", "--lr", "1", *flags]
    run = alone(images, *plain)
    run.scaler = scaler or run.scaler
    weight = run.model.classifier.weight
    if spoilt:
        weight.register_hook(lambda gradient: gradient * torch.inf)
    before = weight.detach().clone()
    run._train_on(*next(run.train_batches.epoch()))
    return weight.detach() - before


def test_gradients_are_clipped_to_a_norm(images):
    free, loose, tight = (change(images, "--clip-norm", norm) for norm in ("0", "1000", "0.001"))
    assert torch.equal(free, loose)
    assert 0 < tight.norm() <= 0.001
    torch.testing.assert_close(tight / tight.norm(), free / free.norm())


def test_scaled_gradients_change_the_weights_as_others_do(images):
    # The scaler of float16, whose arithmetic itself needs a GPU.
    scaled = change(images, scaler=torch.amp.GradScaler("cpu"))
    torch.testing.assert_close(scaled, change(images))
    assert not change(images, scaler=torch.amp.GradScaler("cpu"), spoilt=True).any()


class Board:
    """Stands for TensorBoard's writer."""

    def __init__(self, folder, purge_step):
        self.folder, self.first, self.found = folder, purge_step, []

    def add_scalar(self, name, _, step):
        self.found.append((name, step))

    def flush(self):
        boards.append(self)


boards = []


def test_tensorboard_is_written_if_it_is_there(images, monkeypatch):
    monkeypatch.setattr(train_imagenet, "SummaryWriter", Board)
    assert main(on(images, "--out", "run", "--epochs", "1")) == 0
    board = boards[-1]
    assert (board.folder, board.first) == (Path("run/tensorboard"), 1)
    assert {("loss", 3), ("lr", 3), ("test_accuracy", 3)} <= set(board.found)


def test_states_beyond_the_range_of_exact_sums_stop_the_run(images, capsys):
    message = refused(capsys, *on(images, "--out", "run", "--lr", "1e30"))
    assert "training stops after 0 whole epochs: " in message
    assert "the network has diverged" in message
    assert "Begin again with a lower --lr" in message
    assert not Path("run").exists()


@pytest.mark.parametrize("when", [["--log-every", "2"], ["--save-every", "0"], []])
def test_a_loss_that_explodes_stops_the_run_at_the_next_look(images, capsys, when):
    flags = on(images, "--out", "run", "--lr", "1e30", "--quantum", "none", *when)
    message = refused(capsys, *flags)
    assert re.search("(the loss is no longer finite|activations can't be rebuilt) in", message)
    if Path("run").exists():
        state = checkpoint("run")
        assert "Go on with --resume --out run --lr 1e+29." in message
        assert all(map(math.isfinite, state["losses"]))


def test_a_run_that_diverged_goes_on_with_a_lower_learning_rate(images, capsys):
    assert main(on(images, "--out", "run", "--epochs", "1")) == 0
    capsys.readouterr()
    higher = ["--resume", "--out", "run", "--epochs", "2", "--lr", "1e30"]
    assert "Go on with --resume --out run --lr 1e+29." in refused(capsys, *higher)
    assert main(["--resume", "--out", "run", "--lr", "0.01"]) == 0
    assert epochs("run")[1]["lr"] == pytest.approx(0.01)
