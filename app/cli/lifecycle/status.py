"""`arriero status`: what runs on the data directory, where it listens, and what it does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import httpx2
import typer
from rich.text import Text

from app.cli.client import RequestRefused, connected_to, key_of, url_of
from app.cli.lifecycle import installation
from app.cli.lifecycle.installation import UP, Installation, ListedProcess
from app.cli.output import AsJson, console, print_json, settings_of, state, table
from app.cli.processes.records import LOG_FILE, TreeState
from app.kernel import clock
from app.kernel.errors import Unavailable
from app.kernel.settings import Settings
from app.kernel.units import durations
from app.kernel.units.sizes import rounded
from app.workflows.state_machine.states import FINAL_RUNS, RunState

#: The exit codes: something is not as it should be; nothing runs.
DEGRADED, DOWN = 1, 5
#: Seconds to wait for an answer of the API.
_SECONDS = 3.0
_UNFINISHED = tuple(state for state in RunState if state not in FINAL_RUNS)
#: Most runs that are counted by state.
_COUNTED = 200


@dataclass(frozen=True, slots=True)
class ApiStatus:
    """What the API says."""

    url: str
    #: Why it does not answer, or what is wrong with it; empty when it is ready.
    problem: str
    #: Whether it belongs to another installation.
    foreign: bool
    fleet: Mapping[str, Any]
    #: The number of unfinished runs, by state.
    runs: Mapping[str, int]


def status(context: typer.Context, as_json: AsJson = False) -> None:
    """
    Show what runs on the data directory: processes, addresses, models, and the queue.

    Without the API, it is read from the data directory. Exits with 0 when everything runs and is ready, with 1 when
    something is starting, stopping, missing or not answering, and with 5 when nothing runs. The memory of a process
    includes that of its children; what processes share is divided among them.
    """
    settings = settings_of(context)
    found = installation.read(settings.data_dir, clock.now())
    api = _asked(settings, found)
    problems = _problems(settings, found, api)
    code = DOWN if found.holder is None and not found.processes else DEGRADED if problems else 0
    if as_json:
        print_json(_document(found, api, problems, code))
    else:
        _print(found, api, problems)
    raise typer.Exit(code)


def _asked(settings: Settings, found: Installation) -> ApiStatus:
    url = found.record.api if found.record is not None and found.record.api else url_of(settings)
    if found.record is not None and found.record.state == TreeState.STARTING:
        return ApiStatus(url, "it is starting", False, {}, {})  # its socket accepts connections, but nobody answers
    try:
        answer = httpx2.get(f"{url}/readyz", timeout=_SECONDS, trust_env=False, verify=url.startswith("https:"))
        ready = answer.json()
        if found.record is None or not isinstance(ready, dict) or ready.get("instance") != found.record.instance:
            return ApiStatus(url, "", True, {}, {})
        if not ready["ready"]:
            return ApiStatus(url, f"database: {ready['database']}; broker: {ready['broker']}", False, {}, {})
        with connected_to(url, _SECONDS, key_of(settings, url)) as client:
            fleet = client.get("/v1/fleet")
            runs = client.get("/v1/runs", state=_UNFINISHED, limit=_COUNTED)["runs"]
            return ApiStatus(url, "", False, fleet, Counter(run["state"] for run in runs))
    except httpx2.TransportError as error:
        return ApiStatus(url, f"no answer at {url} ({error})", False, {}, {})
    except (Unavailable, RequestRefused) as error:
        return ApiStatus(url, str(error).partition(";")[0], False, {}, {})
    except ValueError:  # no JSON
        return ApiStatus(url, "", True, {}, {})


def _problems(settings: Settings, found: Installation, api: ApiStatus) -> list[str]:
    """Return what is not as it should be."""
    problems = []
    if found.holder is None:
        if found.processes:
            left = ", ".join(process.name for process in found.processes)
            problems.append(
                f"a killed start has left: {left}; `arriero up` takes over what it can, `arriero down` ends them"
            )
        return problems
    if found.running(UP) is None:
        problems.append("it runs in another container or on another machine: its processes cannot be seen here")
    if found.record is None:
        problems.append(f"{found.holder.command} is starting")
        return problems
    if found.record.state != TreeState.READY:
        problems.append(f"{found.holder.command} is {found.record.state}")
        return problems
    if found.running(UP) is not None:
        problems += [f"{name} does not run" for name in found.record.programs if found.running(name) is None]
    problems += [f"{process.name} is stopped by a signal" for process in found.processes if process.stopped]
    if api.problem:
        problems.append(f"API: {api.problem}")
    if api.foreign:
        problems.append(f"another API answers at {api.url}")
    if api.fleet:
        served = {pool["model"] for pool in api.fleet["pools"] if pool["state"] == "serving"}
        problems += [f"{name} is not served" for name in settings.pools.models if name not in served]
    return problems


def _document(found: Installation, api: ApiStatus, problems: Sequence[str], code: int) -> dict[str, Any]:
    record = found.record
    return {
        "state": "down" if code == DOWN else "degraded" if code == DEGRADED else "running",
        "problems": list(problems),
        "data_dir": str(found.directory),
        "holder": None
        if found.holder is None
        else {
            "pid": found.holder.pid,
            "command": found.holder.command,
            "since": found.holder.since.isoformat(),
            "phase": None if record is None else record.state,
            "version": None if record is None else record.version,
            "instance": None if record is None else record.instance,
        },
        "api": None if record is None else {"url": record.api, "ready": not (api.problem or api.foreign)},
        "flower": None if record is None else record.flower,
        "logs": str(found.directory / LOG_FILE.parent),
        "processes": [
            {
                **asdict(process),
                "uptime": round(process.uptime, 1),
                "restarts": 0 if record is None else record.restarts.get(process.name, 0),
                "last_end": None if record is None else record.endings.get(process.name),
            }
            for process in found.processes
        ],
        "models": _models(api),
        "runs": dict(api.runs),
        "waiting": [{"model": one["model"], "reason": one["reason"]} for one in api.fleet.get("refusals", ())],
    }


def _models(api: ApiStatus) -> list[dict[str, Any]]:
    """Return the pools of each model, by the answer of the API."""
    found: dict[str, dict[str, Any]] = {}
    for pool in api.fleet.get("pools", ()):
        model = found.setdefault(
            pool["model"], {"model": pool["model"], "pools": 0, "states": Counter(), "slots": 0, "busy": 0, "bytes": 0}
        )
        model["pools"] += 1
        model["states"][pool["state"] if pool["state"] == "serving" else pool["phase"] or pool["state"]] += 1
        model["slots"] += pool["slots"]
        model["busy"] += pool["busy"]
        model["bytes"] += sum(pool["bytes"].values())
    return list(found.values())


def _print(found: Installation, api: ApiStatus, problems: Sequence[str]) -> None:
    out = console()
    if found.holder is None:
        what = "`arriero up` was killed" if found.processes else "nothing runs"
        out.print(Text.assemble((what, "bold red"), f" on {found.directory}; `arriero up` starts it"))
        if api.foreign and not found.processes:
            out.print(f"an API of another installation answers at {api.url}")
    else:
        record, since = found.record, clock.now() - found.holder.since
        ready = "" if record is None or record.ready_after is None else f", ready after {record.ready_after:g} s"
        out.print(
            Text.assemble(
                (found.holder.command if record is None else f"arriero {record.version}", "bold"),
                " is ",
                state("degraded" if problems else "running"),
                f" on {found.directory} for {_shown(since.total_seconds())}{ready}",
            ),
        )
        if record is not None:
            out.print(f"API     {record.api}{'' if api.problem or api.foreign else ' (ready)'}")
            if record.flower:
                out.print(f"Flower  {record.flower}")
        out.print(f"logs    {found.directory / LOG_FILE.parent} (arriero logs -f)")
    if found.processes:
        out.print()
        out.print(_table(found))
    if models := _models(api):
        out.print()
        right = ("pools", "busy slots", "reserved")
        printed = table(("model", "pools", "state", "busy slots", "reserved"), right=right)
        for model in models:
            states = ", ".join(name if count == 1 else f"{count} {name}" for name, count in model["states"].items())
            busy = f"{model['busy']} of {model['slots']}"
            printed.add_row(model["model"], str(model["pools"]), states, busy, rounded(model["bytes"]))
        out.print(printed)
    if api.fleet:
        out.print()
        out.print(_queue(api))
    for problem in problems:
        out.print(Text.assemble(("! ", "bold yellow"), problem))


def _table(found: Installation) -> Any:
    printed = table(("process", "pid", "up for", "restarts", "memory"), right=("pid", "restarts", "memory"))
    for process in found.processes:
        restarts = 0 if found.record is None else found.record.restarts.get(process.name, 0)
        name = process.name if process.model is None else f"{process.name} ({process.model})"
        printed.add_row(
            f"{name}{_marks(process)}",
            str(process.pid),
            _shown(process.uptime),
            Text(str(restarts), "yellow" if restarts else ""),
            rounded(process.memory),
        )
    total = sum(process.memory for process in found.processes)
    printed.add_row("total", "", "", "", rounded(total), style="dim")
    return printed


def _marks(process: ListedProcess) -> str:
    return f"{' (stopped)' if process.stopped else ''}{' (left over)' if process.orphaned else ''}"


def _queue(api: ApiStatus) -> str:
    runs = sum(api.runs.values())
    counted = ", ".join(f"{count} {name}" for name, count in api.runs.items())
    text = f"{'at least ' if runs >= _COUNTED else ''}{runs} runs in progress{f' ({counted})' if counted else ''}"
    waiting = "; ".join(f"{one['model']}: {one['reason']}" for one in api.fleet["refusals"])
    return f"queue   {text}{f'; waiting for {waiting}' if waiting else ''}"


def _shown(seconds: float) -> str:
    """Return a duration in its two largest units."""
    whole = timedelta(seconds=int(seconds))
    if whole >= timedelta(days=1):
        whole = timedelta(hours=whole // timedelta(hours=1))
    elif whole >= timedelta(hours=1):
        whole = timedelta(minutes=whole // timedelta(minutes=1))
    return durations.show(whole)
