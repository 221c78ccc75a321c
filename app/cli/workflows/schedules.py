"""`arriero schedules`: store, list, show, pause, resume, trigger, preview and remove schedules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli import texts
from app.cli.client import connected
from app.cli.output import AsJson, ago, console, named, notes, print_json, settings_of, state, table
from app.kernel import clock
from app.workflows.schedules import check, timetable
from app.workflows.schedules.overlap import FireState
from app.workflows.schedules.timetable import Timetable

app = typer.Typer(no_args_is_help=True, help="Schedules: run workflows at given times.")

ScheduleName = Annotated[str, typer.Argument(metavar="NAME", help="The name of a schedule.")]


@app.command("list")
def list_schedules(context: typer.Context, as_json: AsJson = False) -> None:
    """List schedules, with the next fire of each and the result of the last."""
    with connected(settings_of(context)) as client:
        found = client.get("/v1/schedules")
    if as_json:
        print_json(found)
        return
    printed = table(("schedule", "state", "workflow", "trigger", "next", "last fire"))
    now = clock.now()
    for row in found["schedules"]:
        trigger = f"{row['trigger']}, {row['timezone']}"
        printed.add_row(named(row), state(row["state"]), row["workflow"], trigger, _next(row), _last(row, now))
    console().print(printed)


@app.command()
def show(
    context: typer.Context,
    name: ScheduleName,
    limit: Annotated[int, typer.Option(min=1, max=200, help="Most fires to list.")] = 10,
    states: Annotated[
        list[FireState] | None, typer.Option("--state", help="Only fires in this state. May be repeated.")
    ] = None,
    cursor: Annotated[str | None, typer.Option(help="Continue where an earlier page of fires ended.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show a schedule and its fires: the run of each, or the reason why there is none."""
    with connected(settings_of(context)) as client:
        found = client.get(f"/v1/schedules/{name}")
        fires = client.get(f"/v1/schedules/{name}/fires", limit=limit, state=states, cursor=cursor)
    if as_json:
        print_json(found | {"fires": fires["fires"], "next_cursor": fires["next_cursor"]})
        return
    _print_head(found)
    if fires["fires"]:
        console().print()
        _print_fires(fires["fires"])
    if fires["next_cursor"]:
        notes().print(f"more: arriero schedules show {name} --cursor {fires['next_cursor']}", style="dim")


@app.command()
def put(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A schedule in YAML or JSON.")],
    as_json: AsJson = False,
) -> None:
    """Store a schedule under the name in the file. It replaces one with the same name, which keeps its history."""
    text = texts.read(file)
    name = check.parse(text).schedule
    with connected(settings_of(context)) as client:
        stored = client.put_text(f"/v1/schedules/{name}", text, "application/yaml")
    _print_state(stored, as_json=as_json)


@app.command()
def delete(context: typer.Context, name: ScheduleName) -> None:
    """Remove a schedule and the history of its fires. Its runs are kept."""
    with connected(settings_of(context)) as client:
        client.delete(f"/v1/schedules/{name}")
    typer.echo(f"{name} is removed")


@app.command()
def pause(
    context: typer.Context,
    name: ScheduleName,
    reason: Annotated[str | None, typer.Option(help="The reason, which is shown with the schedule.")] = None,
    as_json: AsJson = False,
) -> None:
    """Pause a schedule: it does not fire. Waiting fires are skipped; runs continue."""
    with connected(settings_of(context)) as client:
        _print_state(client.post(f"/v1/schedules/{name}/pause", parameters={"reason": reason}), as_json=as_json)


@app.command()
def resume(context: typer.Context, name: ScheduleName, as_json: AsJson = False) -> None:
    """Resume a schedule: it fires again from now on."""
    with connected(settings_of(context)) as client:
        _print_state(client.post(f"/v1/schedules/{name}/resume"), as_json=as_json)


