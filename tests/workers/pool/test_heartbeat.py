"""The heartbeat of a pool, in a process of its own: the process ends before its lease expires."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

from app.kernel.sections.fleet import FleetSettings
from workers.pool.pool import idle_interval

ROOT = Path(__file__).parents[3]

#: The beginning of the programs.
COMMON = """
import signal, sys, threading, time
from datetime import timedelta
from app.fleet.holder import Grant, HeartbeatReply, ReservationHolder
from app.fleet.pool import Desired
from workers.pool.heartbeat import Heartbeat
from workers.pool.progress import Status

def heartbeat_of(holder):
    grant = Grant("p", 1, 0, "h", "m.1", "m:1", 1, 1, ())
    return Heartbeat(holder, grant, "w", Status("m:1"), timedelta(seconds=0.1), time.monotonic())
"""

#: A pool whose first heartbeats fail with a defect, and with the error of a fail-over.
DEFECTS = """
import psycopg

import itertools

calls = itertools.count(1)

class Broken(ReservationHolder):
    def renew(self, *_):
        call = next(calls)
        if call == 1:
            raise KeyError("a defect")
        if call == 2:
            raise psycopg.errors.ReadOnlySqlTransaction("cannot execute UPDATE in a read-only transaction")
        if call == 5:
            renewed.set()
        return HeartbeatReply(Desired.RUN, 2)

renewed = threading.Event()
heartbeat = heartbeat_of(Broken(None, timedelta(seconds=60)))
def broken(_):
    print("threads changed", flush=True)
    raise RuntimeError("the engine cannot")
heartbeat.on_threads(broken)
heartbeat.start()
sys.exit(0 if renewed.wait(50) else 1)
"""

#: A pool whose steps cannot be requeued when its reservation expires.
STUCK = """
class Blocked(ReservationHolder):
    def renew(self, *_):
        threading.Event().wait()

class Steps:
    count = 0

    def held(self):
        return ["standard"]
    def drain(self):
        raise RuntimeError("the steps cannot be stopped")

signal.signal(signal.SIGTERM, lambda *_: print("SIGTERM", flush=True))
heartbeat = heartbeat_of(Blocked(None, timedelta(seconds=1)))
heartbeat.serve(Steps(), lambda: timedelta(0))
heartbeat.start()
threading.Event().wait(60)
"""

#: A pool that has steps, and then has none: its heartbeats are as far apart as it was told.
IDLE = """
from app.fleet.pool import PoolPhase

class Counting(ReservationHolder):
    calls = 0
    def renew(self, *_):
        Counting.calls += 1
        if Counting.calls == 10:
            steps.clear()
            quiet.set()
        return HeartbeatReply(Desired.RUN, 1)

class Steps:
    count = 0

    def held(self):
        return list(steps)

steps, quiet = ["standard"], threading.Event()
status = Status("m:1")
status.enter(PoolPhase.SERVING)
grant = Grant("p", 1, 0, "h", "m.1", "m:1", 1, 1, ())
often, rarely = timedelta(seconds=0.01), timedelta(seconds=600)
heartbeat = Heartbeat(Counting(None, timedelta(seconds=6000)), grant, "w", status, often, time.monotonic(), rarely)
heartbeat.serve(Steps(), lambda: timedelta(0))
heartbeat.start()
assert quiet.wait(50), "it is sent often while there are steps"
threading.Event().wait(1.0)
print(Counting.calls)
heartbeat.stop()
"""

#: A busy pool that neither the end of its steps nor SIGTERM ends, with a database that does not answer.
POOL = """
import signal, threading, time
from datetime import timedelta
from app.fleet.holder import Grant, ReservationHolder
from workers.pool.heartbeat import Heartbeat
from workers.pool.progress import Status

class Blocked(ReservationHolder):
    def renew(self, *_):
        threading.Event().wait()

class Steps:
    count = 0

    def held(self):
        return ["standard"]
    def drain(self):
        print("drained", flush=True)

signal.signal(signal.SIGTERM, lambda *_: print("SIGTERM", flush=True))
grant = Grant("p", 1, 0, "h", "m.1", "m:1", 1, 1, ())
holder = Blocked(None, timedelta(seconds=1))
heartbeat = Heartbeat(holder, grant, "w", Status("m:1"), timedelta(seconds=0.1), time.monotonic())
heartbeat.serve(Steps(), lambda: timedelta(0))
heartbeat.start()
began = time.monotonic()
while time.monotonic() - began < 60:
    time.sleep(0.05)
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", COMMON + program]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)


def test_a_failed_heartbeat_is_logged_and_followed_by_the_next() -> None:
    done = run(DEFECTS)

    assert done.returncode == 0, done.stderr
    assert "threads changed" in done.stdout
    assert done.stdout.count("] heartbeat_failed") == 3, done.stdout
    assert "KeyError: 'a defect'" in done.stdout, "with its traceback"


def test_a_pool_whose_steps_cannot_be_requeued_exits_before_its_lease_expires() -> None:
    done = run(STUCK)

    assert done.returncode == 7, done.stderr
    assert "SIGTERM" in done.stdout


def test_a_pool_that_waits_for_a_blocked_database_exits_before_its_lease_expires() -> None:
    done = subprocess.run(
        [sys.executable, "-c", POOL], cwd=ROOT, capture_output=True, text=True, timeout=50, check=False
    )

    assert done.returncode == 7, done.stderr
    assert [line for line in done.stdout.splitlines() if line in {"drained", "SIGTERM"}] == [
        "drained",
        "SIGTERM",
    ]


def test_a_pool_without_steps_sends_fewer_heartbeats() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMMON + IDLE], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stdout.split()[-1]) == (0, "10"), done.stderr


def test_heartbeats_of_an_idle_pool_are_never_so_far_apart_that_it_seems_silent() -> None:
    def seconds(**more: float) -> float:
        fleet = FleetSettings(**{key: timedelta(seconds=value) for key, value in more.items()})  # type: ignore[arg-type] # all of `more` are durations
        return idle_interval(fleet).total_seconds()

    assert seconds(heartbeat=2, heartbeat_timeout=20, lease=60) == 6
    assert seconds(heartbeat=2, heartbeat_timeout=10, lease=60) == 3
    assert seconds(heartbeat=2, heartbeat_timeout=20, lease=9) == 2.7
    assert seconds(heartbeat=2, heartbeat_timeout=6, lease=60) == 2
