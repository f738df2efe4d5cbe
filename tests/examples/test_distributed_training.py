"""Two processes train together: once, in one go, for all tests, as starting them takes long."""

import math
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import distributed

import train_imagenet
from experiment.folder import RunError, load_checkpoint, read_log
from experiment.settings import parse
from images.batches import Share, load_data
from train_imagenet import main
from trainer import training
from trainer.distributed import Team, own_device

pytestmark = pytest.mark.skipif(
    not distributed.is_available() or sys.platform == "win32", reason="needs gloo"
)

# Three steps an epoch.
FLAGS = ["--blocks", "1", "1", "1", "--epochs", "2", "--batch-size", "478", "--milestones", "1"]
FLAGS += ["--threads", "1"]
IMAGES = ["--data", "images", "--preset", "cifar10", "--image-size", "16", "--workers", "0"]
IMAGES += ["--blocks", "1", "1", "1", "--batch-size", "4", "--augmentation", "resized-crop"]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start(rank, *arguments):
    """Runs this file as one of two processes, as torchrun would."""
    environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(train_imagenet.__file__).parent)
    return subprocess.Popen(
        [sys.executable, __file__, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder of the runs, the two processes, and what each printed."""
    folder = tmp_path_factory.mktemp("runs")
    random = np.random.default_rng(0)
    for part in ("train", "val"):
        (folder / "images" / part / "class").mkdir(parents=True)
        for index in range(4):
            pixels = random.integers(256, size=(20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / part / "class" / f"{index}.png")
    (folder / "images/train/class/2.png").write_bytes(b"no image")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ports = [free_port() for _ in work()]
        processes = [start(rank, *ports) for rank in range(2)]
        printed = [process.communicate(timeout=300) for process in processes]
        assert main([*FLAGS, "--out", "one", "--accumulate", "2"]) == 0
    return SimpleNamespace(folder=folder, processes=processes, printed=printed)


def work():
    """What the processes do: flags, the step at which the second gets SIGTERM, and the status."""
    sharded = [*FLAGS, "--parallel", "fsdp", "--out", "sharded"]
    return [
        ([*FLAGS, "--out", "copied"], None, 0),
        (sharded, 4, 143),
        ([*sharded, "--resume"], None, 0),
        # One of them cannot read its images: this ends both processes, and is the last.
        ([*IMAGES, "--out", "unreadable"], None, 1),
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


def losses(folder):
    return [loss for line in read_log(folder) for loss in line.get("losses", [])]


def test_two_processes_train_as_one_does_in_two_parts(ran):
    # Batch statistics are those of a part, in both.
    one, two = (load_checkpoint(ran.folder / out)["model"] for out in ("one", "copied"))
    for name in filter(is_weight, one):
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)
    assert losses(ran.folder / "one") == pytest.approx(losses(ran.folder / "copied"), rel=1e-4)


def test_sharded_processes_stop_together_and_go_on(ran):
    copied, sharded = (load_checkpoint(ran.folder / out) for out in ("copied", "sharded"))
    assert sharded["epoch"] == 2
    for state in (copied, sharded):
        state["optimizer"] = state["optimizer"]["state"]
    for part in ("model", "optimizer"):
        torch.testing.assert_close(sharded[part], copied[part], rtol=1e-4, atol=1e-5)
    assert sharded["model"]["classifier.weight"].is_contiguous()
    assert losses(ran.folder / "sharded") == pytest.approx(losses(ran.folder / "copied"), rel=1e-4)
    assert (ran.folder / "sharded/reconstructions.png").exists()


def test_all_processes_test_the_network_of_the_first(ran):
    config = parse([*FLAGS, "--out", str(ran.folder / "copied")])
    cpu = torch.device("cpu")
    alone = training.Training(config, load_data(config, cpu), Team(cpu))
    alone.restore(load_checkpoint(ran.folder / "copied"))
    *_, last = read_log(ran.folder / "copied")
    found = alone.test(lambda: None).read()
    assert found["loss"] == pytest.approx(last["test_loss"], rel=1e-5)


def test_one_process_speaks_for_all(ran):
    first, second = (output for output, _ in ran.printed)
    assert second == ""
    assert first.count("epoch 2/2 ") == 2
    assert "sharded/checkpoint.pt holds the state behind step 4: go on" in first


def test_the_failure_of_a_process_ends_all_with_its_message(ran):
    assert [process.returncode for process in ran.processes] == [1, 1]
    errors = "".join(error for _, error in ran.printed)
    assert re.search(r"^error: cannot read the image .*2\.png: .*\(process [01]\)$", errors, re.M)
    assert errors.count("error: ") == 1
    assert "Traceback" not in errors


def test_the_last_test_images_may_be_fewer_than_the_processes():
    config = parse([*FLAGS, "--batch-size", "358"])  # of 360
    cpu = torch.device("cpu")
    first = training.Training(config, load_data(config, cpu, Share(0, 179)), Team(cpu))
    batches = []
    tally = first.test(lambda: batches.append(1))  # where the processes meet
    assert len(batches) == 2
    assert tally.images == 2
    assert math.isfinite(tally.read()["loss"])


def test_a_batch_that_cannot_be_shared_is_refused():
    team = Team(torch.device("cpu"), rank=0, ranks=3)
    with pytest.raises(RunError, match=r"a multiple of 3 processes times --accumulate 1, got 64"):
        training.Training(parse([]), None, team)


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_scaled_gradients_cannot_be_sharded():
    team = Team(torch.device("cuda"), joined=True)
    with pytest.raises(RunError, match="--parallel fsdp does not take --precision float16"):
        training.Training(parse(["--parallel", "fsdp", "--precision", "float16"]), None, team)


def test_each_process_needs_a_gpu(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RunError, match="there are 2: start torchrun with --nproc-per-node 2"):
        own_device(torch.device("cuda"))
