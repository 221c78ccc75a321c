"""
Views of runs, as clients read them. Nothing here changes anything.

Lists are sorted from the newest to the oldest by id, which sorts by age; the cursor is the last id of a page.
Inputs and outputs can be long. A view shows those that have `most` bytes together, the shortest first; `Elsewhere`
replaces the others, and `text_of` returns one by itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

from sqlalchemy import text

from app.kernel import ids
from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import Conflict, InvalidInput, NotFound, Problem, StepFailure
from app.workflows.language.steps import AnyStep
from app.workflows.runs.details import (
    AttemptDetails,
    Elsewhere,
    HistoryRecord,
    ItemDetails,
    ListedRun,
    Page,
    RunDetails,
    RunView,
    StepDetails,
)
from app.workflows.runs.storage import graphs, payloads, store, values

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

R = TypeVar("R", bound="DataclassInstance")

#: No limit of bytes.
ALL = 1 << 62
#: Items of a map whose outputs are read at a time, where they are read as one text.
_ITEMS_AT_A_TIME = 200


#: The conditions on the namespace of a run: none, and one. Each statement exists with both, so that each has a plan.
_OF = ("true", "namespace = :namespace")
_FIND_ALL, _FIND_OF = (
    text(f"""
        (SELECT id FROM run WHERE {of} AND id BETWEEN CAST(:low AS uuid) AND CAST(:high AS uuid)
         ORDER BY id DESC LIMIT 3)
        UNION
        (SELECT id FROM (SELECT id FROM run WHERE {of} ORDER BY id DESC LIMIT :latest) AS latest
         WHERE right(replace(id::text, '-', ''), length(:part)) = :part ORDER BY id DESC LIMIT 3)
        ORDER BY id DESC
    """)
    for of in _OF
)
#: Characters of an id that are enough to look for it, and the number of runs whose ends are compared.
LEAST_OF_ID, _LATEST = 4, 10_000


def _value(name: str, shown: str) -> str:
    """The columns of a value that is shown on a condition."""
    columns = (f"CASE WHEN {shown} THEN {column} END AS {column}" for column in (name, f"{name}_sha256"))
    return f"{', '.join(columns)}, {name}_bytes, {shown} AS {name}_shown"


def _shortest(name: str, place: str) -> str:
    """A column with the sum of the lengths of a value, from the shortest on."""
    return f"sum({name}_bytes) OVER (ORDER BY {name}_bytes, {place}) AS {name}_upto"


_RUN = text(f"""
    SELECT id, namespace, workflow, version, sha256, state, paused OR workflow_paused AS paused, priority, rank, labels,
           {_value("inputs", "inputs_bytes <= :most")}, {_value("output", "output_bytes <= :most")},
           error, idempotency_key, concurrency_key, parent_step_id, forked_from, created_at, started_at,
           finished_at, deadline_at, expected, expires_at,
           (SELECT run_id FROM step WHERE step.id = run.parent_step_id) AS parent_run_id
    FROM run WHERE id = :id
""")
_STEPS = text(f"""
    SELECT step.id, key, kind, model, state, branch, awaits, delegated, attempt, failures, losses, owner,
           {_value("output", "output_upto <= :most")}, finish_reason, error,
           step.tokens_in + CASE WHEN delegated THEN COALESCE(fan_out.tokens_in, 0) ELSE 0 END AS tokens_in,
           step.tokens_out + CASE WHEN delegated THEN COALESCE(fan_out.tokens_out, 0) ELSE 0 END AS tokens_out,
           not_before, ready_at, started_at, finished_at, deadline_at,
           fan_out.total AS items, fan_out.waiting AS items_waiting, fan_out.in_flight AS items_in_flight,
           fan_out.failed AS items_failed, fan_out.truncated AS items_truncated,
           (SELECT run.id FROM run WHERE run.parent_step_id = step.id ORDER BY run.id DESC LIMIT 1) AS called_run_id,
           (SELECT reason FROM refusal WHERE CASE
                WHEN step.state = 'ready' THEN refusal.model = step.model
                WHEN step.state = 'awaiting' THEN EXISTS (
                    SELECT FROM step AS item
                    WHERE item.parent_id = step.id AND item.state = 'ready' AND item.model = refusal.model
                )
            END ORDER BY since LIMIT 1) AS waiting_reason
    FROM (SELECT *, {_shortest("output", "position")} FROM step WHERE run_id = :id AND parent_id IS NULL) AS step
         LEFT JOIN fan_out ON fan_out.step_id = step.id
    ORDER BY position
