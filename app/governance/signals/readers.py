"""
The readers of signals: they make samples of what the product records anyway.

Attempts, called runs and conversations are read from a watermark on, by an index on the time of their end: the cost
grows with what is new, not with what is kept. States, such as the memory of devices, are sampled. Each reader writes
its samples and its watermark in one transaction, so an attempt is counted once, and one process at a time reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import text

from app.governance.signals import store
from app.governance.signals.collaboration import score
from app.governance.signals.horizon import horizon
from app.governance.signals.sample import Sample, SignalLabels
from app.governance.signals.store import SignalQuery
from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import FailureReason

#: Attempts that are read in one transaction.
BATCH = 5_000
#: States are sampled at most this often.
_SAMPLED_EACH = timedelta(seconds=5)
#: The window of the collaboration score.
_SCORED = timedelta(hours=1)
#: The names of the watermarks.
ATTEMPTS, CALLED_RUNS, POOLS, CONVERSATIONS, STATES, CACHE = (
    f"read:{name}" for name in ("attempts", "called_runs", "pools", "conversations", "states", "cache")
)

#: Outcomes that say something of the model and its pool. Wrong requests, and what was cancelled or requeued, do not.
_FAILURES = frozenset(
    {
        FailureReason.INVALID_OUTPUT,
        FailureReason.TRUNCATED,
        FailureReason.TIMEOUT,
        FailureReason.ENGINE_ERROR,
        FailureReason.HTTP_5XX,
        FailureReason.HTTP_THROTTLED,
        FailureReason.HTTP_UNREACHABLE,
        FailureReason.HTTP_UNUSABLE,
        FailureReason.WORKER_LOST,
        FailureReason.INTERNAL,
    }
)
_SUCCEEDED = "succeeded"
#: What attempts are read for.
SIGNALS_OF_ATTEMPTS = (
    *("error_rate", "cooperation", "queue_wait", "response_time", "first_token_time", "thrash_rate", "steps_per_load"),
    *("tokens", "prefix_hit_rate", "cost"),
)
#: How endings of pools begin that ran out of memory (`workers/agent/agent.py`), and the exit code of a pool that
#: refused to load because the bytes were not available (`workers/pool/pool.py`).
OUT_OF_MEMORY, REFUSED = "memory ran out", 8

_BEGIN = text("INSERT INTO signal_watermark (name) VALUES (:name) ON CONFLICT DO NOTHING")
_LOCK = text("SELECT at, state FROM signal_watermark WHERE name = :name FOR UPDATE SKIP LOCKED")
_MOVE = text("UPDATE signal_watermark SET at = :at WHERE name = :name")
_KEEP = text("UPDATE signal_watermark SET at = now(), state = CAST(:state AS jsonb) WHERE name = :name")
_ATTEMPTS = """
    SELECT attempt.model, attempt.attempt, attempt.outcome, attempt.finished_at AS at, step.priority, run.namespace,
           split_part(attempt.owner, '/', -1) AS pool, first_token_ms / 1000.0 AS first_token,
           extract(epoch FROM attempt.finished_at - LEAST(step.ready_at, attempt.started_at))::float AS total,
           extract(epoch FROM attempt.started_at - LEAST(step.ready_at, attempt.started_at))::float AS waited,
           COALESCE(attempt.tokens_in, 0) AS tokens_in, COALESCE(attempt.tokens_out, 0) AS tokens_out, tokens_cached,
           attempt.cost::float AS cost, step.position > 0 OR step.parent_id IS NOT NULL AS goes_on
    FROM attempt JOIN step ON step.id = step_id JOIN run ON run.id = step.run_id
    WHERE attempt.model IS NOT NULL AND attempt.finished_at IS NOT NULL AND
"""
_NEW = text(f"""
    {_ATTEMPTS} attempt.finished_at > :begin AND attempt.finished_at <= :end ORDER BY attempt.finished_at LIMIT :most
