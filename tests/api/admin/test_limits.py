"""Who may set and see limits on calls; keys and namespaces with limits of their own."""

from __future__ import annotations

from typing import Any

from fastapi.testclient import TestClient

ADMIN = ["admin", "submit", "read"]
RUN = {"definition": {"workflow": "w", "steps": [{"id": "a", "kind": "noop"}]}}


def key(client: TestClient, name: str, namespace: str | None = None, scopes: list[str] | None = None) -> dict[str, Any]:
    body = {"name": name, "scopes": scopes or ADMIN, "namespace": namespace}
    answer = client.post("/v1/keys", json=body)
    assert answer.status_code == 201, answer.text
    found: dict[str, Any] = answer.json()
    return found


def bearer(made: dict[str, Any]) -> dict[str, str]:
    return {"Authorization": f"Bearer {made['key']}"}


def test_the_limits_of_a_key_hold_for_its_requests_only(client: TestClient) -> None:
    limited, other = (key(client, name, "team") for name in ("limited", "other"))
    answer = client.put(f"/v1/limits/key/{limited['id']}", json={"requests_per_minute": 1})
    assert answer.status_code == 200, answer.text

    def submitted(made: dict[str, Any]) -> list[int]:
        run = {**RUN, "labels": {"namespace": "team"}}
        return [client.post("/v1/runs", json=run, headers=bearer(made)).status_code for _ in range(2)]

    assert submitted(limited) == [202, 429]
    assert submitted(other) == [202, 202]


def test_an_administrator_of_a_namespace_limits_its_keys_and_sees_no_others(client: TestClient) -> None:
    admin, own, foreign = key(client, "admin", "team"), key(client, "own", "team"), key(client, "foreign", "other")
    for one in ("namespace/team", "namespace/other", f"key/{foreign['id']}"):
        assert client.put(f"/v1/limits/{one}", json={"requests_per_minute": 9}).status_code == 200
    headers = bearer(admin)
    path, hidden, none = (f"/v1/limits/key/{id_}" for id_ in (own["id"], foreign["id"], "nobody"))

    assert client.put(path, json={"requests_per_minute": 3}, headers=headers).json()["requests_per_minute"] == 3
    found = client.get("/v1/limits", headers=headers).json()["limits"]
    assert [(one["kind"], one["id"]) for one in found] == [("key", own["id"]), ("namespace", "team")]
    assert client.get(path, headers=headers).status_code == 200
    assert client.get("/v1/limits/namespace/team", headers=headers).json()["requests_per_minute"] == 9
    assert client.get("/v1/limits/namespace/other", headers=headers).status_code == 404
    for method in ("GET", "PUT", "DELETE"):
        answers = [client.request(method, url, json={}, headers=headers) for url in (hidden, none)]
        assert [answer.status_code for answer in answers] == [404, 404]
        texts = [answer.text.replace(foreign["id"], "ID").replace("nobody", "ID") for answer in answers]
        assert texts[0] == texts[1], "a foreign key and an unknown one are answered alike"
    for method in ("PUT", "DELETE"):
        answer = client.request(method, "/v1/limits/namespace/team", json={}, headers=headers)
        assert answer.status_code == 403, "nobody raises the limits that hold for himself"
    assert client.delete(path, headers=headers).status_code == 200


def test_settings_are_changed_by_administrators_of_all_namespaces_only(client: TestClient) -> None:
    body = {"settings": {"log.level": "info"}, "reason": "a test"}
    for made in (key(client, "admin", "team"), key(client, "reader", None, ["read"])):
        for method, path in (("PATCH", ""), ("POST", "/revert"), ("GET", ""), ("GET", "/history")):
            answer = client.request(method, f"/v1/admin/settings{path}", json=body, headers=bearer(made))
            assert answer.status_code == 403


def test_the_audit_log_names_keys_and_shows_a_namespace_its_own_entries(client: TestClient) -> None:
    admin = key(client, "admin of team", "team")
    client.put(f"/v1/limits/key/{admin['id']}", json={"requests_per_minute": 100}, headers=bearer(admin))
    client.put("/v1/limits/namespace/other", json={"requests_per_minute": 100})
    client.put("/v1/limits/namespace/other", json={}, headers=bearer(admin))
    client.put("/v1/limits/namespace/other", json={}, headers={"Authorization": "Bearer arr_none_x"})

    everything = client.get("/v1/audit").json()["entries"]
    assert [(one["actor"], one["status"]) for one in everything] == [
        ("admin of team", 403),
        ("local", 200),
        ("admin of team", 200),
        ("local", 201),
    ]
    assert admin["key"].rsplit("_", 1)[1] not in str(everything)
    other = client.get("/v1/audit", params={"namespace": "other"}, headers=bearer(admin))
    assert other.status_code == 422
    own = client.get("/v1/audit", headers=bearer(admin)).json()["entries"]
    assert {(one["namespace"], one["key_id"]) for one in own} == {("team", admin["id"])}
    assert len(own) == 2
