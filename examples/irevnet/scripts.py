"""How the scripts read their flags, and how they end."""

import sys
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

import tyro

from errors import explained

S = TypeVar("S")


def ending(body: Callable[[], int | None], *, prints: bool = True) -> int:
    """Runs a script's body; the exit status, errors being one line each."""
    try:
        return body() or 0
    except KeyboardInterrupt:
        print("Stopped before there was anything to keep.", file=sys.stderr)
        return 130
    except Exception as error:
        line = explained(error)
        if line is None:
            raise
        if prints:
            print(line, file=sys.stderr)
        return 1


def run_script(
    settings: type[S], body: Callable[[S], None], arguments: Sequence[str] | None = None
) -> NoReturn:
    """Runs a script whose module's docstring is the help, and ends with its exit status.

    Its flags, the fields of a dataclass, are read from the arguments or else the command line.
    """
    # The docstring's first paragraph, and the commands in it.
    first, *others = (sys.modules[body.__module__].__doc__ or "").replace("``", "").split("\n\n")
    commands = [each for each in others if each.startswith("    ")]
    description = "\n\n".join([first, *commands])
    sys.exit(ending(lambda: body(tyro.cli(settings, args=arguments, description=description))))
