"""The resource `context`, over HTTP."""

from __future__ import annotations

from fastapi.testclient import TestClient

ANA = {"user": "ana"}
BOAT = "---\ntags: [boat]\n---\n# Boat\nThe boat is called Marea.\n# Crew\nBen and Lua sail, too."


def test_documents_are_stored_read_listed_and_deleted(client: TestClient) -> None:
    path = "/v1/context/projects/boat"
    created = client.put(path, params=ANA, json={"content": BOAT})
    assert (created.status_code, created.json()["tags"], created.json()["version"]) == (201, ["boat"], 1)
    assert client.put(path, params=ANA, json={"content": BOAT}).json()["version"] == 1
    changed = client.put(path, params=ANA, json={"content": {"boat": "Marea"}, "version": 1})
    assert (changed.status_code, changed.json()["format"], changed.json()["version"]) == (200, "json", 2)
    stale = client.put(path, params=ANA, json={"content": "x", "version": 1})
    assert (stale.status_code, "is at version 2" in stale.json()["detail"]) == (409, True)
    assert client.get(path, params=ANA).json()["content"] == '{\n  "boat": "Marea"\n}'
    assert client.get(path).status_code == client.get(path, params={"user": "ben"}).status_code == 404

    client.put("/v1/context/preferences/tone", json={"content": "Be kind."})
    listed = client.get("/v1/context", params={"limit": 1}).json()
    assert [(one["name"], one["user"], one["content"]) for one in listed["documents"]] == [("boat", "ana", None)]
    rest = client.get("/v1/context", params={"cursor": listed["next_cursor"]}).json()
    assert [(one["name"], one["always"]) for one in rest["documents"]] == [("tone", True)]
    assert [one["name"] for one in client.get("/v1/context?shared=true").json()["documents"]] == ["tone"]
    assert client.delete(path, params=ANA).status_code == 204
    assert client.delete(path, params=ANA).status_code == 404
    assert client.get("/v1/context/files").json() == {"folder": False, "files": [], "next_cursor": None}


def test_what_is_no_document_is_refused_and_the_audit_log_has_none(client: TestClient) -> None:
    for content, where in (("", "content"), ("---\ntitel: x\n---\nsecret", "content.titel"), ({}, "content")):
        answer = client.put("/v1/context/projects/boat", params=ANA, json={"content": content})
        assert (answer.status_code, answer.json()["errors"][0]["where"]) == (422, where)
    assert client.put("/v1/context/plans/boat", json={"content": "x"}).status_code == 422
    assert client.put("/v1/context/projects/-", json={"content": "x"}).status_code == 422

    client.put("/v1/context/projects/boat", params=ANA, json={"content": "secret"})
    (entry,) = client.get("/v1/audit").json()["entries"]
    assert entry["action"] == "PUT /v1/context/{kind}/{name}"
    assert "secret" not in str(entry)


def test_what_a_prompt_contains_has_ids_and_scores(client: TestClient) -> None:
    boat = client.put("/v1/context/projects/boat", params=ANA, json={"content": BOAT}).json()
    tone = client.put("/v1/context/preferences/tone", json={"content": "Be kind to a boat."}).json()
    client.put("/v1/context/projects/boat", params={"user": "ben"}, json={"content": "The boat of Ben is Rosa."})

    found = client.post("/v1/context/relevant", json={"user": "ana", "query": "who is in the crew?"}).json()
    assert [(one["document_id"], one["heading"]) for one in found["parts"][:2]] == [
        (tone["id"], "tone"),
        (boat["id"], "boat > Crew"),
    ]
    assert found["parts"][0]["score"] is None
    assert found["parts"][1]["score"] > 0
    assert found["text"].startswith("[preferences: tone]\nBe kind to a boat.\n\n[projects: boat > Crew]\nBen and Lua")
    assert found["search"]["lexical"]["used"]
    assert "Rosa" not in client.post("/v1/context/relevant", json={"user": "ana", "query": "boat Rosa"}).text
    assert client.post("/v1/context/relevant", json={}).json()["search"] is None
