"""
`arriero up -d`: starts `arriero up` in a session of its own, and returns when it is ready.

Its output goes to a log in the data directory, and meanwhile to the terminal too. Ctrl-C before it is ready stops it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from app.cli.processes import first_key, records
from app.cli.processes.records import LOG_FILE, TreeState
from app.cli.processes.reporter import Reporter
from app.cli.processes.signals import Interrupted, Signals
from app.kernel.errors import Conflict, ServerNotStarted
from app.kernel.processes import log_files
from app.kernel.processes.data_directory import find_holder, make_directory
from app.kernel.settings import Settings

#: The exit code that shells use for a command ended by Ctrl-C.
_INTERRUPTED = 130
_PAUSE = 0.1
#: The time at the beginning of a line in the log, which is not copied to the terminal.
_TIME = re.compile(rb"^\S+Z ", re.MULTILINE)


def start(settings: Settings, root_options: Mapping[str, Any], options: Sequence[str], report: Reporter) -> None:
    """
    Start `arriero up` with these options in the background, and return when it is ready; also when it is up already.

    Raises Conflict while another one starts or stops, ServerNotStarted; exits with the code of one that fails.
    """
    directory = settings.data_dir
    holder = find_holder(directory)
    if holder is not None:
        record = records.find(directory, holder)
        if record is None or record.state != TreeState.READY:
            doing = "starting" if record is None else record.state
            raise Conflict(f"`{holder.command}` (pid {holder.pid}) on {directory} is {doing}; see `arriero status`")
        report("info", f"it is up already (pid {holder.pid}), at {record.api}, on {directory}")
        return
    signals = Signals()
    log = directory / LOG_FILE
    try:
        make_directory(directory, traversable=True)
        log.parent.mkdir(mode=0o700, exist_ok=True)
        log_files.rename_when_long(log)
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    except OSError as error:
        raise ServerNotStarted("arriero up", f"its log {log} cannot be written: {error.strerror}") from error
    with os.fdopen(descriptor, "ab", buffering=0) as output:
        copied = output.tell()
        command = [sys.executable, "-P", "-m", "app", *_options(root_options), "up", "--in-background", *options]
        signals.install()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        while process.poll() is None:
            signals.check()
            copied = _copy(log, copied)
            record = records.running(directory)
            if record is not None and record.pid == process.pid and record.state == TreeState.READY:
                access = first_key.lines(record.api, directory)
                _copy(log, copied)
                report.block("access", access)
                return
            time.sleep(_PAUSE)
    except Interrupted:
        report("warning", "interrupted: stopping it again")
        _stop(process, log, copied, signals)
        raise typer.Exit(_INTERRUPTED) from None
    _copy(log, copied)
    if process.returncode == 0:
        report("warning", "it was stopped before it was ready")
    else:
        report("error", f"arriero did not start; its log is {log}, and those of its processes lie beside it")
    raise typer.Exit(process.returncode if process.returncode > 0 else 1)


def _stop(process: subprocess.Popen[bytes], log: Path, copied: int, signals: Signals) -> None:
    process.terminate()
    hurried = False
    while process.poll() is None:
        copied = _copy(log, copied)
        if signals.hurry and not hurried:
            hurried = True
            process.terminate()
        time.sleep(_PAUSE)
    _copy(log, copied)


def _options(root: Mapping[str, Any]) -> list[str]:
    """Return the options before the command, as they were given."""
    found = [f"--set={text}" for text in root.get("values") or ()]
    for name, key in (("--config", "config_file"), ("--data-dir", "data_dir")):
        if root.get(key) is not None:
            found.append(f"{name}={Path(root[key]).absolute()}")
    return found


def _copy(log: Path, copied: int) -> int:
    """Copy what was appended to the log to standard error, up to the last whole line. Returns the new position."""
    with log.open("rb") as stream:
        stream.seek(copied)
        text = stream.read()
    whole = text[: text.rfind(b"\n") + 1]
    sys.stderr.write(_TIME.sub(b"", whole).decode(errors="replace"))
    sys.stderr.flush()
    return copied + len(whole)
