"""Messages and keys that nobody can read: workers put them aside and go on at once."""

from __future__ import annotations

import base64
import json

import pytest
import redis
from pytest_celery import CeleryTestWorker

from app.kernel.dead_letters import KEPT, DeadLetters
from app.workflows.runs.messages import RUN_STEP
from app.workflows.state_machine.states import RunState
from tests.faults.conftest import Stage, generate, lattice, until

SEPARATOR = "\x06\x16"


def poison() -> list[bytes]:
    """One of each kind that ended workers, and some that cost a slot or were done again and again."""
    body = base64.b64encode(b"[[], {}, {}]").decode()

    def message(**changes: object) -> bytes:
        headers = {"task": RUN_STEP, "id": "1", "lang": "py"}
        properties = {
            "delivery_tag": "t",
            "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": "x"},
        }
        whole = {"body": body, "headers": headers, "properties": properties, "content-type": "application/json"}
        return json.dumps(whole | changes).encode()

    return [
        b"hello",
        b"\xff\x00",
        b"[1, 2]",
        b"null",
        b"{}",
        b"[" * 50_000,
        b"x" * 5_000_000,
        message(body="%%%"),
        message(body=7),
        message(body=base64.b64encode(b"no json").decode()),
        message(),
        message(headers={"task": "os.system", "id": "1"}),
        message(headers={"task": ["a"], "id": {}}),
        message(headers=None),
        message(properties={}, body=base64.b64encode(b'[["no id", "x"], {}, {}]').decode()),
        message(properties=None, **{"content-type": "application/x-python-serialize"}),
    ]


@pytest.fixture
def client(stage: Stage) -> redis.Redis:
    return redis.Redis.from_url(stage._valkey.url, protocol=2)


def put_aside(client: redis.Redis) -> int:
    return sum(DeadLetters(client).counts().values())


def flooded(client: redis.Redis, *queues: str) -> int:
    """Put every kind of poison in front of what the queues hold; gives how many."""
    count = 0
    for queue in queues:
        for key in (queue, f"{queue}{SEPARATOR}3"):
            for raw in poison():
                client.rpush(key, raw)
                count += 1
    return count


def assert_it_never_ended(*nodes: CeleryTestWorker) -> None:
    for node in nodes:
        assert node.container.child.alive
        assert node.container.log().count(b"worker_ready") == 1


def test_control_worker_puts_poison_aside_and_does_what_follows(stage: Stage, client: redis.Redis) -> None:
    """Whatever lies in the queues of control workers: the same process does the runs behind it."""
    run_id = stage.submit(lattice(1))
    count = flooded(client, "io", "control")
    worker = stage.control()
    assert worker.ready()

    until(lambda: stage.state(run_id) == RunState.SUCCEEDED)
    until(lambda: put_aside(client) == count)
    again = flooded(client, "io", "control")
    after = stage.submit(lattice(1))
    until(lambda: stage.state(after) == RunState.SUCCEEDED)
    until(lambda: put_aside(client) == count + again)

    assert_it_never_ended(worker)
    letters = DeadLetters(client)
    assert {letter.reason for letter in letters.newest(KEPT)} == {
        "unreadable", "too_large", "unknown_task", "wrong_arguments",
    }  # fmt: skip
    assert max(len(letter.message) for letter in letters.newest(KEPT)) <= 4 * 2048
    assert b"message_dead_lettered" in worker.container.log()
    assert client.hlen("unacked") == 0, "nothing of it comes back"


def test_pool_puts_poison_aside_and_does_what_follows(stage: Stage, client: redis.Redis) -> None:
    """The queue of a model holds the same; and a key of a wrong type."""
    run_id = stage.submit(generate(4))
    (queue,) = {name.split(SEPARATOR)[0] for key in client.keys("model.*") if (name := key.decode())}
    count = flooded(client, queue)
    client.set(f"{queue}{SEPARATOR}7", "a text")
    pool = stage.pool()
    assert pool.ready()

    until(lambda: stage.state(run_id) == RunState.SUCCEEDED)
    until(lambda: put_aside(client) == count + 1)
    assert_it_never_ended(pool)


