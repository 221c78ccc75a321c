"""`arriero jobs`: list, show, pause, resume, change and run the scheduled jobs of the installation."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any

import typer

from app.cli.client import Client, connected
from app.cli.output import AsJson, ago, console, notes, print_json, seconds, settings_of, shortened, state, table
from app.kernel import clock
from app.kernel.errors import InvalidInput, Problem

app = typer.Typer(no_args_is_help=True, help="Scheduled jobs: when they run, and how they ended.")

JobName = Annotated[str, typer.Argument(metavar="NAME", help="The name of a job.")]

#: Seconds for which `run` waits for a worker to begin, and between two looks.
_BEGIN_SECONDS, _LOOK_SECONDS = 60.0, 0.2
#: Exit codes of `run`: the pass failed, or no control worker has begun or ended it in time.
_FAILED, _NOT_RUN = 1, 4


@app.command("list")
def list_jobs(context: typer.Context, as_json: AsJson = False) -> None:
    """List the jobs: when each runs, how its last pass ended, and when the next one is due."""
    with connected(settings_of(context)) as client:
        found = client.get("/v1/jobs")
    if as_json:
        print_json(found)
        return
    now = clock.now()
    printed = table(
        ("job", "state", "trigger", "last pass", "took", "outcome", "next", "failures"), right=("failures",)
    )
    for row in found["jobs"]:
        last = row["last"] or {}
        printed.add_row(
            row["name"],
            state(row["state"]),
            _trigger(row["trigger"]) + (" (changed)" if row["changed"] else ""),
            ago(last.get("started_at"), now),
            seconds(last.get("seconds")),
            state(last["outcome"]) if last else "-",
            _next(row, now),
            f"{row['failures']} of {row['passes']}",
        )
    console().print(printed)
    if found["beat"] == "stopped":
        notes().print("no beat runs, so nothing triggers the jobs: start arriero up or arriero beat", style="yellow")
    elif found["beat"] == "unknown":
        notes().print("the broker is unreachable, so nothing triggers the jobs", style="yellow")


@app.command()
def show(
    context: typer.Context,
    name: JobName,
    limit: Annotated[int, typer.Option(min=1, max=50, help="Most passes to list.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Show a job, and its last passes that did something, failed or were run by hand."""
    with connected(settings_of(context)) as client:
        found = client.get(f"/v1/jobs/{name}")
        passes = client.get(f"/v1/jobs/{name}/passes", limit=limit)["passes"]
    if as_json:
        print_json(found | {"last_passes": passes})
        return
    _print_job(found)
    if passes:
        now = clock.now()
        printed = table(("pass", "when", "by hand", "took", "outcome", "detail"))
        for one in passes:
            outcome = state(one["outcome"] or one["state"])
            by_hand = "yes" if one["by_hand"] else ""
            detail = "" if one["detail"] is None else shortened(one["detail"])
            printed.add_row(one["id"], ago(one["requested_at"], now), by_hand, seconds(one["seconds"]), outcome, detail)
        console().print()
        console().print(printed)


@app.command()
def probes(context: typer.Context, as_json: AsJson = False) -> None:
    """List the last probe of each pool: whether it can write a token."""
    with connected(settings_of(context)) as client:
        found = client.get("/v1/probes")
    if as_json:
        print_json(found)
        return
    now = clock.now()
    printed = table(("pool", "model", "probed", "outcome", "token after", "failures", "detail"))
    for one in found["probes"]:
        outcome = state(one["outcome"] or "pending")
        failures, detail = str(one["failures"]), shortened(one["detail"])
        when = ago(one["ended_at"], now)
        printed.add_row(one["pool"][-6:], one["model"], when, outcome, seconds(one["seconds"]), failures, detail)
    console().print(printed)


@app.command()
def pause(
    context: typer.Context,
    name: JobName,
    reason: Annotated[str | None, typer.Option(help="The reason, which is shown with the job.")] = None,
    as_json: AsJson = False,
) -> None:
    """Pause a job: nothing triggers it. It can still be run by hand."""
    with connected(settings_of(context)) as client:
        _print_state(client.post(f"/v1/jobs/{name}/pause", parameters={"reason": reason}), as_json=as_json)


@app.command()
def resume(context: typer.Context, name: JobName, as_json: AsJson = False) -> None:
    """Resume a job."""
    with connected(settings_of(context)) as client:
        _print_state(client.post(f"/v1/jobs/{name}/resume"), as_json=as_json)


