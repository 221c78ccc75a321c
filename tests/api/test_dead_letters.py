"""Dead letters over HTTP."""

from __future__ import annotations

from datetime import UTC, datetime

from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from app.api.services import Services
from app.kernel.dead_letters import Reason


def metrics(client: TestClient) -> dict[tuple[str, ...], float]:
    answer = client.get("/metrics")
    assert answer.status_code == 200, answer.text
    families = text_string_to_metric_families(answer.text)
    samples = [one for family in families for one in family.samples if one.name.startswith("arriero_dead_letters")]
    return {(one.name, *one.labels.values()): one.value for one in samples}


def test_dead_letters_are_listed_counted_and_removed(client: TestClient, services: Services) -> None:
    assert client.get("/v1/dead-letters").json() == {"dead_letters": [], "kept": 0, "counts": {}}
    assert metrics(client) == {("arriero_dead_letters_kept",): 0}
    letters = services.publisher.dead_letters()
    for number in range(3):
        letters.put(datetime(2026, 1, 1, tzinfo=UTC), "io", Reason.UNREADABLE, "no JSON", b"hello %d" % number)

    page = client.get("/v1/dead-letters", params={"limit": 1}).json()
    assert page["dead_letters"] == [
        {
            "at": "2026-01-01T00:00:00Z",
            "queue": "io",
            "reason": "unreadable",
            "detail": "no JSON",
            "bytes": 7,
            "message": "hello 2",
        }
    ]
    assert (page["kept"], page["counts"]) == (3, {"io": {"unreadable": 3}})
    assert metrics(client)[("arriero_dead_letters_total", "io", "unreadable")] == 3
    assert client.delete("/v1/dead-letters").json() == {"removed": 3}
    assert metrics(client) == {
        ("arriero_dead_letters_kept",): 0,
        ("arriero_dead_letters_total", "io", "unreadable"): 3,
    }