def test_keys_of_wrong_types_are_put_aside_while_workers_start_and_run(stage: Stage, client: redis.Redis) -> None:
    """Every key that a consumer reads or writes: before its start, and under its hands."""
    names = [
        "io", "control", f"io{SEPARATOR}3", f"control{SEPARATOR}8", "unacked", "unacked_index", "_kombu.binding.io",
        "_kombu.binding.control", "_kombu.binding.celery.pidbox", "_kombu.binding_permanent.io",
    ]  # fmt: skip

    def broken() -> None:
        with client.pipeline() as pipeline:
            for name in names:
                pipeline.delete(name)
                if name == "unacked_index" or name.startswith("_kombu"):
                    pipeline.rpush(name, "x")
                else:
                    pipeline.set(name, "x")
            pipeline.execute()

    broken()
    worker = stage.control()
    assert worker.ready()
    run_id = stage.submit(lattice(2))
    until(lambda: stage.state(run_id) == RunState.SUCCEEDED)
    assert put_aside(client) == len(names)

    broken()
    until(lambda: put_aside(client) == 2 * len(names))
    after = stage.submit(lattice(2))
    until(lambda: stage.state(after) == RunState.SUCCEEDED)
    assert_it_never_ended(worker)
    kept = {key.decode().removeprefix("arriero:dead-letters:key:") for key in client.keys("arriero:dead-letters:key:*")}
    assert kept == set(names)
    assert DeadLetters(client).clear() > 0
    assert not client.keys("arriero:dead-letters:key:*")


def test_what_cannot_be_sent_again_and_what_is_told_to_all_workers(stage: Stage, client: redis.Redis) -> None:
    """Unacknowledged entries and broadcasts that are no messages end no worker either."""
    worker = stage.control()
    assert worker.ready()
    for number, raw in enumerate((b"hello", b"7", b"[1]", b'["a", "b", "c"]', b"\xff", b"[" * 10_000)):
        client.hset("unacked", f"tag-{number}", raw)
        client.zadd("unacked_index", {f"tag-{number}": 1.0})
    for raw in (*poison(), json.dumps({"properties": {}, "body": 3}).encode()):
        assert client.publish("/0.celery.pidbox", raw) >= 1

    until(lambda: client.hlen("unacked") == 0 and client.zcard("unacked_index") == 0)
    run_id = stage.submit(lattice(1))
    until(lambda: stage.state(run_id) == RunState.SUCCEEDED)
    assert_it_never_ended(worker)


def test_keys_of_beat_of_wrong_types_are_put_aside(stage: Stage, client: redis.Redis) -> None:
    """A beat whose schedule, entries or lock were overwritten ticks again by itself."""
    client.rpush("redbeat::schedule", "x")
    client.set("redbeat::statics", "x")
    client.set("redbeat:sweep", "x")
    beat = stage.beat()
    assert beat.ready()
    until(lambda: client.llen("control") > 2)

    for break_it in (
        lambda: client.set("redbeat::schedule", "x"),
        lambda: (client.delete("redbeat:sweep"), client.rpush("redbeat:sweep", "x")),
        lambda: client.hset("redbeat:sweep", mapping={"definition": "no json", "meta": "7"}),
        lambda: client.hset("redbeat:sweep", mapping={"definition": '{"name": 1}', "meta": '{"x": []}'}),
        lambda: client.hset("redbeat:sweep", mapping={"definition": "[" * 100_000, "meta": "{}"}),
        lambda: client.set("redbeat::lock", "a lock without an end"),
        lambda: (client.delete("redbeat::lock"), client.rpush("redbeat::lock", "x")),
        lambda: (
            client.hset("redbeat:other", "definition", "[]"),
            client.zadd("redbeat::schedule", {"redbeat:other": 0}),
        ),
    ):
        break_it()
        client.delete("control")
        until(lambda: client.llen("control") > 2)
    assert beat.container.child.alive