@app.command("set")
def set_trigger(
    context: typer.Context,
    name: JobName,
    every: Annotated[str | None, typer.Option(help="An interval, such as 30s, 5m or 1d.")] = None,
    cron: Annotated[str | None, typer.Option(help="A cron expression of five fields, such as '30 2 * * 1-5'.")] = None,
    timezone: Annotated[str | None, typer.Option(help="The time zone of --cron, such as Europe/Madrid.")] = None,
    reset: Annotated[bool, typer.Option("--reset", help="Run it as the settings say again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Change when a job runs. It holds within moments, in all processes, and after a restart."""
    given = {key: value for key, value in (("every", every), ("cron", cron), ("timezone", timezone)) if value}
    if reset == bool(given):
        message = "--reset excludes the others" if reset else "nothing is given"
        raise InvalidInput([Problem("", message, "--every, --cron with --timezone, or --reset")], "usage")
    with connected(settings_of(context)) as client:
        path = f"/v1/jobs/{name}/trigger"
        found = client.delete(path) if reset else client.put(path, given)
    _print_state(found, as_json=as_json)


@app.command()
def run(
    context: typer.Context,
    name: JobName,
    wait: Annotated[bool, typer.Option(help="Wait until it has ended.")] = True,
    timeout: Annotated[float, typer.Option(min=1, max=3600, help="Seconds to wait at most.")] = 300,
    as_json: AsJson = False,
) -> None:
    """
    Run a job now, also a paused one, and print what it did.

    Exits with 1 when the pass failed or was postponed, with 4 when no control worker has begun it within a minute, or
    when it has not ended in time.
    """
    with connected(settings_of(context)) as client:
        found = client.post(f"/v1/jobs/{name}/run")
        if wait:
            found = _ended(client, found, timeout)
    if as_json:
        print_json(found)
    elif found["state"] == "ended":
        detail = "" if found["detail"] is None else f": {shortened(found['detail'], 1000)}"
        typer.echo(f"{name}: {found['outcome']} in {seconds(found['seconds'])}{detail}")
    elif wait:
        reason = "has not ended yet" if found["state"] == "running" else "no control worker has begun it"
        notes().print(f"{name}: {reason}; see arriero jobs show {name} and arriero doctor")
    else:
        typer.echo(found["id"])
    if found["outcome"] in ("failed", "postponed"):
        raise typer.Exit(_FAILED)
    if wait and found["state"] != "ended":
        raise typer.Exit(_NOT_RUN)


def _ended(client: Client, found: Any, timeout: float) -> Any:
    began = time.monotonic()
    while found["state"] in ("requested", "running"):
        passed = time.monotonic() - began
        if passed > timeout or (found["state"] == "requested" and passed > _BEGIN_SECONDS):
            break
        time.sleep(_LOOK_SECONDS)
        found = client.get(f"/v1/jobs/{found['job']}/passes/{found['id']}")
    return found


def _print_state(found: Any, *, as_json: bool) -> None:
    if as_json:
        print_json(found)
    else:
        typer.echo(f"{found['name']} is {found['state']}: {_trigger(found['trigger'])}")


def _print_job(found: Mapping[str, Any]) -> None:
    now = clock.now()
    printed = table(("", ""))
    printed.show_header = False
    last = found["last"]
    rows: dict[str, Any] = {
        "job": found["name"],
        "does": found["description"],
        "state": state(found["state"]),
        "trigger": _trigger(found["trigger"]),
        "settings": f"{_trigger(found['default_trigger'])} ({found['setting']})",
        "next": _next(found, now),
        "passes": f"{found['passes']}, of which {found['failures']} failed; {seconds(found['mean_seconds'])} each",
        "last did something": ago(found["last_done_at"], now),
        "last failed": ago(found["last_failed_at"], now),
    }
    if found["paused_at"]:
        rows["state"] = f"paused {ago(found['paused_at'], now)}: {found['paused_reason'] or 'no reason given'}"
    if last:
        rows["last pass"] = f"{ago(last['started_at'], now)}, {last['outcome']}, {seconds(last['seconds'])}"
        rows["worker"] = last["worker"] or "-"
        if last["detail"]:
            rows["detail"] = shortened(last["detail"], 1000)
    for label, value in rows.items():
        printed.add_row(label, value)
    console().print(printed)


def _trigger(given: Mapping[str, Any]) -> str:
    return f"every {given['every']}" if given["every"] else f"{given['cron']}, {given['timezone']}"


def _next(row: Mapping[str, Any], now: datetime) -> str:
    if row["next_at"] is None:
        return "-"
    left = (datetime.fromisoformat(row["next_at"]) - now).total_seconds()
    return f"in {seconds(left)}" if left > 0 else "due"
