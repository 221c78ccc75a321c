"""The heart of a pool, in a process of its own: it lets go of its bytes before its lease ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

#: A pool in the middle of its work, which neither its steps nor SIGTERM end, and a database that does not answer.
POOL = """
import signal, threading, time
from datetime import timedelta
from app.fleet.holder import Grant, Holder
from workers.heart import Heart
from workers.stage import Status

class Silent(Holder):
    def renew(self, *_):
        threading.Event().wait()

class Steps:
    def held(self):
        return ["standard"]
    def drain(self):
        print("handed back", flush=True)

signal.signal(signal.SIGTERM, lambda *_: print("asked to end", flush=True))
grant = Grant("p", 1, 0, "h", "m.1", "m:1", 1, 1, ())
heart = Heart(Silent(None, timedelta(seconds=1)), grant, "w", Status("m:1"), timedelta(seconds=0.1), time.monotonic())
heart.serve(Steps(), lambda: timedelta(0))
heart.start()
began = time.monotonic()
while time.monotonic() - began < 60:
    time.sleep(0.05)
"""


def test_a_pool_that_waits_for_a_silent_database_is_gone_before_its_lease_is() -> None:
    done = subprocess.run(
        [sys.executable, "-c", POOL], cwd=ROOT, capture_output=True, text=True, timeout=50, check=False
    )

    assert done.returncode == 7, done.stderr
    assert [line for line in done.stdout.splitlines() if line in {"handed back", "asked to end"}] == [
        "handed back",
        "asked to end",
    ]
