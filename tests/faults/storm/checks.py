"""The invariants of a storm, checked from outside: over the rows of the database, the effects and the processes."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from sqlalchemy import text

from app.fleet import views as fleet_views
from app.workflows.state_machine.states import FINAL_RUNS
from tests.faults.conftest import until
from tests.faults.fleets import assert_consistent, ledger_matches_processes
from tests.faults.installation_chaos import COUNTS, LEFT, RUNS, STEPS, WITHOUT_ATTEMPT
from tests.faults.storm.site import Site
from tests.faults.storm.work import FIRE_SECONDS, Work, effects_of

#: Most problems of one kind that are listed.
_LISTED = 20
_FIRES = text("SELECT due_at, state, run_id::text FROM schedule_fire WHERE state <> 'skipped' ORDER BY due_at")


def settle(site: Site, patience: float) -> list[str]:
    """Wait until every run has ended; returns those that are stuck."""

    def is_quiet() -> bool:
        with site.database.work() as work:
            row = work.row(COUNTS)
            return row is not None and row.open == 0

    try:
        until(is_quiet, patience)
    except AssertionError:
        with site.database.work() as work:
            left = [f"{row.workflow}/{row.key} {row.state}" for row in work.rows(LEFT)]
        return [f"stuck after {patience:g} s of quiet: {', '.join(left)}"]
    return []


def recorded(site: Site, work: Work) -> list[str]:
    """Accepted runs that did not succeed, steps that were recorded twice or are open, effects that were doubled."""
    with site.database.work() as reading:
        runs, steps = reading.rows(RUNS), reading.rows(STEPS)
    by_key = {row.idempotency_key: row for row in runs if row.idempotency_key}
    found, expected = [], set()
    for key, workload in work.accepted.items():
        row = by_key.get(key)
        if row is None:
            found.append(f"run {key} ({workload.name}) was accepted and is unknown")
        elif row.state != "succeeded":
            found.append(f"run {key} ({workload.name}) {row.state}: {(row.error or '')[:300]}")
        else:
            expected |= effects_of(workload)
    found += [f"run {row.id} is {row.state}" for row in runs if row.state not in FINAL_RUNS]
    own = {by_key[key].id for key in work.accepted if key in by_key}
    for step in steps:
        described = f"step {step.key} ({step.kind}, {step.state}) of run {step.run_id}"
        if step.open:
            found.append(f"{described} has {step.open} open attempts")
        if step.succeeded > 1:
            found.append(f"{described} was recorded {step.succeeded} times")
        if (
            step.run_id in own
            and step.state == "succeeded"
            and step.kind not in WITHOUT_ATTEMPT
            and step.succeeded != 1
        ):
            found.append(f"{described} succeeded with {step.succeeded} successful attempts")
    found += site.effects.problems(expected)
    return found[:_LISTED]


def fires(site: Site) -> list[str]:
    """Instants of the schedule that fired twice, or not at all."""
    with site.database.work() as work:
        rows = work.rows(_FIRES)
    twice = [at for at, count in Counter(row.due_at for row in rows).items() if count > 1]
    runs = [id_ for id_, count in Counter(row.run_id for row in rows if row.run_id).items() if count > 1]
    found = [f"{at} fired twice" for at in twice] + [f"run {id_} belongs to two fires" for id_ in runs]
    found += [f"the fire of {row.due_at} is {row.state}" for row in rows if row.state != "fired"]
    for before, after in pairwise(rows):
        if (gap := (after.due_at - before.due_at).total_seconds()) != FIRE_SECONDS:
            found.append(f"no fire for {gap:g} s after {before.due_at}")
    return found[:_LISTED]


def ledger(site: Site) -> list[str]:
    """Whether the ledger, the rows of pools and the processes agree in the end."""
    cluster = site.as_cluster()
    try:
        until(lambda: ledger_matches_processes(cluster), 120)
        assert_consistent(cluster)
    except AssertionError as error:
        pools = [(pool.id, pool.pid, pool.state) for pool in fleet_views.pools(site.database)]
        return [f"ledger and processes differ: {error}; pools {pools}"]
    return []
