"""The resource `blocks`, over HTTP."""

from __future__ import annotations

from typing import Any

from fastapi.testclient import TestClient

ANA = {"kind": "user", "name": "ana"}


def made(client: TestClient, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/blocks", json={"label": "human", "value": "Ana", "attach": [ANA], **fields})
    assert answer.status_code == 201, answer.text
    assert answer.headers["ETag"] == '"1"'
    return dict(answer.json())


def test_an_edit_needs_the_version_that_was_read(client: TestClient) -> None:
    path = f"/v1/blocks/{made(client)['id']}"

    missing = client.patch(path, json={"value": "x"})
    assert missing.status_code == 422
    assert missing.json()["errors"][0]["accepted"] == "1, or the header If-Match"
    edited = client.patch(path, json={"value": "Ana\nVigo", "version": 1})
    assert (edited.status_code, edited.json()["version"], edited.headers["ETag"]) == (200, 2, '"2"')

    stale = client.patch(path, json={"value": "x", "version": 1})
    assert (stale.status_code, stale.headers["ETag"], stale.json()["errors"][0]["accepted"]) == (409, '"2"', "2")
    stale = client.patch(path, json={"value": "x"}, headers={"If-Match": '"1"'})
    assert (stale.status_code, stale.headers["ETag"]) == (412, '"2"')
    assert client.patch(path, json={"value": "x"}, headers={"If-Match": "new"}).status_code == 422
    assert client.get(path).json()["value"] == "Ana\nVigo"
    assert client.patch(path, json={"limit": 5000}, headers={"If-Match": '"2"'}).json()["version"] == 3
    too_long = client.patch(path, json={"value": "x" * 5001, "version": 3})
    assert too_long.json()["errors"][0]["message"].startswith("it has 5001 characters, 1 more than the limit")


def test_versions_have_authors_and_a_diff_and_come_back(client: TestClient) -> None:
    path = f"/v1/blocks/{made(client)['id']}"
    client.patch(path, json={"value": "Ana\nVigo", "version": 1})

    changed = client.get(f"{path}/diff").json()
    assert changed["changed"] == ["value"]
    assert changed["diff"].split("\n") == ["--- version 1", "+++ version 2", "@@ -1 +1,2 @@", " Ana", "+Vigo"]
    back = client.post(f"{path}/rollback", json={"to": 1, "version": 2}).json()
    assert (back["version"], back["value"]) == (3, "Ana")
    listed = client.get(f"{path}/versions", params={"limit": 2}).json()
    assert [one["operation"] for one in listed["versions"]] == ["rollback to 1", "edit"]
    assert listed["versions"][0]["author"] == {"kind": "caller", "name": "local", "run_id": None, "step": None}
    rest = client.get(f"{path}/versions", params={"before": listed["next_before"]}).json()
    assert [one["version"] for one in rest["versions"]] == [1]
    assert client.get(f"{path}/versions/2").json()["value"] == "Ana\nVigo"
    assert client.get(f"{path}/versions/9").status_code == 404
    assert client.post(f"{path}/rollback", json={"to": 1, "version": 2}).status_code == 409


def test_what_a_prompt_contains(client: TestClient) -> None:
    human = made(client, description="the user")
    rules = made(client, label="rules", value="be kind", attach=[{"kind": "namespace"}], read_only=True)

    found = client.get("/v1/blocks/in-context", params={"user": "ana"}).json()
    assert [one["id"] for one in found["blocks"]] == [human["id"], rules["id"]]
    assert '<block label="human" characters="3/2000">\n<description>the user</description>' in found["text"]
    client.post(f"/v1/blocks/{rules['id']}/archive")
    assert client.get(f"/v1/blocks/{rules['id']}").json()["archived_at"] is not None
    assert client.get("/v1/blocks/in-context", params={"user": "ben"}).json() == {"blocks": [], "text": ""}
    assert client.post(f"/v1/blocks/{rules['id']}/restore").json()["archived_at"] is None
    client.post(f"/v1/blocks/{human['id']}/detach", json=ANA)
    assert [one["label"] for one in client.get("/v1/blocks/in-context?user=ana").json()["blocks"]] == ["rules"]
    attached = client.post(f"/v1/blocks/{human['id']}/attach", json={"kind": "agent", "name": "helper"}).json()
    assert attached["attached"] == [{"kind": "agent", "name": "helper"}]
    assert [one["label"] for one in client.get("/v1/blocks?agent=helper").json()["blocks"]] == ["human"]
    assert client.get("/v1/blocks?agent=helper&user=ana").status_code == 422


def test_a_label_that_is_taken_is_refused(client: TestClient) -> None:
    first = made(client)
    answer = client.post("/v1/blocks", json={"label": "human", "attach": [ANA]})

    assert answer.status_code == 409
    assert first["id"] in answer.json()["detail"]
    assert len(client.get("/v1/blocks").json()["blocks"]) == 1, "nothing was created"
    assert client.delete(f"/v1/blocks/{first['id']}").status_code == 204
    assert client.get(f"/v1/blocks/{first['id']}").status_code == 404
    for body in ({"label": "No"}, {"label": "a", "limit": 0}, {"label": "a", "attach": [{"kind": "user"}]}):
        assert client.post("/v1/blocks", json=body).status_code == 422, body


def test_a_template_creates_all_its_blocks_or_none(client: TestClient) -> None:
    template = {"blocks": [{"label": "human"}, {"label": "rules", "value": "be kind", "read_only": True}]}
    assert client.put("/v1/block-templates/support", json=template).status_code == 200
    twice = {"blocks": [{"label": "a"}, {"label": "a"}]}
    assert client.put("/v1/block-templates/twice", json=twice).json()["errors"][0]["where"] == "blocks[1].label"
    names = [one["name"] for one in client.get("/v1/block-templates").json()["templates"]]
    assert names == ["assistant", "project", "support"]

    made(client)
    path, body = "/v1/block-templates/support/apply", {"attach": [ANA]}
    assert client.post(path, json=body).status_code == 409
    assert len(client.get("/v1/blocks").json()["blocks"]) == 1
    assert client.post(path, json={**body, "existing": "keep"}).json()["labels"] == ["rules"]
    assert client.post("/v1/block-templates/assistant/apply", json={"attach": [{"kind": "agent", "name": "x"}]}).json()[
        "labels"
    ] == ["human", "persona"]
    assert client.delete("/v1/block-templates/support").status_code == 204
    assert client.delete("/v1/block-templates/assistant").status_code == 404
