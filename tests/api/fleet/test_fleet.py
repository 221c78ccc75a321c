"""The fleet over HTTP: its state, operator commands, and rejected requests."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text

from app.api.main import serve
from app.api.services import Services
from app.devices.device import HardwareKind
from app.fleet.holder import HeartbeatReport, ReservationHolder
from app.fleet.hosts import Hosts, PoolEnded
from app.fleet.pool import PoolPhase
from app.kernel.database import Database
from app.scheduler import needs
from app.scheduler.operator_commands import OperatorCommands
from app.workflows.language import check
from app.workflows.runs.submission import Submission
from tests.fleet.granting import LEASE, begun, device_report, granted, simulated_report

MODEL = "smollm2:135m"


@pytest.fixture
def pool(services: Services, database: Database) -> str:
    """A host with a real and a simulated device, and a serving pool on the simulated one."""
    hosts = Hosts(database, LEASE, LEASE)
    devices = [
        device_report(
            "h/cpu", "cpu", kind=HardwareKind.CPU, type_="cpu", total=2000, capacity=1500, used=700, unmanaged=200
        ),
        simulated_report("h/sim-0", "sim-0"),
    ]
    agent = hosts.join("h", "h", 8, devices, {})
    hosts.heartbeat("h", agent, devices, [], ["a driver does not answer"])
    configuration = needs.configuration_id(services.catalog.get(MODEL))
    id_ = granted(database, "h", {"h/sim-0": 600}, configuration=configuration, model=MODEL)
    assert isinstance(id_, str)
    epoch = begun(hosts, "h", agent, id_)
    ReservationHolder(database, LEASE).renew(
        id_, epoch, HeartbeatReport(PoolPhase.SERVING, worker="simulated-pool.x", busy=1)
    )
    return id_


def test_simulated_parts_of_the_fleet_are_marked(client: TestClient, pool: str) -> None:
    found = client.get("/v1/fleet").json()

    (host,) = found["hosts"]
    cpu, simulated = host["devices"]
    assert (host["state"], host["alive"], host["problems"]) == ("schedulable", True, ["a driver does not answer"])
    assert (cpu["capacity"], cpu["reserved"], cpu["free"], cpu["unmanaged"]) == (1500, 0, 1500, 200)
    assert (simulated["simulated"], simulated["reserved"]) == (True, 600)
    (shown,) = found["pools"]
    assert (shown["id"], shown["state"], shown["simulated"], shown["busy"]) == (pool, "serving", True, 1)
    assert shown["name"] == "simulated-pool.x"
    kept = {"model": MODEL, "pools": 1, "pinned": True, "by": "settings"}
    assert (found["targets"], found["reserves"], found["orphans"]) == ([kept], [], [])


def test_a_pool_is_found_by_the_end_of_its_id_and_its_log_is_kept(
    client: TestClient, database: Database, pool: str
) -> None:
    assert client.get(f"/v1/pools/{pool[-6:]}").json()["id"] == pool
    hosts = Hosts(database, LEASE, LEASE)
    agent = hosts.join("h", "h", 8, [], {})
    hosts.release("h", agent, PoolEnded(pool, -9, failed=True, ending="it was ended by SIGKILL", log_tail="one\ntwo"))

    assert client.get("/v1/pools").json()["pools"] == []
    (ended,) = client.get("/v1/pools", params={"ended": True}).json()["pools"]
    assert (ended["state"], ended["failed"], ended["ending"]) == (None, True, "it was ended by SIGKILL")
    assert client.get(f"/v1/pools/{pool}/log").json()["lines"] == ["one", "two"]
    assert client.post(f"/v1/pools/{pool}/stop").status_code == 409


def test_operator_commands_wait_for_a_reconcile_pass(client: TestClient, pool: str) -> None:
    assert client.post("/v1/pools", json={"model": MODEL, "keep": True}).status_code == 202
    assert client.post(f"/v1/pools/{pool}/restart").json()["id"] == pool
    assert [one["id"] for one in client.post("/v1/pools/stop", json={"model": MODEL}).json()["pools"]] == [pool]
    assert client.get("/v1/fleet/defragment").json() == {"moves": [], "gains": [], "stuck": []}


def test_namespaces_are_limited_over_http(client: TestClient, database: Database, pool: str) -> None:
    with database.work() as work:
        work.run(text("UPDATE reservation SET namespace = 'team'"))
    given = {"max_bytes": "1KiB", "max_device_time": "90m", "period": "7d", "weight": 2}
    found = client.put("/v1/namespaces/team", json=given).json()
    assert (found["max_bytes"], found["held_bytes"], found["max_device_s"]) == (1024, 600, 5400.0)
    assert client.get("/v1/namespaces").json() == {"namespaces": [found]}
    assert client.put("/v1/namespaces/team", json={}).json()["max_bytes"] is None


def test_explanations_of_models_and_steps(client: TestClient, services: Services) -> None:
    definition = check.parse(f"workflow: w\nsteps: [{{id: a, kind: generate, model: '{MODEL}', prompt: x}}]")
    run_id = services.runs.submit(Submission(definition, {})).id
    step = client.get(f"/v1/runs/{run_id}").json()["steps"][0]["id"]

    found = client.get("/v1/fleet/explain", params={"step": step}).json()
    place = {"id": step, "run": str(run_id), "key": "a", "state": "ready", "detail": "it waits for a slot of its model"}
    assert found["step"] == place
    assert found | {"step": None} == client.get("/v1/fleet/explain", params={"model": MODEL}).json()
    assert (found["model"], found["condition"], found["waiting"]) == (MODEL, "refused", 1)
    assert client.get("/v1/fleet/explain", params={"model": "qwen3:4b"}).json()["condition"] == "unasked"


def test_hosts_are_cordoned_opened_and_removed(client: TestClient, database: Database, pool: str) -> None:
    assert client.put("/v1/hosts/h", json={"state": "cordoned"}).json()["state"] == "cordoned"
    assert client.put("/v1/hosts/h", json={"state": "schedulable"}).json()["state"] == "schedulable"
    conflict = client.delete("/v1/hosts/h")
    assert (conflict.status_code, "stop it first" in conflict.json()["detail"]) == (409, True)

    hosts = Hosts(database, timedelta(0), LEASE)
    hosts.join("h", "h", 8, [], {})
    assert client.delete("/v1/hosts/h").status_code == 409, "it holds a pool"
    assert client.delete("/v1/hosts/h", params={"lost": True}).status_code == 204
    assert client.get("/v1/hosts").json() == {"hosts": []}


def test_a_host_that_is_removed_while_it_is_cordoned_is_not_found(services: Services, database: Database) -> None:
    Hosts(database, timedelta(0), LEASE).join("h", "h", 8, [], {})
    commands = OperatorCommands(database, lambda: None)
    racing = replace(services, operator_commands=OperatorCommands(database, lambda: commands.remove("h")))

    answer = TestClient(serve(racing), base_url="http://localhost").put("/v1/hosts/h", json={"state": "cordoned"})

    assert (answer.status_code, answer.json()["detail"]) == (404, "no host 'h'")


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"),
    [
        ("GET", "/v1/fleet/explain", None, 422, "exactly one of model and step"),
        ("GET", "/v1/fleet/explain?model=nothing:1", None, 404, "no model 'nothing:1'"),
        ("GET", "/v1/fleet/explain?step=01a1fdfa-a906-7e23-898e-3ea034e5d688", None, 404, "no step with a model"),
        ("POST", "/v1/pools", {"model": "nothing:1"}, 404, "no model 'nothing:1'"),
        ("POST", "/v1/pools", {"model": MODEL, "pin": True}, 422, "keep, model, pinned; did you mean 'pinned'?"),
        ("POST", "/v1/pools/stop", {"model": MODEL, "now": True}, 422, '"accepted":"model"'),
        ("POST", "/v1/bulk/cancel", {"state": []}, 422, "did you mean 'states'?"),
        ("POST", "/v1/bulk/retry", {"x": 1}, 422, "created_after, created_before, ids, labels, states, workflow"),
        ("PUT", "/v1/hosts/h", {"status": "cordoned"}, 422, "state; did you mean 'state'?"),
        ("POST", "/v1/pools/stop", {"model": "nothing:1"}, 404, "no model 'nothing:1'"),
        ("PUT", "/v1/namespaces/team", {"max_bytes": "much"}, 422, "'much' is not a size"),
        ("PUT", "/v1/namespaces/team", {"weight": 0}, 422, "greater than 0"),
        ("PUT", "/v1/namespaces/team", {"bytes": 1}, 422, "max_bytes, max_device_time, period, weight; did you mean"),
        ("PUT", "/v1/namespaces/Team", {}, 422, "is not a valid name of a namespace"),
        ("GET", "/v1/fleet/defragmentations?limit=0", None, 422, "limit"),
        ("GET", "/v1/pools/ffffff", None, 404, "no pool 'ffffff'"),
        ("PUT", "/v1/hosts/h", {"state": "schedulable"}, 404, "no host 'h'"),
        ("PUT", "/v1/hosts/h", {"state": "lost"}, 422, "remove it instead; accepted: schedulable, cordoned, draining"),
    ],
)
def test_invalid_requests_are_rejected_by_name(
    client: TestClient, method: str, path: str, body: Any, status: int, message: str
) -> None:
    answer = client.request(method, path, json=body)
    assert answer.status_code == status
    assert message in answer.text
