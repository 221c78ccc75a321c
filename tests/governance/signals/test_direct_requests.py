"""A request that went directly to a pool is recorded late, and counts from when it was taken."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import text

from app.governance.signals.readers import Readers
from app.governance.signals.store import SignalQuery, SignalStore
from app.inference.direct import DirectRequest
from app.workflows.runs.service import Runs


def test_it_counts_from_when_it_was_taken(runs: Runs) -> None:
    database = runs.database
    readers = Readers(database, timedelta(seconds=10))
    readers.attempts()
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
    request = DirectRequest.new("m", body, "interactive", {}, 0)
    claim = runs.submit_held(request.submission(), "pool.m@h/1/x", timedelta(seconds=30))
    assert claim is not None
    with database.work() as work:
        work.run(text("UPDATE attempt SET finished_at = now(), outcome = 'succeeded', first_token_ms = 100"))
    assert readers.attempts() == 1
    signals = SignalStore(database)
    found = {
        name: signals.read(SignalQuery(name, timedelta(minutes=5)))[""].mean for name in ("response_time", "queue_wait")
    }
    assert found["response_time"] == pytest.approx(30, abs=5)
    assert found["queue_wait"] == pytest.approx(0, abs=1)
