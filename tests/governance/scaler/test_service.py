"""The scaler's decisions and requests on a real database: once, by one worker, and sent again until accepted."""

from __future__ import annotations

import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from app.footprint.layout import KnownLayout
from app.governance.scaler import service
from app.kernel.database import Database
from app.kernel.priority import Priority
from app.kernel.sections.scaler import ScaledClass, ScalerSettings
from app.scheduler.observation import FleetDemand, Observation
from app.scheduler.planner.cluster import Cluster, Configuration
from app.scheduler.planner.demand import WaitingSteps
from workers.governance.scaler import ScalerRequestFailed, call_program

GIB = 2**30
NOW = datetime(2026, 1, 1, tzinfo=UTC)
TIMEOUT = timedelta(seconds=1)
SETTINGS = ScalerSettings(
    mode="on", command=("true",), classes=(ScaledClass(name="l4", type="NVIDIA L4", bytes=22 * GIB, max=3),)
)
LAYOUT = KnownLayout("c", "NVIDIA L4", (10 * GIB,), "measured", timedelta(seconds=9), 50.0)
CONFIGURATION = Configuration("c", "a:1", 4, (LAYOUT,))


def seen(at: datetime = NOW) -> Observation:
    return Observation(at, Cluster(devices=(), configurations=(CONFIGURATION,)), {"a:1": CONFIGURATION}, ())


def wanted(steps: int) -> FleetDemand:
    waiting = [WaitingSteps("a:1", Priority.STANDARD, steps, NOW, work=timedelta(seconds=20))] if steps else []
    return FleetDemand([], waiting, {}, {})


def test_a_request_is_stored_and_sent_until_it_is_accepted(database: Database) -> None:
    assert service.claim(database, "l4", TIMEOUT) is None
    service.advance(database, SETTINGS, seen(), wanted(1))
    request = service.claim(database, "l4", TIMEOUT)
    assert request is not None
    assert (request["id"], request["hosts"], request["release"]) == ("l4-1", 1, [])
    assert service.claim(database, "l4", TIMEOUT) is None, "another worker sends it"
    service.failed(database, "l4", "l4-1", "503")
    (view,) = service.plan(database, SETTINGS, seen(), wanted(1))
    assert (view.attempts, view.error) == (1, "503")
    service.accepted(database, "l4", "l4-1")
    service.advance(database, SETTINGS, seen(NOW + timedelta(minutes=1)), wanted(1))
    (view,) = service.plan(database, SETTINGS, seen(), wanted(1))
    assert (view.pending, view.decision.is_asked) == (None, False), "the same is not asked for twice"


def test_a_newer_request_replaces_one_that_was_not_accepted(database: Database) -> None:
    service.advance(database, SETTINGS, seen(), wanted(1))
    service.advance(database, SETTINGS, seen(NOW + timedelta(minutes=1)), wanted(60))
    service.accepted(database, "l4", "l4-1")
    request = service.claim(database, "l4", TIMEOUT)
    assert request is not None, "what was accepted is the older one"
    assert (request["id"], request["hosts"]) == ("l4-2", 3)


def test_two_workers_decide_once(database: Database) -> None:
    """A plan of one worker while another decides is left out; both together ask once."""
    begin, numbers = threading.Barrier(2), []

    def decide() -> None:
        begin.wait()
        found = service.advance(database, SETTINGS, seen(), wanted(1))
        numbers.extend([] if found is None else [one.decision.is_asked for one in found])

    threads = [threading.Thread(target=decide) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert numbers.count(True) == 1


def test_a_program_reads_the_request(tmp_path: Path) -> None:
    file = tmp_path / "request.json"
    script = f"import sys; open({str(file)!r}, 'w').write(sys.stdin.read())"
    call_program([sys.executable, "-c", script], {"id": "l4-1", "hosts": 2}, 60)
    assert file.read_text() == '{"id": "l4-1", "hosts": 2}'
    with pytest.raises(ScalerRequestFailed, match=r"ended with 3: no quota"):
        call_program([sys.executable, "-c", "import sys; sys.stderr.write('no quota'); sys.exit(3)"], {}, 60)
    with pytest.raises(ScalerRequestFailed, match=r"did not end within 0\.2 s"):
        call_program([sys.executable, "-c", "import time; time.sleep(60)"], {}, 0.2)
    with pytest.raises(ScalerRequestFailed, match=r"could not be started"):
        call_program(["/nowhere/program"], {}, 1)
