"""`arriero run`, `arriero submit` and `arriero runs`: submit runs and show them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.live import Live

from app.cli import texts
from app.cli.client import Client, connected
from app.cli.output import (
    AsJson,
    ago,
    console,
    live,
    notes,
    print_json,
    print_text,
    settings_of,
    shortened,
    state,
    table,
)
from app.cli.workflows import progress
from app.cli.workflows.graph import drawn
from app.kernel import clock
from app.kernel.errors import InvalidDefinition, InvalidInput, Problem
from app.workflows.language import source
from app.workflows.language.overrides import EVERY
from app.workflows.state_machine.states import FINAL_RUNS, RunState

app = typer.Typer(no_args_is_help=True, help="Runs: list, show, watch, control.")
#: Headings in the help of the group.
SHOW, CONTROL = "Show", "Control"

#: Seconds between two polls of a run.
_PAUSE = 0.3

Flow = Annotated[
    str,
    typer.Argument(metavar="FLOW", help="A workflow: the path of a YAML or JSON file, or the name of a stored one."),
]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input", "-i", metavar="NAME=VALUE", help="An input, parsed as its schema's type; NAME=@FILE reads a file."
    ),
]
InputFile = Annotated[
    Path | None, typer.Option("--inputs", metavar="FILE", help="All inputs from a YAML or JSON file.", dir_okay=False)
]
Key = Annotated[
    str | None, typer.Option("--key", help="An Idempotency-Key: the same key returns the same run, not a second one.")
]
RunLabels = Annotated[
    list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="A label of the run. May be repeated.")
]
PriorityOption = Annotated[
    str | None, typer.Option("--priority", help="interactive, standard or batch, instead of the workflow's own.")
]
Deadline = Annotated[
    str | None, typer.Option(help="A deadline for the whole run, instead of the workflow's own: '30m'.")
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model", metavar="[STEP=]NAME", help="A model for every step that uses one, or for one step. May be repeated."
    ),
]
After = Annotated[datetime | None, typer.Option(help="Only runs submitted at this time or later (UTC).")]
Before = Annotated[datetime | None, typer.Option(help="Only runs submitted before this time (UTC).")]
RunId = Annotated[
    str, typer.Argument(metavar="RUN", help="The id of a run, or enough of its first or last characters.")
]


def run(
    context: typer.Context,
    flow: Flow,
    inputs: Inputs = None,
    input_file: InputFile = None,
    key: Key = None,
    labels: RunLabels = None,
    priority: PriorityOption = None,
    deadline: Deadline = None,
    models: Models = None,
    as_json: AsJson = False,
) -> None:
    """
    Run a workflow, watch it, and print its output.

    Exits with 1 when the run fails or is cancelled. Ctrl-C stops the watching; the run continues.
    """
    with connected(settings_of(context)) as client:
        more = {"labels": labels_of(labels), "priority": priority, "deadline": deadline, "models": models_of(models)}
        submitted = _submit(client, flow, inputs, input_file, key, more)
        final = _with_output(client, _watch(client, submitted["id"], quiet=as_json))
    if as_json:
        print_json(final)
    else:
        _print_result(final)
    _exit_by(final)


def submit(
    context: typer.Context,
    flow: Flow,
    inputs: Inputs = None,
    input_file: InputFile = None,
    key: Key = None,
    labels: RunLabels = None,
    priority: PriorityOption = None,
    deadline: Deadline = None,
    models: Models = None,
    as_json: AsJson = False,
) -> None:
    """Submit a run and print its id, without waiting for it."""
    with connected(settings_of(context)) as client:
        more = {"labels": labels_of(labels), "priority": priority, "deadline": deadline, "models": models_of(models)}
        submitted = _submit(client, flow, inputs, input_file, key, more)
    if as_json:
        print_json(submitted)
    else:
        typer.echo(submitted["id"])
        for warning in filter(None, [(submitted.get("expected") or {}).get("warning")]):
            notes().print(f"warning: {warning}", style="yellow", markup=False)


@app.command("list", rich_help_panel=SHOW)
def list_runs(
    context: typer.Context,
    states: Annotated[
        list[RunState] | None, typer.Option("--state", help="Only runs in this state. May be repeated.")
    ] = None,
    workflow: Annotated[str | None, typer.Option(help="Only runs of this workflow.")] = None,
    labels: Annotated[
        list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="Only runs with this label.")
    ] = None,
    after: After = None,
    before: Before = None,
    limit: Annotated[int, typer.Option(min=1, max=200, help="Most runs to list.")] = 20,
    cursor: Annotated[str | None, typer.Option(help="Continue where an earlier page ended.")] = None,
    as_json: AsJson = False,
) -> None:
    """List runs, the newest first."""
    with connected(settings_of(context)) as client:
        page = client.get(
            "/v1/runs",
            state=states,
            workflow=workflow,
            label=labels,
            created_after=instant_of(after),
            created_before=instant_of(before),
            limit=limit,
            cursor=cursor,
        )
    if as_json:
        print_json(page)
        return
    printed = table(("run", "workflow", "state", "steps", "tokens", "submitted"), right=("steps", "tokens"))
    now = clock.now()
    for row in page["runs"]:
        steps, tokens = f"{row['steps_succeeded']}/{row['steps']}", str(row["tokens_out"])
        printed.add_row(row["id"], row["workflow"], state(row["state"]), steps, tokens, ago(row["created_at"], now))
    console().print(printed)
    if page["next_cursor"]:
        notes().print(f"more: arriero runs list --cursor {page['next_cursor']}", style="dim")


def instant_of(given: datetime | None) -> str | None:
    """Return a time of an option, which is in UTC, as the API takes it."""
    return None if given is None else f"{given.isoformat()}Z"


@app.command(rich_help_panel=SHOW)
def show(context: typer.Context, run_id: RunId, as_json: AsJson = False) -> None:
    """Show a run: its steps with attempts, times, tokens and outputs, and the cause of a failure."""
    with connected(settings_of(context)) as client:
        found = _with_output(client, client.get(f"/v1/runs/{run_id}"))
    if as_json:
        print_json(found)
        return
    console().print(drawn(found, clock.now()))
    _print_attempts(found)
    _print_hooks(found)
    if found["cost"] is not None:
        typer.echo(f"cost: {found['cost']:.6f}")
    _print_result(found)


@app.command(rich_help_panel=SHOW)
def watch(context: typer.Context, run_id: RunId, as_json: AsJson = False) -> None:
    """
    Watch a run until it ends. At a terminal its graph is updated as it changes.

    Exits with 1 when the run fails or is cancelled. Ctrl-C stops the watching; the run continues.
    """
    with connected(settings_of(context)) as client:
        final = _with_output(client, _watch(client, run_id, quiet=as_json))
    if as_json:
        print_json(final)
    else:
        _print_result(final)
    _exit_by(final)


@app.command(rich_help_panel=SHOW)
def output(
    context: typer.Context,
    run_id: RunId,
    step: Annotated[
        str | None,
        typer.Option("--step", metavar="STEP", help="The output of a step, or of an item of a map: 'read[12]'."),
    ] = None,
) -> None:
    """Print the whole output of a run as JSON."""
    resource = f"/v1/runs/{run_id}" if step is None else f"/v1/runs/{run_id}/steps/{quote(step, safe='')}"
    with connected(settings_of(context)) as client:
        print_json(client.get(f"{resource}/output"))


@app.command(rich_help_panel=CONTROL)
def cancel(context: typer.Context, run_id: RunId, as_json: AsJson = False) -> None:
    """Cancel a run. Running steps stop at their next token; until then the run is cancelling."""
    with connected(settings_of(context)) as client:
        answer = client.post(f"/v1/runs/{run_id}/cancel")
    if as_json:
        print_json(answer)
    else:
        typer.echo(f"{answer['id']} is {answer['state']}")


def submission_of(client: Client, flow: str, given: Sequence[str], file: Path | None) -> dict[str, Any]:
    """Return the body of a submission: `flow` is a file or a name; inputs are parsed as the types of their schemas."""
    path = Path(flow)
    body: dict[str, Any]
    if path.suffix in {".yaml", ".yml", ".json"} or path.exists():
        text = texts.read(path)
        schemas = _schemas(source.read(text).data)
        body = {"definition": text}
    else:
        schemas = client.get(f"/v1/workflows/{flow}")["inputs"]
        body = {"workflow": flow}
    inputs = _from_file(file) if file is not None else {}
    return body | {"inputs": inputs | inputs_of(given, schemas)}


def inputs_of(given: Sequence[str], schemas: Mapping[str, Any]) -> dict[str, Any]:
    """Parse `NAME=VALUE` options as the types of their schemas. Raises InvalidInput."""
    return dict(_input(pair, schemas) for pair in given)


def labels_of(given: Sequence[str] | None) -> dict[str, str]:
    """Parse `KEY=VALUE` options. Raises InvalidInput."""
    invalid = [text for text in given or () if "=" not in text]
    if invalid:
        raise InvalidInput([Problem("--label", f"{text!r} has no '='", "KEY=VALUE") for text in invalid], "labels")
    return {key: value for key, _, value in (text.partition("=") for text in given or ())}


def models_of(given: Sequence[str] | None) -> dict[str, str]:
    """Parse `NAME` and `STEP=NAME` options."""
    pairs = [text.rpartition("=") for text in given or ()]
    return {step if mark else EVERY: name for step, mark, name in pairs}


def _submit(
    client: Client,
    flow: str,
    given: list[str] | None,
    file: Path | None,
    key: str | None,
    more: Mapping[str, Any],
) -> Any:
    body = submission_of(client, flow, given or (), file) | {name: value for name, value in more.items() if value}
    return client.post("/v1/runs", body, {"Idempotency-Key": key} if key else None)


def _schemas(data: Any) -> Mapping[str, Any]:
    inputs = data.get("inputs") if isinstance(data, dict) else None
    return inputs if isinstance(inputs, dict) else {}


def _from_file(path: Path) -> dict[str, Any]:
    data = source.read(texts.read(path)).data
    if not isinstance(data, dict):
        message = "the file does not contain a mapping"
        raise InvalidInput([Problem(str(path), message, "a mapping of names to values")], "inputs")
    return data


def _input(pair: str, schemas: Mapping[str, Any]) -> tuple[str, Any]:
    name, mark, text = pair.partition("=")
    if not mark:
        raise InvalidInput([Problem("--input", f"{pair!r} has no '='", "NAME=VALUE or NAME=@FILE")], "inputs")
    if text.startswith("@"):
        text = texts.read(Path(text[1:]))
    schema = schemas.get(name)
    kind = schema.get("type") if isinstance(schema, dict) else None
    if kind == "string" or (isinstance(kind, list) and "string" in kind):
        return name, text
    try:
        return name, source.read(text).data
    except InvalidDefinition:
        return name, text


def _watch(client: Client, run_id: str, *, quiet: bool) -> dict[str, Any]:
    """Poll a run until it ends; show its graph at a terminal, its changes elsewhere, or `quiet` why it waits."""
    found: dict[str, Any] = client.get(f"/v1/runs/{run_id}")
    with ExitStack() as stack:
        out = live()
        graph = None
        if not quiet and out.is_terminal:
            graph = stack.enter_context(Live(drawn(found, clock.now()), console=out, refresh_per_second=8))
        before = earlier = None
        while True:
            now = clock.now()
            if graph is not None:
                graph.update(drawn(found, now))
            else:  # without an end nobody would know what to do
                lines = progress.waits(before, found) if quiet else progress.changes(before, found, now, earlier)
                for line in lines:
                    notes().print(line, markup=False)
            if found["state"] in FINAL_RUNS:
                return found
            time.sleep(_PAUSE)
            before, earlier, found = found, now, client.get(f"/v1/runs/{run_id}")


def _with_output(client: Client, found: dict[str, Any]) -> dict[str, Any]:
    """Return a run with its whole output, which is fetched separately when it was too long to be included."""
    shown = found["output"]
    if isinstance(shown, dict) and set(shown) == {"$payload"}:
        return found | {"output": client.get(shown["$payload"]["href"])}
    return found


def _print_attempts(found: Mapping[str, Any]) -> None:
    rows = [
        (step["key"], attempt)
        for step in found["steps"]
        for attempt in step["attempts"]
        if attempt["outcome"] not in (None, "succeeded", "left")
    ]
    if not rows:
        return
    console().print()
    printed = table(("step", "attempt", "outcome", "worker", "detail"))
    for key, attempt in rows:
        detail = attempt["message"] or ""
        if attempt["text"]:
            detail += f" - the model wrote: {shortened(attempt['text'], 200)}"
        printed.add_row(key, str(attempt["attempt"]), attempt["outcome"], attempt["worker"], detail)
    console().print(printed)


def _print_hooks(found: Mapping[str, Any]) -> None:
    """Print what hooks did, where they did more than let a request pass."""
    rows = [
        (step["key"], attempt["attempt"], one)
        for step in found["steps"]
        for attempt in step["attempts"]
        for one in attempt["hooks"] or ()
        if one["result"] != "passed"
    ]
    if not rows:
        return
    console().print()
    printed = table(("step", "attempt", "hook", "at", "result", "ms", "detail"), right=("ms",))
    for key, attempt, one in rows:
        found_there = ", ".join(f"{name}: {value}" for name, value in one.get("annotations", {}).items())
        detail = shortened("; ".join(filter(None, (one.get("error"), found_there))), 200)
        printed.add_row(key, str(attempt), one["hook"], one["at"], one["result"], str(one["ms"]), detail)
    console().print(printed)


def _print_result(found: Mapping[str, Any]) -> None:
    if found["state"] == RunState.SUCCEEDED:
        for key, value in (found["output"] or {}).items():
            console().print(f"\n[bold]{key}[/]")
            print_text(value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False))
    elif found["error"]:
        notes().print(f"\n[bold red]{found['state']}:[/] ", end="")
        notes().print(found["error"]["message"], markup=False)


def _exit_by(found: Mapping[str, Any]) -> None:
    if found["state"] != RunState.SUCCEEDED:
        raise typer.Exit(1)
