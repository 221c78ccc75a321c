"""Hosts that join: one token, one host, once."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy import text
from sqlalchemy.engine import make_url

from app.access.agents import invitation, invitations, passwords, roles
from app.api.fleet import join_attempts
from app.api.main import serve
from app.api.services import Services
from app.kernel import ids
from app.kernel.database import Database
from app.kernel.errors import Conflict, DatabaseUnreachable
from app.kernel.sections.agents import AgentSettings
from app.kernel.settings import Settings

PASSWORD = "a-password-of-a-host"


def served(services: Services, **agents: Any) -> TestClient:
    database_url, redis_url = services.database.url, "rediss://agents:pw@valkey.example.com:6379/0"
    given = AgentSettings(**({"redis_url": redis_url} | agents))
    changes = {"database_url": SecretStr(database_url), "redis_url": SecretStr(redis_url), "agents": given}
    settings = services.settings.model_copy(update=changes)
    return TestClient(serve(replace(services, settings=settings)), base_url="http://localhost")


@pytest.fixture
def joining(services: Services) -> TestClient:
    return served(services)


def invited(client: TestClient, **body: Any) -> str:
    answer = client.post("/v1/hosts/invitations", json=body)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["token"])


def request_of(token: str, host: str = "gpu-1") -> dict[str, str]:
    return {"token": token, "host": host, "verifier": passwords.verifier(PASSWORD, ids.new_salt())}


def test_a_host_that_joins_gets_a_role_whose_password_only_it_knows(joining: TestClient, database: Database) -> None:
    token = invited(joining)
    answer = joining.post("/v1/hosts/join", json=request_of(token))
    assert answer.status_code == 200, answer.text
    assert answer.headers["Cache-Control"] == "no-store"
    found = answer.json()
    url = make_url(found["database_url"])
    assert (url.username, url.password) == (found["role"], None)
    assert "agents:pw@" in found["redis_url"]
    agent = Database(url.set(password=PASSWORD).render_as_string(hide_password=False), pool_size=1)
    with agent.work() as work:
        assert work.row(text("SELECT agent_host() AS host")) == ("gpu-1",)
    agent.close()
    listed = joining.get("/v1/hosts/invitations").json()["invitations"][0]
    assert (listed["used_by"], listed["created_by"]) == ("gpu-1", "local")
    assert token not in str(listed)


def test_no_secret_of_the_api_s_own_address_is_given_away(services: Services, database: Database) -> None:
    own = make_url(database.url).update_query_dict({"sslpassword": "hidden", "sslkey": "/k", "sslmode": "prefer"})
    settings = services.settings.model_copy(
        update={
            "database_url": SecretStr(own.render_as_string(hide_password=False)),
            "redis_url": SecretStr("redis://127.0.0.1/0"),
        }
    )
    client = TestClient(serve(replace(services, settings=settings)), base_url="http://localhost")
    found = client.post("/v1/hosts/join", json=request_of(invited(client))).json()
    assert found["database_url"].endswith("?sslmode=prefer")
    assert str(own.password) not in str(found)
    assert "hidden" not in str(found)


def test_of_twenty_clients_with_one_token_one_joins(joining: TestClient, database: Database) -> None:
    token = invited(joining)
    with ThreadPoolExecutor(20) as threads:
        answers = list(
            threads.map(lambda n: joining.post("/v1/hosts/join", json=request_of(token, f"gpu-{n}")), range(20))
        )
    assert sorted(answer.status_code for answer in answers) == [200, *[409] * 19]
    refused = next(answer for answer in answers if answer.status_code == 409)
    assert "was used by host gpu-" in refused.json()["detail"]
    with database.work() as work:
        assert len(roles.listed(work)) == 1


def test_a_token_is_refused_with_the_reason_only_to_who_has_it(joining: TestClient, database: Database) -> None:
    token = invited(joining, host="gpu-1")
    wrong = token[:-1] + ("a" if token[-1] != "a" else "b")
    unknown = invitation.compose("0" * 10, "x" * 43)
    for bad in (wrong, unknown, "", "join_", "arr_" + token):
        answer = joining.post("/v1/hosts/join", json=request_of(bad))
        assert answer.status_code == 401, answer.text
        assert "the token is not valid" in answer.json()["detail"]
    other = joining.post("/v1/hosts/join", json=request_of(token, "gpu-2"))
    assert (other.status_code, "is for host gpu-1" in other.text) == (409, True)
    with database.work() as work:
        work.run(text("UPDATE host_invitation SET expires_at = now()"))
    late = joining.post("/v1/hosts/join", json=request_of(token))
    assert (late.status_code, "the token expired at" in late.text) == (409, True)
    with database.work() as work:
        assert roles.listed(work) == []


def test_only_an_invitation_by_name_replaces_a_host(joining: TestClient, database: Database) -> None:
    """The earlier role ends: whoever has stolen it is out."""
    first = joining.post("/v1/hosts/join", json=request_of(invited(joining))).json()
    again = joining.post("/v1/hosts/join", json=request_of(invited(joining)))
    assert (again.status_code, "there is a host gpu-1 already" in again.text) == (409, True)
    second = joining.post("/v1/hosts/join", json=request_of(invited(joining, host="gpu-1"))).json()
    with database.work() as work:
        assert [one.role for one in roles.listed(work)] == [second["role"]]
    url = make_url(first["database_url"]).set(password=PASSWORD).render_as_string(hide_password=False)
    old = Database(url, pool_size=1)
    with pytest.raises(DatabaseUnreachable), old.work():
        pass
    old.close()


def test_a_removed_host_loses_its_role_and_its_invitations(joining: TestClient, database: Database) -> None:
    joining.post("/v1/hosts/join", json=request_of(invited(joining)))
    invited(joining, host="gpu-1")
    insert = """
        INSERT INTO host (name, state, identity, agent_epoch, agent_until, cores, files, problems)
        VALUES ('gpu-1', 'schedulable', 'x', 1, now(), 1, '[]', '[]')
    """
    with database.work() as work:
        work.run(text(insert))
    assert joining.delete("/v1/hosts/gpu-1").status_code == 204
    with database.work() as work:
        assert roles.listed(work) == []
        assert [one.used_by for one in invitations.listed(work)] == ["gpu-1"]


def test_a_token_never_travels_in_plain_text(services: Services, database: Database) -> None:
    client = TestClient(serve(services), base_url="http://localhost", client=("10.0.0.9", 50_000))
    answer = client.post("/v1/hosts/join", json=request_of(invitation.compose("0" * 10, "x" * 43)))
    assert (answer.status_code, "over https only" in answer.text) == (409, True)


def test_another_machine_gets_no_loopback_address(services: Services, database: Database) -> None:
    token = invited(served(services))
    app = served(services).app
    client = TestClient(app, base_url="https://localhost", client=("10.0.0.9", 50_000))
    answer = client.post("/v1/hosts/join", json=request_of(token))
    assert (answer.status_code, "set agents.database_url" in answer.text) == (409, True)
    answer = TestClient(
        served(services, database_url="postgresql://db.example.com/arriero?sslmode=verify-full").app,
        base_url="https://localhost",
        client=("10.0.0.9", 50_000),
    ).post("/v1/hosts/join", json=request_of(token))
    assert answer.status_code == 200, answer.text
    assert answer.json()["database_url"].endswith("@db.example.com/arriero?sslmode=verify-full")


def test_only_certificates_of_the_file_are_given_away(services: Services, database: Database, tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    block = "-----BEGIN {0}-----\nMIIB\n-----END {0}-----\n"
    file.write_text(block.format("PRIVATE KEY") + block.format("CERTIFICATE") + "a comment\n")
    client = served(services, ca_file=file)
    found = client.post("/v1/hosts/join", json=request_of(invited(client))).json()
    assert found["certificates"] == block.format("CERTIFICATE")


def test_attempts_are_limited(joining: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(join_attempts, "MAX_OF_ONE", 2)
    body = request_of(invitation.compose("0" * 10, "x" * 43))
    assert [joining.post("/v1/hosts/join", json=body).status_code for _ in range(4)] == [401, 401, 429, 429]


def test_neither_log_nor_audit_has_a_token(
    joining: TestClient, database: Database, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    token = invited(joining)
    body = request_of(token)
    for _ in range(2):
        joining.post("/v1/hosts/join", json=body)
    entries = joining.get("/v1/audit").text
    assert '"POST /v1/hosts/join"' in entries
    seen = entries + caplog.text + "".join(capsys.readouterr())
    secret = token.rpartition("_")[2]
    assert secret not in seen
    assert body["verifier"] not in seen


@pytest.mark.parametrize(
    "weak",
    [
        {"database_url": "postgresql://db.example.com/arriero"},
        {"database_url": "postgresql://db.example.com/arriero?sslmode=require"},
        {"redis_url": "redis://agents:pw@valkey.example.com/0"},
    ],
)
def test_no_host_gets_an_address_that_is_not_verified(
    services: Services, database: Database, weak: dict[str, str]
) -> None:
    client = served(services, **weak)
    made = client.post("/v1/hosts/invitations", json={}).json()
    assert any("no host can join" in warning for warning in made["warnings"])
    answer = client.post("/v1/hosts/join", json=request_of(made["token"]))
    assert (answer.status_code, "without TLS that is verified" in answer.text) == (409, True)
    with database.work() as work:
        assert roles.listed(work) == []
        assert invitations.listed(work)[0].used_at is None, "it works when the settings are right"


@pytest.mark.parametrize(
    "body",
    [
        {"token": "x" * 201, "host": "a", "verifier": "SCRAM-SHA-256$4096:x"},
        request_of("x", "a b"),
        request_of("x", "../x"),
        request_of("x", "x" * 101),
        request_of("x") | {"verifier": "md5" + "0" * 32},
        request_of("x") | {"verifier": "'; DROP ROLE arriero; --"},
        request_of("x") | {"more": 1},
    ],
)
def test_bodies_are_checked(joining: TestClient, body: dict[str, Any]) -> None:
    assert joining.post("/v1/hosts/join", json=body).status_code == 422


def test_invitations_are_withdrawn_and_bounded(
    joining: TestClient, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = invited(joining, expires_in="10m")
    id_ = invitation.id_of(token)
    assert joining.delete(f"/v1/hosts/invitations/{id_}").status_code == 204
    assert joining.delete(f"/v1/hosts/invitations/{id_}").status_code == 404
    assert joining.post("/v1/hosts/join", json=request_of(token)).status_code == 401
    assert joining.post("/v1/hosts/invitations", json={"expires_in": "8d"}).status_code == 422
    monkeypatch.setattr(invitations, "MAX_KEPT", 1)
    with database.work() as work:
        invitations.create(work, "a" * 10, "s", None, timedelta(hours=1), "test")
    with pytest.raises(Conflict, match="withdraw some"), database.work() as work:
        invitations.create(work, "b" * 10, "s", None, timedelta(hours=1), "test")


def test_settings_of_agents_have_no_user() -> None:
    with pytest.raises(ValueError, match="no user and no password"):
        Settings(agents=AgentSettings(database_url="postgresql://ada:x@h/d"))
