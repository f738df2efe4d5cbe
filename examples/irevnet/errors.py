"""Errors that whoever started a script can mend, and how the scripts end."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import tyro
from rich.console import Console

S = TypeVar("S")


class RunError(Exception):
    """Shown as one line, without a traceback."""


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
    """Makes the folder that a result goes to and tries it, before the work instead of behind it.

    Args:
        path: Of the result.
        folder: Whether that is a folder itself.
    """
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


def summary(text: str | None) -> str:
    """Of a docstring, its first paragraph and the commands in it."""
    first, *others = (text or "").replace("``", "").split("\n\n")
    return "\n\n".join([first, *(each for each in others if each.startswith("    "))])


def ending(body: Callable[[], int], *, prints: bool = True) -> int:
    """Runs a script's body; the exit status, errors being one line each."""
    try:
        return body()
    except RunError as error:
        if prints:
            print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped before there was anything to keep.", file=sys.stderr)
        return 130


def run_script(
    settings: type[S], body: Callable[[S, Console], None], arguments: Sequence[str] | None = None
) -> int:
    """Runs a script with these flags, or the command line's; returns the exit status.

    Args:
        settings: Its flags, a dataclass.
        body: The script, whose module's docstring is the help.
        arguments: The flags' words; None takes those of the command line.
    """

    def run() -> int:
        description = summary(sys.modules[body.__module__].__doc__)
        chosen = tyro.cli(settings, args=arguments, description=description)
        body(chosen, Console(highlight=False, soft_wrap=True))
        return 0

    return ending(run)
