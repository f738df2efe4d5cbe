"""Ctrl-C and SIGTERM, answered between two steps."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):  # noqa: N818 (as KeyboardInterrupt, no error)
    """A signal has come, and the state is saved.

    Args:
        number: That of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.strsignal(number))
        self.status = 128 + number  # as shells count


class Signals:
    """Remembers a signal until the step in progress is done; a second one interrupts it.

    Used as a context. What comes within a second of the first is taken for the same: torchrun
    passes on what its processes may have got already.
    """

    received = 0  # the number of the signal, 0 if none has come
    since = 0.0

    def __enter__(self) -> Signals:
        self.before = [signal.signal(number, self._handle) for number in SIGNALS]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in zip(SIGNALS, self.before, strict=True):
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.received and time.monotonic() - self.since > 1:
            raise KeyboardInterrupt
        if not self.received:
            self.received, self.since = number, time.monotonic()
