"""CORS: pages of listed origins may call the API, exactly those, and the guard agrees."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient

from app.kernel.errors import InvalidSettings
from app.kernel.settings import load

ORIGIN = "https://app.example.com"
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, content-type"}
PAGE = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"}
RUN = {"definition": {"workflow": "w", "steps": [{"id": "a", "kind": "noop"}]}}


def allow(client: TestClient, *origins: str) -> None:
    body = {"settings": {"api.cors_origins": origins}, "reason": "a test"}
    assert client.patch("/v1/admin/settings", json=body).status_code == 200


def test_by_default_no_page_of_another_origin_may_call(client: TestClient) -> None:
    for method in ("OPTIONS", "POST", "GET"):
        answer = client.request(method, "/v1/runs", headers={"Origin": ORIGIN, **PREFLIGHT, **PAGE})
        assert answer.status_code == 403
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_listed_origin_gets_its_preflight_and_its_answers(client: TestClient) -> None:
    allow(client, ORIGIN)
    answer = client.options("/v1/runs", headers={"Origin": ORIGIN, **PREFLIGHT, **PAGE})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert answer.headers["access-control-allow-headers"] == "authorization, content-type"
    assert "access-control-allow-credentials" not in answer.headers

    answer = client.post("/v1/runs", json=RUN, headers={"Origin": ORIGIN, **PAGE})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (202, ORIGIN)
    assert "Origin" in answer.headers["vary"]
    for name in ("X-Arriero-Run", "X-Arriero-Cache", "X-Arriero-Model", "Preference-Applied", "WWW-Authenticate"):
        assert name in answer.headers["access-control-expose-headers"]
    # A page has to see its errors, too.
    answer = client.get("/v1/runs/none", headers={"Origin": ORIGIN, **PAGE})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (422, ORIGIN)


@pytest.mark.parametrize(
    "origin",
    [
        "http://app.example.com",
        "https://app.example.com:8443",
        "https://app.example.com.evil.example",
        "https://evil-app.example.com",
        "https://x.app.example.com",
        "null",
        "",
        "https://app.example.com, https://evil.example",
    ],
)
def test_all_other_origins_are_refused(client: TestClient, origin: str) -> None:
    allow(client, ORIGIN)
    for method in ("OPTIONS", "POST", "GET"):
        answer = client.request(method, "/v1/runs", headers={"Origin": origin, **PREFLIGHT, **PAGE})
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers


def test_the_name_of_the_server_is_checked_for_listed_origins_too(client: TestClient) -> None:
    allow(client, ORIGIN)
    answer = client.options("/v1/runs", headers={"Origin": ORIGIN, "Host": "evil.example", **PREFLIGHT})
    assert answer.status_code == 403


def test_a_removed_origin_is_refused_again(client: TestClient) -> None:
    allow(client, ORIGIN)
    allow(client)
    assert client.get("/v1/runs", headers={"Origin": ORIGIN, **PAGE}).status_code == 403


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("HTTPS://App.Example.com/", "https://app.example.com"),
        ("https://a.example:443", "https://a.example"),
        ("http://localhost:3000", "http://localhost:3000"),
        ("http://[::1]:3000", "http://[::1]:3000"),
    ],
)
def test_origins_are_kept_as_browsers_send_them(given: str, kept: str) -> None:
    assert load(environment={"ARRIERO_API__CORS_ORIGINS": given}).settings.api.cors_origins == (kept,)


@pytest.mark.parametrize(
    "wrong", ["*", "https://*.example.com", "app.example.com", "https://a/b", "https://a:0", "null"]
)
def test_what_is_no_exact_origin_is_refused(wrong: str) -> None:
    with pytest.raises(InvalidSettings, match="is not an origin"):
        load(environment={"ARRIERO_API__CORS_ORIGINS": wrong})
