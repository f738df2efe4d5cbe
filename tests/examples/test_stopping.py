import os
import signal
import time

import pytest

from trainer.stopping import Signals


def receive(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_remembered(number):
    with Signals() as signals:
        assert signals.received == 0
        receive(number)
        assert signals.received == number


def test_a_signal_that_is_passed_on_counts_once(monkeypatch):
    with Signals() as signals:
        receive(signal.SIGTERM)
        receive(signal.SIGINT)
        assert signals.received == signal.SIGTERM
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 2)
        with pytest.raises(KeyboardInterrupt):
            receive(signal.SIGINT)


def test_signals_are_answered_as_before_afterwards():
    with Signals():
        pass
    with pytest.raises(KeyboardInterrupt):
        receive(signal.SIGINT)
