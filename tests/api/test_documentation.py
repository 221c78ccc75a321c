"""The pages of the API for people."""

from __future__ import annotations

import re

from fastapi.testclient import TestClient

from app.api import documentation


def test_the_documentation_loads_nothing_from_other_servers(client: TestClient) -> None:
    page = client.get("/docs")
    sources = re.findall(r'(?:src|href)="([^"]+)"', page.text)

    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert re.findall(r"https?://", page.text) == []
    assert len(sources) == 3
    for source in [*sources, "/openapi.json"]:
        assert client.get(source).status_code == 200, source
    assert b"SwaggerUIBundle" in client.get(f"{documentation.ASSETS}/swagger-ui-bundle.js").content


def test_the_root_links_to_what_there_is(client: TestClient) -> None:
    links = client.get("/").json()["links"]
    page = client.get("/", headers={"Accept": "text/html,*/*;q=0.8"})

    assert page.headers["content-type"].startswith("text/html")
    assert re.findall(r'href="([^"]+)"', page.text) == list(links.values())
    for path in links.values():
        assert client.get(path).status_code == 200, path