""")
_ATTEMPTS = text("""
    SELECT step_id, attempt.attempt, attempt.owner, attempt.model, attempt.started_at, attempt.finished_at, outcome,
           message, text,
           attempt.tokens_in, attempt.tokens_out, tokens_cached, first_token_ms, attempt.finish_reason,
           cost::float AS cost, cost_basis, assembly, hooks
    FROM attempt JOIN step ON step.id = attempt.step_id
    WHERE step.run_id = :id AND step.parent_id IS NULL ORDER BY attempt.attempt
""")
_COST = text("""
    SELECT sum(cost)::float AS cost FROM step JOIN attempt ON step_id = step.id AND cost IS NOT NULL WHERE run_id = :id
""")
#: By so much may the clock of who submitted a run differ from that of the database.
_CLOCKS = timedelta(minutes=5)
_LIST = """
    SELECT run.id, namespace, workflow, version, state, paused OR workflow_paused AS paused, priority, rank, labels,
           created_at, started_at, finished_at, counted.*
    FROM (
        SELECT * FROM run
        WHERE {of} AND (CAST(:before AS uuid) IS NULL OR run.id < :before)
          AND (CAST(:states AS text[]) IS NULL OR state = ANY(:states))
          AND (CAST(:workflow AS text) IS NULL OR workflow = :workflow)
          AND labels @> CAST(:labels AS jsonb)
          AND (CAST(:first_id AS uuid) IS NULL OR (run.id >= :first_id AND created_at >= :created_after))
          AND (CAST(:end_id AS uuid) IS NULL OR (run.id < :end_id AND created_at < :created_before))
        ORDER BY run.id DESC LIMIT :limit
    ) AS run, LATERAL (
        SELECT count(*) AS steps, count(*) FILTER (WHERE step.state = 'succeeded') AS steps_succeeded,
               CAST(COALESCE(sum(step.tokens_in + COALESCE(fan_out.tokens_in, 0)), 0) AS bigint) AS tokens_in,
               CAST(COALESCE(sum(step.tokens_out + COALESCE(fan_out.tokens_out, 0)), 0) AS bigint) AS tokens_out
        FROM step LEFT JOIN fan_out ON fan_out.step_id = step.id AND delegated
        WHERE step.run_id = run.id AND step.parent_id IS NULL
    ) AS counted
    ORDER BY run.id DESC
"""
_LIST_ALL, _LIST_OF = (text(_LIST.format(of=of)) for of in _OF)
_ITEMS = text(f"""
    SELECT id, key, kind, item, {_value("input", "input_upto <= :most")}, model, state, attempt, failures, losses,
           owner, {_value("output", "output_upto <= :most")}, finish_reason, error, tokens_in, tokens_out, not_before,
           ready_at, started_at, finished_at
    FROM (
        SELECT *, {_shortest("input", "item")}, {_shortest("output", "item")} FROM (
            SELECT * FROM step
            WHERE parent_id = :id AND item >= :first AND (CAST(:states AS text[]) IS NULL OR state = ANY(:states))
            ORDER BY item LIMIT :limit
        ) AS page
    ) AS step
    ORDER BY item
""")
_RUN_TEXTS = text("""
    SELECT CAST(inputs AS text) AS inputs, inputs_sha256, CAST(output AS text) AS output, output_sha256
    FROM run WHERE id = :id
""")
_STEP_TEXTS = text("""
    SELECT id, kind = 'map' AND parent_id IS NULL AND state = 'succeeded' AS has_items, CAST(input AS text) AS input,
           input_sha256, CAST(output AS text) AS output, output_sha256
    FROM step WHERE run_id = :id AND key = :key
