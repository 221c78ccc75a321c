"""`arriero runs …`: commands that control runs (pause, retry, fork, cancel), and their history and items."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Annotated, Any

import typer

from app.cli.client import connected
from app.cli.output import AsJson, console, notes, print_json, settings_of, shortened, state, table
from app.cli.workflows import progress
from app.cli.workflows.runs import CONTROL, SHOW, After, Before, RunId, inputs_of, instant_of, labels_of
from app.cli.workflows.runs import app as runs_app
from app.kernel.errors import InvalidInput, Problem
from app.workflows.state_machine.states import RunState, StepState

#: The command group `runs`, to which this module adds commands.
app = runs_app
#: A heading in the help of the group.
_MANY = "Many runs"

LabelFilter = Annotated[
    list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="Only runs with this label. May be repeated.")
]
Workflow = Annotated[str | None, typer.Option(help="Only runs of this workflow.")]
States = Annotated[list[RunState] | None, typer.Option("--state", help="Only runs in this state. May be repeated.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")]


@app.command(rich_help_panel=CONTROL)
def pause(context: typer.Context, run_id: RunId, as_json: AsJson = False) -> None:
    """Pause a run: no further step starts. Running steps continue to their end, and waiting steps keep waiting."""
    _post(context, f"/v1/runs/{run_id}/pause", as_json, "{id} is paused")


@app.command(rich_help_panel=CONTROL)
def resume(context: typer.Context, run_id: RunId, as_json: AsJson = False) -> None:
    """Resume a paused run."""
    _post(context, f"/v1/runs/{run_id}/resume", as_json, "{id} is resumed")


@app.command(rich_help_panel=CONTROL)
def retry(context: typer.Context, run_id: RunId, as_json: AsJson = False) -> None:
    """Retry the steps that did not succeed in a failed or cancelled run. Steps that succeeded keep their outputs."""
    _post(context, f"/v1/runs/{run_id}/retry", as_json, "{id} is {state}")


@app.command(rich_help_panel=CONTROL)
def score(
    context: typer.Context,
    run_id: RunId,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What was judged, such as helpful.")],
    value: Annotated[float, typer.Argument(metavar="VALUE", help="From 0 to 1.")],
    comment: Annotated[str, typer.Option(help="What there is to say about it.")] = "",
    as_json: AsJson = False,
) -> None:
    """Say how good the output of a run is. The same name again replaces the score."""
    with connected(settings_of(context)) as client:
        found = client.put(f"/v1/runs/{run_id}/scores/{name}", {"value": value, "comment": comment})
    _print_scores(found, as_json=as_json)


@app.command(rich_help_panel=SHOW)
def scores(context: typer.Context, run_id: RunId, as_json: AsJson = False) -> None:
    """List what people and programs said of the output of a run."""
    with connected(settings_of(context)) as client:
        found = client.get(f"/v1/runs/{run_id}/scores")
    _print_scores(found, as_json=as_json)


def _print_scores(found: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    printed = table(("score", "value", "by", "comment"), right=("value",))
    for one in found["scores"]:
        printed.add_row(one["name"], f"{one['value']:g}", one["author"], one["comment"])
    console().print(printed)


@app.command(rich_help_panel=CONTROL)
def fork(
    context: typer.Context,
    run_id: RunId,
    step: Annotated[
        str, typer.Option("--from", metavar="STEP", help="The first step to run again, with all steps after it.")
    ],
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input", "-i", metavar="NAME=VALUE", help="Replaces an input of the run; NAME=@FILE reads a file."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """
    Run a finished run again from a step on, as a new run, and print its id.

    Earlier steps keep their outputs. The original run does not change.
    """
    with connected(settings_of(context)) as client:
        before = client.get(f"/v1/runs/{run_id}")["inputs"]
        # The API does not return the schemas of a run, so inputs that were texts are read as texts.
        texts = {name: {"type": "string"} for name, value in before.items() if isinstance(value, str)}
        body = {"from": step, "inputs": inputs_of(inputs or (), texts)}
        made = client.post(f"/v1/runs/{run_id}/fork", body)
    if as_json:
        print_json(made)
    else:
        typer.echo(made["id"])


@app.command("cancel-step", rich_help_panel=CONTROL)
def cancel_step(
    context: typer.Context,
    run_id: RunId,
    step: Annotated[str, typer.Argument(metavar="STEP", help="A step, or an item of a map: 'read[12]'.")],
    as_json: AsJson = False,
) -> None:
    """Cancel one step, or one item of a map. The rest of the run continues."""
    _post(context, f"/v1/runs/{run_id}/steps/{step}/cancel", as_json, "{key} is {state}")


@app.command("send-event", rich_help_panel=CONTROL)
def send_event(
    context: typer.Context,
    run_id: RunId,
    event: Annotated[str, typer.Argument(metavar="EVENT", help="The event; for an approval, the id of its step.")],
    payload: Annotated[str, typer.Option("--payload", metavar="JSON", help="The payload of the event.")] = "null",
    key: Annotated[str | None, typer.Option("--key", help="The idempotency key of the event.")] = None,
    as_json: AsJson = False,
) -> None:
    """
    Send an event to a run. It completes the step that waits for it, or the first one that will wait for it.

    The payload must conform to the step's schema. A second event with the same key has no effect.
    """
    try:
        value = json.loads(payload)
    except json.JSONDecodeError as error:
        raise InvalidInput([Problem("--payload", f"invalid JSON: {error}", "a JSON value")], "event") from None
    _send_event(context, run_id, {"name": event, "payload": value}, key, as_json)


@app.command(rich_help_panel=CONTROL)
def approve(
    context: typer.Context,
    run_id: RunId,
    step: Annotated[str, typer.Argument(metavar="STEP", help="The step that waits for a decision.")],
    reject: Annotated[bool, typer.Option("--reject", help="Reject instead of approving.")] = False,
    comment: Annotated[str | None, typer.Option(help="The reason of the decision.")] = None,
    by: Annotated[str | None, typer.Option(help="The person who decides.")] = None,
    as_json: AsJson = False,
) -> None:
    """
    Approve or reject the request of a step that waits for a decision.

    `arriero runs watch` and `show` print the request. The decision may be sent before the step waits.
    """
    payload: dict[str, Any] = {"approved": not reject}
    payload |= {name: value for name, value in (("comment", comment), ("by", by)) if value is not None}
    _send_event(context, run_id, {"name": step, "payload": payload}, None, as_json)


@app.command(rich_help_panel=SHOW)
def history(context: typer.Context, run_id: RunId, as_json: AsJson = False) -> None:
    """Print the history of a run: every event, with its cause."""
    with connected(settings_of(context)) as client:
        events: list[Any] = []
        after: int | None = 0
        while after is not None:
            page = client.get(f"/v1/runs/{run_id}/events", after=after)
            events += page["events"]
            after = page["next_after"]
    if as_json:
        print_json({"events": events})
        return
    printed = table(("time", "step", "attempt", "event", "cause"), right=("attempt",))
    for entry in events:
        cause = entry["cause"] or {}
        message = cause.get("message") or (json.dumps(cause, ensure_ascii=False) if cause else "")
        at = datetime.fromisoformat(entry["at"]).astimezone().strftime("%H:%M:%S.%f")[:-3]
        printed.add_row(
            at, entry["step"] or "-", str(entry["attempt"] or "-"), state(entry["event"]), shortened(message, 160)
        )
    console().print(printed)


@app.command(rich_help_panel=SHOW)
def items(
    context: typer.Context,
    run_id: RunId,
    step: Annotated[str, typer.Argument(metavar="STEP", help="A map.")],
    states: Annotated[
        list[StepState] | None, typer.Option("--state", help="Only items in this state. May be repeated.")
    ] = None,
    first: Annotated[int, typer.Option(min=0, help="The index of the first item.")] = 0,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Most items to list.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List the items of a map in order, with their outputs or errors."""
    with connected(settings_of(context)) as client:
        page = client.get(f"/v1/runs/{run_id}/steps/{step}/items", first=first, limit=limit, state=states)
    if as_json:
        print_json(page)
        return
    printed = table(("item", "state", "attempt", "input", "output"), right=("item", "attempt"))
    for row in page["items"]:
        result = row["error"]["message"] if row["error"] and row["state"] != "succeeded" else row["output"]
        printed.add_row(
            str(row["index"]),
            state(row["state"]),
            str(row["attempt"] or "-"),
            shortened(row["input"], 60),
            shortened(result, 80) + (f" ({progress.CUT})" if progress.is_cut(row) else ""),
        )
    console().print(printed)
    if page["next_first"] is not None:
        notes().print(f"more: --first {page['next_first']}", style="dim")


