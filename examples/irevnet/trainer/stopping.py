"""Ctrl-C, SIGTERM, a closed terminal and a reader who goes away, answered between two steps."""

import os
import signal
import sys
import time
from types import FrameType
from typing import Any, Self

from rich.console import Console

SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP"):  # not on Windows
    SIGNALS.append(signal.SIGHUP)
CLOSED = 13  # SIGPIPE, which Python has turned off


class Stopped(Exception):  # noqa: N818 (as KeyboardInterrupt, no error)
    """A signal of this number has come: the state is to be saved."""


class Signals:
    """Remembers a signal until the step in progress is done; a second one interrupts it.

    Used as a context. What comes within a second of the first is taken for the same: torchrun
    passes on what its processes may have got already.
    """

    received = 0  # the number of the signal, 0 if none has come
    since = 0.0

    def __enter__(self) -> Self:
        self.before = [signal.signal(number, self._handle) for number in SIGNALS]
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in zip(SIGNALS, self.before, strict=True):
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if not self.received:
            self.received, self.since = number, time.monotonic()
        elif time.monotonic() - self.since > 1:
            raise KeyboardInterrupt


class Terminal(Console):
    """A console that notes when nobody reads it any more, instead of ending the process."""

    closed = 0  # CLOSED if so

    def print(self, *objects: Any, **options: Any) -> None:
        """Prints, if it can."""
        try:
            super().print(*objects, **options)
        except OSError:  # of a terminal that is gone
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Prints nothing from now on."""
        self.closed, self.quiet = CLOSED, True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
