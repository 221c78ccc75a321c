"""Run-time settings over the API: what may change, versions, reverts, and what other processes see."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.api.services import Services
from app.kernel import settings as all_settings
from app.kernel.database import Database
from app.kernel.live import live_settings

URL = "/v1/admin/settings"


def changed(client: TestClient, settings: dict[str, Any], **more: Any) -> dict[str, Any]:
    answer = client.patch(URL, json={"settings": settings, "reason": "a test", **more})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def shown(client: TestClient, key: str) -> dict[str, Any]:
    (found,) = [one for one in client.get(URL).json()["settings"] if one["key"] == key]
    return dict(found)


def test_a_change_holds_at_once_with_its_origin_and_version(client: TestClient, services: Services) -> None:
    before = shown(client, "runs.retention")
    assert (before["value"], before["origin"], before["changeable"]) == ("30d", "default", True)
    assert shown(client, "api.max_body_bytes")["origin"] == "configuration"

    found = changed(client, {"runs.retention": "7d", "api.max_body_bytes": "32768"})

    assert found["version"] == 1
    assert found["changes"]["runs.retention"] == {"before": None, "now": "7d"}
    assert shown(client, "runs.retention") == {**before, "value": "7d", "origin": "run time, version 1"}
    assert services.runs.policy.retention.days == 7
    assert client.post("/v1/runs", json={"workflow": "x" * 40_000}).status_code == 413


def test_null_gives_the_value_of_the_configuration_back(client: TestClient) -> None:
    changed(client, {"api.max_body_bytes": 2048})
    changed(client, {"api.max_body_bytes": None})
    assert shown(client, "api.max_body_bytes")["value"] == 64 * 1024
    assert shown(client, "api.max_body_bytes")["origin"] == "configuration"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"log.level": "loud"}, "debug"),
        ({"api.port": 1}, "it cannot change while the processes run"),
        ({"database_url": "postgresql://x"}, "it cannot change while the processes run"),
        ({"api.nothing": 1}, "there is no such setting"),
        ({"": 1}, "there is no such setting"),
        ({"http.allowed_hosts": ["http://x/"]}, "http.allowed_hosts"),
        ({"runs.retention": "-1s"}, "runs.retention"),
        ({"api.cors_origins": ["*"]}, "not an origin"),
        ({"api.cors_origins": 5}, "api.cors_origins"),
        ({"limits.key_requests_per_minute": -1}, "limits.key_requests_per_minute"),
        ({"log.level": {"a": 1}}, "log.level"),
    ],
)
def test_wrong_values_are_refused_as_at_a_start_and_nothing_changes(
    client: TestClient, settings: dict[str, Any], message: str
) -> None:
    answer = client.patch(URL, json={"settings": {"schedules.keep_fires": "2d", **settings}, "reason": "a test"})

    assert answer.status_code == 422, answer.text
    assert message in answer.text
    assert client.get(URL).json()["version"] == 0


@pytest.mark.parametrize("body", [{}, {"settings": {}, "reason": "x"}, {"settings": {"log.level": "info"}}])
def test_a_change_needs_a_setting_and_a_reason(client: TestClient, body: dict[str, Any]) -> None:
    assert client.patch(URL, json=body).status_code == 422


def test_history_and_revert(client: TestClient) -> None:
    changed(client, {"runs.retention": "7d"})
    changed(client, {"runs.retention": "8d", "log.level": "warning"})
    answer = client.post(f"{URL}/revert", json={"version": 1, "reason": "too quiet"})

    assert answer.json()["version"] == 3
    assert (answer.json()["values"], answer.json()["reverted_to"]) == ({"runs.retention": "7d"}, 1)
    assert shown(client, "log.level")["value"] == "info"
    found = client.get(f"{URL}/history", params={"limit": 2}).json()
    assert [one["version"] for one in found["versions"]] == [3, 2]
    assert (found["versions"][0]["author"], found["versions"][0]["reason"]) == ("local", "too quiet")
    assert client.get(f"{URL}/history", params={"before": found["next_before"]}).json()["versions"][0]["version"] == 1
    assert client.post(f"{URL}/revert", json={"version": 9, "reason": "x"}).status_code == 404
    assert client.post(f"{URL}/revert", json={"version": 0, "reason": "x"}).json()["values"] == {}


def test_a_change_of_what_another_has_changed_meanwhile_is_refused(client: TestClient) -> None:
    changed(client, {"runs.retention": "7d"}, version=0)
    answer = client.patch(URL, json={"settings": {"runs.retention": "9d"}, "reason": "a test", "version": 0})
    assert (answer.status_code, "version 1" in answer.text) == (409, True)


def test_another_process_applies_a_change(
    client: TestClient, services: Services, database: Database, redis_url: str
) -> None:
    """Each process listens on a thread; what it missed before it listened it reads then."""
    import threading

    applied: list[all_settings.Settings] = []
    came = threading.Event()

    def note(settings: all_settings.Settings) -> None:
        applied.append(settings)
        came.set()

    changed(client, {"http.allowed_hosts": "api.example.com"})
    listener = live_settings.follow(services.live.base, database, redis_url, note)
    try:
        assert applied[-1].http.allowed_hosts == ("api.example.com",)
        came.clear()
        # The thread may not listen yet; it reads the settings when it does.
        changed(client, {"http.allowed_hosts": ["*.example.org"], "log.level": "error"})
        assert came.wait(30)
        assert applied[-1].http.allowed_hosts == ("*.example.org",)
        assert logging.getLogger().level == logging.ERROR
    finally:
        listener.close()


def test_a_stored_value_that_is_invalid_here_is_left_out(
    client: TestClient, services: Services, database: Database
) -> None:
    """A version may have been written by a release that knew other values."""
    from sqlalchemy import text

    with database.work() as work:
        work.run(
            text("""
            INSERT INTO setting_version (version, values, changes, author, reason) VALUES (1,
                '{"log.level": "loud", "no.such": 1, "runs.retention": "5d"}', '{}', 'x', 'x')
            """)
        )
    services.live.refresh(database)

    assert services.settings.log.level == "info"
    assert services.settings.runs.retention.days == 5
