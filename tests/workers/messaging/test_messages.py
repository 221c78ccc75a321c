"""Validation of messages: valid ones pass, others are rejected with a reason, and nothing else is raised."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.kernel.broker import CeleryPublisher
from app.kernel.dead_letters import Reason
from app.kernel.settings import Settings
from app.scheduler.wake_up import wake_reconciler
from app.workflows.runs.messages import RUN_STEP
from workers.application import Application
from workers.messaging import messages
from workers.messaging.messages import MAX_BYTES, TASKS, PoisonMessage, validated

STEP = "01a20000-0000-7000-8000-000000000000"
NEVER = "2999-01-01T00:00:00+00:00"


def message(body: Any = None, *, task: Any = RUN_STEP, arguments: Any = (STEP, 1), **headers: Any) -> dict[str, Any]:
    """A message as the publisher sends it, except for the given parts."""
    if body is None:
        body = base64.b64encode(json.dumps([arguments, {}, {"chain": None}]).encode()).decode()
    return {"body": body, "headers": {"task": task, "id": "1", **headers}, "properties": {"delivery_tag": "t"}}


def validated_document(found: Any) -> dict[str, Any]:
    raw = found if isinstance(found, bytes) else json.dumps(found).encode()
    made: dict[str, Any] = json.loads(validated(raw, "io", 3, "tag"))
    return made


def rejection(message: Any) -> Reason:
    with pytest.raises(PoisonMessage) as poison:
        validated_document(message)
    assert poison.value.detail
    assert len(poison.value.detail) < 1000
    return poison.value.reason


def test_messages_of_the_publisher_pass_unchanged(publisher: CeleryPublisher, valkey: redis.Redis) -> None:
    publisher.publish(RUN_STEP, (STEP, 2), queue="io", priority=3, description="triage/reply #2")
    sent = valkey.lindex("io\x06\x163", 0)
    made = json.loads(validated(sent.encode(), "io", 3, "tag"))

    given = json.loads(sent)
    assert json.loads(base64.b64decode(made["body"]))[:2] == [[STEP, 2], {}]
    assert set(given) == set(made), "kombu and Celery have nothing else in a message"
    assert given["headers"].keys() - made["headers"].keys() <= {"origin"}
    assert made["headers"]["argsrepr"] == "triage/reply #2"
    assert made["headers"]["id"] == given["headers"]["id"]
    assert made["properties"]["delivery_info"] == given["properties"]["delivery_info"]
    assert (made["properties"]["priority"], made["properties"]["delivery_tag"]) == (3, "tag")


def test_the_expiry_is_kept(publisher: CeleryPublisher, valkey: redis.Redis) -> None:
    wake_reconciler(publisher)
    sent = valkey.lindex("control", 0)
    assert json.loads(validated(sent.encode(), "control", 0, "tag"))["headers"]["expires"] is not None


def test_applications_of_one_process_have_tasks_of_their_own(redis_url: str, database_url: str) -> None:
    settings = Settings(database_url=database_url, redis_url=redis_url)
    first, second = (Application(settings).celery for _ in range(2))
    assert all(first.tasks[name].app is first and second.tasks[name].app is second for name in TASKS)


def test_every_task_of_a_worker_has_a_predicate(redis_url: str, database_url: str) -> None:
    celery = Application(Settings(database_url=database_url, redis_url=redis_url)).celery
    assert {name for name in celery.tasks if name.startswith(("app.", "workers."))} == set(TASKS)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (b"\xff\xfe", Reason.UNREADABLE),
        (b"", Reason.UNREADABLE),
        (b"hello", Reason.UNREADABLE),
        (b"[" * 60_000, Reason.UNREADABLE),
        (b"1" * 60_000, Reason.UNREADABLE),
        (b"[1, 2]", Reason.UNREADABLE),
        (b"null", Reason.UNREADABLE),
        (b"{}", Reason.UNREADABLE),
        (message("%%%"), Reason.UNREADABLE),
        (message("é"), Reason.UNREADABLE),
        (message(7), Reason.UNREADABLE),
        (message(["a"]), Reason.UNREADABLE),
        (message(base64.b64encode(b"no json").decode()), Reason.UNREADABLE),
        (message(base64.b64encode(b"{}").decode()), Reason.UNREADABLE),
        (message(base64.b64encode(b"[1, 2, 3]").decode()), Reason.UNREADABLE),
        (message(base64.b64encode(b"[" * 40_000).decode()), Reason.UNREADABLE),
        (message(task=["a"]), Reason.UNREADABLE),
        (message(task={}), Reason.UNREADABLE),
        (message(expires="soon"), Reason.UNREADABLE),
        (message(expires="9999-12-31T23:59:59-23:00"), Reason.UNREADABLE),
        (message(expires="2026-01-01T00:00:00"), Reason.UNREADABLE),
        (message(expires=1e400), Reason.UNREADABLE),
        ({"body": "W10=", "headers": "x"}, Reason.UNREADABLE),
        (message(task="celery.backend_cleanup", arguments=[]), Reason.UNKNOWN_TASK),
        (message(task="os.system", arguments=["true"]), Reason.UNKNOWN_TASK),
        (message(task="x" * 10_000), Reason.UNKNOWN_TASK),
        (message(arguments=[]), Reason.WRONG_ARGUMENTS),
        (message(arguments=[STEP]), Reason.WRONG_ARGUMENTS),
        (message(arguments=["no id", 1]), Reason.WRONG_ARGUMENTS),
        (message(arguments=[STEP, "1"]), Reason.WRONG_ARGUMENTS),
        (message(arguments=[STEP, True]), Reason.WRONG_ARGUMENTS),
        (message(arguments=[STEP, 2**31]), Reason.WRONG_ARGUMENTS),
        (message(arguments=[STEP, 1, 2]), Reason.WRONG_ARGUMENTS),
        (message(arguments=[f"{{{STEP}}}", 1]), Reason.WRONG_ARGUMENTS),
        (message(task="workers.jobs.run_sweep"), Reason.WRONG_ARGUMENTS),
        (message(base64.b64encode(b'[[], {"a": 1}, {}]').decode()), Reason.WRONG_ARGUMENTS),
        (message(base64.b64encode(b'[[], {}, {"callbacks": [1]}]').decode()), Reason.WRONG_ARGUMENTS),
        (message(base64.b64encode(b" " * MAX_BYTES).decode()), Reason.TOO_LARGE),
    ],
)  # fmt: skip
def test_an_invalid_message_is_rejected_with_its_reason(found: Any, reason: Reason) -> None:
    assert rejection(found) is reason


def test_no_other_part_of_a_message_reaches_celery() -> None:
    hostile: dict[str, Any] = {
        "retries": "many",
        "timelimit": 7,
        "eta": "2026-01-01T00:00:00Z",
        "shadow": {},
        "lang": [],
    }
    hostile |= {"stamped_headers": 3, "called_directly": False, "hostname": 1, "delivery_info": None, "x": {"y": []}}
    hostile |= {"id": {"a": 1}, "argsrepr": [1]}
    found = message(expires=NEVER, **hostile)
    found |= {"content-type": "application/x-python-serialize", "content-encoding": [], "properties": "none"}

    assert validated_document(found) == validated_document(message(expires=NEVER, id=None))
    assert validated_document(found)["headers"]["id"] == "tag"


slow_machines = settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)


@slow_machines
@given(st.dictionaries(st.sampled_from(["body", "headers", "properties", "x"]), JSON), st.data())
def test_a_message_with_any_change_is_validated_or_rejected(changes: dict[str, Any], data: st.DataObject) -> None:
    found = message() | changes
    if isinstance(found["headers"], dict):
        found["headers"] |= data.draw(st.dictionaries(st.sampled_from(["task", "id", "expires", "argsrepr"]), JSON))
    try:
        made = validated_document(found)
    except PoisonMessage:
        return
    assert made["headers"]["task"] in TASKS


@slow_machines
@given(st.binary(max_size=200), st.integers(0, 400))
def test_any_bytes_are_validated_or_rejected(noise: bytes, at: int) -> None:
    raw = json.dumps(message()).encode()
    for found in (noise, raw[:at] + noise + raw[at:], raw[:at], raw[at:]):
        try:
            made = validated(found, "io", 3, "tag")
        except PoisonMessage:
            continue
        assert messages.validated(made, "io", 3, "tag") == made
