"""
Every error that Arriero raises on purpose.

    ArrieroError
    ├── InvalidInput                what the caller gave cannot be used; carries every problem found
    │   ├── InvalidDefinition       a workflow
    │   ├── InvalidSettings         arriero.toml, the environment, the command line
    │   └── InvalidCatalog          a catalogue of models
    ├── BodyTooLarge                a request passes the size limit
    ├── PayloadTooLarge             inputs, an output or an event pass theirs
    ├── NotFound                    nothing has that name or id
    ├── Conflict                    it exists, but its state does not allow this
    │   ├── IdempotencyKeyReused    the key was used for another request
    │   ├── EventKeyReused          the key was used for another event of the run
    │   ├── ConcurrencyLimitReached a run is one too many of its key
    │   ├── InvalidTransition       no such edge in a table of transitions
    │   └── DataDirectoryHeld       another process tree runs on the data directory
    ├── LeaseLost                   somebody else holds it now
    ├── Unavailable                 a part that this needs is not there
    │   ├── DatabaseUnreachable
    │   ├── DatabaseBehind          its schema is not the one of this version
    │   ├── RowsLocked              another transaction holds the rows; asked by who does not wait for them
    │   ├── BrokerUnreachable
    │   ├── ServerNotStarted        an embedded server or a child process did not come up
    │   └── MemoryNotEnough         the device or the machine has not the bytes that a load needs
    │       └── AllocationFailed    it was tried, and failed
    ├── ModelFileUnusable           a GGUF file cannot be had or read
    │   ├── ModelFileMissing
    │   ├── ModelFileDamaged
    │   ├── ModelUnsupported        a whole file, but not for this version of llama.cpp or this use
    │   └── DownloadFailed
    └── StepFailure                 one attempt of a step ended badly; the retry rule decides what follows

A vendor's error is translated where it enters. HTTP statuses and exit codes are given elsewhere:
`app/api/main.py` and `app/cli/__init__.py` hold one table each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path

#: Characters of a message that is stored with a run, at the most.
MESSAGE_CHARACTERS = 2_000


def shortened(message: str, most: int = MESSAGE_CHARACTERS) -> str:
    """
    The message as Postgres keeps it, or its beginning and how much is left out: it may quote a value of any length.

    NUL and half characters (lone surrogates) are replaced.
    """
    kept = message if len(message) <= most else f"{message[:most]}… ({len(message) - most} more characters)"
    return kept.replace("\x00", "\ufffd").encode(errors="replace").decode()


class ArrieroError(Exception):
    """The root: catching it catches all that Arriero raises on purpose."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with an input: where, what, and what would be accepted."""

    #: Path of the field, such as `steps[2].needs[0]`, or the key of a setting; empty for the whole.
    where: str
    #: What is wrong with the value, as a sentence without a full stop.
    message: str
    #: What would be accepted, or empty when the message says it.
    accepted: str = ""
    #: Line of the source text, counted from 1, where the source is a text.
    line: int | None = None

    def __str__(self) -> str:
        place = self.where if self.line is None else f"{self.where or 'document'} (line {self.line})"
        text = f"{place}: {self.message}" if place else self.message
        return f"{text}; accepted: {self.accepted}" if self.accepted else text


class InvalidInput(ArrieroError):
    """What the caller gave cannot be used. Nothing was stored."""

    #: Names the input in the message.
    what = "input"

    def __init__(self, problems: Sequence[Problem], what: str | None = None) -> None:
        self.problems = tuple(problems)
        if what is not None:
            self.what = what
        lines = "\n".join(f"  {problem}" for problem in self.problems)
        super().__init__(f"invalid {self.what}:\n{lines}")


class InvalidDefinition(InvalidInput):
    """A workflow that cannot run as written."""

    what = "workflow"


class InvalidSettings(InvalidInput):
    """A setting with a wrong value, or one that does not exist."""

    what = "settings"


class InvalidCatalog(InvalidInput):
    """A catalogue of models with a wrong entry."""

    what = "model catalogue"


