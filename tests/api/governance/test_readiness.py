"""Readiness by component: what each outage looks like."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text

from app.api.main import serve
from app.api.services import Services
from app.fleet.hosts import Hosts
from app.governance.health import components, signs
from app.kernel import broker
from app.kernel.broker import CeleryPublisher
from app.kernel.database import Database
from app.kernel.sections.servers import BrokerSettings
from tests.fleet.granting import LEASE, cpu_report
from workers.governance.sign_of_life import SignOfLife

ALL = ("database", "broker", "beat", "control", "agents")


@pytest.fixture
def healthy(database: Database, valkey: Any) -> None:
    """Signs of everything that belongs to an installation."""
    valkey.set("redbeat::lock", "beat", px=60_000)
    valkey.set(signs.key("control@here"), "0.5")
    Hosts(database, LEASE, LEASE).join("here", "here", 8, [cpu_report("here/cpu")], {})


def states(client: TestClient) -> dict[str, str]:
    found = client.get("/readyz").json()
    return {name: found[name] for name in ALL}


def wrong(client: TestClient, status: int) -> dict[str, str]:
    """What is not ok; the status must be this one, and 503 for whoever requires it."""
    answer = client.get("/readyz")
    assert answer.status_code == status, answer.text
    found = {name: answer.json()[name] for name in ALL if answer.json()[name] != "ok"}
    assert answer.json()["degraded"] is bool(found)
    for name in ALL:
        required = client.get("/readyz", params={"require": name}).status_code
        goes_on = found.get(name, "degraded").startswith("degraded")
        assert required == (200 if status == 200 and goes_on else 503)
    return found


@pytest.mark.usefixtures("healthy")
def test_all_is_well(client: TestClient) -> None:
    assert wrong(client, 200) == {}
    assert client.get("/readyz", params={"require": "weather"}).status_code == 422


@pytest.mark.usefixtures("healthy")
def test_no_beat(client: TestClient, valkey: Any) -> None:
    valkey.delete("redbeat::lock")
    found = wrong(client, 200)
    assert found.keys() == {"beat"}
    assert found["beat"].startswith("no beat runs")


@pytest.mark.usefixtures("healthy")
def test_no_control_worker(client: TestClient, valkey: Any) -> None:
    valkey.delete(signs.key("control@here"))
    assert wrong(client, 200).keys() == {"control"}


@pytest.mark.usefixtures("healthy")
def test_a_control_worker_that_takes_no_messages(client: TestClient, valkey: Any) -> None:
    valkey.set(signs.key("control@here"), "300")
    assert "has begun a scheduled job for 300 s" in wrong(client, 200)["control"]
    valkey.delete("redbeat::lock")
    assert wrong(client, 200).keys() == {"beat"}, "without a beat there is nothing to take"


@pytest.mark.usefixtures("healthy")
def test_an_agent_that_is_gone(client: TestClient, database: Database, publisher: CeleryPublisher) -> None:
    Hosts(database, LEASE, LEASE).join("there", "there", 8, [cpu_report("there/cpu")], {})
    with database.work() as work:
        work.run(text("UPDATE host SET agent_until = now() - interval '1 minute' WHERE name = 'there'"))
    found = wrong(client, 200)
    assert found == {"agents": "degraded: 1 of 2 agents are not alive"}
    assert "there" not in str(found), "anybody may read it"
    state = components.read(database, publisher)[components.Component.AGENTS]
    assert state.hosts == ("there",), "an operator sees which one"
    with database.work() as work:
        work.run(text("UPDATE host SET agent_until = now() - interval '1 minute'"))
    assert wrong(client, 200) == {"agents": "no agent is alive, so no pool is started"}


def test_no_agent_has_ever_joined(client: TestClient) -> None:
    assert "no agent has ever joined" in states(client)["agents"]


@pytest.mark.usefixtures("healthy")
def test_the_broker_is_down(services: Services) -> None:
    nowhere = "redis://127.0.0.1:1/0"
    publisher = CeleryPublisher(broker.celery_app(nowhere, BrokerSettings()), nowhere)
    client = TestClient(serve(replace(services, publisher=publisher)), base_url="http://localhost")
    found = wrong(client, 503)
    publisher.close()
    assert found.keys() == {"broker", "beat", "control"}
    assert found["beat"].startswith("unknown: ")
    assert "is unreachable" in found["broker"] or "does not answer" in found["broker"]


@pytest.mark.usefixtures("healthy")
def test_the_database_is_down(services: Services) -> None:
    database = Database("postgresql://arriero@127.0.0.1:1/arriero", pool_size=1)
    client = TestClient(serve(replace(services, database=database)), base_url="http://localhost")
    found = wrong(client, 503)
    database.close()
    assert found.keys() == {"database", "agents"}
    assert found["agents"].startswith("unknown: ")


def test_a_control_worker_gives_signs_of_life_until_it_ends(valkey: Any, redis_url: str) -> None:
    sign = SignOfLife(redis_url, "control@here", lambda: 1.25)
    sign._closed.set()
    sign._closed.wait = lambda _=None: True  # type: ignore[method-assign] # one renewal
    sign._closed.is_set = iter([False, True]).__next__  # type: ignore[method-assign] # the second look ends it
    sign.start()
    sign._thread.join(60)
    assert signs.age(valkey.get(signs.key("control@here")).encode()) == pytest.approx(1.2, abs=0.1)
    assert 0 < valkey.pttl(signs.key("control@here")) <= signs.LASTS / timedelta(milliseconds=1)
    sign.close()
    assert valkey.get(signs.key("control@here")) is None
