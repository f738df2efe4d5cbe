"""A run's folder: its settings, its log, its checkpoints, and the process that holds it."""

import itertools
import json
import os
import shutil
import socket
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

import torch

from errors import RunError, first_line, meaning, writing

try:
    import fcntl
except ImportError:  # on Windows, where nothing keeps two processes of one folder apart
    fcntl = None  # type: ignore[assignment]

RUNS = Path("runs/irevnet")  # holds the runs without a folder of their own, numbered from 1
CHECKPOINT = "checkpoint.pt"
BEST = "best.pt"
LOG = "log.jsonl"
SETTINGS = "settings.json"
BOARD = "tensorboard"
HOLDER = ".holder"  # names the process that writes to the folder, which locks it
BEGUN = {LOG, SETTINGS, BOARD, HOLDER}  # what a run has that has no checkpoint yet
# What makes a state dict of a pickled network, for those who trust it.
UNPACK = """
    import torch
    checkpoint = torch.load({path!r}, weights_only=False)
    torch.save({{"state_dict": checkpoint["model"].state_dict()}}, "weights.pth.tar")"""


def latest_run() -> Path:
    """The folder of the last numbered run that has a checkpoint; of all runs if there is none."""
    folders = [path.parent for path in RUNS.glob(f"*/{CHECKPOINT}") if path.parent.name.isdigit()]
    return max(folders, key=lambda folder: int(folder.name), default=RUNS)


def make_folder(out: Path | None) -> Path:
    """Makes the folder ``out``, or the next free number, for a run that begins."""
    with writing(out or RUNS):
        if out is None:
            return _next_number()
        if (out / CHECKPOINT).exists():
            raise RunError(
                f"{out} holds a run: continue it with --resume, or choose another --out."
            )
        if out.exists() and not (out.is_dir() and {path.name for path in out.iterdir()} <= BEGUN):
            raise RunError(f"{out} exists and is no empty folder: choose another --out.")
        out.mkdir(parents=True, exist_ok=True)
        return out


def _next_number() -> Path:
    for number in itertools.count(1):
        with suppress(FileExistsError):  # also if another run has just made it
            (RUNS / str(number)).mkdir(parents=True)
            break
    return RUNS / str(number)


def load_file(path: Path) -> Any:
    """Reads a file of torch; only tensors and plain values can be in it, no code is run."""
    with meaning(f"cannot read {path}", Exception):  # a damaged file fails in many ways
        with path.open("rb") as file:
            start = file.read(24)
        if not start.startswith((b"PK", b"\x80")):  # an archive, or as torch wrote until 1.6
            raise ValueError(f"it is no file of torch, it begins with {start!r}")
        if zipfile.is_zipfile(path):  # whose checksums torch does not look at
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f"the checksum of {damaged} in it is wrong")
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            if "GLOBAL" not in str(error):
                raise
            raise RunError(
                f"{path} holds more than tensors and plain values, and to load that can run any "
                "code. If you trust whoever made it, make a state dict of it, where the code of "
                f"its network can be imported:{UNPACK.format(path=str(path))}"
            ) from error


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Gives a file beside it to write, then renames: who is killed midway keeps the one before."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    # torch's writer turns a full disk into a RuntimeError.
    except (OSError, RuntimeError) as error:
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        before = " What was there before is untouched." if path.exists() else ""
        raise RunError(f"cannot write {path}: {first_line(reason)}.{before}") from error
    finally:
        partial.unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """Reads the checkpoint of a run; :data:`BEST` beside it is another, should it be damaged."""
    state = load_file(folder / CHECKPOINT)
    if not isinstance(state, dict) or "log_lines" not in state:
        raise RunError(f"{folder / CHECKPOINT} is not of a run of this version.")
    return state


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of a run."""
    with meaning(f"cannot read {folder / SETTINGS}", OSError, ValueError):
        return json.loads((folder / SETTINGS).read_text())


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    with meaning(f"cannot read {folder / LOG}", OSError, ValueError):
        return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


class RunFolder:
    """What one process of a run does to its folder, which it locks if it is the one that writes."""

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path = path
        self.writes = writes
        self.lines = 0  # of the log
        self.holder = _lock(path) if writes else None

    def close(self) -> None:
        """Lets others have the folder; of a run that has no checkpoint, nothing is left."""
        if self.holder is None:
            return
        self.holder.close()
        if not (self.path / CHECKPOINT).is_file():
            for name in (LOG, SETTINGS, HOLDER):
                (self.path / name).unlink(missing_ok=True)
            shutil.rmtree(self.path / BOARD, ignore_errors=True)
            if not any(self.path.iterdir()):
                self.path.rmdir()

    def resume(self) -> dict[str, Any]:
        """The state of the checkpoint; of the log, the lines remain that it knows of."""
        state = load_checkpoint(self.path)
        self.lines = state["log_lines"]
        log = self.path / LOG
        if self.writes and log.exists():
            kept = log.read_text().splitlines(keepends=True)[: self.lines]
            self._write(LOG, "".join(kept))
        return state

    def save(self, state: Mapping[str, Any], *, best: bool = False) -> None:
        """Writes a checkpoint; the best one stays under another name when others replace it."""
        for name in (CHECKPOINT, BEST) if best else (CHECKPOINT,):
            if self.writes:
                with replacing(self.path / name) as file:
                    torch.save({**state, "log_lines": self.lines}, file)

    def log(self, record: dict[str, Any]) -> None:
        """Adds a line of JSON to the log; the first one drops what a killed run has left there."""
        self._write(LOG, json.dumps(record) + "\n", "a" if self.lines else "w")
        self.lines += 1

    def write_settings(self, settings: dict[str, Any]) -> None:
        """Writes what ``--resume`` reads."""
        self._write(SETTINGS, json.dumps(settings, indent=2) + "\n")

    def _write(self, name: str, text: str, mode: str = "w") -> None:
        if self.writes:
            with writing(self.path / name), (self.path / name).open(mode) as file:
                file.write(text)


def _lock(folder: Path) -> IO[str]:
    with writing(folder):
        file = (folder / HOLDER).open("a+")
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        holder = (folder / HOLDER).read_text() or "another process"
        raise RunError(f"{folder} is held by {holder}: let that end first.") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} of {socket.gethostname()}")
    file.flush()
    return file