class BodyTooLarge(ArrieroError):
    """A request body passes the limit of bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        super().__init__(f"the body is larger than {limit} bytes (setting api.max_body_bytes)")


class PayloadTooLarge(ArrieroError):
    """Inputs, an output or an event are longer than may be stored."""

    def __init__(self, what: str, size: int, limit: int) -> None:
        self.what, self.size, self.limit = what, size, limit
        super().__init__(
            f"{what}: {size} bytes as JSON; {limit} can be stored at the most (setting runs.max_payload_bytes)"
        )


class NotFound(ArrieroError):
    """Nothing of that kind has that name or id."""

    def __init__(self, kind: str, name: str, known: Sequence[str] = ()) -> None:
        self.kind, self.name, self.known = kind, name, tuple(known)
        hint = f"; there are: {', '.join(self.known)}" if self.known else ""
        super().__init__(f"no {kind} {name!r}{hint}")


class Conflict(ArrieroError):
    """The thing exists, but its state does not allow this."""


class IdempotencyKeyReused(Conflict):
    """The key was used before, for a request with another content."""

    def __init__(self, key: str, run_id: str) -> None:
        self.key, self.run_id = key, run_id
        super().__init__(
            f"idempotency key {key!r} belongs to run {run_id}, which was submitted with another content "
            "(workflow, version, inputs, priority, rank, labels, deadline, retention); "
            "submit this one under another key"
        )


class EventKeyReused(Conflict):
    """The key was used before, for another event of the same run."""

    def __init__(self, key: str, event_id: str, name: str) -> None:
        self.key, self.event_id, self.name = key, event_id, name
        super().__init__(
            f"idempotency key {key!r} belongs to event {event_id} ({name!r}), which came with another name or payload; "
            "send another event under another key"
        )


class ConcurrencyLimitReached(Conflict):
    """So many runs of the key go on already, and the workflow refuses more."""

    def __init__(self, workflow: str, key: str, limit: int) -> None:
        self.workflow, self.key, self.limit = workflow, key, limit
        super().__init__(
            f"{limit} run(s) of {workflow} with the concurrency key {key!r} go on already: no more are taken"
        )


class InvalidTransition(Conflict):
    """An event met a state that has no edge for it."""

    def __init__(self, subject: str, state: str, event: str) -> None:
        self.subject, self.state, self.event = subject, state, event
        super().__init__(f"{subject} is {state}: {event} cannot happen to it")


class DataDirectoryHeld(Conflict):
    """Another process tree runs on the data directory."""

    def __init__(self, path: Path, pid: int, since: datetime, command: str) -> None:
        self.path, self.pid, self.since, self.command = path, pid, since, command
        super().__init__(
            f"{path} is in use by process {pid} ({command}) since {since:%Y-%m-%d %H:%M:%S %Z}; "
            "stop that one, or choose another directory with --data-dir or ARRIERO_DATA_DIR"
        )


class LeaseLost(ArrieroError):
    """The lease ran out or was given to another holder; the work must be dropped."""


class Unavailable(ArrieroError):
    """A part that this needs is not there now."""


class DatabaseUnreachable(Unavailable):
    """No connection to Postgres."""


class DatabaseBehind(Unavailable):
    """The schema of the database is not the one that this version needs."""

    def __init__(self, current: str | None, head: str) -> None:
        self.current, self.head = current, head
        super().__init__(
            f"the database is at revision {current or 'none (empty)'}, this version needs {head}; "
            "run `arriero db upgrade`"
        )


class RowsLocked(Unavailable):
    """Another transaction holds rows, and whoever asked does not wait for them."""


class BrokerUnreachable(Unavailable):
    """No connection to Redis or Valkey."""


class ServerNotStarted(Unavailable):
    """A server or child process did not come up in its time, or ended at once."""

    def __init__(self, name: str, reason: str, log: str = "") -> None:
        self.name, self.reason, self.log = name, reason, log
        super().__init__(f"{name} did not start: {reason}" + (f"\n{log}" if log else ""))


class MemoryNotEnough(Unavailable):
    """The device or the machine has not the bytes that a load needs."""

    def __init__(self, what: str, needed: int | None, free: int | None) -> None:
        self.what, self.needed, self.free = what, needed, free
        needs = "more memory than there is" if needed is None else f"{needed / 2**20:,.0f} MiB"
        has = "" if free is None else f"; {free / 2**20:,.0f} MiB are free"
        super().__init__(f"{what} needs {needs}{has}")


class AllocationFailed(MemoryNotEnough):
    """It was tried, and failed: whoever thought that it would fit was wrong."""


class ModelFileUnusable(ArrieroError):
    """A GGUF file cannot be had or read."""


class ModelFileMissing(ModelFileUnusable):
    """The file, or the package that carries it, is not there."""


class ModelFileDamaged(ModelFileUnusable):
    """The file is there, but it is not a whole GGUF file."""

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"{path} is not a usable GGUF file: {reason}")


class ModelUnsupported(ModelFileUnusable):
    """The file is whole, but this version of llama.cpp cannot run it as asked."""

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"{path} cannot be served: {reason}")


class DownloadFailed(ModelFileUnusable):
    """The file could not be fetched, or is not the one that was asked for."""


class FailureReason(StrEnum):
    """Why an attempt failed: what retry conditions and counters name."""

    INVALID_OUTPUT = "invalid_output"
    INVALID_REQUEST = "invalid_request"
    TEMPLATE_ERROR = "template_error"
    CONTEXT_EXCEEDED = "context_exceeded"
    TIMEOUT = "timeout"
    ENGINE_ERROR = "engine_error"
    HTTP_4XX = "http_4xx"
    HTTP_5XX = "http_5xx"
    #: The server asks to come back later (429).
    HTTP_THROTTLED = "http_throttled"
    #: No address, no connection, no encryption, or a connection that broke.
    HTTP_UNREACHABLE = "http_unreachable"
    #: The call is not allowed.
    HTTP_REFUSED = "http_refused"
    #: An answer that is of no use: another status than was expected below 400, too long, broken.
    HTTP_UNUSABLE = "http_unusable"
    #: A run that was called, or an item of a map, did not succeed.
    CHILD_FAILED = "child_failed"
    #: A run that was called was one too many.
    REJECTED = "rejected"
    WORKER_LOST = "worker_lost"
    WORKER_STOPPED = "worker_stopped"
    CANCELLED = "cancelled"
    INTERNAL = "internal"


class StepFailure(ArrieroError):
    """One attempt of a step ended badly."""

    def __init__(
        self,
        reason: FailureReason,
        message: str,
        *,
        text: str | None = None,
        status: int | None = None,
        retry_after: timedelta | None = None,
    ) -> None:
        self.reason, self.message = reason, message
        #: What the model wrote, or the server answered, kept for inspection.
        self.text = text
        #: What the server answered, of HTTP's statuses.
        self.status = status
        #: The server wants no other attempt before.
        self.retry_after = retry_after
        super().__init__(message)
