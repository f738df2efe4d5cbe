"""Errors that whoever started a script can mend."""

import math
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any


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
    if isinstance(error, LookupError):  # which says only what was not found
        return f"{error} ({type(error).__name__})"
    return (str(error) or type(error).__name__).splitlines()[0]


@contextmanager
def meaning(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Says what an error of these kinds means, before what it says itself."""
    try:
        yield
    except RunError:
        raise
    except kinds as error:
        raise RunError(f"{what}: {first_line(error).rstrip('.')}.") from error


def writing(path: Path) -> AbstractContextManager[None]:
    """Names the path when something cannot be written."""
    return meaning(f"cannot write {path}", OSError)


def try_writing(path: Path, *, folder: bool = False) -> None:
    """Makes the folder that a result goes to, or is, and tries it, before the work."""
    home = path if folder else path.parent
    with writing(path):
        home.mkdir(parents=True, exist_ok=True)
        if path.is_dir() and not folder:
            raise IsADirectoryError("it is a folder")
        with tempfile.TemporaryFile(dir=home):
            pass


def flag(name: str) -> str:
    """How a setting is given."""
    return f"--{name.replace('_', '-')}"


def at_least(least: float, *, most: float = math.inf, **flags: Any) -> None:
    """Refuses numbers, also in tuples, that are less or more; None stands for all there are."""
    for name, value in flags.items():
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not least <= number <= most:
                bounds = f"at least {least:.10g}" if number < least else f"at most {most:.10g}"
                raise RunError(f"{flag(name)} must be {bounds}, got {number}.")
