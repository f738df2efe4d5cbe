"""A run's folder: its settings, its log and its checkpoints."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

RUNS = Path("runs/irevnet")  # holds the runs without a folder of their own, numbered from 1
CHECKPOINT = "checkpoint.pt"
BEST = "best.pt"
LOG = "log.jsonl"
SETTINGS = "settings.json"


class RunError(Exception):
    """What whoever started the run can mend: shown as one line, without a traceback."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Names the path when something cannot be written."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {path}: {error}.") from error


def new_folder(out: Path | None) -> Path:
    """Makes the folder ``out``, or the next free number; what another run left stays untouched."""
    with writing(out or RUNS):
        return _next_folder() if out is None else _free_folder(out)


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
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise RunError(f"{out} exists and is no empty folder: choose another --out.")
    out.mkdir(parents=True, exist_ok=True)
    return out


def folder_to_resume(out: Path | None) -> Path:
    """The folder ``out``, or that of the latest numbered run, if a checkpoint is in it."""
    if out is None:
        numbered = [path.parent for path in RUNS.glob(f"*/{CHECKPOINT}")]
        folders = [folder for folder in numbered if folder.name.isdigit()]
        out = max(folders, key=lambda folder: int(folder.name), default=RUNS)
    if not (out / CHECKPOINT).is_file():
        raise RunError(f"there is no checkpoint in {out} to resume: start without --resume.")
    return out


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
        raise RunError(
            f"cannot write {path}: {_first_line(reason)}. The checkpoint before it is untouched."
        ) from error
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
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways
        raise RunError(
            f"cannot read {path}: {_first_line(error)}. If it is damaged, start again without "
            f"--resume and with another --out; {BEST} beside it may still have the best weights."
        ) from error
    return state


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    path = folder / LOG
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path}: {error}") from error


class RunFolder:
    """What one process of a run does to its folder.

    Args:
        path: Of the folder.
        writes: Whether the process writes anything at all: one does, of those of a distributed run.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path = path
        self.writes = writes
        self.lines = 0  # of the log

    @classmethod
    def new(cls, out: Path | None, *, writes: bool = True) -> RunFolder:
        """The folder of a new run."""
        return cls(new_folder(out) if writes else out or RUNS, writes=writes)

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
        """Writes the settings for people to read; to resume, the checkpoint has them too."""
        if self.writes:
            with writing(self.path / SETTINGS):
                (self.path / SETTINGS).write_text(json.dumps(dict(settings), indent=2) + "\n")


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


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
