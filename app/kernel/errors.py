"""
Every error that Arriero raises on purpose.

    ArrieroError
    ├── InvalidInput                the input is invalid; contains every problem found
    │   ├── InvalidDefinition       a workflow
    │   ├── InvalidSettings         arriero.toml, the environment, the command line
    │   └── InvalidCatalog          a catalogue of models
    ├── BodyTooLarge                a request body exceeds its size limit
    ├── PayloadTooLarge             inputs, an output or an event exceed their size limit
    ├── NotFound                    nothing has this name or id
    ├── Conflict                    the resource exists, but its state does not allow the request
    │   ├── IdempotencyKeyReused    the key was used for another request
    │   ├── EventKeyReused          the key was used for another event of the run
    │   ├── ConcurrencyLimitReached the concurrency key has no room for another run
    │   ├── InvalidTransition       the table of transitions has no such edge
    │   └── DataDirectoryHeld       another process tree runs on the data directory
    ├── BudgetUsedUp                a hard budget has nothing left; new work is refused until its period is over
    ├── LeaseLost                   the lease has expired or has another holder
    ├── Unavailable                 a required part is not available
    │   ├── DatabaseUnreachable
    │   ├── DatabaseDenied          the role of the database may not do this
    │   ├── UnfitPooler             a pooler in front of Postgres takes away what is needed
    │   ├── DatabaseBehind          its schema does not have the revision of this version
    │   ├── DatabaseAhead           its schema is of a later version, which this one does not work with
    │   ├── RowsLocked              another transaction has locked the rows, and the caller does not wait
    │   ├── BrokerUnreachable
    │   ├── ServerNotStarted        an embedded server or a child process did not start
    │   └── MemoryNotEnough         the device or the machine has less free memory than a load needs
    │       └── AllocationFailed    an allocation was tried and failed
    ├── ModelFileUnusable           a GGUF file is not available or not readable
    │   ├── ModelFileMissing
    │   ├── ModelFileDamaged
    │   ├── ModelUnsupported        a complete file, but unsupported by this version of llama.cpp or for this use
    │   ├── DownloadFailed
    │   └── ModelServerUnusable     a model has no file but a server, which may not be called from here
    └── StepFailure                 one attempt of a step failed; its retry policy decides what follows

Errors of libraries are translated where they enter. HTTP statuses and exit codes are defined elsewhere:
`app/api/main.py` and `app/cli/__init__.py` have one table each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path

#: Most characters of a message that is stored with a run.
MESSAGE_CHARACTERS = 2_000


def shortened(message: str, max_characters: int = MESSAGE_CHARACTERS) -> str:
    """
    Return the message in a form that Postgres can store, cut to a maximum length: it may quote a value of any length.

    A cut message ends with the number of omitted characters. NUL and lone surrogates are replaced.
    """
    kept = (
        message
        if len(message) <= max_characters
        else f"{message[:max_characters]}… ({len(message) - max_characters} more characters)"
    )
    return kept.replace("\x00", "\ufffd").encode(errors="replace").decode()


class ArrieroError(Exception):
    """The root of all errors that Arriero raises on purpose."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem of an input: its place, what is wrong, and what would be accepted."""

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
    """The input is invalid. Nothing was stored."""

    #: The kind of input, for the message.
    what = "input"

    def __init__(self, problems: Sequence[Problem], what: str | None = None) -> None:
        self.problems = tuple(problems)
        if what is not None:
            self.what = what
        lines = "\n".join(f"  {problem}" for problem in self.problems)
        super().__init__(f"invalid {self.what}:\n{lines}")


class InvalidDefinition(InvalidInput):
    """A workflow definition is invalid."""

    what = "workflow"


class InvalidSettings(InvalidInput):
    """A setting has an invalid value or does not exist."""

    what = "settings"


class InvalidCatalog(InvalidInput):
    """A catalogue of models has an invalid entry."""

    what = "model catalogue"


class BodyTooLarge(ArrieroError):
    """A request body has more bytes than allowed."""

    def __init__(self, limit: int, setting: str = "api.max_body_bytes") -> None:
        self.limit = limit
        super().__init__(f"the body is larger than {limit} bytes (setting {setting})")


