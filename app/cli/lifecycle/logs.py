"""`arriero logs`: the logs of processes, merged by time, and followed."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from app.cli.lifecycle import installation, log_lines
from app.cli.lifecycle.log_lines import LogLine
from app.cli.output import console, settings_of
from app.kernel import clock
from app.kernel.errors import InvalidInput, NotFound, Problem, Unavailable
from app.kernel.processes.log_files import rotated
from app.kernel.units import durations

#: Bytes that are read at once, from the end of a log backwards.
_CHUNK = 256 * 1024
#: Most characters of a line; the rest is left out.
_LINE_CHARACTERS = 64 * 1024
#: Seconds between two looks at the followed logs.
_PAUSE = 0.2
#: Least characters of a part of an id.
_ID_CHARACTERS = 4
_EARLIEST = datetime.min.replace(tzinfo=UTC)
_STYLES = ("cyan", "magenta", "green", "yellow", "blue", "bright_cyan", "bright_magenta")


@dataclass(slots=True)
class FollowedLog:
    """A log, and how far it was read."""

    process: str
    file: Path
    position: int
    inode: int
    last: datetime
    rest: bytes = field(default=b"")

    def appended(self) -> list[LogLine]:
        """Return the whole lines that were written since the last call, across rotations."""
        try:
            stat = self.file.stat()
        except FileNotFoundError:
            return []
        read = b""
        if stat.st_ino != self.inode or stat.st_size < self.position:
            read = _bytes(rotated(self.file), self.position)
            self.position, self.inode = 0, stat.st_ino
        appended = _bytes(self.file, self.position)
        self.position += len(appended)
        whole, mark, self.rest = (self.rest + read + appended).rpartition(b"\n")
        found = list(log_lines.lines(self.process, _split(whole + mark), self.last))
        self.last = found[-1].at if found else self.last
        return found


def logs(
    context: typer.Context,
    processes: Annotated[
        list[str] | None,
        typer.Argument(
            help="Processes, as `arriero status` names them; a model or the id of a pool means pools. By default all.",
            metavar="[PROCESS]...",
        ),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print new lines as they come, until Ctrl-C.")] = False,
    count: Annotated[int, typer.Option("-n", "--lines", min=0, help="The number of last lines.")] = 100,
    since: Annotated[
        str | None, typer.Option(help="Only lines since then: 10m, 2h, or a time such as 2026-11-22T16:20:00Z.")
    ] = None,
) -> None:
    """
    Print the logs of processes, merged by time.

    With --since all lines since then are printed, unless -n is given too. At a terminal, lines are written for people;
    in a pipe they are as in the files, with the name of the process before each when there are several.
    """
    directory = settings_of(context).data_dir
    installation.holder_of(directory)  # raises when the directory belongs to another user
    after = _instant(since) if since is not None else None
    given = context.get_parameter_source("count")
    limit = None if after is not None and given is not None and given.name == "DEFAULT" else count
    files = _chosen(directory, processes or [])
    out = _Output(single=len(files) == 1 and bool(processes))
    followed, found = [], []
    for process, file in files.items():
        try:
            log, last = _read(process, file, limit, after)
        except OSError as error:
            raise Unavailable(f"the log {file} cannot be read: {error.strerror or error}") from error
        followed.append(log)
        found += last
        if not follow and log.rest and (after is None or log.last >= after):
            found += log_lines.lines(process, _split(log.rest), log.last)  # a last line that was not finished
    found.sort(key=lambda line: line.at)
    out.print(found if limit is None else found[max(len(found) - limit, 0) :])
    while follow:
        time.sleep(_PAUSE)
        known = {log.process for log in followed}
        for process, file in _chosen(directory, processes or [], required=False).items():
            if process not in known:
                followed.append(FollowedLog(process, file, 0, file.stat().st_ino, _EARLIEST))
        out.print(sorted((line for log in followed for line in log.appended()), key=lambda line: line.at))


class _Output:
    """Prints lines: for people at a terminal, as they are elsewhere."""

    def __init__(self, *, single: bool) -> None:
        self._single, self._console = single, console()
        self._styles: dict[str, str] = {}

    def print(self, found: Sequence[LogLine]) -> None:
        """Print lines, and flush them."""
        for line in found:
            name = line.process
            if sys.stdout.isatty():
                style = self._styles.setdefault(name, _STYLES[len(self._styles) % len(_STYLES)])
                prefix = "" if self._single else f"{name:<12} "
                self._console.print(Text.assemble((prefix, style), log_lines.rendered(line)), soft_wrap=True)
            else:
                sys.stdout.write(line.text + "\n" if self._single else f"{name} | {line.text}\n")
        sys.stdout.flush()


def _chosen(directory: Path, names: Sequence[str], *, required: bool = True) -> Mapping[str, Path]:
    """Return the logs of the named processes. Raises NotFound."""
    files = installation.log_files_of(directory)
    if not names:
        if not files and required:
            raise NotFound("log in the data directory", str(directory))
        return files
    models = {
        name: record.name.removeprefix("pool ")
        for name, record in installation.pid_records(directory)
        if name.startswith("pool-")
    }
    found: dict[str, Path] = {}
    for name in names:
        matching = {
            process: file
            for process, file in files.items()
            if process == name.lower() or (process.startswith("pool-") and _is_pool(file, name, models.get(process)))
        }
        if not matching and required:
            raise NotFound("log of a process", name, [*(one for one in files if not one.startswith("pool-")), "pool"])
        found |= matching
    return found


def _is_pool(file: Path, name: str, model: str | None) -> bool:
    """Whether the log is that of the pools, the model or the id (or an end of it) with this name."""
    id_ = file.name.removeprefix("pool.").removesuffix(".log")
    return name in {"pool", model} or (len(name) >= _ID_CHARACTERS and (id_.startswith(name) or id_.endswith(name)))


def _read(process: str, file: Path, limit: int | None, after: datetime | None) -> tuple[FollowedLog, list[LogLine]]:
    """Return the last lines of a log, from its older part too, and where it goes on."""
    with file.open("rb") as stream:
        size, inode = stream.seek(0, 2), _inode(file)
    older = _bytes(rotated(file), 0) if after is not None else b""
    content = older + (_bytes(file, 0, size) if after is not None else _tail(file, size, limit or 0))
    if after is None and content.count(b"\n") < (limit or 0) and size <= len(content):
        part = rotated(file)
        if part.is_file():
            content = _tail(part, part.stat().st_size, (limit or 0) - content.count(b"\n")) + content
    whole, mark, rest = content.rpartition(b"\n")
    found = list(log_lines.lines(process, _split(whole + mark), _EARLIEST))
    last = found[-1].at if found else _EARLIEST
    found = [line for line in found if after is None or line.at >= after]
    found = found if limit is None else found[max(len(found) - limit, 0) :]
    return FollowedLog(process, file, size, inode, last, rest), found


def _tail(file: Path, size: int, count: int) -> bytes:
    """Return the end of a file, with at least `count` whole lines where it has so many."""
    start, content = size, b""
    with file.open("rb") as stream:
        while start > 0 and content.count(b"\n") <= count:
            step = min(_CHUNK, start)
            start -= step
            stream.seek(start)
            content = stream.read(step) + content
    return content if start == 0 else content.partition(b"\n")[2]


def _bytes(file: Path, start: int, end: int | None = None) -> bytes:
    try:
        with file.open("rb") as stream:
            stream.seek(start)
            return stream.read() if end is None else stream.read(max(end - start, 0))
    except FileNotFoundError:
        return b""


def _inode(file: Path) -> int:
    return file.stat().st_ino


def _split(content: bytes) -> Iterator[str]:
    for line in content.splitlines():
        yield line.decode(errors="replace")[:_LINE_CHARACTERS]


def _instant(text: str) -> datetime:
    """Return the instant of `--since`: a time, or a duration before now."""
    try:
        if re.match(r"\d{4}-", text):
            at = datetime.fromisoformat(text)
            return at.astimezone(UTC)
        return clock.now() - durations.parse(text)
    except (ValueError, OverflowError):
        accepted = "a duration such as 10m, or a time such as 2026-11-22T16:20:00Z"
        raise InvalidInput(
            [Problem("--since", f"{text!r} is neither a duration nor a time", accepted)], "usage"
        ) from None
