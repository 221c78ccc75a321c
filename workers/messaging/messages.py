"""
Validation of messages: each message is parsed as untrusted input, and built again from its validated parts.

Only the task, its arguments, its id, its expiry and its label in Flower reach Celery. So a forged header, body or tag
can neither stop a consumer nor block one of its threads.

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

from app.governance.jobs.registry import JOBS
from app.kernel.dead_letters import Reason
from app.workflows.runs.messages import RUN_STEP

#: Most bytes of a message; valid ones have about 1,200.
MAX_BYTES = 64 * 1024
#: Most characters of an id, and of the label in Flower.
_MAX_ID, _MAX_LABEL = 100, 500
#: Attempts are below this: they are integers in Postgres.
_ATTEMPT_BOUND = 2**31


class PoisonMessage(Exception):
    """A message that no worker can process."""

    def __init__(self, reason: Reason, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(detail)


@dataclass(frozen=True, slots=True)
class _Parts:
    """The parts of a message that are kept."""

    task: str
    arguments: list[Any]
    #: Its id in Celery; empty when it has none.
    id: str
    expires: str | None
    #: The label in Flower.
    label: str


def validated(raw: bytes, queue: str, priority: int, tag: str) -> bytes:
    """
    Return the message in the form that Celery reads, with `tag` as its delivery tag.

    Raises PoisonMessage.
    """
    if len(raw) > MAX_BYTES:
        raise PoisonMessage(Reason.TOO_LARGE, f"the message has {len(raw)} bytes; at most {MAX_BYTES} are accepted")
    parts = _parsed(_object(_json(raw), "the message"))
    accepts = TASKS.get(parts.task)
    if accepts is None:
        raise PoisonMessage(Reason.UNKNOWN_TASK, f"there is no task {parts.task[:_MAX_ID]!r}")
    if not accepts(parts.arguments):
        raise PoisonMessage(
            Reason.WRONG_ARGUMENTS, f"{parts.task} does not accept {json.dumps(parts.arguments)[:_MAX_ID]}"
        )
    return json.dumps(_built(parts, queue, priority, tag)).encode()


def _built(parts: _Parts, queue: str, priority: int, tag: str) -> dict[str, Any]:
    """Return a message of Celery's protocol 2: https://docs.celeryq.dev/en/stable/internals/protocol.html."""
    nothing = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    id_ = parts.id or tag
    return {
        "body": base64.b64encode(json.dumps([parts.arguments, {}, nothing]).encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {
            "lang": "py",
            "task": parts.task,
            "id": id_,
            "shadow": None,
            "eta": None,
            "expires": parts.expires,
            "group": None,
            "group_index": None,
            "retries": 0,
            "timelimit": [None, None],
            "root_id": id_,
            "parent_id": None,
            "argsrepr": parts.label,
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


def _parsed(message: dict[str, Any]) -> _Parts:
    headers = _object(message.get("headers"), "headers")
    body = message.get("body")
    try:
        decoded = base64.b64decode(body, validate=True) if isinstance(body, str) else b""
    except (binascii.Error, ValueError) as error:
        raise PoisonMessage(Reason.UNREADABLE, f"body is not base64: {error}") from None
    document = _json(decoded)
    if not isinstance(document, list) or len(document) != 3 or not isinstance(document[0], list):
        raise PoisonMessage(Reason.UNREADABLE, "body is not a list of arguments, keyword arguments and callbacks")
    task = headers.get("task")
    if not isinstance(task, str):
        raise PoisonMessage(Reason.UNREADABLE, "headers.task is not a string")
    if document[1] != {} or (isinstance(document[2], dict) and any(document[2].values())):
        raise PoisonMessage(Reason.WRONG_ARGUMENTS, f"{task[:_MAX_ID]} accepts neither keyword arguments nor callbacks")
    id_, label = headers.get("id"), headers.get("argsrepr")
    return _Parts(
        task,
        document[0],
        id_ if isinstance(id_, str) and len(id_) <= _MAX_ID else "",
        _instant(headers.get("expires")),
        label[:_MAX_LABEL] if isinstance(label, str) else "",
    )


def _instant(value: object) -> str | None:
    """Return the expiry of a message, or None. Its year is limited, so that arithmetic with it cannot overflow."""
    if value is None:
        return None
    try:
        found = datetime.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        found = None
    if found is None or found.tzinfo is None or not 2000 <= found.year <= 9000:
        raise PoisonMessage(
            Reason.UNREADABLE, "headers.expires is not an instant with a time zone, of the years 2000 to 9000"
        )
    return found.isoformat()


def _json(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise PoisonMessage(Reason.UNREADABLE, f"it is not JSON: {error}") from None


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise PoisonMessage(Reason.UNREADABLE, f"{name} is not an object")
    return value


def _is_step(arguments: list[Any]) -> bool:
    match arguments:
        case [str(step_id), int(attempt)] if not isinstance(attempt, bool) and 0 < attempt < _ATTEMPT_BOUND:
            try:
                return str(UUID(step_id)) == step_id.lower()
            except ValueError:
                return False
    return False


def _is_nothing(arguments: list[Any]) -> bool:
    return not arguments


#: The tasks of workers, each with a predicate for its arguments.
TASKS: Mapping[str, Callable[[list[Any]], bool]] = {RUN_STEP: _is_step} | {job.task: _is_nothing for job in JOBS}