""")
_ITEM_TEXTS = text("""
    SELECT item, CAST(output AS text) AS output, output_sha256 FROM step
    WHERE parent_id = :id AND item > :after ORDER BY item LIMIT :limit
""")
_STEP_ID = text("SELECT id FROM step WHERE run_id = :id AND key = :key AND parent_id IS NULL")
_RUNNING = text("SELECT key, attempt FROM step WHERE run_id = :id AND key = ANY(:keys) AND state = 'running'")
_KEYS = text("""
    SELECT key FROM step WHERE run_id = :id AND kind IN ('map', 'agent') AND parent_id IS NULL ORDER BY position
""")
_ENDED = text("SELECT id FROM run WHERE id = ANY(:ids) AND finished_at IS NOT NULL")
_STEP_STATE = text("SELECT state FROM step WHERE run_id = :id AND key = :key")
_WORK = text("SELECT sha256, workflow, state FROM run WHERE id = :id")
_EXISTS = text("SELECT state FROM run WHERE id = :id")
_IN_NAMESPACE = text("SELECT 1 FROM run WHERE id = :id AND namespace = :namespace")
_HISTORY = text("""
    SELECT id, at, step, attempt, event, cause FROM history WHERE run_id = :id AND id > :after ORDER BY id LIMIT :limit
""")
# One for each state: there are partial indexes of ready and of running steps, and none of both.
_WAITING = text("""
    SELECT model, count(*) FILTER (WHERE state = 'ready') AS ready, count(*) FILTER (WHERE state = 'running') AS running
    FROM (
        SELECT model, state FROM step WHERE state = 'ready' AND model IS NOT NULL
        UNION ALL SELECT model, state FROM step WHERE state = 'running' AND model IS NOT NULL
    ) AS open GROUP BY model
""")
_WAITING_OF = text("""
    SELECT model, count(*) FILTER (WHERE open.state = 'ready') AS ready,
           count(*) FILTER (WHERE open.state = 'running') AS running
    FROM (
        SELECT run_id, model, state FROM step WHERE state = 'ready' AND model IS NOT NULL
        UNION ALL SELECT run_id, model, state FROM step WHERE state = 'running' AND model IS NOT NULL
    ) AS open JOIN run ON run.id = open.run_id WHERE run.namespace = :namespace GROUP BY model
""")


# One snapshot for several statements.
_SNAPSHOT = text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")


def require(database: Database, run_id: UUID, namespace: str) -> None:
    """Raise NotFound for a run that does not exist or belongs to another namespace; the two are not told apart."""
    with database.work() as work:
        if work.row(_IN_NAMESPACE, {"id": run_id, "namespace": namespace}) is None:
            raise NotFound("run", str(run_id))


def find(database: Database, part: str, namespace: str | None = None) -> UUID:
    """
    Return the id of the run whose id begins or ends with `part`, hexadecimal digits with or without hyphens.

    Only runs of the namespace are looked at; None: of all of them.

    Ends are compared with those of the latest runs only. Raises NotFound, and Conflict when several runs match.
    """
    digits = part.replace("-", "").lower()
    values = {"low": digits.ljust(32, "0"), "high": digits.ljust(32, "f"), "part": digits, "latest": _LATEST}
    statement = _FIND_ALL if namespace is None else _FIND_OF
    with database.work() as work:
        found: list[UUID] = [row.id for row in work.rows(statement, {**values, "namespace": namespace})]
    if not found:
        raise NotFound("run", part)
    if len(found) > 1:
        listed = ", ".join(map(str, found))
        raise Conflict(f"{part!r} is the beginning or the end of more than one run, such as {listed}; give more of it")
    return found[0]


def run(database: Database, run_id: UUID, most: int = ALL) -> RunView:
    """One run; up to `most` bytes of its inputs, of its output and of its steps' outputs are shown. Raises NotFound."""
    with database.work() as work:
        work.execute(_SNAPSHOT)
        found = work.execute_of(RunDetails, _RUN, {"id": run_id, "most": most})
        steps_found = work.execute_of(StepDetails, _STEPS, {"id": run_id, "most": most})
        cost_found = work.execute(_COST, {"id": run_id})
        attempts_found = work.execute_of(AttemptDetails, _ATTEMPTS, {"id": run_id})
        row: RunDetails | None = next(iter(_shown(work, found.fetchall(), "inputs", "output")), None)
        if row is None:
            raise NotFound("run", str(run_id))
        steps: list[StepDetails] = _shown(work, steps_found.fetchall(), "output")
        attempts: dict[UUID, list[AttemptDetails]] = {step.id: [] for step in steps}
        for attempt in attempts_found.fetchall():
            attempts[attempt.step_id].append(attempt)
        definition = store.document(work, row.sha256)
        cost = next((found.cost for found in cost_found.fetchall()), None)
    return RunView(row, definition, steps, attempts, cost)


