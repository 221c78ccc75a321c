"""The broker: measured settings, priorities, and short waits for a broker that does not answer."""

from __future__ import annotations

import json
import os
import signal
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from app.kernel import broker
from app.kernel.broker import PRIORITIES, CeleryPublisher, model_queue
from app.kernel.embedded import ValkeyServer, start_valkey
from app.kernel.errors import BrokerUnreachable
from app.kernel.sections.servers import BrokerSettings
from tests.frozen import frozen


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[ValkeyServer]:
    """A broker for one test only."""
    server = start_valkey(tmp_path / "valkey")
    yield server
    server.stop()


@pytest.fixture
def own_publisher(own_valkey: ValkeyServer) -> Iterator[CeleryPublisher]:
    made = CeleryPublisher(broker.celery_app(own_valkey.url, BrokerSettings()), own_valkey.url)
    yield made
    made.close()


def wait_until(condition: Callable[[], bool]) -> None:
    limit, pause = time.monotonic() + 60, threading.Event()
    while not condition():
        assert time.monotonic() < limit
        pause.wait(0.02)


def test_the_measured_settings_are_in_force() -> None:
    conf = broker.celery_app("redis://h:1/0", BrokerSettings()).conf

    assert conf.task_acks_late is False
    assert (conf.worker_disable_prefetch, conf.worker_prefetch_multiplier) == (True, 1)
    assert conf.task_ignore_result is True
    assert conf.broker_transport_options["visibility_timeout"] == 120
    assert conf.broker_transport_options["unacked_restore_interval"] == 5
    assert conf.accept_content == ["json"]


def test_urls_with_the_schemes_of_valkey_are_accepted() -> None:
    assert broker.celery_app("valkeys://h:1/0", BrokerSettings()).conf.broker_url == "rediss://h:1/0"


def test_the_certificate_of_an_encrypted_broker_is_verified() -> None:
    for url in ("rediss://h:1/0", "valkeys://h:1/0"):
        made = broker.celery_app(url, BrokerSettings()).connection_for_write()
        assert made.ssl == {"ssl_cert_reqs": ssl.CERT_REQUIRED}
    given = "rediss://h:1/0?ssl_cert_reqs=none&ssl_ca_certs=/x"
    assert broker.celery_app(given, BrokerSettings()).connection_for_write().ssl["ssl_ca_certs"] == "/x"
    assert not broker.celery_app("redis://h:1/0", BrokerSettings()).connection_for_write().ssl


def test_each_priority_has_a_list_and_the_depth_counts_all_of_them(
    publisher: CeleryPublisher, valkey: redis.Redis
) -> None:
    for priority in PRIORITIES.values():
        assert publisher.publish("t", ("id", 1), queue="model.x", priority=priority, description="w/s")

    assert sorted(valkey.keys("model.x*")) == ["model.x", "model.x\x06\x163", "model.x\x06\x166"]
    assert publisher.depth("model.x") == 3


def test_a_message_has_two_arguments_and_a_short_description_for_flower(
    publisher: CeleryPublisher, valkey: redis.Redis
) -> None:
    publisher.publish("workers.steps.run_step", ("id", 1), queue="io", description="triage/reply #1")
    message = json.loads(valkey.lrange("io\x06\x163", 0, -1)[0])

    assert message["headers"]["task"] == "workers.steps.run_step"
    assert message["headers"]["argsrepr"] == "triage/reply #1"
    assert len(json.dumps(message)) < 1200


def test_an_unreachable_broker_is_reported_as_such() -> None:
    nowhere = "redis://127.0.0.1:1/0"
    publisher = CeleryPublisher(broker.celery_app(nowhere, BrokerSettings()), nowhere)

    assert publisher.publish("t", (), queue="q") is False
    for call in (publisher.ping, lambda: publisher.depth("q")):
        with pytest.raises(BrokerUnreachable):
            call()
    publisher.close()


def test_model_queues_are_named_by_slugs() -> None:
    assert model_queue("smollm2-135m") == "model.smollm2-135m"


def test_a_silent_broker_delays_only_the_first_caller(own_valkey: ValkeyServer, own_publisher: CeleryPublisher) -> None:
    """A frozen broker accepts connections but does not answer: the first caller waits, the next ones do not."""
    publisher = own_publisher
    assert publisher.publish("t", (), queue="q")
    publisher.ping()

    def took(call: Callable[[], object]) -> float:
        begun = time.monotonic()
        with pytest.raises(BrokerUnreachable):
            call()
        return time.monotonic() - begun

    def publish() -> None:
        if not publisher.publish("t", (), queue="q"):
            raise BrokerUnreachable

    with frozen(own_valkey.pid):
        assert took(publish) < 6, "the timeout is 2 s"
        for call in (publish, publisher.ping, lambda: publisher.depth("q"), publish):
            assert took(call) < 1
    wait_until(lambda: publisher.publish("t", (), queue="q"))
    assert publisher.depth("q") >= 2
    publisher.ping()


@pytest.mark.parametrize("what", ["ping", "depth"])
def test_reads_from_a_silent_broker_time_out_soon(
    own_valkey: ValkeyServer, own_publisher: CeleryPublisher, what: str
) -> None:
    call = {"ping": own_publisher.ping, "depth": lambda: own_publisher.depth("q")}[what]
    call()

    with frozen(own_valkey.pid):
        begun = time.monotonic()
        with pytest.raises(BrokerUnreachable, match="Timeout"):
            call()
        assert time.monotonic() - begun < 6


def test_a_restarted_broker_loses_no_message(own_valkey: ValkeyServer, own_publisher: CeleryPublisher) -> None:
    """The old connections fail at their next use."""
    assert own_publisher.publish("t", (), queue="q")
    assert own_valkey.pid is not None
    os.kill(own_valkey.pid, signal.SIGKILL)
    own_valkey.stop()
    own_valkey.start()

    assert own_publisher.publish("t", (), queue="q")
