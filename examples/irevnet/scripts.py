"""How the scripts read their flags, and how they end."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from errors import explained


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


def script(body: Callable[[Any], None]) -> Callable[..., int]:
    """Makes ``main`` of what a script does with its settings: arguments in, exit status out.

    Its flags, the fields of the settings, are read from the arguments or else the command line, and
    its module's docstring is the help.
    """
    settings, *_ = body.__annotations__.values()
    # The docstring's first paragraph, and the commands in it.
    first, *others = (sys.modules[body.__module__].__doc__ or "").replace("``", "").split("\n\n")
    description = "\n\n".join([first, *(each for each in others if each.startswith("    "))])

    def main(arguments: Sequence[str] | None = None) -> int:
        return ending(lambda: body(tyro.cli(settings, args=arguments, description=description)))

    return main
