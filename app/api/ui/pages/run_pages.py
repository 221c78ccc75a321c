"""The pages of runs: the list with its filters, and one run with its graph, times, values and causes."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import Query, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from app.access.callers import KeyScope
from app.api.callers import InjectedCaller, ListedNamespace, requires
from app.api.routers import ApiRouter
from app.api.services import InjectedServices, Services
from app.api.ui import drawing
from app.api.ui.pages.written import written
from app.api.ui.rendering import render
from app.api.workflows import events as events_resource
from app.api.workflows import payloads, prompts
from app.api.workflows import runs as runs_resource
from app.api.workflows.run_documents import RunOut, StepOut
from app.api.workflows.run_ids import ResolvedRunId
from app.kernel import clock
from app.kernel.errors import InvalidInput, Problem
from app.kernel.units import durations
from app.workflows.runs import views
from app.workflows.state_machine.states import FINAL_RUNS, RunState, StepState

router = ApiRouter(prefix="/ui", include_in_schema=False, dependencies=[requires(KeyScope.READ)])

_Text = Annotated[str, Query(max_length=200, pattern=r"^[^\x00]*$")]
#: The id of a run, which begins with its time. The name of a workflow may be hexadecimal digits too.
_ID = re.compile(r"[0-9a-f]{8}-?[0-9a-f]{4}-?7[0-9a-f]{3}-?[0-9a-f]{4}-?[0-9a-f]{12}", re.IGNORECASE)
#: States by what a reader looks for.
_GROUPS = {
    "open": (RunState.BLOCKED, RunState.QUEUED, RunState.RUNNING, RunState.CANCELLING, RunState.COMPENSATING),
    **{state.value: (state,) for state in RunState},
}
#: Most entries of the history that a page shows, items of a map, and runs.
_HISTORY, _ITEMS, _RUNS = 200, 50, 50
#: The events of a run after which its page is drawn again.
_EVENTS = " ".join(
    [*dict.fromkeys([*map(str, RunState), *map(str, StepState)]), "paused", "resumed", "submitted", "retried"]
)
#: Fields of a step's definition that say what it asks.
_ASKS = ("system", "prompt", "messages", "template", "url", "body", "over", "step", "workflow", "approval", "cases")


@router.get("/runs")
def listed(
    request: Request,
    caller: InjectedCaller,
    services: InjectedServices,
    namespace: ListedNamespace,
    state: _Text = "",
    workflow: _Text = "",
    label: _Text = "",
    q: _Text = "",
    since: _Text = "",
    until: _Text = "",
    cursor: UUID | None = None,
) -> Response:
    """
    Runs from the newest to the oldest. `q` is the id of one, a label, or the name of a workflow.

    `since` and `until` are instants, or times before now (`24h`); times without a zone are in UTC.
    """
    sought = q.strip()
    if _ID.fullmatch(sought):
        return RedirectResponse(f"/ui/runs/{sought}", 303)
    if "=" in sought:
        label = sought
    elif sought:
        workflow = sought
    if state and state not in _GROUPS:
        raise InvalidInput([Problem("query.state", f"{state!r} is no state", ", ".join(_GROUPS))], "query")
    labels = [one.strip() for one in label.split(",") if one.strip()]
    states = list(_GROUPS[state]) if state else None
    now = clock.now()
    after, before = _instant("since", since, now), _instant("until", until, now)
    page = runs_resource.page(
        services, namespace, states, workflow or None, labels, after, before, limit=_RUNS, cursor=cursor
    )
    return render(
        request,
        caller,
        "runs.html",
        title="Runs",
        page=page,
        states=_GROUPS,
        state=state,
        bulk_states=[str(one) for one in states or ()],
        workflow=workflow,
        label=label,
        since=since,
        until=until,
        after=after,
        before=before,
        labels=runs_resource.labels_of(labels),
        cursor=cursor,
        namespace=namespace,
        in_words=drawing.in_words,
        now=now,
    )


@router.get("/runs/{run_id}")
def shown(
    request: Request,
    run_id: ResolvedRunId,
    caller: InjectedCaller,
    services: InjectedServices,
    step: _Text = "",
    first: Annotated[int, Query(ge=0, le=10_000_000)] = 0,
    after: Annotated[int, Query(ge=0, le=2**62)] = 0,
) -> HTMLResponse:
    """One run. `step` is the one that is shown, from its item `first` on. The history begins after `after`."""
    run = runs_resource.get(run_id, services, caller)
    definition = views.run(services.database, run_id, 0).definition
    _, rows = views.history(services.database, run_id, after=after, limit=_HISTORY + 1)
    history = events_resource.HistoryOut(
        events=[events_resource.EntryOut.model_validate(row) for row in rows[:_HISTORY]],
        next_after=rows[_HISTORY - 1].id if len(rows) > _HISTORY else None,
    )
    chosen = next((one for one in run.steps if one.key == step), None)
    items = None
    if chosen is not None and chosen.items is not None:
        items = runs_resource.items(run_id, chosen.key, services, first=first, limit=_ITEMS, state=None)
    now = clock.now()
    return render(
        request,
        caller,
        "run.html",
        title=f"{run.workflow} · {str(run.id)[-6:]}",
        run=run,
        ended=run.state in FINAL_RUNS,
        graph=drawing.graph_of(run.steps),
        gantt=drawing.gantt_of(run, now),
        lasted=(run.finished_at or now) - run.created_at,
        causes=_causes(run),
        waits=[one for one in run.steps if one.state == StepState.AWAITING and (one.awaits or {}).get("event")],
        held=[one for one in run.steps if one.waiting_reason],
        approvals={one["id"] for one in definition.get("steps", ()) if "approval" in one},
        chosen=chosen,
        asks=_asks(definition, step) if chosen else "",
        prompt=None if chosen is None else _prompt(run_id, chosen, services),
        items=items,
        first=first,
        after=after,
        before=max(first - _ITEMS, 0),
        history=history,
        events=_EVENTS,
        in_words=drawing.in_words,
        pretty=_pretty,
        reference=_reference,
    )


def _causes(run: RunOut) -> list[StepOut]:
    """Return the steps that failed, the first one first: what came after it is its consequence."""
    failed = [one for one in run.steps if one.state == StepState.FAILED or (one.error and not one.finished_at)]
    return sorted(failed, key=lambda one: one.finished_at or run.created_at)


def _asks(definition: Any, key: str) -> str:
    """Return what a step asks, as its definition says it."""
    steps = [*definition.get("steps", ()), *definition.get("on_failure", ())]
    found: dict[str, Any] = next((one for one in steps if one["id"] == key), {})
    asked = {name: found[name] for name in _ASKS if found.get(name)}
    if set(asked) == {"prompt"}:
        return str(asked["prompt"])
    return written(asked) if asked else ""


def _prompt(run_id: UUID, step: StepOut, services: Services) -> prompts.PromptOut | str | None:
    """Return what a step gave its model, a text that says why that cannot be shown, or None if it gave nothing."""
    if step.kind != "generate" or step.started_at is None:
        return None
    try:
        return prompts.get(run_id, step.key, services)
    except InvalidInput as error:
        return str(error)


def _instant(name: str, given: str, now: datetime) -> datetime | None:
    """Return an instant that was given as one, or as a time before now."""
    if not given:
        return None
    try:
        return now - durations.parse(given)
    except ValueError:
        pass
    try:
        found = datetime.fromisoformat(given)
    except ValueError:
        found = None
    if found is None or not 2000 <= found.year < 9000:
        problem = Problem(f"query.{name}", f"{given!r} is no time", "2026-11-23T08:00, or a time before now: 24h")
        raise InvalidInput([problem], "query")
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _pretty(value: Any) -> str:
    """Return a value as people read it."""
    return value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)


def _reference(value: Any) -> Any:
    """Return the reference that replaces a long value, or None."""
    return value[payloads.MARK] if isinstance(value, dict) and set(value) == {payloads.MARK} else None
