"""`arriero down`: stops what runs on the data directory, and waits until it has ended."""

from __future__ import annotations

import contextlib
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import psutil
import typer

from app.cli.lifecycle import installation
from app.cli.lifecycle.installation import POOLS
from app.cli.output import settings_of
from app.cli.processes import records
from app.cli.processes.records import RUN
from app.cli.processes.reporter import Reporter
from app.fleet.pool import METRICS_FOLDER
from app.kernel import clock, log
from app.kernel.embedded import DataDirectory, PostgresServer, ValkeyServer
from app.kernel.errors import Conflict, InvalidInput, Problem
from app.kernel.processes import pid_file
from app.kernel.processes.data_directory import DirectoryHolder
from app.kernel.processes.process import end_leftovers
from app.kernel.settings import Settings
from app.kernel.units import durations

#: The command in the lock of a data directory.
COMMAND = "arriero down"
#: Time for everything that needs no `pools.drain_timeout`.
_REST = timedelta(seconds=60)
#: Seconds for the parent to end its processes by force, before it is killed itself.
_FORCED_SECONDS = 25.0
_PAUSE = 0.1


def down(
    context: typer.Context,
    timeout: Annotated[
        str | None,
        typer.Option(help="Time for an orderly stop, such as 30s; by default pools.drain_timeout and a minute more."),
    ] = None,
) -> None:
    """
    Stop what `arriero up` runs on the data directory, and wait until it has ended.

    Running steps may finish within pools.drain_timeout and are requeued after that. What still runs at the timeout is
    killed. Processes that a killed `arriero up` has left are ended too. Exits with 0 also when nothing runs.
    """
    settings, report = settings_of(context), Reporter()
    log.configure(settings.log.model_copy(update={"level": "error"}))  # warnings would repeat the printed lines
    limit = _parsed(timeout) if timeout is not None else settings.pools.drain_timeout + _REST
    stop(settings, limit, report)


def stop(settings: Settings, timeout: timedelta, report: Reporter) -> None:
    """
    Stop what runs on the data directory. Returns when it has ended.

    Raises Conflict when it cannot be stopped from here, Unavailable when the directory belongs to another user.
    """
    directory = settings.data_dir
    holder = installation.holder_of(directory)
    if holder is not None and holder.command == COMMAND:
        report("info", f"process {holder.pid} is stopping it already")
        _has_ended(directory, holder, time.monotonic() + timeout.total_seconds(), set(), report)
    elif holder is not None:
        _stop_tree(directory, holder, timeout, report)
    _end_leftovers(settings, timeout, report, was_up=holder is not None)


def _parsed(text: str) -> timedelta:
    try:
        return durations.parse(text)
    except ValueError as error:
        raise InvalidInput([Problem("--timeout", str(error), "a duration, such as 30s or 2m")], "usage") from None


def _stop_tree(directory: Path, holder: DirectoryHolder, timeout: timedelta, report: Reporter) -> None:
    process = installation.visible_process(directory, holder)
    report("info", f"stopping {holder.command} (pid {holder.pid}), which may take {durations.show(timeout)} at most")
    began = time.monotonic()
    _signal(process, signal.SIGTERM)
    _signal(process, signal.SIGCONT)  # one that is stopped would not get it
    left = {name for name, record in installation.pid_records(directory)}
    for seconds, number, text in (
        (timeout.total_seconds(), signal.SIGTERM, "it has not ended in time; what still runs is killed"),
        (_FORCED_SECONDS, signal.SIGKILL, "it does not end; it is killed itself"),
        (_FORCED_SECONDS, None, ""),
    ):
        if _has_ended(directory, holder, time.monotonic() + seconds, left, report):
            report("info", f"{holder.command} has ended ({time.monotonic() - began:.1f} s)")
            return
        if number is not None:
            report("warning", text)
            _signal(process, number)
    raise Conflict(f"process {holder.pid} ({holder.command}) does not end")


def _has_ended(directory: Path, holder: DirectoryHolder, limit: float, left: set[str], report: Reporter) -> bool:
    while True:
        gone = installation.holder_of(directory) != holder and pid_file.birth(holder.pid) != holder.birth
        now = {name for name, _ in installation.pid_records(directory)}
        if ended := sorted(left - now):
            report("info", f"{', '.join(ended)} ended")
            left &= now
        if gone:
            return True
        if time.monotonic() > limit:
            return False
        time.sleep(_PAUSE)


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    try:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
    except psutil.AccessDenied:
        raise Conflict(f"process {process.pid} belongs to another user, who alone can stop it") from None


def _end_leftovers(settings: Settings, timeout: timedelta, report: Reporter, *, was_up: bool) -> None:
    """End what a killed tree has left. Its agent stops the pools, so it gets the time for an orderly stop."""
    directory = settings.data_dir
    if not directory.is_dir():
        report("info", f"nothing runs: there is no data directory {directory}")
        return
    with DataDirectory(directory, now=clock.now(), command=COMMAND):
        records_found = installation.pid_records(directory)
        running = [name for name, one in records_found if one.orphaned and pid_file.birth(one.pid) == one.birth]
        if running:
            report("info", f"ending what a killed start has left: {', '.join(running)}")
        ended = [*end_leftovers(directory / RUN, timeout), *end_leftovers(directory / POOLS)]
        for server in (PostgresServer(directory / "postgres"), ValkeyServer(directory / "valkey")):
            ended += server.end_leftovers()
        for file in (directory / METRICS_FOLDER).glob("*.json") if ended else ():  # a killed pool leaves its own
            file.unlink(missing_ok=True)
        records.remove(directory)
    for one in ended:
        report("info", f"{one.name} (pid {one.pid}) {'was killed' if one.forced else 'ended'}")
    if not was_up and not ended:
        report("info", f"nothing runs on {directory}")
