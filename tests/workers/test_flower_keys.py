"""Who may use Flower: the callers of the API, with the same keys."""

from __future__ import annotations

import base64
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import SecretStr
from tornado.httputil import HTTPHeaders, HTTPServerRequest, RequestStartLine

from app.access import key_store, keys, operator_key
from app.access.callers import LOCAL, KeyScope, NotAllowed, NotAuthenticated
from app.access.keys import NewKey
from app.kernel import ids
from app.kernel.database import Database
from app.kernel.sections.access import AccessSettings
from app.kernel.sections.servers import ApiSettings, FlowerSettings
from app.kernel.settings import Settings
from workers.monitoring.access import FlowerAccess

REQUIRED = {"access": AccessSettings(keys="required")}


def settings(tmp_path: Path, **more: object) -> Settings:
    return Settings(data_dir=tmp_path, redis_url=SecretStr("redis://x"), **more)  # type: ignore[arg-type] # of its fields


def request(method: str = "GET", path: str = "/", ip: str = "127.0.0.1", **headers: str) -> HTTPServerRequest:
    given = HTTPHeaders({"Host": "localhost:5555"} | {name.replace("_", "-"): value for name, value in headers.items()})
    connection = SimpleNamespace(context=SimpleNamespace(remote_ip=ip, protocol="http"))
    start = RequestStartLine(method, path, "HTTP/1.1")
    return HTTPServerRequest(headers=given, start_line=start, connection=connection)  # type: ignore[arg-type] # of tests


def key(database: Database, *scopes: KeyScope, namespace: str | None = None) -> str:
    key_id, secret = ids.new_text(keys.ID_CHARACTERS, lower_case=True), ids.new_text(keys.SECRET_CHARACTERS)
    with database.work() as work:
        key_store.create(work, LOCAL, NewKey("watcher", namespace, frozenset(scopes), None), key_id, secret)
    return keys.compose(key_id, secret)


def test_a_program_on_this_machine_needs_none_where_the_api_asks_for_none(database: Database, tmp_path: Path) -> None:
    access = FlowerAccess(settings(tmp_path), database)

    assert access.caller_of(request("POST", "/api/task/revoke/x")) == LOCAL
    for other in (request(ip="10.0.0.7"), request(X_Forwarded_For="10.0.0.7"), request(Host="arriero.example.com")):
        with pytest.raises(NotAuthenticated, match="an API key is needed"):
            access.caller_of(other)


@pytest.mark.parametrize(
    "more", [REQUIRED, {"flower": FlowerSettings(host="0.0.0.0")}, {"api": ApiSettings(host="0.0.0.0")}]
)
def test_keys_are_needed_where_others_can_reach_it(database: Database, tmp_path: Path, more: dict[str, object]) -> None:
    with pytest.raises(NotAuthenticated):
        FlowerAccess(settings(tmp_path, **more), database).caller_of(request())


def test_a_key_is_a_token_or_the_password_of_a_browser(database: Database, tmp_path: Path) -> None:
    access, token = FlowerAccess(settings(tmp_path, **REQUIRED), database), key(database, KeyScope.READ)
    as_password = base64.b64encode(f"anyone:{token}".encode()).decode()

    for header in (f"Bearer {token}", f"Basic {as_password}"):
        assert access.caller_of(request(Authorization=header)).name == "watcher"
    for header in (f"Bearer {token[:-1]}x", "Bearer sk-1", "Basic !", f"Digest {token}", "Basic " + "A" * 100_000):
        with pytest.raises(NotAuthenticated):
            access.caller_of(request(Authorization=header))


def test_to_change_anything_needs_the_scope_for_it(database: Database, tmp_path: Path) -> None:
    access, reader = FlowerAccess(settings(tmp_path, **REQUIRED), database), key(database, KeyScope.READ)
    operator = key(database, KeyScope.READ, KeyScope.OPERATE)

    assert access.caller_of(request("POST", "/tasks/datatable", Authorization=f"Bearer {reader}")).name == "watcher"
    with pytest.raises(NotAllowed, match="operate"):
        access.caller_of(request("POST", "/api/worker/shutdown/x", Authorization=f"Bearer {reader}"))
    assert access.caller_of(request("POST", "/api/worker/shutdown/x", Authorization=f"Bearer {operator}"))


def test_a_key_of_one_namespace_is_refused(database: Database, tmp_path: Path) -> None:
    token = key(database, *KeyScope, namespace="a")
    with pytest.raises(NotAllowed, match="all namespaces"):
        FlowerAccess(settings(tmp_path), database).caller_of(request(Authorization=f"Bearer {token}"))


def test_a_revoked_key_ends_within_seconds_and_the_operator_key_works(database: Database, tmp_path: Path) -> None:
    now = 0.0
    access = FlowerAccess(settings(tmp_path, **REQUIRED), database, now=lambda: now)
    (tmp_path / "run").mkdir()
    token, operator = key(database, KeyScope.READ), operator_key.create(tmp_path)
    access.caller_of(request(Authorization=f"Bearer {token}"))
    with database.work() as work:
        key_store.revoke(work, LOCAL, keys.id_of(token) or "")
    now = 6.0

    with pytest.raises(NotAuthenticated, match="revoked"):
        access.caller_of(request(Authorization=f"Bearer {token}"))
    assert access.caller_of(request(Authorization=f"Bearer {operator}")).name == "operator"


def test_only_health_and_files_are_open(database: Database, tmp_path: Path) -> None:
    access = FlowerAccess(settings(tmp_path), database, "monitor")

    assert access.is_open(request(path="/monitor/healthcheck"))
    assert access.is_open(request(path="/monitor/static/js/flower.js"))
    for path in ("/", "/metrics", "/api/workers", "/monitor/tasks", "/api/healthcheck"):
        assert not access.is_open(request(path=path))
