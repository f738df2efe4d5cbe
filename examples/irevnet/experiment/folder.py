"""A run's folder: its settings, its log and its checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import socket
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from errors import RunError, first_line, writing

try:
    import fcntl
except ImportError:  # on Windows, where two runs are kept apart only at their start
    fcntl = None  # type: ignore[assignment]

RUNS = Path("runs/irevnet")  # holds the runs without a folder of their own, numbered from 1
CHECKPOINT = "checkpoint.pt"
BEST = "best.pt"
LOG = "log.jsonl"
SETTINGS = "settings.json"
BOARD = "tensorboard"
HOLDER = ".holder"  # names the process that writes to the folder, which locks it


def new_folder(out: Path | None) -> Path:
    """Makes the folder ``out``, or the next free number, for this process alone."""
    with writing(out or RUNS):
        folder = _next_folder() if out is None else _free_folder(out)
        try:
            with (folder / HOLDER).open("x") as file:
                file.write(_this_process())
        except FileExistsError:
            raise RunError(f"{folder} {_held(folder)}: choose another --out.") from None
    return folder


def _next_folder() -> Path:
    number = 1
    while True:
        try:
            (RUNS / str(number)).mkdir(parents=True)
        except FileExistsError:  # also if another run has just made it
            number += 1
        else:
            return RUNS / str(number)


def _free_folder(out: Path) -> Path:
    if (out / CHECKPOINT).exists():
        raise RunError(f"{out} holds a run: continue it with --resume, or choose another --out.")
    if (out / HOLDER).exists():
        raise RunError(
            f"{out} {_held(out)} and has no checkpoint yet. If it is gone, --resume auto begins "
            "there anew; or choose another --out."
        )
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise RunError(f"{out} exists and is no empty folder: choose another --out.")
    out.mkdir(parents=True, exist_ok=True)
    return out


def _this_process() -> str:
    return f"process {os.getpid()} of {socket.gethostname()}"


def _held(folder: Path) -> str:
    return f"is held by {(folder / HOLDER).read_text() or 'another process'}"


def folder_to_resume(out: Path | None, *, needed: bool = True) -> Path | None:
    """The folder ``out``, or that of the latest numbered run, if a checkpoint is in it."""
    if out is None:
        numbered = [path.parent for path in RUNS.glob(f"*/{CHECKPOINT}")]
        folders = [folder for folder in numbered if folder.name.isdigit()]
        out = max(folders, key=lambda folder: int(folder.name), default=RUNS)
    if (out / CHECKPOINT).is_file():
        return out
    if needed:
        raise RunError(f"there is no checkpoint in {out} to resume: start without --resume.")
    return None


def save_checkpoint(folder: Path, state: Mapping[str, Any]) -> None:
    """Writes beside the checkpoint, then renames: a run killed midway keeps the one before."""
    path = folder / CHECKPOINT
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(folder)
    # torch's writer turns a full disk into a RuntimeError.
    except (OSError, RuntimeError) as error:
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        before = " The checkpoint before it is untouched." if path.exists() else ""
        raise RunError(f"cannot write {path}: {first_line(reason)}.{before}") from error
    finally:
        partial.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a loss of power."""
    if os.name == "nt":  # where folders cannot be opened
        return
    entry = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(entry)
    finally:
        os.close(entry)


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """Reads the checkpoint; only tensors and plain values can be in it, no code."""
    path = folder / CHECKPOINT
    try:
        check_sums(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
    except Exception as error:  # a damaged file fails in many ways
        raise RunError(
            f"cannot read {path}: {first_line(error)}. If it is damaged, start again without "
            f"--resume and with another --out; {BEST} beside it may still have the best weights."
        ) from error
    return state


def check_sums(path: Path) -> None:
    """Raises if bytes of a file of torch have changed; torch itself does not look."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"the checksum of {damaged} in it is wrong")


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of a run."""
    try:
        found: dict[str, Any] = json.loads((folder / SETTINGS).read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {folder / SETTINGS}: {error}") from error
    return found


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    path = folder / LOG
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path}: {error}") from error


class RunFolder:
    """What one process of a run does to its folder."""

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path = path
        self.writes = writes
        self.lines = 0  # of the log
        self.holder = self._hold() if writes else None

    @classmethod
    def new(cls, out: Path | None, *, again: bool = False, writes: bool = True) -> RunFolder:
        """The folder of a new run."""
        if not writes:
            return cls(out or RUNS, writes=False)
        if again and out is not None and (out / HOLDER).is_file():
            folder = cls(out)
            folder.discard()
        return cls(new_folder(out))

    def _hold(self) -> IO[str]:
        """Locks the folder for as long as this process lives, or the file is open."""
        with writing(self.path):
            file = (self.path / HOLDER).open("a+")
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise RunError(f"{self.path} {_held(self.path)}: let that end first.") from None
        file.truncate(0)
        file.write(_this_process())
        file.flush()
        return file

    def close(self) -> None:
        """Lets others have the folder."""
        if self.holder is not None:
            self.holder.close()

    def discard(self) -> None:
        """Removes what a run has begun that has no checkpoint."""
        self.close()
        if not self.writes:
            return
        for name in (LOG, SETTINGS, HOLDER):
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.path / BOARD, ignore_errors=True)
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def resume(self) -> dict[str, Any]:
        """The state of the checkpoint; of the log, the lines remain that it knows of."""
        state = load_checkpoint(self.path)
        if "log_lines" not in state:
            raise RunError(f"{self.path / CHECKPOINT} is not of a run of this version.")
        self.lines = state["log_lines"]
        if self.writes:
            _cut(self.path / LOG, self.lines)
        return state

    def save(self, state: Mapping[str, Any]) -> None:
        """Writes a checkpoint."""
        if self.writes:
            save_checkpoint(self.path, {**state, "log_lines": self.lines})

    def keep_as_best(self) -> None:
        """Lets the present checkpoint stay under another name when the next one replaces it."""
        if self.writes:
            _copy(self.path / CHECKPOINT, self.path / BEST)

    def log(self, record: Mapping[str, Any]) -> None:
        """Adds a line of JSON to the log."""
        if self.writes:
            with writing(self.path / LOG), (self.path / LOG).open("a") as file:
                file.write(json.dumps(dict(record)) + "\n")
        self.lines += 1

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Writes the settings, which ``--resume`` reads."""
        if self.writes:
            with writing(self.path / SETTINGS):
                (self.path / SETTINGS).write_text(json.dumps(dict(settings), indent=2) + "\n")

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is something to go on from."""
        return (self.path / CHECKPOINT).is_file()


def _copy(path: Path, copy: Path) -> None:
    partial = copy.with_suffix(".partial")
    with writing(copy):
        partial.unlink(missing_ok=True)
        try:
            os.link(path, partial)  # no file is ever changed in place
        except OSError:  # a file system without hard links
            shutil.copyfile(path, partial)
        partial.replace(copy)


def _cut(log: Path, lines: int) -> None:
    """Drops the lines that a killed run has written behind its checkpoint: they come again."""
    with writing(log):
        kept = log.read_text().splitlines(keepends=True)[:lines] if log.exists() else []
        log.write_text("".join(kept))
