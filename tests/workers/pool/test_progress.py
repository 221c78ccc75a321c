"""The status of a pool, and the log of a load."""

from __future__ import annotations

import structlog

from app.fleet.pool import PoolPhase
from workers.pool.progress import Status


def test_a_long_load_is_logged_every_two_seconds() -> None:
    now = [0.0]
    status = Status("m:1", lambda: now[0])
    with structlog.testing.capture_logs() as lines:
        for second, loaded in ((0.5, 0.1), (2.1, 0.25), (2.2, 0.3), (3.9, 0.5), (4.3, 0.6), (9.0, 1.0)):
            now[0] = second
            status.note_progress(loaded)
        status.enter(PoolPhase.SERVING)
    assert [line["percent"] for line in lines if line["event"] == "model_loading"] == [25, 60]
    assert lines[-1]["phase"] == "serving"
    assert (status.loaded, status.phase) == (1.0, PoolPhase.SERVING)
