"""The counters of refined outputs over HTTP."""

from __future__ import annotations

from typing import Any

from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from app.api.services import Services
from app.inference.refinement_counters import RefinementCounters

REPORT: dict[str, Any] = {
    "verification": "passed",
    "rounds": [{"kept": False}, {"kept": True}],
    "gain": {
        "before": {"passed": False},
        "after": {"passed": True},
        "wrong_to_right": 1,
        "right_to_wrong": 0,
        "checks_mended": 2,
        "checks_broken": 0,
    },
    "tokens": {"draft": 30, "after_draft": 70},
}


def test_refined_outputs_are_counted(client: TestClient, services: Services, redis_url: str) -> None:
    counters = RefinementCounters(redis_url)
    before = counted(client)
    for _ in range(2):
        counters.count("refine", REPORT)
    counters.close()
    after = counted(client)

    added = {key: value - before.get(key, 0) for key, value in after.items() if key[1] == "refine"}
    assert {key: value for key, value in added.items() if value} == {
        ("arriero_refinement_items_total", "refine", "passed"): 2,
        ("arriero_refinement_passed_total", "refine", "after"): 2,
        ("arriero_refinement_flips_total", "refine", "wrong_to_right"): 2,
        ("arriero_refinement_checks_total", "refine", "mended"): 4,
        ("arriero_refinement_tokens_total", "refine", "draft"): 60,
        ("arriero_refinement_tokens_total", "refine", "after_draft"): 140,
        ("arriero_refinement_rounds_total", "refine", "true"): 2,
        ("arriero_refinement_rounds_total", "refine", "false"): 2,
    }


def counted(client: TestClient) -> dict[tuple[str, str, str], float]:
    families = list(text_string_to_metric_families(client.get("/metrics").text))
    return {
        (one.name, one.labels["kind"], next(value for name, value in one.labels.items() if name != "kind")): one.value
        for family in families
        if family.name.startswith("arriero_refinement")
        for one in family.samples
    }
