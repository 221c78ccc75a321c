"""Waiting for the end of processes and for clients."""

from __future__ import annotations

import socket
import subprocess
import threading
import time

from app.kernel.processes.waiting import wait_for_any

#: Seconds of a wait that a test must not reach.
LONG = 60.0


def test_the_end_of_a_process_ends_the_wait() -> None:
    with subprocess.Popen(["sleep", "100"]) as lasting, subprocess.Popen(["sleep", "0.2"]) as ending:
        began = time.monotonic()
        wait_for_any([lasting.pid, ending.pid], [], LONG)
        assert time.monotonic() - began < LONG / 2
        assert ending.wait(LONG) == 0
        lasting.kill()


def test_a_client_ends_the_wait() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        threading.Timer(0.1, lambda: socket.create_connection(address).close()).start()
        began = time.monotonic()
        wait_for_any([], [listener.fileno()], LONG)
        assert time.monotonic() - began < LONG / 2


def test_the_wait_ends_after_its_time_and_for_a_process_that_does_not_exist() -> None:
    wait_for_any([], [], 0.01)
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    wait_for_any([ended.pid], [], LONG)
