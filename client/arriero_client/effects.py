"""
What an operation asks its transport to do, as values.

An operation is a generator: it yields effects, is sent their results, and returns its own. It does no input and output
itself, so that one operation serves the synchronous and the asynchronous client.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Request:
    """An HTTP request. Times are in seconds."""

    method: str
    #: Below the address of the server.
    path: str
    query: Mapping[str, Any] = field(default_factory=dict)
    #: Sent as JSON.
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    #: Parts of a form: fields, and one file with its name and content.
    form: Mapping[str, str] = field(default_factory=dict)
    file: tuple[str, bytes] | None = None
    #: For the answer to begin, and between two parts of it; None: that of the client.
    timeout: float | None = None
    #: Whether sending it twice does no more than sending it once.
    repeatable: bool = True


@dataclass(frozen=True, slots=True)
class Reply:
    """An HTTP answer."""

    status: int
    #: Names in lower case.
    headers: Mapping[str, str]
    #: Empty for a stream that was opened.
    content: bytes
    #: Seconds from the request to the end of the answer.
    seconds: float


@dataclass(frozen=True, slots=True)
class Open:
    """Send a request and read only the head of the answer; an error is read as a whole. Its result is a Reply."""

    request: Request


@dataclass(frozen=True, slots=True)
class Read:
    """Read the next bytes of the opened stream. Its result is bytes, or None at the end."""


@dataclass(frozen=True, slots=True)
class Sleep:
    """Wait."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Clock:
    """Its result is the time of a monotonic clock in seconds."""


@dataclass(frozen=True, slots=True)
class Emit:
    """Hand a value to whoever iterates over the operation."""

    value: Any


@dataclass(frozen=True, slots=True)
class Together:
    """
    Do several operations, at most `limit` of them at a time.

    Its result is a list with the result of each in order, or the ClientError that it raised.
    """

    operations: Sequence[Callable[[], Operation[Any]]]
    limit: int


Effect: TypeAlias = Request | Open | Read | Sleep | Clock | Emit | Together
#: An operation that returns a T. A transport throws ConnectionLost into it.
Operation: TypeAlias = Generator[Effect, Any, T]


class ConnectionLost(Exception):
    """The server could not be reached, or did not answer in time."""

    def __init__(self, message: str, *, sent: bool = True, timed_out: bool = False) -> None:
        #: Whether the request may have reached the server.
        self.sent = sent
        self.timed_out = timed_out
        super().__init__(message)
