"""
Messages as workers take them: each is read as what anybody may have written, and built anew from what was checked.

Nothing of a message reaches Celery but the task, its arguments, its id, when it expires and what Flower shows of it. So
no header, body or tag that somebody made up can stop a consumer, or cost it a slot.

Nothing here reads the broker.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from app.kernel.dead_letters import Reason
from app.scheduler.tasks import DEFRAGMENT, RECONCILE
from app.workflows.runs.messages import RUN_STEP
from workers.messaging import timetable

#: Bytes of a message; ours have some 1,200.
LARGEST = 64 * 1024
#: Characters of an id, and of what Flower shows.
_ID, _SHOWN = 100, 500
#: Attempts fit into Postgres's integers.
_ATTEMPTS = 2**31


class Poison(Exception):
    """A message that no worker can take."""

    def __init__(self, reason: Reason, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(detail)


@dataclass(frozen=True, slots=True)
class _Given:
    """The parts of a message that count."""

    task: str
    arguments: list[Any]
    #: Celery's id of it, where it has one.
    id: str
    expires: str | None
    shown: str


def taken(raw: bytes, queue: str, priority: int, tag: str) -> bytes:
    """
    The message as Celery reads it, with a delivery tag of our own.

    Raises Poison.
    """
    if len(raw) > LARGEST:
        raise Poison(Reason.TOO_LARGE, f"{len(raw)} bytes; {LARGEST} at the most")
    given = _given(_object(_json(raw), "the message"))
    accepts = TASKS.get(given.task)
    if accepts is None:
        raise Poison(Reason.UNKNOWN_TASK, f"there is no task {given.task[:_ID]!r}")
    if not accepts(given.arguments):
        raise Poison(Reason.WRONG_ARGUMENTS, f"{given.task} does not take {json.dumps(given.arguments)[:_ID]}")
    return json.dumps(_built(given, queue, priority, tag)).encode()


def _built(given: _Given, queue: str, priority: int, tag: str) -> dict[str, Any]:
    """As Celery's second protocol has it: https://docs.celeryq.dev/en/stable/internals/protocol.html."""
    nothing = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    id_ = given.id or tag
    return {
        "body": base64.b64encode(json.dumps([given.arguments, {}, nothing]).encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {
            "lang": "py",
            "task": given.task,
            "id": id_,
            "shadow": None,
            "eta": None,
            "expires": given.expires,
            "group": None,
            "group_index": None,
            "retries": 0,
            "timelimit": [None, None],
            "root_id": id_,
            "parent_id": None,
            "argsrepr": given.shown,
            "kwargsrepr": "",
            "ignore_result": True,
            "replaced_task_nesting": 0,
            "stamped_headers": None,
            "stamps": {},
        },
        "properties": {
            "correlation_id": id_,
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": queue},
            "priority": priority,
            "body_encoding": "base64",
            "delivery_tag": tag,
        },
    }


def _given(message: dict[str, Any]) -> _Given:
    headers = _object(message.get("headers"), "headers")
    body = message.get("body")
    try:
        decoded = base64.b64decode(body, validate=True) if isinstance(body, str) else b""
    except (binascii.Error, ValueError) as error:
        raise Poison(Reason.UNREADABLE, f"body is no base64: {error}") from None
    parts = _json(decoded)
    if not isinstance(parts, list) or len(parts) != 3 or not isinstance(parts[0], list):
        raise Poison(Reason.UNREADABLE, "body is no list of arguments, keywords and what follows")
    task = headers.get("task")
    if not isinstance(task, str):
        raise Poison(Reason.UNREADABLE, "headers.task is no text")
    if parts[1] != {} or (isinstance(parts[2], dict) and any(parts[2].values())):
        raise Poison(Reason.WRONG_ARGUMENTS, f"{task[:_ID]} takes neither keywords nor tasks that follow")
    id_, shown = headers.get("id"), headers.get("argsrepr")
    return _Given(
        task,
        parts[0],
        id_ if isinstance(id_, str) and len(id_) <= _ID else "",
        _instant(headers.get("expires")),
        shown[:_SHOWN] if isinstance(shown, str) else "",
    )


def _instant(value: object) -> str | None:
    """When nobody needs the message any more, with a year that every arithmetic takes."""
    if value is None:
        return None
    try:
        found = datetime.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        found = None
    if found is None or found.tzinfo is None or not 2000 <= found.year <= 9000:
        raise Poison(Reason.UNREADABLE, "headers.expires is no instant")
    return found.isoformat()


def _json(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Poison(Reason.UNREADABLE, f"no JSON: {error}") from None


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Poison(Reason.UNREADABLE, f"{name} is no object")
    return value


def _is_step(arguments: list[Any]) -> bool:
    match arguments:
        case [str(step_id), int(attempt)] if not isinstance(attempt, bool) and 0 < attempt < _ATTEMPTS:
            try:
                return str(UUID(step_id)) == step_id.lower()
            except ValueError:
                return False
    return False


def _is_nothing(arguments: list[Any]) -> bool:
    return not arguments


#: What workers do, and which arguments each takes.
TASKS: Mapping[str, Callable[[list[Any]], bool]] = {
    RUN_STEP: _is_step,
    timetable.SWEEP: _is_nothing,
    timetable.EXPIRE: _is_nothing,
    timetable.SCHEDULES: _is_nothing,
    RECONCILE: _is_nothing,
    DEFRAGMENT: _is_nothing,
}