""")
_AT = text(f"{_ATTEMPTS} attempt.finished_at = :at")
_HOSTS = text("SELECT id::text, host FROM reservation WHERE id::text = ANY(:ids)")
_CALLED = text("""
    SELECT namespace, state, finished_at AS at FROM run
    WHERE parent_step_id IS NOT NULL AND finished_at > :begin AND finished_at <= :end AND state <> 'cancelled'
""")
_LOADED = text("""
    SELECT pool.model, serving_at AS at FROM pool_report JOIN pool ON pool.id = pool_id
    WHERE serving_at > :begin AND serving_at <= :end
""")
_ENDED = text("""
    SELECT pool.model, reservation.host, ended_at AS at, returncode, COALESCE(ending, '') AS ending
    FROM pool_process JOIN pool ON pool.id = pool_id JOIN reservation ON reservation.id = pool_id
    WHERE ended_at > :begin AND ended_at <= :end
""")
_CONVERSATIONS = text("""
    SELECT namespace, messages, updated_at <= :end AS is_last, least(updated_at, :end) AS at, added
    FROM conversation CROSS JOIN LATERAL (
        SELECT count(*) AS added FROM (
            SELECT created_at FROM conversation_message
            WHERE conversation_id = conversation.id ORDER BY seq DESC LIMIT 1000
        ) AS newest WHERE created_at > :begin AND created_at <= :end
    ) AS counted
    WHERE updated_at > :begin
""")
_DEVICES = text("""
    SELECT id, host, used_bytes, total_bytes, charged_bytes, capacity_bytes, utilisation, kind
    FROM device WHERE present AND total_bytes > 0
""")
_AGENTS = text("""
    SELECT name, GREATEST(extract(epoch FROM now() - agent_until + CAST(:lease AS interval)), 0)::float AS age
    FROM host WHERE lost_at IS NULL
""")
_POOLS = text("""
    SELECT pool.id::text, pool.model, reservation.host,
           extract(epoch FROM now() - COALESCE(heartbeat_at, granted_at))::float AS age
    FROM pool JOIN reservation ON reservation.id = pool.id LEFT JOIN pool_report ON pool_id = pool.id
    WHERE reservation.state <> 'released' AND reservation.activated_at IS NOT NULL
""")
_POOL_MEMORY = text("""
    SELECT pool.id::text, pool.model, reservation.host, used.bytes AS used, held.bytes AS reserved
    FROM pool_process JOIN pool ON pool.id = pool_id JOIN reservation ON reservation.id = pool_id
    CROSS JOIN LATERAL (SELECT sum(value::text::bigint)::float AS bytes FROM jsonb_each(pool_process.used)) AS used
    CROSS JOIN LATERAL (
        SELECT sum(bytes)::float AS bytes FROM reservation_device WHERE reservation_id = pool_id
    ) AS held
    WHERE reservation.state = 'active' AND pool_process.state <> 'ended' AND used.bytes > 0 AND held.bytes > 0
""")
_QUEUES = text("""
    SELECT step.model, step.priority, count(*) AS steps,
           extract(epoch FROM now() - min(COALESCE(ready_at, published_at, now())))::float AS age
    FROM step JOIN run ON run.id = step.run_id AND run.finished_at IS NULL
    WHERE step.state = 'ready' AND step.model IS NOT NULL AND NOT run.paused AND NOT run.workflow_paused
    GROUP BY step.model, step.priority
