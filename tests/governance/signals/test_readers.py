"""Signals are made of what is recorded anyway: each attempt counts once, and nothing of a slow transaction is lost."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import pytest
from sqlalchemy import text

from app.fleet.ledger.reservation import ReservationState
from app.governance.signals import readers as module
from app.governance.signals.collaboration import score
from app.governance.signals.readers import OUT_OF_MEMORY, Readers
from app.governance.signals.store import SignalQuery, SignalStore
from app.kernel import ids
from app.kernel.database import Database, UnitOfWork

WINDOW = timedelta(minutes=5)
RUN = """
    INSERT INTO run (id, workflow, sha256, state, priority, inputs, retention_s, namespace, finished_at,
                     parent_step_id, paused, workflow_paused, rank, depth)
    VALUES (:id, 'w', 'd', :state, 'interactive', '{}', 60, :namespace, :finished, :parent,
            false, false, 1, 0)
"""


def attempts(work: UnitOfWork, count: int = 1, *, outcome: str = "succeeded", namespace: str = "a") -> UUID:
    """Write attempts of one run that began five seconds ago, after a second of waiting."""
    work.run(text("INSERT INTO definition (sha256, document) VALUES ('d', '{}') ON CONFLICT DO NOTHING"))
    run_id = ids.new_id()
    values = {"id": run_id, "state": "running", "namespace": namespace, "finished": None, "parent": None}
    work.run(
        text(RUN.replace(":finished", "CAST(:finished AS timestamptz)").replace(":parent", "CAST(:parent AS uuid)")),
        values,
    )
    for place in range(count):
        step = {"id": ids.new_id(), "run": run_id, "key": f"s{place}", "position": place, "outcome": outcome}
        work.run(
            text("""
                INSERT INTO step (id, run_id, key, position, kind, model, queue, priority, state, ready_at,
                                  model_index, rank, delegated, attempt, failures, losses, tokens_in, tokens_out)
                VALUES (:id, :run, :key, :position, 'generate', 'm', 'model.m', 'interactive', 'succeeded',
                        now() - interval '6 seconds', 0, 1, false, 1, 0, 0, 8, 2)
            """),
            {name: step[name] for name in ("id", "run", "key", "position")},
        )
        work.run(
            text("""
                INSERT INTO attempt (step_id, attempt, owner, model, started_at, finished_at, outcome, tokens_in,
                                     tokens_out, tokens_cached, first_token_ms, cost)
                VALUES (:id, 1, 'pool.m@h/1/x', 'm', now() - interval '5 seconds', now(), :outcome, 8, 2, 4, 500, 0.5)
            """),
            {name: step[name] for name in ("id", "outcome")},
        )
    return run_id


@pytest.fixture
def readers(database: Database) -> Readers:
    made = Readers(database, timedelta(seconds=10))
    for read in (made.attempts, made.called_runs, made.pools, made.conversations):
        read()  # the watermarks begin now
    return made


def means(database: Database, by: str | None = None) -> Mapping[str, float | None]:
    signals = SignalStore(database)
    found = {name: signals.read(SignalQuery(name, WINDOW)).get("") for name in module.SIGNALS_OF_ATTEMPTS}
    return {name: value.mean for name, value in found.items() if value is not None}


def test_an_attempt_counts_once(database: Database, readers: Readers) -> None:
    with database.work() as work:
        attempts(work, 3)
        attempts(work, outcome="engine_error")
        attempts(work, outcome="cancelled")
    assert readers.attempts() == 5
    assert readers.attempts() == 0
    found = means(database)
    assert found["error_rate"] == 0.25
    assert found["response_time"] == pytest.approx(6)
    assert found["first_token_time"] == pytest.approx(1.5)
    assert found["queue_wait"] == pytest.approx(1)
    assert (found["prefix_hit_rate"], found["cooperation"]) == (0.5, 1.0)
    signals = SignalStore(database)
    assert signals.read(SignalQuery("tokens", WINDOW, by="namespace"))["a"].total == 50
    assert signals.read(SignalQuery("cost", WINDOW, by="model"))["m"].total == 2.5


def test_what_a_slow_transaction_records_is_read_when_it_ends(database: Database, readers: Readers) -> None:
    """Its rows are older than others that were read before."""
    begun, go_on = threading.Event(), threading.Event()

    def slow() -> None:
        with database.work() as work:
            work.rows(text("SELECT now()"))
            begun.set()
            assert go_on.wait(30)
            attempts(work)

    thread = threading.Thread(target=slow)
    thread.start()
    assert begun.wait(30)
    with database.work() as work:
        attempts(work)
    assert readers.attempts() == 0, "the horizon is where the slow transaction began"
    go_on.set()
    thread.join(30)
    assert readers.attempts() == 2


def test_a_full_batch_leaves_nothing_out(database: Database, readers: Readers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several attempts end at the same instant, and the batch ends among them."""
    monkeypatch.setattr(module, "BATCH", 4)
    with database.work() as work:
        attempts(work, 3)
    with database.work() as work:
        attempts(work, 3)
    while readers.attempts() >= 4:
        pass
    assert SignalStore(database).read(SignalQuery("error_rate", WINDOW))[""].observations == 6


