"""
A pass of the probes: ask the pools that are due, judge their answers, and have those restarted that do not work.

Two control workers never probe a pool at the same time: the instant of a probe is written before it is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import redis
from sqlalchemy import text

from app.catalog.catalog import Catalog
from app.governance.probes import sending
from app.governance.probes.probe import PoolProgress, ProbeAnswer, ProbeOutcome, ProbeResult, is_restarted, judge
from app.governance.probes.sending import ProbedPool
from app.kernel import log
from app.kernel.database import Database
from app.kernel.sections.probes import ProbeSettings
from app.scheduler.operator_commands import OperatorCommands

_log = log.get(__name__)

#: How the reason of a restart begins; restarts are counted by it.
_REASON = "probe: "
#: Most pools of one pass.
_MOST = 200
#: Seconds between two probes of a pool, when an operator asks for one.
_AT_ONCE = 1.0

_DUE = text("""
    INSERT INTO pool_probe AS probe (pool_id, sent_at)
    SELECT pool.id, now() FROM pool
    JOIN reservation ON reservation.id = pool.id JOIN pool_report ON pool_report.pool_id = pool.id
    LEFT JOIN pool_probe AS known ON known.pool_id = pool.id
    WHERE reservation.state <> 'released' AND pool.desired = 'run' AND phase = 'serving'
      AND (COALESCE(known.sent_at, serving_at) < now() - make_interval(
                  secs => CASE WHEN known.failures > 0 THEN :again ELSE :every END))
    ORDER BY pool.id LIMIT :most
    ON CONFLICT (pool_id) DO UPDATE SET sent_at = now()
    WHERE probe.sent_at < now() - make_interval(secs => :again)
    RETURNING pool_id::text AS id, (SELECT model FROM pool WHERE pool.id = pool_id) AS model
""")
_PROGRESS = text("""
    SELECT pool_id::text AS id, busy, LEAST(stalled_ms, 1e12)::float AS stalled_ms
    FROM pool_report WHERE pool_id = ANY(CAST(:ids AS uuid[]))
""")
_RECORD = text("""
    UPDATE pool_probe SET outcome = :outcome, ended_at = now(), seconds = :seconds, detail = :detail,
        failures = CASE WHEN :bad THEN failures + 1 WHEN :slow THEN failures ELSE 0 END
    WHERE pool_id = CAST(:id AS uuid)
    RETURNING failures, (
        SELECT count(*) FROM pool AS other JOIN pool AS own ON own.model = other.model
        WHERE own.id = pool_id AND other.stop_reason LIKE :reason AND other.created_at > now() - interval '1 hour'
    ) AS restarts
""")
_ALL = text("""
    SELECT pool_id::text AS pool, pool.model, sent_at, outcome, ended_at, seconds, detail, failures
    FROM pool_probe JOIN pool ON pool.id = pool_id JOIN reservation ON reservation.id = pool.id
    WHERE reservation.state <> 'released' ORDER BY pool.model, pool_id
""")


@dataclass(frozen=True, slots=True)
class ProbeView:
    """The last probe of a pool."""

    pool: str
    model: str
    sent_at: datetime
    outcome: str | None
    ended_at: datetime | None
    seconds: float | None
    detail: str
    failures: int


def all_probes(database: Database) -> list[ProbeView]:
    """Return the last probe of each pool that has not ended. Raises DatabaseUnreachable."""
    with database.work() as work:
        return work.rows_of(ProbeView, _ALL)


@dataclass(frozen=True, slots=True)
class Probes:
    """The probes of an installation."""

    database: Database
    client: redis.Redis
    commands: OperatorCommands
    settings: ProbeSettings
    #: The setting `fleet.progress_timeout`.
    progress_timeout: timedelta

    def run(self, catalog: Catalog, now: Callable[[], datetime], *, every_pool: bool = False) -> Mapping[str, int]:
        """
        Probe the pools that are due, or every pool. Returns how many had which outcome, and how many are restarted.

        Raises DatabaseUnreachable, BrokerUnreachable.
        """
        due = self._due(catalog, every_pool=every_pool)
        if not due:
            return {}
        timeout = self.settings.timeout
        alive = sending.alive(self.client, due)  # before a probe itself is such a request
        answers = sending.ask(self.client, due, int(now().timestamp()), timeout.total_seconds())
        counts: dict[str, int] = {}
        for pool, result in self._judged(due, answers, alive, timeout):
            counts[result.outcome] = counts.get(result.outcome, 0) + 1
            if self._record(pool, result):
                counts["restarted"] = counts.get("restarted", 0) + 1
        return counts

    def _due(self, catalog: Catalog, *, every_pool: bool = False) -> list[ProbedPool]:
        parameters: dict[str, Any] = {
            "every": self.settings.every.total_seconds(),
            "again": min(self.settings.check_every, self.settings.every).total_seconds() / 2,
            "most": _MOST,
        }
        if every_pool:
            # Not those that another worker probes at this moment.
            parameters |= {"every": 0.0, "again": _AT_ONCE}
        with self.database.work() as work:
            rows = work.rows(_DUE, parameters)
        found = ((row.id, catalog.find(row.model)) for row in rows)
        return [
            ProbedPool(id_, model)
            for id_, model in found
            if model is not None and (model.remote is None or self.settings.remote)
        ]

    def _judged(
        self, due: Iterable[ProbedPool], answers: Mapping[str, ProbeAnswer], alive: set[str], timeout: timedelta
    ) -> Iterable[tuple[ProbedPool, ProbeResult]]:
        late = [pool.id for pool in due if pool.id not in answers]
        with self.database.work() as work:
            reports = {row.id: row for row in work.rows(_PROGRESS, {"ids": late})} if late else {}
        for pool in due:
            progress = PoolProgress(False, timedelta(0))
            if (report := reports.get(pool.id)) is not None:
                is_busy = report.busy > 0 or pool.id in alive
                progress = PoolProgress(is_busy, timedelta(milliseconds=report.stalled_ms))
            yield pool, judge(answers.get(pool.id), progress, timeout, self.progress_timeout)

    def _record(self, pool: ProbedPool, result: ProbeResult) -> bool:
        """Record a result. Returns whether the pool is restarted for it."""
        parameters = {
            "id": pool.id,
            "outcome": result.outcome,
            "seconds": result.seconds,
            "detail": result.detail[:1_000],
            "bad": result.outcome.is_bad,
            "slow": result.outcome is ProbeOutcome.SLOW,
            "reason": f"{_REASON}%",
        }
        with self.database.work() as work:
            row = work.row(_RECORD, parameters)
        if row is None or not result.outcome.is_bad:
            return False
        _log.warning(
            "pool_probe_failed", pool=pool.id, model=pool.model.name, failures=row.failures, reason=result.detail
        )
        settings = self.settings
        if not is_restarted(row.failures, settings.restart_after, row.restarts, settings.max_restarts):
            return False
        self.commands.restart(pool.id, pool.model.name, f"{_REASON}{result.detail}")
        return True
