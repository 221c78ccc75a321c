"""One exchange with the server: a request, its retries, and its errors as exceptions."""

from __future__ import annotations

import json
import random
import uuid
from dataclasses import dataclass
from typing import Any

from arriero_client import errors
from arriero_client.effects import ConnectionLost, Open, Operation, Reply, Request, Sleep
from arriero_client.errors import ClientError, ConnectionFailed, InvalidAnswer, TimedOut

#: Statuses after which a request is sent again: the server has done nothing.
_AGAIN = frozenset({429, 503})


@dataclass(frozen=True, slots=True)
class Retries:
    """
    When a request is sent again: after a lost connection and the statuses 429 and 503. Times are in seconds.

    A server that names a time (`Retry-After`) is obeyed, if the time is not above `most`.
    """

    #: Attempts in all; 1 means no retries.
    attempts: int = 6
    #: The longest first pause. Each further one may be twice as long as the one before, and at most `most`.
    first: float = 0.5
    most: float = 30.0

    def pause(self, attempt: int, wanted: float | None) -> float | None:
        """The pause after an attempt, counted from 1; None when there is no other attempt."""
        if attempt >= self.attempts or (wanted is not None and wanted > self.most):
            return None
        longest = min(self.first * 2.0 ** (attempt - 1), self.most)
        jittered = longest * (0.5 + random.random() / 2)
        return jittered if wanted is None else max(wanted, jittered)


def send(request: Request, retries: Retries) -> Operation[Reply]:
    """Send a request until it is answered. Raises ApiError, ConnectionFailed, TimedOut."""
    reply: Reply = yield from _attempts(request, request, retries)
    return reply


def open_stream(request: Request, retries: Retries) -> Operation[Reply]:
    """Open a stream. Raises what `send` raises."""
    reply: Reply = yield from _attempts(Open(request), request, retries)
    return reply


def send_json(request: Request, retries: Retries) -> Operation[Any]:
    """Send a request, and return the document of the answer. Raises InvalidAnswer in addition to what `send` raises."""
    reply = yield from send(request, retries)
    return document(reply)


def document(reply: Reply) -> Any:
    """Return the JSON document of an answer. Raises InvalidAnswer."""
    try:
        return json.loads(reply.content)
    except (ValueError, RecursionError) as error:
        text = reply.content[:500].decode("utf-8", "replace")
        raise InvalidAnswer(f"the answer is not JSON ({error}): is this an Arriero server?", text) from None


def new_key() -> str:
    """Return a new idempotency key."""
    return str(uuid.uuid4())


def _attempts(effect: Request | Open, request: Request, retries: Retries) -> Operation[Reply]:
    attempt = 0
    while True:
        attempt += 1
        wanted: float | None = None
        failure: ClientError
        try:
            reply: Reply = yield effect
        except ConnectionLost as lost:
            failure = TimedOut(str(lost)) if lost.timed_out else ConnectionFailed(str(lost))
            if (lost.sent and not request.repeatable) or lost.timed_out:
                raise failure from lost
        else:
            if reply.status < 400:
                return reply
            failure = errors.of_reply(reply)
            if reply.status not in _AGAIN:
                raise failure
            wanted = errors.retry_after(reply.headers)
        pause = retries.pause(attempt, wanted)
        if pause is None:
            raise failure
        yield Sleep(pause)
