"""Waiting for the end of processes and for clients, without looking at each of them again and again."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack

#: Seconds of a wait where the end of a process cannot be waited for.
_POLL_SECONDS = 0.25


def wait_for_any(pids: Sequence[int], listeners: Sequence[int], seconds: float) -> None:
    """
    Wait until one of the processes has ended, or a client connects to one of the listening sockets; at most `seconds`.

    Processes need not be children. Returns soon where the system offers no such wait, or one of them does not exist.
    """
    if sys.platform != "linux":
        time.sleep(min(seconds, _POLL_SECONDS))
        return
    with ExitStack() as opened:
        poll = select.poll()
        for descriptor in listeners:
            poll.register(descriptor, select.POLLIN)
        for pid in pids:
            try:
                descriptor = os.pidfd_open(pid)
            except OSError:
                time.sleep(min(seconds, _POLL_SECONDS))
                return
            opened.callback(os.close, descriptor)
            poll.register(descriptor, select.POLLIN)
        poll.poll(seconds * 1000)
