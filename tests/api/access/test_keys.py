"""The resource `keys`: creation, lists, rotation, revocation, and what a key of a namespace may manage."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text

from app.access import keys
from app.access.callers import LOCAL, KeyScope, NotAuthenticated
from app.access.keys import StoredSecrets
from app.api.access import keyring
from app.api.access.keyring import MAX_AGE, Keyring
from app.api.main import serve
from app.api.services import Services
from app.kernel.database import Database
from app.kernel.errors import Unavailable
from app.kernel.sections.access import AccessSettings

ALL = [scope.value for scope in KeyScope]


@pytest.fixture
def strict(services: Services) -> TestClient:
    """A client of an API that needs keys."""
    settings = services.settings.model_copy(update={"access": AccessSettings(keys="required")})
    return TestClient(serve(replace(services, settings=settings)), base_url="http://localhost")


def made(client: TestClient, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/keys", json={"name": "k", "scopes": ALL, **body})
    assert answer.status_code == 201, answer.text
    found: dict[str, Any] = answer.json()
    return found


def bearer(key: dict[str, Any] | str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key if isinstance(key, str) else key['key']}"}


def run_sql(database: Database, statement: str) -> None:
    with database.work() as work:
        work.run(text(statement))


def test_a_key_is_shown_once_and_only_its_hash_is_stored(client: TestClient, database: Database) -> None:
    answer = client.post("/v1/keys", json={"name": "ci", "scopes": ["submit", "read"], "expires_in": "90d"})
    key = answer.json()

    assert answer.headers["Cache-Control"] == "no-store"
    assert keys.id_of(key["key"]) == key["id"]
    assert key["key"] == keys.compose(key["id"], key["key"].rsplit("_", 1)[1])
    secret = key["key"].rsplit("_", 1)[1]
    for path in ("/v1/keys", answer.headers["Location"]):
        assert secret not in client.get(path).text
    with database.work() as work:
        row = work.row(text("SELECT *, api_key::text AS whole FROM api_key"))
    assert row is not None
    assert bytes(row.secret_hash) == keys.hash_of(key["key"])
    assert secret not in row.whole


@pytest.mark.parametrize(
    "body",
    [
        {"scopes": []},
        {"scopes": ["root"]},
        {"name": ""},
        {"name": "x" * 101},
        {"name": "a\x1b[2J"},
        {"namespace": "Not Valid"},
        {"namespace": "research\n"},
        {"expires_in": "0s"},
        {"secret": "mine"},
    ],
)
def test_a_key_that_cannot_be_is_refused(client: TestClient, body: dict[str, Any]) -> None:
    assert client.post("/v1/keys", json={"name": "k", "scopes": ["read"], **body}).status_code == 422


def test_both_secrets_work_during_the_overlap_and_then_only_the_new_one(
    client: TestClient, strict: TestClient, database: Database
) -> None:
    old = made(client)
    new = client.post(f"/v1/keys/{old['id']}/rotate", json={"overlap": "1h"}).json()

    assert new["id"] == old["id"]
    assert [strict.get("/v1/runs", headers=bearer(key)).status_code for key in (old, new)] == [200, 200]
    run_sql(database, "UPDATE api_key SET overlap_until = now()")
    strict.app.state.keyring.forget(old["id"])  # type: ignore[attr-defined] # it is a FastAPI
    assert [strict.get("/v1/runs", headers=bearer(key)).status_code for key in (old, new)] == [401, 200]
    newest = client.post(f"/v1/keys/{old['id']}/rotate", json={"overlap": 0}).json()
    strict.app.state.keyring.forget(old["id"])  # type: ignore[attr-defined] # it is a FastAPI
    assert [strict.get("/v1/runs", headers=bearer(key)).status_code for key in (old, new, newest)] == [401, 401, 200]


def test_a_revoked_and_an_expired_key_are_refused(client: TestClient, strict: TestClient, database: Database) -> None:
    revoked, expired = made(client), made(client)
    # Known to this process, and revoked in it: refused at once.
    assert strict.get("/v1/runs", headers=bearer(revoked)).status_code == 200
    assert strict.post(f"/v1/keys/{revoked['id']}/revoke", headers=bearer(revoked)).json()["revoked_by"] == "k"
    assert strict.get("/v1/runs", headers=bearer(revoked)).status_code == 401
    assert client.post(f"/v1/keys/{revoked['id']}/rotate", json={}).status_code == 409
    run_sql(database, f"UPDATE api_key SET expires_at = now() WHERE id = '{expired['id']}'")
    refused = strict.get("/v1/runs", headers=bearer(expired))
    assert refused.status_code == 401
    assert "expired" in refused.json()["detail"]


def test_who_does_not_know_the_secret_learns_nothing_about_a_key(client: TestClient, strict: TestClient) -> None:
    key = made(client)
    client.post(f"/v1/keys/{key['id']}/revoke")
    wrong = keys.compose(key["id"], "x" * keys.SECRET_CHARACTERS)
    unknown = keys.compose("0" * keys.ID_CHARACTERS, "x" * keys.SECRET_CHARACTERS)
    answers = [strict.get("/v1/runs", headers=bearer(one)) for one in (wrong, unknown)]

    assert answers[0].content == answers[1].content
    assert wrong not in answers[0].text


def test_a_key_of_a_namespace_manages_only_its_namespace_and_no_scope_that_it_lacks(
    client: TestClient, strict: TestClient
) -> None:
    other, everywhere = made(client, namespace="b"), made(client)
    own = bearer(made(client, namespace="a", scopes=["admin", "read"]))
    powerful = made(client, namespace="a")

    assert strict.post("/v1/keys", json={"name": "x", "scopes": ["read"]}, headers=own).json()["namespace"] == "a"
    for body in ({"scopes": ["read"], "namespace": "b"}, {"scopes": ["read", "submit"]}):
        assert strict.post("/v1/keys", json={"name": "x", **body}, headers=own).status_code == 422, body
    assert {key["namespace"] for key in strict.get("/v1/keys", headers=own).json()["keys"]} == {"a"}
    for foreign in (other, everywhere, {"id": "0123456789"}):
        for verb, path in (("GET", ""), ("POST", "/rotate"), ("POST", "/revoke")):
            body = {} if path == "/rotate" else None
            answer = strict.request(verb, f"/v1/keys/{foreign['id']}{path}", headers=own, json=body)
            assert answer.status_code == 404
            assert answer.json()["detail"] == f"no API key '{foreign['id']}'"
    assert strict.post(f"/v1/keys/{powerful['id']}/rotate", json={}, headers=own).status_code == 422
    assert strict.post(f"/v1/keys/{powerful['id']}/revoke", headers=own).status_code == 200


def test_a_key_costs_no_query_while_it_is_fresh_and_its_revocation_is_seen_in_time(database: Database) -> None:
    now, key = [0.0], keys.compose("k" * keys.ID_CHARACTERS, "s" * keys.SECRET_CHARACTERS)
    run_sql(
        database,
        "INSERT INTO api_key (id, name, scopes, secret_hash, created_by) VALUES "
        f"('{'k' * keys.ID_CHARACTERS}', 'k', '{{read}}', '\\x{keys.hash_of(key).hex()}', 'test')",
    )
    queries = []

    class Counted(Keyring):
        def _find(self, key_id: str) -> Any:
            queries.append(key_id)
            return super()._find(key_id)

    async def check() -> None:
        ring = Counted(database, now=lambda: now[0])
        for _ in range(100):
            assert (await ring.caller_of(key)).name == "k"
        assert len(queries) == 1
        await asyncio.gather(*(ring.caller_of(key) for _ in range(50)))
        run_sql(database, "UPDATE api_key SET revoked_at = now()")
        now[0] += MAX_AGE - 0.1
        assert (await ring.caller_of(key)).name == "k"  # and it is read again in the background
        await ring.close()
        with pytest.raises(NotAuthenticated, match="revoked"):
            await ring.caller_of(key)
        assert len(queries) == 2
        now[0] += MAX_AGE
        with pytest.raises(NotAuthenticated, match="revoked"):
            await ring.caller_of(key)
        unknown = keys.compose("u" * keys.ID_CHARACTERS, "s" * keys.SECRET_CHARACTERS)
        for _ in range(3):
            with pytest.raises(NotAuthenticated):
                await ring.caller_of(unknown)
        assert queries.count("u" * keys.ID_CHARACTERS) == 1
        await ring.close()

    asyncio.run(check())


def test_a_flood_of_unknown_keys_is_bounded_and_displaces_no_known_one(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyring, "_MAX_KEPT", 5)
    monkeypatch.setattr(keyring, "_MAX_LOOK_UPS", 10)
    key, now = keys.compose("k" * keys.ID_CHARACTERS, "s" * keys.SECRET_CHARACTERS), [0.0]
    known = StoredSecrets(LOCAL, keys.hash_of(key), None, False, None, None, 0.0, None)
    answer = threading.Event()

    class Slow(Keyring):
        def _find(self, key_id: str) -> StoredSecrets | None:
            if key_id[0] == "k":
                return known
            assert answer.wait(60)
            return None

    async def refused(ring: Keyring, number: int) -> type[Exception] | None:
        try:
            await ring.caller_of(keys.compose(f"u{number:09}", "s" * keys.SECRET_CHARACTERS))
        except (NotAuthenticated, Unavailable) as error:
            return type(error)
        return None

    async def check() -> None:
        ring = Slow(database, now=lambda: now[0])
        assert await ring.caller_of(key) is LOCAL
        flood = [asyncio.create_task(refused(ring, number)) for number in range(30)]
        now[0] += MAX_AGE
        again = asyncio.create_task(ring.caller_of(key))
        answer.set()
        assert await again is LOCAL
        found = await asyncio.gather(*flood)
        assert (found.count(NotAuthenticated), found.count(Unavailable)) == (10, 20)
        assert list(ring._known) == ["k" * keys.ID_CHARACTERS]
        assert len(ring._unknown) == 5
        await ring.close()

    asyncio.run(check())


def test_the_last_use_is_written_at_most_once_a_minute(client: TestClient, database: Database) -> None:
    old = made(client)

    def used() -> Any:
        with database.work() as work:
            return work.row(text("SELECT used_at, previous_used_at FROM api_key"))

    async def use(key: str) -> None:
        ring = Keyring(database)
        await ring.caller_of(key)
        await ring.close()

    assert used().used_at is None
    asyncio.run(use(old["key"]))
    first = used()
    assert first.used_at is not None
    asyncio.run(use(old["key"]))
    assert used() == first
    run_sql(database, "UPDATE api_key SET used_at = used_at - interval '61 s'")
    asyncio.run(use(old["key"]))
    assert used().used_at >= first.used_at
    client.post(f"/v1/keys/{old['id']}/rotate", json={})
    assert used().previous_used_at is None
    asyncio.run(use(old["key"]))
    assert used().previous_used_at is not None


def test_a_request_after_a_revocation_waits_for_no_earlier_look_up(
    client: TestClient, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, find = made(client), Keyring._find
    read, may_end = threading.Event(), threading.Event()

    def slow(ring: Keyring, key_id: str) -> StoredSecrets | None:
        found = find(ring, key_id)
        if not read.is_set():
            read.set()
            assert may_end.wait(60)
        return found

    async def check() -> None:
        ring = Keyring(database)
        monkeypatch.setattr(Keyring, "_find", slow)
        before = asyncio.create_task(ring.caller_of(key["key"]))
        assert await asyncio.to_thread(read.wait, 60)
        with database.work() as work:
            work.run(text("UPDATE api_key SET revoked_at = now(), revoked_by = 'x'"))
        ring.forget(key["id"])
        after = asyncio.create_task(ring.caller_of(key["key"]))
        await asyncio.sleep(0)
        may_end.set()
        assert (await before).name == "k", "it was sent before the revocation"
        with pytest.raises(NotAuthenticated, match="revoked"):
            await after
        await ring.close()

    asyncio.run(check())


def test_the_operator_of_the_machine_needs_no_row(database: Database) -> None:
    key = keys.compose("o" * keys.ID_CHARACTERS, "s" * keys.SECRET_CHARACTERS)

    async def check() -> None:
        ring = Keyring(database, operator_key=key)
        assert (await ring.caller_of(key)).scopes == frozenset(KeyScope)
        with pytest.raises(NotAuthenticated):
            await ring.caller_of(keys.compose("o" * keys.ID_CHARACTERS, "t" * keys.SECRET_CHARACTERS))

    asyncio.run(check())


def test_the_document_names_scheme_scopes_and_refusals(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    chat, keys_ = document["paths"]["/v1/chat/completions"]["post"], document["paths"]["/v1/keys"]["post"]

    assert document["components"]["securitySchemes"]["apiKey"]["scheme"] == "bearer"
    assert chat["security"] == keys_["security"] == [{"apiKey": []}]
    assert "application/json" in chat["responses"]["401"]["content"]
    assert "application/problem+json" in keys_["responses"]["403"]["content"]
    assert "`admin`" in keys_["description"]
    assert "security" not in document["paths"]["/healthz"]["get"]