@app.command("cancel-all", rich_help_panel=_MANY)
def cancel_all(
    context: typer.Context,
    workflow: Workflow = None,
    states: States = None,
    labels: LabelFilter = None,
    after: After = None,
    before: Before = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Cancel every open run that matches the filter."""
    _bulk(context, "cancel", _filter(workflow, states, labels, after, before), yes, as_json)


@app.command("retry-all", rich_help_panel=_MANY)
def retry_all(
    context: typer.Context,
    workflow: Workflow = None,
    states: States = None,
    labels: LabelFilter = None,
    after: After = None,
    before: Before = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Retry every run that matches and failed or was cancelled."""
    _bulk(context, "retry", _filter(workflow, states, labels, after, before), yes, as_json)


def _filter(
    workflow: str | None,
    states: list[RunState] | None,
    labels: list[str] | None,
    after: datetime | None,
    before: datetime | None,
) -> dict[str, Any]:
    return {
        "workflow": workflow,
        "states": states,
        "labels": labels_of(labels),
        "created_after": instant_of(after),
        "created_before": instant_of(before),
    }


def _bulk(context: typer.Context, what: str, which: dict[str, Any], yes: bool, as_json: bool) -> None:
    conditions = {name: value for name, value in which.items() if value}
    if not yes:
        subject = f"every run with {conditions}" if conditions else "all runs, without any condition"
        typer.confirm(f"{what} {subject}?", abort=True)
    with connected(settings_of(context)) as client:
        answer = client.post(f"/v1/bulk/{what}", which)
    if as_json:
        print_json(answer)
        return
    typer.echo(f"{len(answer['done'])} runs")
    for run_id, reason in answer["refused"].items():
        notes().print(f"{run_id}: {reason}", markup=False)
    if answer["more"]:
        notes().print("more runs match: repeat the command", style="dim")


def _send_event(context: typer.Context, run_id: str, body: dict[str, Any], key: str | None, as_json: bool) -> None:
    with connected(settings_of(context)) as client:
        headers = {"Idempotency-Key": key} if key else None
        answer = client.post(f"/v1/runs/{run_id}/events", body, headers)
    if as_json:
        print_json(answer)
    elif answer["answered"]:
        typer.echo(f"step {answer['answered']} received the event")
    else:
        typer.echo("the event is stored; no step waits for it yet")


def _post(context: typer.Context, path: str, as_json: bool, message: str) -> None:
    with connected(settings_of(context)) as client:
        answer = client.post(path)
    if as_json:
        print_json(answer)
    else:
        typer.echo(message.format(**answer))