""")


@dataclass(frozen=True, slots=True)
class Readers:
    """The readers, each with a watermark of its own."""

    database: Database
    #: How long an agent without a heartbeat counts as alive.
    host_lease: timedelta

    def attempts(self) -> int:
        """Read attempts that have ended. Returns how many; `BATCH` or more: there are further ones."""
        with self.database.work() as work:
            begin = _locked(work, ATTEMPTS)
            if begin is None:
                return 0
            end = horizon(work)
            rows = work.rows(_NEW, {"begin": begin, "end": end, "most": BATCH})
            if len(rows) == BATCH:  # of those that ended at the same instant as the last one, some may be missing
                end = rows[-1].at
                rows = [row for row in rows if row.at < end] + work.rows(_AT, {"at": end})
            hosts = {row.id: row.host for row in work.rows(_HOSTS, {"ids": sorted({row.pool for row in rows})})}
            store.write(work, (sample for row in rows for sample in _of_attempt(row, hosts)))
            work.run(_MOVE, {"name": ATTEMPTS, "at": max(end, begin)})
        return len(rows)

    def called_runs(self) -> None:
        """Read called runs that have ended: hand-offs."""
        with self.database.work() as work:
            if (span := _span(work, CALLED_RUNS)) is not None:
                rows = work.rows(_CALLED, span)
                samples = [
                    Sample("handoff_success", row.state == _SUCCEEDED, SignalLabels(namespace=row.namespace), at=row.at)
                    for row in rows
                ]
                store.write(work, samples)

    def pools(self) -> None:
        """Read pools that have loaded their model, and pools that have ended."""
        with self.database.work() as work:
            if (span := _span(work, POOLS)) is not None:
                loads = [
                    sample
                    for row in work.rows(_LOADED, span)
                    for sample in (
                        Sample("thrash_rate", 1, SignalLabels(model=row.model), 0, row.at),
                        Sample("steps_per_load", 0, SignalLabels(model=row.model), 1, row.at),
                    )
                ]
                ends = [
                    Sample("out_of_memory_rate", _lacked_memory(row), SignalLabels(row.model, host=row.host), at=row.at)
                    for row in work.rows(_ENDED, span)
                ]
                store.write(work, loads + ends)

    def conversations(self) -> None:
        """Read what was added to conversations."""
        with self.database.work() as work:
            if (span := _span(work, CONVERSATIONS)) is not None:
                samples = []
                for row in work.rows(_CONVERSATIONS, span):
                    labels = SignalLabels(namespace=row.namespace)
                    samples += [Sample("conversation_growth", row.added, labels, at=row.at)] if row.added else []
                    samples += [Sample("conversation_length", row.messages, labels, at=row.at)] if row.is_last else []
                store.write(work, samples)

    def states(self) -> None:
        """Sample what is: memory, heartbeats, queues, and the collaboration score."""
        with self.database.work() as work:
            sampled = _locked(work, STATES)
            now: datetime = work.rows(text("SELECT now() AS now"))[0].now
            if sampled is None or timedelta(0) < now - sampled < _SAMPLED_EACH:
                return
            samples = [*_of_devices(work), *_of_pools(work), *_of_heartbeats(work, self.host_lease), *_of_queues(work)]
            if (found := _score(work)) is not None:
                samples.append(Sample("collaboration_score", found))
            store.write(work, samples)
            work.run(_MOVE, {"name": STATES, "at": now})

    def cache(self, calls: Mapping[tuple[str, str, str], int]) -> None:
        """Write what the counters of the response cache, by namespace, model and status, have risen by."""
        with self.database.work() as work:
            work.run(_BEGIN, {"name": CACHE})
            row = work.row(_LOCK, {"name": CACHE})
            if row is None:
                return
            before: Mapping[str, int] = row.state
            kept = {json.dumps(key): count for key, count in sorted(calls.items())[: store.MAX_SERIES // 10]}
            samples = []
            for key, count in kept.items():
                namespace, model, status = json.loads(key)
                # A counter that is lower than before began anew. What was there at the first look is not known by time.
                risen = count - before.get(key, 0) if count >= before.get(key, 0) else count
                if risen and before and status in ("hit", "near", "shared", "miss"):
                    labels = SignalLabels(model=model, namespace=namespace)
                    samples.append(Sample("cache_hit_rate", risen if status != "miss" else 0, labels, risen))
            store.write(work, samples)
            if kept != before:
                work.run(_KEEP, {"name": CACHE, "state": json.dumps(kept)})


def _locked(work: UnitOfWork, name: str) -> datetime | None:
    """Lock a watermark and return it; None when another process has it."""
    work.run(_BEGIN, {"name": name})
    row = work.row(_LOCK, {"name": name})
    return None if row is None else row.at


def _span(work: UnitOfWork, name: str) -> dict[str, datetime] | None:
    """Lock a watermark, move it to the horizon, and return what is between; None when there is nothing to read."""
    begin = _locked(work, name)
    end = horizon(work) if begin is not None else None
    if begin is None or end is None or end <= begin:
        return None
    work.run(_MOVE, {"name": name, "at": end})
    return {"begin": begin, "end": end}


def _of_attempt(row: Any, hosts: Mapping[str, str]) -> Iterator[Sample]:
    """Yield the samples of an attempt."""
    host = hosts.get(row.pool, "")
    labels = SignalLabels(row.model, row.pool if host else "", host, "", row.namespace, row.priority)
    succeeded = row.outcome == _SUCCEEDED
    if succeeded or row.outcome in _FAILURES:
        yield Sample("error_rate", not succeeded, labels, at=row.at)
        if row.goes_on:
            by_model = SignalLabels(model=row.model, namespace=row.namespace)
            yield Sample("cooperation", succeeded, by_model, at=row.at)
    if row.attempt == 1:
        yield Sample("queue_wait", row.waited, labels, at=row.at)
    if succeeded:
        yield Sample("response_time", row.total, labels, at=row.at)
        if row.first_token is not None:
            yield Sample("first_token_time", row.waited + float(row.first_token), labels, at=row.at)
        yield Sample("thrash_rate", 0, SignalLabels(model=row.model), at=row.at)
        yield Sample("steps_per_load", 1, SignalLabels(model=row.model), 0, row.at)
    if row.tokens_in or row.tokens_out:
        yield Sample("tokens", row.tokens_in + row.tokens_out, labels, at=row.at)
    if row.tokens_cached is not None and row.tokens_in:
        yield Sample("prefix_hit_rate", min(row.tokens_cached, row.tokens_in), labels, row.tokens_in, row.at)
    if row.cost is not None:
        yield Sample("cost", row.cost, labels, at=row.at)


def _lacked_memory(row: Any) -> bool:
    return bool(row.returncode == REFUSED or row.ending.startswith(OUT_OF_MEMORY))


def _of_devices(work: UnitOfWork) -> Iterator[Sample]:
    for row in work.rows(_DEVICES):
        labels = SignalLabels(host=row.host, device=row.id)
        yield Sample("memory_utilisation", row.used_bytes, labels, row.total_bytes)
        if row.capacity_bytes:
            yield Sample("memory_reserved", row.charged_bytes, labels, row.capacity_bytes)
        if row.utilisation is not None:
            yield Sample("gpu_utilisation", row.utilisation, labels)


def _of_pools(work: UnitOfWork) -> Iterator[Sample]:
    for row in work.rows(_POOL_MEMORY):
        yield Sample("pool_memory", row.used, SignalLabels(row.model, row.id, row.host), row.reserved)


def _of_heartbeats(work: UnitOfWork, lease: timedelta) -> Iterator[Sample]:
    for row in work.rows(_AGENTS, {"lease": lease}):
        yield Sample("heartbeat_age", row.age, SignalLabels(host=row.name))
    for row in work.rows(_POOLS):
        yield Sample("heartbeat_age", row.age, SignalLabels(row.model, row.id, row.host))


def _of_queues(work: UnitOfWork) -> Iterator[Sample]:
    for row in work.rows(_QUEUES):
        labels = SignalLabels(model=row.model, priority=row.priority)
        yield Sample("queue_age", row.age, labels)
        yield Sample("waiting_steps", row.steps, labels)


def _score(work: UnitOfWork) -> float | None:
    parts = {
        name: store.read(work, SignalQuery(name, _SCORED)).get("")
        for name in ("thrash_rate", "handoff_success", "cooperation")
    }
    thrash = parts["thrash_rate"]
    # Without a step that was served, nothing was shared yet.
    sharing = None if thrash is None or thrash.weight < 1 else 1 - min(1.0, thrash.total / thrash.weight)
    handoffs, cooperation = parts["handoff_success"], parts["cooperation"]
    means = [None if value is None else value.mean for value in (handoffs, cooperation)]
    return score(sharing, *means)
