"""The heart of a pool, in a process of its own: it lets go of its bytes before its lease ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]

#: What every one of these processes begins with.
COMMON = """
import signal, sys, threading, time
from datetime import timedelta
from app.fleet.holder import Grant, HeartbeatReply, ReservationHolder
from app.fleet.pool import Desired
from workers.pool.heartbeat import Heartbeat
from workers.pool.progress import Status

def heart_of(holder):
    grant = Grant("p", 1, 0, "h", "m.1", "m:1", 1, 1, ())
    return Heartbeat(holder, grant, "w", Status("m:1"), timedelta(seconds=0.1), time.monotonic())
"""

#: A pool whose beats meet a defect, and a fail-over's error, before they are heard.
DEFECTS = """
import psycopg

import itertools

beats = itertools.count(1)

class Broken(ReservationHolder):
    def renew(self, *_):
        beat = next(beats)
        if beat == 1:
            raise KeyError("a defect")
        if beat == 2:
            raise psycopg.errors.ReadOnlySqlTransaction("cannot execute UPDATE in a read-only transaction")
        if beat == 5:
            heard.set()
        return HeartbeatReply(Desired.RUN, 2)

heard = threading.Event()
heart = heart_of(Broken(None, timedelta(seconds=60)))
def broken(_):
    print("told of threads", flush=True)
    raise RuntimeError("the engine cannot")
heart.on_threads(broken)
heart.start()
sys.exit(0 if heard.wait(50) else 1)
"""

#: A pool whose steps cannot be handed back when its claim is over.
STUCK = """
class Silent(ReservationHolder):
    def renew(self, *_):
        threading.Event().wait()

class Steps:
    def held(self):
        return ["standard"]
    def drain(self):
        raise RuntimeError("nothing can be handed back")

signal.signal(signal.SIGTERM, lambda *_: print("asked to end", flush=True))
heart = heart_of(Silent(None, timedelta(seconds=1)))
heart.serve(Steps(), lambda: timedelta(0))
heart.start()
threading.Event().wait(60)
"""

#: A pool in the middle of its work, which neither its steps nor SIGTERM end, and a database that does not answer.
POOL = """
import signal, threading, time
from datetime import timedelta
from app.fleet.holder import Grant, ReservationHolder
from workers.pool.heartbeat import Heartbeat
from workers.pool.progress import Status

class Silent(ReservationHolder):
    def renew(self, *_):
        threading.Event().wait()

class Steps:
    def held(self):
        return ["standard"]
    def drain(self):
        print("handed back", flush=True)

signal.signal(signal.SIGTERM, lambda *_: print("asked to end", flush=True))
grant = Grant("p", 1, 0, "h", "m.1", "m:1", 1, 1, ())
holder = Silent(None, timedelta(seconds=1))
heart = Heartbeat(holder, grant, "w", Status("m:1"), timedelta(seconds=0.1), time.monotonic())
heart.serve(Steps(), lambda: timedelta(0))
heart.start()
began = time.monotonic()
while time.monotonic() - began < 60:
    time.sleep(0.05)
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", COMMON + program]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)


def test_a_beat_that_fails_in_any_way_is_logged_and_followed_by_the_next() -> None:
    done = run(DEFECTS)

    assert done.returncode == 0, done.stderr
    assert "told of threads" in done.stdout
    assert done.stdout.count("] heartbeat_failed") == 3, done.stdout
    assert "KeyError: 'a defect'" in done.stdout, "with its traceback"


def test_a_pool_whose_steps_cannot_be_handed_back_is_gone_before_its_lease_is() -> None:
    done = run(STUCK)

    assert done.returncode == 7, done.stderr
    assert "asked to end" in done.stdout


def test_a_pool_that_waits_for_a_silent_database_is_gone_before_its_lease_is() -> None:
    done = subprocess.run(
        [sys.executable, "-c", POOL], cwd=ROOT, capture_output=True, text=True, timeout=50, check=False
    )

    assert done.returncode == 7, done.stderr
    assert [line for line in done.stdout.splitlines() if line in {"handed back", "asked to end"}] == [
        "handed back",
        "asked to end",
    ]
