"""Signals interrupt, but not in the library's look at a child, which would then seem to run for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from app.cli.processes.signals import Interrupted, Signals


@pytest.fixture
def child() -> Iterator[Any]:
    found = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield found
    found.kill()
    found.wait(60)


def test_a_signal_interrupts_once() -> None:
    signals = Signals()
    with pytest.raises(Interrupted):
        signals._on_signal(signal.SIGINT, sys._getframe())
    signals._on_signal(signal.SIGINT, sys._getframe())
    assert signals.hurry


def test_a_signal_in_the_look_at_a_child_interrupts_afterwards(child: Any) -> None:
    signals = Signals()

    def interrupted_waitpid(pid: int, flags: int) -> tuple[int, int]:
        signals._on_signal(signal.SIGINT, sys._getframe(1))
        return os.waitpid(pid, flags)

    assert child._internal_poll(_waitpid=interrupted_waitpid) is None
    with pytest.raises(Interrupted):
        signals.check()
    child.kill()
    assert child.wait(60) == -signal.SIGKILL