def ended(database: Database, ids: Sequence[UUID]) -> frozenset[UUID]:
    """Which of the runs have ended."""
    with database.work() as work:
        return frozenset(row.id for row in work.rows(_ENDED, {"ids": list(ids)}))


def step_state(database: Database, run_id: UUID, key: str) -> str | None:
    """The state of a step, or of an item of a map; None when there is none of that key."""
    with database.work() as work:
        row = work.row(_STEP_STATE, {"id": run_id, "key": key})
    return None if row is None else str(row.state)


def page(
    database: Database,
    *,
    limit: int,
    before: UUID | None = None,
    states: Sequence[str] | None = None,
    workflow: str | None = None,
    labels: Mapping[str, str] | None = None,
    created_after: datetime | None = None,
    created_before: datetime | None = None,
    namespace: str | None = None,
) -> Page:
    """
    At most `limit` runs, older than `before`, in one of `states`, of one workflow, with all of these labels.

    They were submitted at `created_after` or later, and before `created_before`; each with a time zone.
    They are of one namespace; None: of all of them.
    """
    given: dict[str, object] = {
        "limit": limit + 1,
        "before": before,
        "states": list(states) if states else None,
        "workflow": workflow,
    }
    given["labels"] = json.dumps(dict(labels or {}))
    # Ids begin with the time, by the clock of whoever submitted: they bound what is read.
    given |= {"created_after": created_after, "first_id": _first_id(created_after, -_CLOCKS)}
    given |= {"created_before": created_before, "end_id": _first_id(created_before, _CLOCKS)}
    statement = _LIST_ALL if namespace is None else _LIST_OF
    with database.work() as work:
        rows = work.rows_of(ListedRun, statement, {**given, "namespace": namespace})
    more = len(rows) > limit
    return Page(rows[:limit], rows[limit - 1].id if more else None)


def _first_id(at: datetime | None, moved: timedelta) -> UUID | None:
    """The least id of runs that were submitted then; None for no instant, and for one beyond all times."""
    try:
        return None if at is None else ids.first_of(at + moved)
    except OverflowError:
        return None


def demand(database: Database, namespace: str | None = None) -> dict[str, tuple[int, int]]:
    """For each model that is needed now: the numbers of ready and of running steps, of one namespace or of all."""
    statement = _WAITING if namespace is None else _WAITING_OF
    with database.work() as work:
        return {row.model: (row.ready, row.running) for row in work.rows(statement, {"namespace": namespace})}


def running(database: Database, run_id: UUID, keys: Sequence[str]) -> dict[str, int]:
    """The attempts of those of these steps and items that run now, by key."""
    with database.work() as work:
        return {row.key: row.attempt for row in work.rows(_RUNNING, {"id": run_id, "keys": list(keys)})}


def work_of(database: Database, run_id: UUID, key: str, most: int) -> tuple[AnyStep, Mapping[str, Any]]:
    """
    A step of a run's definition, and the data of its templates and expressions as they are now, as a claim has them.

    Raises NotFound, and InvalidInput when the values that it reads have more than `most` bytes.
    """
    with database.work() as work:
        work.run(_SNAPSHOT)
        row = work.row(_WORK, {"id": run_id})
        if row is None:
            raise NotFound("run", str(run_id))
        graph = graphs.of(work, row.sha256)
        if key not in graph.steps:
            raise NotFound("step", key, list(graph.steps))
        reads = graph.work_reads[key]
        try:
            steps = values.outputs(work, run_id, reads.steps, most)
        except StepFailure as failure:
            raise InvalidInput([Problem("key", str(failure), "a step that reads less")], "request") from None
        inputs = values.inputs(work, run_id) if reads.inputs else {}
    about = {"id": str(run_id), "workflow": row.workflow, "state": row.state}
    return graph.steps[key], {"inputs": inputs, "steps": steps, "run": about}


