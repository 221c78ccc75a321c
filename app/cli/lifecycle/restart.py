"""`arriero restart`: restarts one process of the running `arriero up`, or everything."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import psutil
import typer

from app.cli.lifecycle import installation
from app.cli.lifecycle.installation import UP
from app.cli.output import settings_of
from app.cli.processes import records
from app.cli.processes.records import LOG_FILE, TreeRecord, TreeState
from app.cli.processes.reporter import Reporter
from app.kernel.errors import Conflict, NotFound, ServerNotStarted, Unavailable
from app.kernel.processes import pid_file
from app.kernel.processes.process import log_tail

#: Time for a restart besides `pools.drain_timeout`; that of everything gets `pools.start_timeout` too.
_REST = timedelta(seconds=90)
_PAUSE = 0.1


def restart(
    context: typer.Context,
    process: Annotated[
        str | None, typer.Argument(help="A process, as `arriero status` names it; by default everything.")
    ] = None,
) -> None:
    """
    Restart one process of the running `arriero up`, or everything.

    Running steps may finish within pools.drain_timeout. A process keeps the settings of its `arriero up`; a restart of
    everything reads arriero.toml again, and keeps the terminal, the variables and the options of that `arriero up`.
    A pool is restarted with `arriero pools restart`.
    """
    settings, report = settings_of(context), Reporter()
    directory = settings.data_dir
    holder = installation.holder_of(directory)
    record = records.find(directory, holder)
    if holder is None or record is None:
        raise Unavailable(f"no `arriero up` runs on {directory}; start it with `arriero up`")
    parent = installation.visible_process(directory, holder)
    if record.state != TreeState.READY:
        raise Conflict(f"`arriero up` (pid {holder.pid}) is {record.state}; wait until it is ready")
    names = [] if process in {None, UP} else [_known(directory, record, str(process))]
    before = _pid(directory, names[0]) if names else None
    on_demand = bool(names) and names[0] not in record.programs
    if on_demand and before is None:
        report("info", f"{names[0]} does not run; it starts when it is asked for")
        return
    records.request_restart(directory, names)
    try:
        with contextlib.suppress(psutil.NoSuchProcess):
            parent.send_signal(signal.SIGUSR1)
    except psutil.AccessDenied:
        raise Conflict(f"process {holder.pid} belongs to another user, who alone can restart it") from None
    limit = _REST + settings.pools.drain_timeout
    if names:
        _wait_for_one(directory, names[0], before, limit, report, on_demand=on_demand)
    else:
        _wait_for_all(directory, record, limit + settings.pools.start_timeout, report)


def _known(directory: Path, record: TreeRecord, name: str) -> str:
    if name.startswith("pool"):
        raise Conflict("a pool is restarted with `arriero pools restart POOL`; `arriero pools list` has their ids")
    running = [found for found, _ in installation.pid_records(directory) if not found.startswith("pool-")]
    known = dict.fromkeys([*record.programs, *running, *(["flower"] if record.flower else [])])
    if name.lower() not in known:
        raise NotFound("process", name, [*known, UP])
    return name.lower()


def _pid(directory: Path, name: str) -> int | None:
    """Return the pid of a running process by its name."""
    for found, record in installation.pid_records(directory):
        if found == name and pid_file.birth(record.pid) == record.birth:
            return record.pid
    return None


def _wait_for_one(
    directory: Path, name: str, before: int | None, limit: timedelta, report: Reporter, *, on_demand: bool
) -> None:
    report("info", f"restarting {name} (pid {before or 'none'})")
    for _ in _until(limit):
        _require_up(directory)
        now = _pid(directory, name)
        if now is not None and now != before:
            report("info", f"{name} runs again (pid {now}, {report.seconds:.1f} s)")
            return
        if now is None and on_demand:
            report("info", f"{name} has ended; it starts again when it is asked for")
            return
    raise ServerNotStarted(name, f"it was not restarted within {limit.total_seconds():g} s; see `arriero logs {name}`")


def _wait_for_all(directory: Path, before: TreeRecord, limit: timedelta, report: Reporter) -> None:
    report("info", f"restarting everything (pid {before.pid})")
    state = ""
    for _ in _until(limit):
        holder = installation.holder_of(directory)
        record = records.find(directory, holder)
        if record is not None and record.instance != before.instance and record.state == TreeState.READY:
            report("info", f"everything runs again at {record.api} ({report.seconds:.1f} s)")
            return
        if record is not None and record.state != state:
            state = record.state
            if state != TreeState.READY:
                report("info", state)
        # Between the end and the new start nobody holds the directory; after an error it stays so.
        if pid_file.birth(before.pid) is None:
            raise ServerNotStarted("arriero up", "it ended", log_tail(directory / LOG_FILE))
    raise ServerNotStarted("arriero up", f"it was not ready after {limit.total_seconds():g} s; see `arriero status`")


def _require_up(directory: Path) -> None:
    if installation.holder_of(directory) is None:
        raise Unavailable(f"`arriero up` on {directory} has ended meanwhile")


def _until(limit: timedelta) -> Iterator[None]:
    """Yield until the time is over, with pauses."""
    end = time.monotonic() + limit.total_seconds()
    while time.monotonic() < end:
        yield
        time.sleep(_PAUSE)