class PayloadTooLarge(ArrieroError):
    """Inputs, an output or an event are longer than the limit for storage."""

    def __init__(self, what: str, size: int, limit: int) -> None:
        self.what, self.size, self.limit = what, size, limit
        super().__init__(
            f"{what}: {size} bytes as JSON; at most {limit} can be stored (setting runs.max_payload_bytes)"
        )


class NotFound(ArrieroError):
    """Nothing of this kind has this name or id."""

    def __init__(self, kind: str, name: str, known: Sequence[str] = (), *, where: str = "") -> None:
        self.kind, self.name, self.known = kind, name, tuple(known)
        #: The field of the request that names it, if it is one.
        self.where = where
        hint = f"; there are: {', '.join(self.known)}" if self.known else ""
        super().__init__(f"no {kind} {name!r}{hint}")


class Conflict(ArrieroError):
    """The resource exists, but its state does not allow the request."""


class IdempotencyKeyReused(Conflict):
    """The key was used before, for a request with different content."""

    def __init__(self, key: str, run_id: str) -> None:
        self.key, self.run_id = key, run_id
        super().__init__(
            f"idempotency key {key!r} belongs to run {run_id}, which was submitted with different content "
            "(workflow, version, inputs, priority, rank, labels, deadline, retention); "
            "submit this one under another key"
        )


class EventKeyReused(Conflict):
    """The key was used before, for another event of the same run."""

    def __init__(self, key: str, event_id: str, name: str) -> None:
        self.key, self.event_id, self.name = key, event_id, name
        super().__init__(
            f"idempotency key {key!r} belongs to event {event_id} ({name!r}), "
            "which was sent with another name or payload; send another event under another key"
        )


class ConcurrencyLimitReached(Conflict):
    """The concurrency key has as many running runs as the workflow allows."""

    def __init__(self, workflow: str, key: str, limit: int) -> None:
        self.workflow, self.key, self.limit = workflow, key, limit
        super().__init__(
            f"{limit} run(s) of {workflow} with the concurrency key {key!r} are in progress, which is the limit"
        )


class InvalidTransition(Conflict):
    """The current state has no transition for the event."""

    def __init__(self, subject: str, state: str, event: str) -> None:
        self.subject, self.state, self.event = subject, state, event
        super().__init__(f"{subject} is {state}; that state does not allow: {event}")


class DataDirectoryHeld(Conflict):
    """Another process tree runs on the data directory."""

    def __init__(self, path: Path, pid: int, since: datetime, command: str) -> None:
        self.path, self.pid, self.since, self.command = path, pid, since, command
        super().__init__(
            f"{path} is in use by process {pid} ({command}) since {since:%Y-%m-%d %H:%M:%S %Z}; "
            "stop that one, or choose another directory with --data-dir or ARRIERO_DATA_DIR"
        )


class BudgetUsedUp(ArrieroError):
    """A hard budget has nothing left. Nothing was stored; what was accepted before goes on."""

    def __init__(self, message: str, *, budget: str, resets_at: datetime) -> None:
        self.budget, self.resets_at = budget, resets_at
        super().__init__(message)


class LeaseLost(ArrieroError):
    """The lease has expired or has another holder; the work must be dropped."""


class Unavailable(ArrieroError):
    """A required part is not available now."""


class DatabaseUnreachable(Unavailable):
    """No connection to Postgres."""


class DatabaseDenied(Unavailable):
    """The role with which this process logs in to Postgres may not do this."""


class UnfitPooler(Unavailable):
    """A pooler in front of Postgres takes away what the programs need."""


class DatabaseBehind(Unavailable):
    """The schema of the database does not have the revision that this version needs."""

    def __init__(self, current: str | None, head: str) -> None:
        self.current, self.head = current, head
        super().__init__(
            f"the database is at revision {current or 'none (empty)'}, this version needs {head}; "
            "run `arriero db upgrade`"
        )


class DatabaseAhead(Unavailable):
    """The schema is of a later version, and has lost what this version needs."""

    def __init__(self, current: str, head: str) -> None:
        self.current, self.head = current, head
        super().__init__(
            f"the database is at revision {current} of a later version, which programs at {head} do not work with; "
            "upgrade this program"
        )


class RowsLocked(Unavailable):
    """Another transaction has locked the rows, and the caller does not wait for them."""


