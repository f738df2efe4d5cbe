"""Two processes train together: once, in one go, for all tests, as starting them takes long."""

import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pictures import write_folders
from processes import free_port, run_two
from torch import distributed

from errors import RunError
from experiment.folder import read_log
from experiment.settings import parse
from images.batches import load_training
from train_imagenet import main
from trainer import training
from trainer.distributed import Team, own_device

pytestmark = pytest.mark.skipif(
    not distributed.is_available() or sys.platform == "win32", reason="needs gloo"
)

# Three steps an epoch.
FLAGS = ["--data", "images", "--preset", "digits", "--blocks", "1", "1", "1", "--epochs", "2"]
FLAGS += ["--batch-size", "16", "--milestones", "1", "--threads", "1", "--workers", "0"]
MOVING = ["--ema", "0.9", "--clip-norm", "1", "--no-decay-norms"]
FLAGS += ["--image-size", "32"]  # 16 would leave batch statistics a pixel of each image


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder of the runs, and for each of the two processes its status and what it printed."""
    folder = tmp_path_factory.mktemp("runs")
    write_folders(folder / "images", train=24)
    broken = write_folders(folder / "broken")
    (broken / "train/day/2.png").write_bytes(b"no image")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        two = run_two(__file__, *(free_port() for _ in work()))
        assert main([*FLAGS, *MOVING, "--out", "one", "--accumulate", "2"]) == 0
    return SimpleNamespace(folder=folder, two=two)


def work():
    """What the processes do: flags, the step at which the second gets SIGTERM, and the status."""
    sharded = [*FLAGS, *MOVING, "--parallel", "fsdp", "--out", "sharded"]
    tuned = [*FLAGS, "--parallel", "fsdp", "--out", "tuned", "--weights", "copied"]
    tuned += ["--optimizer", "adamw", "--lr", "0.001"]
    unreadable = [*FLAGS, "--data", "broken", "--batch-size", "4", "--augmentation", "resized-crop"]
    return [
        ([*FLAGS, *MOVING, "--out", "copied"], None, 0),
        (sharded, 4, 143),
        (["--resume", "auto", "--out", "sharded"], None, 0),
        (tuned, 4, 143),
        (["--resume", "--out", "tuned"], None, 0),
        # One of them cannot read its images: this ends both processes, and is the last.
        ([*unreadable, "--out", "unreadable"], None, 1),
    ]


def run_as_one_of_two(ports):
    for port, (flags, stop, status) in zip(ports, work(), strict=True):
        os.environ["MASTER_PORT"] = port
        with pytest.MonkeyPatch.context() as patch:
            if stop and os.environ["RANK"] == "1":
                patch.setattr(training.Training, "_train_on", terminated_at(stop))
            assert main(flags) == status, flags


def terminated_at(stop):
    """The method, during whose step of that number the process gets SIGTERM."""
    train_on = training.Training._train_on

    def terminated(self, *batch):
        if self.iteration + 1 == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        train_on(self, *batch)

    return terminated


if __name__ == "__main__":
    run_as_one_of_two(sys.argv[1:])
    sys.exit()


def is_weight(name):
    """Whether it is no running mean: those are of the first process's images alone."""
    return not any(word in name for word in ("running", "tracked"))


def checkpoint(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


def losses(folder):
    return [loss for line in read_log(folder) for loss in line.get("losses", [])]


@pytest.mark.slow
def test_two_processes_train_as_one_does_in_two_parts(ran):
    # Batch statistics are those of a part, in both.
    one, two = (checkpoint(ran.folder / out)["model"] for out in ("one", "copied"))
    for name in filter(is_weight, one):
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)
    assert losses(ran.folder / "one") == pytest.approx(losses(ran.folder / "copied"), rel=1e-4)


@pytest.mark.slow
def test_sharded_processes_stop_together_and_go_on(ran):
    copied, sharded = (checkpoint(ran.folder / out) for out in ("copied", "sharded"))
    assert sharded["epoch"] == 2
    for part in ("model", "average", "optimizer"):
        torch.testing.assert_close(sharded[part], copied[part], rtol=1e-4, atol=1e-5)
    assert sharded["model"]["classifier.weight"].is_contiguous()
    assert losses(ran.folder / "sharded") == pytest.approx(losses(ran.folder / "copied"), rel=1e-4)
    assert (ran.folder / "sharded/reconstructions.png").exists()


@pytest.mark.slow
def test_all_processes_test_the_network_of_the_first(ran, monkeypatch):
    monkeypatch.chdir(ran.folder)
    config = parse([*FLAGS, *MOVING, "--out", str(ran.folder / "copied")])
    cpu = torch.device("cpu")
    alone = training.Training(config, load_training(config, cpu), Team(cpu))
    alone.restore(checkpoint(ran.folder / "copied"))
    *_, last = read_log(ran.folder / "copied")
    found = alone.test(lambda: None).read()
    assert found["loss"] == pytest.approx(last["test_loss"], rel=1e-5)


@pytest.mark.slow
def test_one_process_speaks_for_all(ran):
    first, second = (output for _, output, _ in ran.two)
    assert second == ""
    assert first.count("epoch 2/2 ") == 3
    assert "sharded/checkpoint.pt holds the state behind step 4: go on" in first


@pytest.mark.slow
def test_the_failure_of_a_process_ends_all_with_its_message(ran):
    assert [status for status, *_ in ran.two] == [1, 1], ran.two
    errors = "".join(error for *_, error in ran.two)
    assert re.search(r"^error: cannot read the image .*2\.png: .*\(process [01]\)$", errors, re.M)
    assert errors.count("error: ") == 1
    assert "Traceback" not in errors


@pytest.mark.slow
def test_torchrun_starts_again_what_was_killed_and_it_goes_on(tmp_path):
    write_folders(tmp_path / "images", train=24)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", "--master-port", free_port()]
    script = Path(__file__).with_name("restarted.py")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(
        [*command, str(script), "5", *FLAGS, "--out", "run"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert "the run's folder is run, " in ran.stdout.lower()
    records = [line["iteration"] for line in read_log(tmp_path / "run") if "losses" in line]
    assert records == [3, 6]


def test_the_last_test_images_may_be_fewer_than_the_processes():
    config = parse(["--batch-size", "358", "--blocks", "1", "1", "1"])  # of 360
    cpu = torch.device("cpu")
    first = training.Training(config, load_training(config, cpu, 0, 179), Team(cpu))
    batches = []
    tally = first.test(lambda: batches.append(1))  # where the processes meet
    assert len(batches) == 2
    assert tally.images == 2
    assert math.isfinite(tally.read()["loss"])


def test_a_batch_that_cannot_be_shared_is_refused():
    team = Team(torch.device("cpu"), rank=0, ranks=3)
    with pytest.raises(RunError, match=r"a multiple of 3 processes times --accumulate 1, got 64"):
        load_training(parse([]), team.device, team.rank, team.ranks)


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_scaled_gradients_cannot_be_sharded():
    team = Team(torch.device("cuda"), joined=True)
    config = parse(["--parallel", "fsdp", "--precision", "float16"])
    with pytest.raises(RunError, match="--parallel fsdp does not take --precision float16"):
        training.Training(config, load_training(config, torch.device("cpu")), team)


def test_each_process_needs_a_gpu(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RunError, match="there are 2: start torchrun with --nproc-per-node 2"):
        own_device(torch.device("cuda"))