def items(
    database: Database,
    run_id: UUID,
    key: str,
    *,
    first: int = 0,
    limit: int,
    states: Sequence[str] | None = None,
    most: int = ALL,
) -> list[ItemDetails]:
    """
    Items of a map from the index `first` on; up to `most` bytes of their values and of their outputs are shown.

    Raises NotFound for a run, or a map of it.
    """
    with database.work() as work:
        work.run(_SNAPSHOT)
        if work.row(_EXISTS, {"id": run_id}) is None:
            raise NotFound("run", str(run_id))
        found = work.row(_STEP_ID, {"id": run_id, "key": key})
        if found is None:
            raise NotFound("map", key, [row.key for row in work.rows(_KEYS, {"id": run_id})])
        given = {"id": found.id, "first": first, "limit": limit, "states": list(states) if states else None}
        return _shown(work, work.rows_of(ItemDetails, _ITEMS, given | {"most": most}), "input", "output")


def text_of(database: Database, run_id: UUID, name: str, key: str | None = None) -> Iterator[str]:
    """
    A value as JSON, in pieces: `inputs` or `output` of a run, `input` or `output` of one of its steps or items.

    Raises NotFound, at once, for a value that does not exist (yet).
    """
    with database.work() as work:
        work.run(_SNAPSHOT)
        if work.row(_EXISTS, {"id": run_id}) is None:
            raise NotFound("run", str(run_id))
        if key is None:
            row, of = work.row(_RUN_TEXTS, {"id": run_id}), f"{name} of run"
        else:
            row, of = work.row(_STEP_TEXTS, {"id": run_id, "key": key}), f"{name} of step"
            if row is None:
                raise NotFound("step", key)
            if row.has_items and name == "output":
                return _items_text(database, row.id)
        found = payloads.text_of(work, getattr(row, name), getattr(row, f"{name}_sha256"))
    if found is None:
        raise NotFound(of, key or str(run_id))
    return iter((found,))


def _items_text(database: Database, step_id: UUID) -> Iterator[str]:
    """The output of a map."""
    after, rows = -1, None
    while rows is None or len(rows) == _ITEMS_AT_A_TIME:
        with database.work() as work:
            work.execute(_SNAPSHOT)
            rows = work.rows(_ITEM_TEXTS, {"id": step_id, "after": after, "limit": _ITEMS_AT_A_TIME})
            texts = [payloads.text_of(work, row.output, row.output_sha256) or "null" for row in rows]
        yield "".join(f"{',' if row.item else '['}{made}" for row, made in zip(rows, texts, strict=True))
        after = rows[-1].item if rows else after
    yield "]" if after >= 0 else "[]"


def _shown(work: UnitOfWork, rows: Sequence[R], *names: str) -> list[R]:
    return [_marked(row, names) for row in payloads.filled(work, rows, *names)]


def _marked(row: R, names: Sequence[str]) -> R:
    left = {
        name: Elsewhere(size)
        for name in names
        if (size := getattr(row, f"{name}_bytes")) is not None and not getattr(row, f"{name}_shown")
    }
    return replace(row, **left) if left else row


def history(database: Database, run_id: UUID, *, after: int = 0, limit: int = 1000) -> tuple[str, list[HistoryRecord]]:
    """The state of a run, and its history after the entry `after`, the oldest first. Raises NotFound."""
    with database.work() as work:
        row = work.row(_EXISTS, {"id": run_id})
        if row is None:
            raise NotFound("run", str(run_id))
        return row.state, work.rows_of(HistoryRecord, _HISTORY, {"id": run_id, "after": after, "limit": limit})
