"""A run's folder: its checkpoint and its log."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

RUNS = Path("runs/irevnet")  # holds the runs without a folder of their own, numbered from 1
CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"


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
    # torch's writer turns a full disk into a RuntimeError.
    except (OSError, RuntimeError) as error:
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise RunError(
            f"cannot write {path}: {_first_line(reason)}. The checkpoint before it is untouched."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """Reads the checkpoint; only tensors and plain values can be in it, no code."""
    path = folder / CHECKPOINT
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways
        raise RunError(f"cannot read {path}: {_first_line(error)}") from error
    return state


def append_to_log(folder: Path, record: Mapping[str, Any]) -> None:
    """Adds one line of JSON."""
    with writing(folder / LOG), (folder / LOG).open("a") as file:
        file.write(json.dumps(dict(record)) + "\n")


def cut_log(folder: Path, lines: int) -> None:
    """Keeps the first lines, those of the epochs that the checkpoint knows of."""
    path = folder / LOG
    with writing(path):
        kept = path.read_text().splitlines(keepends=True)[:lines] if path.exists() else []
        path.write_text("".join(kept))


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
