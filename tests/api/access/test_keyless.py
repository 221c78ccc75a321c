"""Who needs a key, and how a request without one is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fastapi.testclient import TestClient

from app.access import key_store, keys
from app.access.callers import LOCAL, KeyScope
from app.access.keys import NewKey
from app.api.main import serve
from app.api.services import Services
from app.kernel import ids
from app.kernel.sections.access import AccessSettings
from app.kernel.sections.servers import ApiSettings


def client_of(services: Services, *, peer: str = "127.0.0.1", asked: str = "localhost", **api: str) -> TestClient:
    settings = services.settings.model_copy(update={"api": ApiSettings(**api)}) if api else services.settings
    app = serve(replace(services, settings=settings))
    return TestClient(app, base_url=f"http://{asked}", client=(peer, 5000))


def required(services: Services) -> TestClient:
    settings = services.settings.model_copy(update={"access": AccessSettings(keys="required")})
    return TestClient(serve(replace(services, settings=settings)), base_url="http://localhost")


def new_key(services: Services) -> str:
    key_id, secret = ids.new_text(keys.ID_CHARACTERS, lower_case=True), ids.new_text(keys.SECRET_CHARACTERS)
    with services.database.work() as work:
        key_store.create(work, LOCAL, NewKey("k", None, frozenset({KeyScope.READ}), None), key_id, secret)
    return keys.compose(key_id, secret)


def test_a_program_of_this_machine_needs_no_key(services: Services) -> None:
    for peer in ("127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"):
        assert client_of(services, peer=peer).get("/v1/runs").status_code == 200, peer


@pytest.mark.parametrize("token", ["none", "sk-0123", "ollama", "", "lm-studio"])
def test_where_no_key_is_needed_a_dummy_token_counts_as_none(services: Services, token: str) -> None:
    answer = client_of(services).get("/v1/runs", headers={"Authorization": f"Bearer {token}"})

    assert answer.status_code == 200


def test_where_no_key_is_needed_a_wrong_one_is_refused_all_the_same(services: Services) -> None:
    client = client_of(services)

    for key in ("arr_", "arr_x", keys.compose("a" * 10, "b" * 43), new_key(services)[:-1] + "é"):
        answer = client.get("/v1/runs", headers={"Authorization": f"Bearer {key}".encode()})
        assert answer.status_code == 401, key
        assert answer.headers["WWW-Authenticate"] == 'Bearer realm="arriero", error="invalid_token"'


@pytest.mark.parametrize(
    "header", ["Forwarded", "Via", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Real-IP"]
)
def test_who_comes_through_a_proxy_needs_a_key(services: Services, header: str) -> None:
    assert client_of(services).get("/v1/runs", headers={header: "127.0.0.1"}).status_code == 401


def test_who_comes_from_elsewhere_or_by_another_name_needs_a_key(services: Services) -> None:
    trusted = services.settings.model_copy(update={"trusted_hosts": ("gpu.example.com",)})

    assert client_of(replace(services, settings=trusted), asked="gpu.example.com").get("/v1/runs").status_code == 401
    assert client_of(services, peer="192.0.2.7").get("/v1/runs").status_code == 401
    assert client_of(services, peer="testclient").get("/v1/runs").status_code == 401


def test_an_api_that_others_can_reach_wants_a_key_of_everybody(services: Services) -> None:
    for api in ({"host": "0.0.0.0"}, {"host": "192.0.2.1"}, {"host": "box.lan"}, {"url": "https://box.example.com"}):
        assert client_of(services, **api).get("/v1/runs").status_code == 401, api  # type: ignore[arg-type] # the settings check it


def test_health_and_documentation_are_open(services: Services) -> None:
    client = required(services)

    for path in ("/healthz", "/readyz", "/docs", "/openapi.json", "/", "/v1/schemas/workflow"):
        assert client.get(path).status_code == 200, path


def test_a_missing_key_is_a_problem_document_and_on_endpoints_of_openai_their_error(services: Services) -> None:
    client = required(services)
    plain, openai = client.get("/v1/runs"), client.post("/v1/chat/completions", json={})
    ollama = client.post("/api/chat", json={})

    assert ollama.status_code == 401
    assert "API key" in ollama.json()["error"]
    assert (plain.status_code, openai.status_code) == (401, 401)
    assert plain.headers["content-type"] == "application/problem+json"
    assert plain.json()["type"] == "urn:arriero:error:not-authenticated"
    assert openai.json()["error"]["code"] == "invalid_api_key"
    assert plain.headers["WWW-Authenticate"] == openai.headers["WWW-Authenticate"] == 'Bearer realm="arriero"'


def test_a_valid_key_gets_in(services: Services) -> None:
    client, key = required(services), new_key(services)

    assert client.get("/v1/runs", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    refused = client.post("/v1/runs", json={}, headers={"Authorization": f"bearer {key}"})
    assert refused.status_code == 403
    assert "lacks the scope 'submit'" in refused.json()["detail"]
    assert 'error="insufficient_scope", scope="submit"' in refused.headers["WWW-Authenticate"]
