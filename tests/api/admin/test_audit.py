"""The audit log: which requests get an entry, what is in it, and that nothing depends on it."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text

from app.access.audit import entry
from app.access.audit import log as audit_log
from app.api.services import Services
from app.kernel.database import Database
from app.kernel.errors import DatabaseUnreachable

WORKFLOW = {"workflow": "w", "steps": [{"id": "a", "kind": "noop"}]}


def entries(client: TestClient, **parameters: Any) -> list[dict[str, Any]]:
    answer = client.get("/v1/audit", params=parameters)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["entries"])


def test_a_change_gets_one_entry_with_who_what_and_outcome(client: TestClient) -> None:
    assert client.put("/v1/workflows/w", json=WORKFLOW).status_code < 300
    assert client.put("/v1/workflows/v", json={"workflow": "v"}).status_code == 422

    refused, stored = entries(client)
    assert (stored["actor"], stored["action"], stored["target"]) == (
        "local",
        "PUT /v1/workflows/{name}",
        {"name": "w"},
    )
    assert 200 <= stored["status"] < 300
    assert '"kind": "noop"' in stored["summary"]
    assert stored["address"] == "127.0.0.1"
    assert refused["status"] == 422


def test_what_is_written_with_its_change_has_one_entry(client: TestClient) -> None:
    client.put("/v1/limits/namespace/team", json={"requests_per_minute": 5})
    client.patch("/v1/admin/settings", json={"settings": {"runs.retention": "7d"}, "reason": "x"})
    client.patch("/v1/admin/settings", json={"settings": {"runs.retention": "no"}, "reason": "x"})

    found = [(one["action"], one["status"]) for one in entries(client)]
    assert found == [
        ("PATCH /v1/admin/settings", 422),
        ("PATCH /v1/admin/settings", 200),
        ("PUT /v1/limits/{kind}/{id}", 200),
    ]


def test_reads_calls_of_models_and_submissions_have_no_entry(client: TestClient) -> None:
    client.get("/v1/runs")
    client.post("/v1/runs", json={"definition": WORKFLOW})
    client.post("/v1/chat/completions", json={"model": "none", "messages": []})
    client.post("/v1/compress", json={"model": "none", "text": "private", "max_tokens": 5})
    client.post("/v1/nothing", json={})
    assert entries(client) == []


def test_filters_and_pages(client: TestClient) -> None:
    for number in range(5):
        client.put(f"/v1/workflows/w{number}", json={**WORKFLOW, "workflow": f"w{number}"})
    client.delete("/v1/dead-letters")

    page = client.get("/v1/audit", params={"limit": 4}).json()
    rest = client.get("/v1/audit", params={"cursor": page["next_cursor"]}).json()
    assert [len(page["entries"]), len(rest["entries"]), rest["next_cursor"]] == [4, 2, None]
    assert [one["target"] for one in entries(client, target="w3")] == [{"name": "w3"}]
    assert [one["action"] for one in entries(client, action="dead-letters")] == ["DELETE /v1/dead-letters"]
    assert entries(client, actor="nobody") == entries(client, namespace="team") == []
    since = page["entries"][0]["at"]
    assert len(entries(client, since=since)) == 1
    assert len(entries(client, until=since)) == 5


def test_an_entry_cannot_be_changed(client: TestClient, database: Database) -> None:
    client.delete("/v1/dead-letters")
    with pytest.raises(psycopg.errors.RaiseException, match="cannot be changed"), database.work() as work:
        work.run(text("UPDATE audit_entry SET actor = 'x'"))


def test_a_summary_is_bounded_and_without_secrets() -> None:
    secret = {"api_key": "k1", "nested": [{"Password": "k2"}], "url": "postgres://u:k3@host/x", "text": "t" * 10_000}
    shown = entry.summary_of(secret)
    assert all(word not in shown for word in ("k1", "k2", "k3"))
    assert "postgres://u:***@host/x" in shown
    headers = {
        "X-API-Key": "k4",
        "Cookie": "k5",
        "X-Access-Key": "k6",
        "url": f"{'t' * 150} https://u:{'k7' * 100}@host",
    }
    assert all(word not in entry.summary_of({"headers": headers}) for word in ("k4", "k5", "k6", "k7"))

    deep: Any = "x"
    for _ in range(200):
        deep = [deep] * 3
    for hostile in (deep, {str(n): "y" * 500 for n in range(5000)}, "a\x00\ud800", 10**5000):
        assert len(entry.summary_of(hostile)) <= entry.MAX_SUMMARY
        assert "\x00" not in entry.summary_of(hostile)


def test_the_change_stands_without_its_entry_which_is_written_later(
    client: TestClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_all = audit_log.add_all

    def unreachable(*_: Any) -> None:
        raise DatabaseUnreachable("gone")

    monkeypatch.setattr(audit_log, "add_all", unreachable)
    assert client.put("/v1/workflows/w", json=WORKFLOW).status_code < 300
    monkeypatch.setattr(audit_log, "add_all", add_all)
    assert entries(client) == []

    client.delete("/v1/dead-letters")
    assert [one["action"] for one in entries(client)] == ["DELETE /v1/dead-letters", "PUT /v1/workflows/{name}"]


def test_hostile_bodies_and_paths_are_kept_in_a_form_that_can_be_stored(client: TestClient) -> None:
    for body in (b"[" * 10_000, b'{"a": "\\u0000"}', b"\xff\xfe", b'{"a": 1e999}', b"{" + b'"k":1,' * 9_000):
        answer = client.put("/v1/workflows/w", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 422, answer.text
    assert len(entries(client)) == 5


def test_old_entries_are_removed(client: TestClient, database: Database) -> None:
    from datetime import timedelta

    client.delete("/v1/dead-letters")
    with database.work() as work:
        assert audit_log.remove(work, timedelta(hours=1), 10) == 0
        assert audit_log.remove(work, timedelta(0), 10) == 1


def test_pages_of_a_namespace_use_its_index(client: TestClient, database: Database) -> None:
    with database.work() as work:
        work.run(
            text("""
            INSERT INTO audit_entry (id, at, namespace, actor, action, target, summary, status, address)
            SELECT gen_random_uuid(), now(), 'n' || n % 100, 'local', 'PUT /v1/x', '{}', '', 200, '127.0.0.1'
            FROM generate_series(1, 5000) AS n
        """)
        )
        work.run(text("ANALYZE audit_entry"))
        sql = "EXPLAIN SELECT * FROM audit_entry WHERE namespace = 'a' ORDER BY id DESC LIMIT 10"
        plan = "\n".join(row[0] for row in work.rows(text(sql)))
    assert "ix_audit_entry_namespace" in plan
