"""Invalid messages and keys in the broker: they become dead letters, and workers continue immediately."""

from __future__ import annotations

import base64
import json

import pytest
import redis
from pytest_celery import CeleryTestWorker

from app.kernel.dead_letters import KEPT, DeadLetters
from app.workflows.runs.messages import RUN_STEP
from app.workflows.state_machine.states import RunState
from tests.faults.conftest import Cluster, generate, lattice, until

SEPARATOR = "\x06\x16"


def poison_messages() -> list[bytes]:
    """Messages that would end a worker, block a thread, or be delivered without end."""
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
def client(cluster: Cluster) -> redis.Redis:
    return redis.Redis.from_url(cluster._valkey.url, protocol=2)


def count_dead_letters(client: redis.Redis) -> int:
    return sum(DeadLetters(client).counts().values())


def flood(client: redis.Redis, *queues: str) -> int:
    """Put all poison messages in front of the messages of the queues. Returns their number."""
    count = 0
    for queue in queues:
        for key in (queue, f"{queue}{SEPARATOR}3"):
            for raw in poison_messages():
                client.rpush(key, raw)
                count += 1
    return count


def assert_never_restarted(*nodes: CeleryTestWorker) -> None:
    for node in nodes:
        assert node.container.child.alive
        assert node.container.log().count(b"worker_ready") == 1


def test_a_control_worker_stores_dead_letters_and_continues(cluster: Cluster, client: redis.Redis) -> None:
    """With poison messages in its queues, the same process executes the runs behind them."""
    run_id = cluster.submit(lattice(1))
    count = flood(client, "io", "control")
    worker = cluster.control()
    assert worker.ready()

    until(lambda: cluster.state(run_id) == RunState.SUCCEEDED)
    until(lambda: count_dead_letters(client) == count)
    again = flood(client, "io", "control")
    after = cluster.submit(lattice(1))
    until(lambda: cluster.state(after) == RunState.SUCCEEDED)
    until(lambda: count_dead_letters(client) == count + again)

    assert_never_restarted(worker)
    letters = DeadLetters(client)
    assert {letter.reason for letter in letters.newest(KEPT)} == {
        "unreadable", "too_large", "unknown_task", "wrong_arguments",
    }  # fmt: skip
    assert max(len(letter.message) for letter in letters.newest(KEPT)) <= 4 * 2048
    assert b"message_dead_lettered" in worker.container.log()
    assert client.hlen("unacked") == 0, "no message is delivered again"


def test_a_pool_stores_dead_letters_and_continues(cluster: Cluster, client: redis.Redis) -> None:
    """The same for the queue of a model, which also has a key of the wrong type."""
    run_id = cluster.submit(generate(4))
    (queue,) = {name.split(SEPARATOR)[0] for key in client.keys("model.*") if (name := key.decode())}
    count = flood(client, queue)
    client.set(f"{queue}{SEPARATOR}7", "a text")
    pool = cluster.pool()
    assert pool.ready()

    until(lambda: cluster.state(run_id) == RunState.SUCCEEDED)
    until(lambda: count_dead_letters(client) == count + 1)
    assert_never_restarted(pool)


def test_keys_of_the_wrong_type_become_dead_letters(cluster: Cluster, client: redis.Redis) -> None:
    """All keys that a consumer reads or writes, before its start and while it runs."""
    names = [
        "io", "control", f"io{SEPARATOR}3", f"control{SEPARATOR}8", "unacked", "unacked_index", "_kombu.binding.io",
        "_kombu.binding.control", "_kombu.binding.celery.pidbox", "_kombu.binding_permanent.io",
    ]  # fmt: skip

    def break_keys() -> None:
        with client.pipeline() as pipeline:
            for name in names:
                pipeline.delete(name)
                if name == "unacked_index" or name.startswith("_kombu"):
                    pipeline.rpush(name, "x")
                else:
                    pipeline.set(name, "x")
            pipeline.execute()

    break_keys()
    worker = cluster.control()
    assert worker.ready()
    run_id = cluster.submit(lattice(2))
    until(lambda: cluster.state(run_id) == RunState.SUCCEEDED)
    assert count_dead_letters(client) == len(names)

    break_keys()
    until(lambda: count_dead_letters(client) == 2 * len(names))
    after = cluster.submit(lattice(2))
    until(lambda: cluster.state(after) == RunState.SUCCEEDED)
    assert_never_restarted(worker)
    kept = {key.decode().removeprefix("arriero:dead-letters:key:") for key in client.keys("arriero:dead-letters:key:*")}
    assert kept == set(names)
    assert DeadLetters(client).clear() > 0
    assert not client.keys("arriero:dead-letters:key:*")


def test_invalid_broadcasts_and_unacknowledged_messages_end_no_worker(cluster: Cluster, client: redis.Redis) -> None:
    worker = cluster.control()
    assert worker.ready()
    for number, raw in enumerate((b"hello", b"7", b"[1]", b'["a", "b", "c"]', b"\xff", b"[" * 10_000)):
        client.hset("unacked", f"tag-{number}", raw)
        client.zadd("unacked_index", {f"tag-{number}": 1.0})
    for raw in (*poison_messages(), json.dumps({"properties": {}, "body": 3}).encode()):
        assert client.publish("/0.celery.pidbox", raw) >= 1

    until(lambda: client.hlen("unacked") == 0 and client.zcard("unacked_index") == 0)
    run_id = cluster.submit(lattice(1))
    until(lambda: cluster.state(run_id) == RunState.SUCCEEDED)
    assert_never_restarted(worker)


@pytest.mark.storm
def test_invalid_keys_of_beat_become_dead_letters(cluster: Cluster, client: redis.Redis) -> None:
    """A beat continues to tick after its schedule, its entries or its lock were overwritten."""
    client.rpush("redbeat::schedule", "x")
    client.set("redbeat::statics", "x")
    client.set("redbeat:sweep", "x")
    beat = cluster.beat()
    assert beat.ready()
    until(lambda: client.llen("control") > 2)

    for break_it in (
        lambda: client.set("redbeat::schedule", "x"),
        lambda: (client.delete("redbeat:sweep"), client.rpush("redbeat:sweep", "x")),
        lambda: client.hset("redbeat:sweep", mapping={"definition": "no json", "meta": "7"}),
        lambda: client.hset("redbeat:sweep", mapping={"definition": '{"name": 1}', "meta": '{"x": []}'}),
        lambda: client.hset("redbeat:sweep", mapping={"definition": "[" * 100_000, "meta": "{}"}),
        lambda: client.set("redbeat::lock", "a lock without a time to live"),
        lambda: (client.delete("redbeat::lock"), client.rpush("redbeat::lock", "x")),
        lambda: (
            client.hset("redbeat:other", "definition", "[]"),
            client.zadd("redbeat::schedule", {"redbeat:other": 0}),
        ),
    ):
        break_it()
        client.delete("control")
        # The job whose entry is broken: the others would tick anyway.
        until(lambda: sum(b"run_sweep" in message for message in client.lrange("control", 0, -1)) > 2)
    assert beat.container.child.alive
