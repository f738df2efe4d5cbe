import os
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from errors import RunError, try_writing, writing
from experiment.folder import (
    RunFolder,
    latest_run,
    make_folder,
    read_log,
    read_settings,
)

pytestmark = pytest.mark.usefixtures("_in_a_folder_of_its_own")


OPEN = []


@pytest.fixture(autouse=True)
def _closed():
    yield
    for run in OPEN:
        if run.writes:
            run.holder.close()
    OPEN.clear()


def opened(path="run", **options):
    OPEN.append(RunFolder(Path(path), **options))
    return OPEN[-1]


def folder(path="run"):
    return opened(make_folder(Path(path)))


def checkpoint(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


def names(path):
    return sorted(entry.name for entry in path.iterdir() if entry.name != ".holder")


@contextmanager
def files_of_4_kib():
    """No file can get larger, as on a full disk; nor can that which pytest may print to."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_new_folders_have_the_next_free_number():
    assert [str(make_folder(None)) for _ in range(2)] == ["runs/irevnet/1", "runs/irevnet/2"]


def test_the_latest_run_with_a_checkpoint_is_resumed():
    for number in ("2", "10", "11", "best"):
        Path("runs/irevnet", number).mkdir(parents=True)
    for number in ("2", "10", "best"):
        Path("runs/irevnet", number, "checkpoint.pt").touch()
    assert latest_run() == Path("runs/irevnet/10")


def test_a_full_disk_leaves_the_checkpoint_before():
    run = folder()
    run.save({"weights": torch.ones(3)})
    weights = torch.randn(10_000)
    with (
        pytest.raises(RunError, match=r"cannot write run/checkpoint.pt: \[Errno 27\].*untouched"),
        files_of_4_kib(),
    ):
        run.save({"weights": weights})
    assert torch.equal(checkpoint("run")["weights"], torch.ones(3))
    assert names(run.path) == ["checkpoint.pt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_named_when_the_log_is_written():
    run = folder()
    (run.path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"cannot write run/log.jsonl: .*No space left on device"):
        run.log({"epoch": 1})


def test_a_failed_write_leaves_the_checkpoint_before(monkeypatch):
    run = folder()
    run.save({"step": 1})

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunError, match=r"cannot write run/checkpoint.pt: .*Input/output error"):
        run.save({"step": 2})
    assert checkpoint("run") == {"log_lines": 0, "step": 1}


def test_a_folder_that_cannot_be_written_is_named():
    Path("file").touch()
    with pytest.raises(RunError, match="cannot write file/run: "):
        folder("file/run")
    with pytest.raises(RunError, match="cannot write here: "), writing(Path("here")):
        raise OSError


def test_a_damaged_checkpoint_is_refused():
    run = folder()
    (run.path / "checkpoint.pt").write_bytes(b"damaged")
    with pytest.raises(RunError, match=r"cannot read run/checkpoint.pt: it is no file of torch"):
        run.resume()


def test_a_checkpoint_of_something_else_is_refused():
    run = folder()
    torch.save({"state_dict": {}}, run.path / "checkpoint.pt")
    with pytest.raises(RunError, match=r"run/checkpoint.pt is not of a run of this version"):
        run.resume()


def test_a_checkpoint_cannot_run_code():
    run = folder()
    torch.save({"log_lines": 0, "code": os.system}, run.path / "checkpoint.pt")
    with pytest.raises(RunError, match="holds more than tensors"):
        run.resume()


def test_lines_of_the_log_behind_the_checkpoint_are_dropped():
    run = folder()
    for step in (1, 2):
        run.log({"iteration": step})
    run.save({"step": 2})
    run.log({"iteration": 3})
    run.close()
    again = opened()
    assert again.resume()["step"] == 2
    assert read_log(run.path) == [{"iteration": 1}, {"iteration": 2}]
    again.log({"iteration": 3})
    again.save({})
    assert checkpoint("run")["log_lines"] == 3


def test_a_log_that_cannot_be_read_is_named():
    with pytest.raises(RunError, match=r"cannot read run/log.jsonl: "):
        read_log(Path("run"))
    (make_folder(Path("run")) / "log.jsonl").write_text("{")
    with pytest.raises(RunError, match=r"cannot read run/log.jsonl: "):
        read_log(Path("run"))


def test_the_best_checkpoint_stays_when_others_follow():
    run = folder()
    for step in (1, 2, 3, 4):
        run.save({"step": step}, best=step in (1, 3))
    best = torch.load("run/best.pt", weights_only=True)
    assert (best["step"], checkpoint("run")["step"]) == (3, 4)
    assert names(run.path) == ["best.pt", "checkpoint.pt"]


def test_only_one_process_of_a_run_writes():
    run = opened(writes=False)
    run.write_settings({})
    run.log({})
    run.save({})
    assert not Path("run").exists()


def test_the_settings_can_be_read():
    folder().write_settings({"lr": 0.1, "mean": (0.5,)})
    assert read_settings(Path("run")) == {"lr": 0.1, "mean": [0.5]}


def test_two_processes_cannot_have_one_folder():
    run = folder()
    who = f"run is held by process {os.getpid()} of "
    for enter in (folder, opened):
        with pytest.raises(RunError, match=who):
            enter()
    run.save({})
    with pytest.raises(RunError, match=f"{who}.*let that end first"):
        opened()
    run.close()
    opened()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_of_two_processes_that_start_together_one_gets_the_folder():
    for number in range(8):
        start, children = time.time() + 0.02, []
        for _ in range(2):
            child = os.fork()
            if not child:
                while time.time() < start:
                    pass
                try:
                    folder(str(number))
                except RunError:
                    os._exit(1)
                time.sleep(0.3)  # else the other finds it free again
                os._exit(0)
            children.append(child)
        assert sorted(os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children) == [0, 1]


def test_what_a_killed_run_left_without_a_checkpoint_is_begun_anew():
    run = folder()
    run.write_settings({})
    run.log({"iteration": 1})
    run.holder.close()  # as when its process ends
    folder().log({"iteration": 2})
    assert read_log(Path("run")) == [{"iteration": 2}]


def test_a_run_that_did_nothing_leaves_nothing():
    run = folder()
    run.write_settings({})
    run.log({})
    run.close()
    assert not Path("run").exists()


@pytest.mark.parametrize("at", [0.2, 0.5, 0.9])
def test_a_checkpoint_whose_bytes_have_changed_is_refused(at):
    run = folder()
    run.save({"weights": torch.ones(100_000)})
    path = run.path / "checkpoint.pt"
    damaged = bytearray(path.read_bytes())
    middle = int(len(damaged) * at)
    damaged[middle : middle + 8] = b"\xff" * 8
    path.write_bytes(damaged)
    with pytest.raises(RunError, match=r"cannot read run/checkpoint.pt: the checksum of "):
        run.resume()


def test_a_place_for_results_is_tried_at_once():
    Path("file").touch()
    try_writing(Path("new/er/x.json"))
    try_writing(Path("folder"), folder=True)
    assert Path("new/er").is_dir()
    assert names(Path("folder")) == []
    for path, is_folder in (("file/x", False), ("file", True), ("folder", False)):
        with pytest.raises(RunError, match=f"cannot write {path}: "):
            try_writing(Path(path), folder=is_folder)
