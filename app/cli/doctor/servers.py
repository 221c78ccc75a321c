"""Checks of the servers and of what runs on them: database, schema, broker, clocks, components, jobs and pools."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import redis
from sqlalchemy import text

from app.cli.doctor.finding import Finding, of_broker, of_clock, of_database, ok, problem, skipped, warning
from app.governance.health import components
from app.governance.health.components import Component, ComponentCondition
from app.governance.jobs import store
from app.governance.jobs.job import PassOutcome
from app.governance.probes import service as probes
from app.governance.probes.probe import ProbeOutcome
from app.kernel import addresses, broker, clock
from app.kernel.broker import CeleryPublisher
from app.kernel.database import Database, head_revision
from app.kernel.errors import DatabaseAhead, DatabaseBehind, DatabaseUnreachable, UnfitPooler
from app.kernel.settings import Settings

#: Most time for an answer of the database.
_PATIENCE = timedelta(seconds=5)
_START = "start everything with `arriero up`, or set ARRIERO_{}_URL"

_SERVER = text("""
    SELECT current_setting('server_version_num')::int AS version, now() AS now,
           (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend') AS connections,
           current_setting('max_connections')::int AS max_connections,
           EXISTS (SELECT FROM pg_extension WHERE extname = 'vector') AS has_vector
""")
_HOSTS = text("SELECT name, problems, agent_until > now() AS alive FROM host ORDER BY name LIMIT 1000")
_UNDELIVERED = text("""
    SELECT channel, count(*) AS failing, (array_agg(error ORDER BY id DESC))[1] AS error FROM alert_notification
    WHERE error <> '' AND (state = 'pending' OR state = 'failed' AND created_at > now() - interval '1 day')
    GROUP BY channel ORDER BY channel LIMIT 100
""")
_REFUSALS = text("SELECT model, reason FROM refusal ORDER BY since LIMIT 100")

#: What to do when a component is down.
_REMEDIES: Mapping[Component, str] = {
    Component.DATABASE: "see the finding `database`",
    Component.BROKER: "see the finding `broker`",
    Component.BEAT: "run `arriero up`, or `arriero beat` on some machine; `arriero logs control` may say why it ended",
    Component.CONTROL: "run `arriero up`, or `arriero control` on some machine; `arriero logs control` may say why",
    Component.AGENTS: "run `arriero agent` on each host; remove a host that is gone with `arriero hosts remove HOST`",
}


def database(settings: Settings) -> Iterator[Finding]:
    """Postgres: whether it answers, its version, its schema and its clock."""
    url = addresses.find_database(settings)
    if url is None:
        yield problem("database", "no address is known, and no embedded one runs", _START.format("DATABASE"))
        return
    server = Database(url, pool_size=1, answer_timeout=_PATIENCE)
    try:
        with server.work() as work:
            sent = clock.now()
            row = work.row(_SERVER)
            middle = sent + (clock.now() - sent) / 2
        assert row is not None
        yield from of_database(row.version, row.connections, row.max_connections, has_vector=row.has_vector)
        yield of_clock("Postgres", (row.now - middle).total_seconds())
        server.require_fit()
        revision, head = server.revision(), head_revision()
        if _works_with(server):
            later = "" if revision == head else f", of a later version; this one is at {head}"
            yield ok("schema", f"revision {revision}{later}")
        else:
            detail = f"the schema is at revision {revision or 'none'}; this version needs {head}"
            yield problem("schema", detail, "`arriero db upgrade` with the newest version, then restart all processes")
    except UnfitPooler as error:
        yield problem("database", str(error), "see docs/high-availability.md")
    except DatabaseUnreachable as error:
        yield problem("database", str(error), "start Postgres, and check database_url, its password and the firewall")
    finally:
        server.close()


def _works_with(server: Database) -> bool:
    """Whether this version works with the schema. Raises DatabaseUnreachable."""
    try:
        server.require_head()
    except (DatabaseAhead, DatabaseBehind):
        return False
    return True


def valkey(settings: Settings) -> Iterator[Finding]:
    """The broker: whether it answers, how it is set, and its clock."""
    url = addresses.find_redis(settings)
    if url is None:
        yield problem("broker", "no address is known, and no embedded one runs", _START.format("REDIS"))
        return
    client = broker.connect(url)
    try:
        info: Any = client.info()
        yield from of_broker(info)
        sent = clock.now().timestamp()
        seconds, microseconds = client.time()
        middle = (sent + clock.now().timestamp()) / 2
        yield of_clock("the broker", seconds + microseconds / 1e6 - middle)
    except (redis.RedisError, OSError) as error:
        yield problem("broker", f"it is unreachable: {error}", "start Valkey, and check redis_url and the firewall")
    finally:
        client.close()


def running(settings: Settings) -> Iterator[Finding]:
    """The components, the scheduled jobs, and the pools."""
    database_url, redis_url = addresses.find_database(settings), addresses.find_redis(settings)
    if database_url is None or redis_url is None:
        yield skipped("components", "the database or the broker is unknown")
        return
    server = Database(database_url, pool_size=2, answer_timeout=_PATIENCE)
    publisher = CeleryPublisher(broker.celery_app(redis_url, settings.broker), redis_url)
    try:
        for component, state in components.read(server, publisher).items():
            if state.condition is ComponentCondition.OK:
                yield ok("components", f"{component.value}: ok")
            elif state.condition is ComponentCondition.UNKNOWN:
                yield skipped("components", f"{component.value}: {state.detail}")
            elif state.condition is ComponentCondition.DEGRADED:
                detail = f"{component.value}: {state.detail}: {', '.join(state.hosts)}"
                yield warning("components", detail, _REMEDIES[component])
            else:
                yield problem("components", f"{component.value}: {state.detail}", _REMEDIES[component])
        if _works_with(server):
            yield from _jobs(server)
            yield from _pools(server)
            yield from _notifications(server)
    except DatabaseUnreachable as error:
        yield skipped("components", f"the database does not answer: {error}")
    finally:
        publisher.close()
        server.close()


def _notifications(server: Database) -> Iterator[Finding]:
    with server.work() as work:
        rows = work.rows(_UNDELIVERED)
    for row in rows:
        detail = f"the channel {row.channel} has {row.failing} notifications that were not delivered: {row.error}"
        yield warning("alerts", detail[:1_000], "arriero alerts sent; then `arriero alerts test CHANNEL`")


def _jobs(server: Database) -> Iterator[Finding]:
    with server.work() as work:
        rows = store.all_rows(work)
    bad = False
    for name, row in sorted(rows.items()):
        if row.paused_at is not None:
            bad = True
            reason = f" ({row.paused_reason})" if row.paused_reason else ""
            yield warning("jobs", f"the job {name} is paused{reason}", f"arriero jobs resume {name}")
        elif row.last_outcome in (PassOutcome.FAILED, PassOutcome.POSTPONED):
            bad = True
            error = str((row.last_detail or {}).get("error", row.last_outcome))
            yield problem(
                "jobs", f"the last pass of the job {name} {row.last_outcome}: {error}", "arriero jobs show " + name
            )
    if not bad:
        yield ok("jobs", f"{len(rows)} scheduled jobs have run, and none failed last")


def _pools(server: Database) -> Iterator[Finding]:
    with server.work() as work:
        hosts, refusals = work.rows(_HOSTS), work.rows(_REFUSALS)
    for host in hosts:
        if not host.alive:
            remedy = f"start `arriero agent` there, or `arriero hosts remove {host.name}`"
            yield problem("hosts", f"the agent of host {host.name} is not alive", remedy)
        for sentence in host.problems:
            yield problem("hosts", f"host {host.name}: {sentence}", "run `arriero doctor` on that host")
    for refusal in refusals:
        remedy = f"arriero fleet why {refusal.model}"
        yield warning("models", f"{refusal.model} is wanted and not started: {refusal.reason}", remedy)
    for probe in probes.all_probes(server):
        name = f"pool {probe.pool[-6:]} of {probe.model}"
        if probe.outcome == ProbeOutcome.OK:
            yield ok("pools", f"{name} wrote a token in {probe.seconds or 0:.2f} s")
        elif probe.outcome == ProbeOutcome.SLOW:
            yield warning("pools", f"{name}: {probe.detail}", "add slots or pools, or shorten prompts")
        elif probe.outcome is not None:
            detail = f"{name}: {probe.detail} ({probe.failures} in a row)"
            yield problem("pools", detail, f"arriero logs pool-{probe.pool[-6:]}; it is restarted by itself")