def test_two_readers_do_not_read_the_same(database: Database, readers: Readers) -> None:
    with database.work() as work:
        attempts(work, 2)
    with database.work() as work:
        work.rows(text("SELECT at FROM signal_watermark WHERE name = 'read:attempts' FOR UPDATE"))
        assert readers.attempts() == 0
    assert readers.attempts() == 2


def test_called_runs_are_hand_offs(database: Database, readers: Readers) -> None:
    with database.work() as work:
        run_id = attempts(work)
        parent = work.rows(text("SELECT id FROM step WHERE run_id = :id"), {"id": run_id})[0].id
        for state in ("succeeded", "succeeded", "succeeded", "failed", "cancelled"):
            work.run(
                text(RUN.replace(":finished", "now()")),
                {"id": ids.new_id(), "state": state, "namespace": "a", "parent": parent},
            )
    readers.called_runs()
    assert SignalStore(database).read(SignalQuery("handoff_success", WINDOW))[""].mean == 0.75


def test_states_of_the_fleet_are_sampled(database: Database, readers: Readers) -> None:
    pool = str(ids.new_id())
    with database.work() as work:
        work.run(
            text("""
            INSERT INTO host (name, state, identity, agent_epoch, agent_until, joined_at, files, problems, cores)
            VALUES ('h', 'schedulable', 'i', 1, now() + interval '4 seconds', now(), '[]', '[]', 1)
        """)
        )
        for name, used, total in (("ram", 45, 90), ("gpu", 10, 10)):
            values = {"name": name, "used": used, "total": total}
            work.run(
                text("""
                    INSERT INTO device (id, host, name, kind, type, simulated, present, speed, total_bytes,
                                        capacity_bytes, used_bytes, utilisation, uuid)
                    VALUES (:name, 'h', :name, 'gpu', 't', false, true, 1, :total, :total, :used, 0.5, '')
                """),
                values,
            )
        held = {"id": pool, "state": ReservationState.ACTIVE}
        work.run(
            text("""
                INSERT INTO reservation (id, epoch, revision, state, host, configuration, draining, pinned, namespace,
                                         lease_until, granted_at, activated_at)
                VALUES (:id, 1, 0, :state, 'h', 'm.1', false, false, '', now(), now() - interval '30 seconds', now())
            """),
            held,
        )
        work.run(
            text("""
                INSERT INTO pool (id, configuration, model, slots, purpose, reason, desired, estimate_seconds)
                VALUES (:id, 'm.1', 'm', 1, 'demand', '', 'run', 0)
            """),
            {"id": pool},
        )
        work.run(
            text("""
                INSERT INTO pool_report (pool_id, phase, progress, detail, worker, busy, stalled_ms, heartbeat_at,
                                         serving_at)
                VALUES (:id, 'serving', 1, '', 'w', 0, 0, now() - interval '3 seconds', now())
            """),
            {"id": pool},
        )
        work.run(
            text("""
                INSERT INTO pool_process (pool_id, state, started_at, ended_at, failed, ending, log_tail)
                VALUES (:id, 'ended', now(), now(), true, :ending, '')
            """),
            {"id": pool, "ending": f"{OUT_OF_MEMORY}: it was killed"},
        )
    readers.states()
    readers.pools()
    signals = SignalStore(database)
    assert signals.read(SignalQuery("memory_utilisation", WINDOW))[""].mean == 0.55
    assert signals.read(SignalQuery("memory_utilisation", WINDOW, by="device"))["gpu"].mean == 1.0
    assert signals.read(SignalQuery("gpu_utilisation", WINDOW))[""].mean == 0.5
    ages = signals.read(SignalQuery("heartbeat_age", WINDOW, by="pool"))
    assert (round(ages[""].total), round(ages[pool].total)) == (6, 3)
    assert signals.read(SignalQuery("out_of_memory_rate", WINDOW, by="model"))["m"].mean == 1.0
    thrash = signals.read(SignalQuery("thrash_rate", WINDOW))[""]
    assert (thrash.total, thrash.weight, thrash.mean) == (1, 0, 1)


def test_the_cache_counts_what_its_counters_rise_by(database: Database, readers: Readers) -> None:
    key = ("a", "m", "hit")
    for calls in (
        {key: 5, ("a", "m", "miss"): 1},
        {key: 8, ("a", "m", "miss"): 2},
        {key: 8, ("a", "m", "miss"): 2},
        {key: 1},
    ):
        readers.cache(calls)
    found = SignalStore(database).read(SignalQuery("cache_hit_rate", WINDOW))[""]
    assert (found.total, found.weight) == (4, 5), "three hits and a miss; then the counters began anew"


def test_the_score_is_the_mean_of_what_was_observed() -> None:
    assert score(None, None, None) is None
    assert score(0.9, None, None) == 0.9
    assert score(1.0, 0.5, 0.0) == 0.5


def test_the_agent_writes_the_words_that_are_looked_for() -> None:
    assert f'f"{OUT_OF_MEMORY}: ' in Path("workers/agent/agent.py").read_text()
    assert f"REFUSED, FAILED = {module.REFUSED}, " in Path("workers/pool/pool.py").read_text()