@app.command()
def trigger(
    context: typer.Context,
    name: ScheduleName,
    force: Annotated[bool, typer.Option("--force", help="Start a run even while an earlier one is running.")] = False,
    key: Annotated[str | None, typer.Option("--key", help="The same key returns the same fire.")] = None,
    as_json: AsJson = False,
) -> None:
    """
    Fire a schedule now, even while it is paused, and print the id of the run.

    Exits with 4 when the fire was skipped because an earlier run is running, with 1 when the run cannot be submitted.
    """
    with connected(settings_of(context)) as client:
        headers = {"Idempotency-Key": key} if key else None
        fire = client.post(f"/v1/schedules/{name}/trigger", headers=headers, parameters={"force": force})
    if as_json:
        print_json(fire)
    elif fire["run_id"]:
        typer.echo(fire["run_id"])
    else:
        notes().print(f"{fire['state']}{': ' + fire['reason'] if fire['reason'] else ''}", markup=False)
    codes = {FireState.SKIPPED: 4, FireState.FAILED: 1}
    raise typer.Exit(codes.get(fire["state"], 0))


@app.command()
def preview(
    context: typer.Context,
    schedule: Annotated[
        str, typer.Argument(metavar="NAME|FILE", help="A stored schedule, or a file; a file needs no server.")
    ],
    count: Annotated[int, typer.Option("-n", min=1, max=1000, help="Number of fires.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Print the next fires of a schedule."""
    path = Path(schedule)
    if path.suffix in {".yaml", ".yml", ".json"} or path.exists():
        fires: Sequence[Mapping[str, Any]] = _of_file(path, count)
    else:
        with connected(settings_of(context)) as client:
            fires = client.get(f"/v1/schedules/{schedule}/preview", n=count)["fires"]
    if as_json:
        print_json({"fires": fires})
        return
    for fire in fires:
        jitter = "" if fire["due_at"] == fire["at"] else f"  (with jitter {_formatted(fire['due_at'])})"
        typer.echo(f"{_formatted(fire['at'])}{jitter}")
    if not fires:
        notes().print("no further fires")


def _of_file(path: Path, count: int) -> list[dict[str, str]]:
    """Return the next fires of a schedule in a file, without jitter, which is drawn when a schedule is stored."""
    schedule = check.parse(texts.read(path)).model_copy(update={"jitter": timedelta(0)})
    found = timetable.upcoming(Timetable(schedule, ""), clock.now(), count)
    instants = [fire.at.astimezone(schedule.zone).isoformat() for fire in found]
    return [{"at": instant, "due_at": instant} for instant in instants]


def _print_state(found: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(found)
    elif found["state"] == "paused":
        typer.echo(f"{found['name']} is paused")
    else:
        typer.echo(f"{found['name']} is {found['state']}, next fire {_next(found)}")


def _print_head(found: Mapping[str, Any]) -> None:
    document = found["schedule"]
    version = "the newest" if found["version"] is None else found["version"]
    reason = f": {found['paused_reason']}" if found["paused_reason"] else ""
    lines = [
        ("state", f"{found['state']}{reason}"),
        ("workflow", f"{found['workflow']}, version {version}"),
        ("trigger", f"{found['trigger']}, {found['timezone']}"),
        ("next", _next(found)),
        ("overlap", f"{document.get('overlap', 'skip')}, {found['waiting']} waiting"),
    ]
    if found["last_run"]:
        lines.append(("last run", f"{found['last_run']['id']} {found['last_run']['state']}"))
    printed = table(("schedule", found["name"]))
    for name, value in lines:
        printed.add_row(name, value)
    console().print(printed)


def _print_fires(fires: Sequence[Mapping[str, Any]]) -> None:
    printed = table(("fire", "state", "run", "detail"))
    for fire in fires:
        detail = fire["reason"] or ("triggered by hand" if fire["by_hand"] else "")
        if fire["count"] != 1:
            many = "many" if fire["count"] is None else str(fire["count"])
            detail = f"{many} until {_formatted(fire['last_at'])}: {detail}"
        run = f"{fire['run_id']} {fire['run_state']}" if fire["run_id"] else "-"
        printed.add_row(_formatted(fire["at"]), state(fire["state"]), run, detail)
    console().print(printed)


def _next(found: Mapping[str, Any]) -> str:
    return _formatted(found["next"]["due_at"]) if found["next"] else "-"


def _last(found: Mapping[str, Any], now: datetime) -> str:
    last = found["last_fire"]
    return f"{last['state']} {ago(last['decided_at'], now)}" if last else "-"


def _formatted(instant: str) -> str:
    """Format an instant of the API for people."""
    return datetime.fromisoformat(instant).strftime("%Y-%m-%d %H:%M:%S %z")
