"""Errors that whoever started a script can mend."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class RunError(Exception):
    """Shown as one line, without a traceback."""


def explained(error: BaseException) -> str | None:
    """The line that an error is shown as; None if it needs its traceback."""
    if isinstance(error, RunError):
        return f"error: {error}"
    if str(error).startswith("DataLoader worker"):
        reason = "a process that reads images died, perhaps out of memory"
        return f"error: {reason}: {first_line(error)} Try fewer --workers."
    return None


def first_line(error: BaseException) -> str:
    """What an error says first, or else its name."""
    return (str(error) or type(error).__name__).splitlines()[0]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Names the path when something cannot be written."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {path}: {error}.") from error


def try_writing(path: Path, *, folder: bool = False) -> None:
    """Makes the folder that a result goes to, or is, and tries it, before the work."""
    home = path if folder else path.parent
    with writing(path):
        home.mkdir(parents=True, exist_ok=True)
        if path.is_dir() and not folder:
            raise IsADirectoryError("it is a folder")
        with tempfile.TemporaryFile(dir=home):
            pass


def at_least(least: int, **flags: int | None) -> None:
    """Refuses what is smaller; None stands for all there are."""
    for name, value in flags.items():
        if value is not None and value < least:
            raise RunError(f"--{name.replace('_', '-')} must be at least {least}, got {value}.")