class BrokerUnreachable(Unavailable):
    """No connection to Redis or Valkey."""


class ServerNotStarted(Unavailable):
    """A server or child process did not start in time, or ended at once."""

    def __init__(self, name: str, reason: str, log: str = "") -> None:
        self.name, self.reason, self.log = name, reason, log
        super().__init__(f"{name} did not start: {reason}" + (f"\n{log}" if log else ""))


class MemoryNotEnough(Unavailable):
    """The device or the machine has less free memory than a load needs."""

    def __init__(self, what: str, needed: int | None, free: int | None) -> None:
        self.what, self.needed, self.free = what, needed, free
        needs = "more memory than is available" if needed is None else f"{needed / 2**20:,.0f} MiB"
        has = "" if free is None else f"; {free / 2**20:,.0f} MiB are free"
        super().__init__(f"{what} needs {needs}{has}")


class AllocationFailed(MemoryNotEnough):
    """An allocation was tried and failed: the estimate that it would fit was wrong."""


class ModelFileUnusable(ArrieroError):
    """A GGUF file is not available or not readable."""


class ModelFileMissing(ModelFileUnusable):
    """The file, or the package that contains it, does not exist here."""


class ModelFileDamaged(ModelFileUnusable):
    """The file exists, but it is not a complete file of its format, which is GGUF unless it is named."""

    def __init__(self, path: Path, reason: str, file_format: str = "GGUF") -> None:
        self.path, self.reason = path, reason
        super().__init__(f"{path} is not a usable {file_format} file: {reason}")


class ModelUnsupported(ModelFileUnusable):
    """The file is complete, but this version of llama.cpp cannot serve it in the requested way."""

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"{path} cannot be served: {reason}")


class DownloadFailed(ModelFileUnusable):
    """The file could not be downloaded, or is not the requested one."""


class ModelServerUnusable(ModelFileUnusable):
    """A model has no file: a server serves it, and that may not be called from here."""


class FailureReason(StrEnum):
    """Why an attempt failed. Retry conditions and metrics use these names."""

    INVALID_OUTPUT = "invalid_output"
    #: The text was cut at `max_tokens`, and the step has `on_length: fail`.
    TRUNCATED = "truncated"
    INVALID_REQUEST = "invalid_request"
    TEMPLATE_ERROR = "template_error"
    CONTEXT_EXCEEDED = "context_exceeded"
    TIMEOUT = "timeout"
    ENGINE_ERROR = "engine_error"
    HTTP_4XX = "http_4xx"
    HTTP_5XX = "http_5xx"
    #: The server asks the client to slow down (429).
    HTTP_THROTTLED = "http_throttled"
    #: No address, no connection, no TLS, or a lost connection.
    HTTP_UNREACHABLE = "http_unreachable"
    #: The call is not allowed.
    HTTP_REFUSED = "http_refused"
    #: An unusable answer: an unexpected status below 400, too long, or malformed.
    HTTP_UNUSABLE = "http_unusable"
    #: A run that was called, or an item of a map, did not succeed.
    CHILD_FAILED = "child_failed"
    #: A called run was rejected, because its concurrency key was at its limit.
    REJECTED = "rejected"
    #: A hook refused the request or its result.
    HOOK_REFUSED = "hook_refused"
    #: A hook failed, and its policy is `closed`.
    HOOK_FAILED = "hook_failed"
    WORKER_LOST = "worker_lost"
    WORKER_STOPPED = "worker_stopped"
    CANCELLED = "cancelled"
    INTERNAL = "internal"


class StepFailure(ArrieroError):
    """One attempt of a step failed."""

    def __init__(
        self,
        reason: FailureReason,
        message: str,
        *,
        text: str | None = None,
        finish_reason: str | None = None,
        status: int | None = None,
        retry_after: timedelta | None = None,
    ) -> None:
        self.reason, self.message = reason, message
        #: The text of the model or the answer of the server, kept for inspection.
        self.text = text
        #: Why the text of the model ended, where it did.
        self.finish_reason = finish_reason
        #: The HTTP status of the answer.
        self.status = status
        #: The server asks to wait for this long before the next attempt.
        self.retry_after = retry_after
        super().__init__(message)
