"""The metrics of the API: what is exported, during outages too, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import text

from app.api.main import serve
from app.api.services import Services
from app.governance.actions import action as actions
from app.governance.actions.action import AlertAction
from app.governance.actions.execution import Cause
from app.governance.alerts.service import AlertService
from app.governance.rules import service
from app.governance.signals import store as signals
from app.governance.signals.sample import Sample
from app.kernel import ids
from app.kernel.broker import CeleryPublisher, celery_app
from app.kernel.database import Database
from app.kernel.sections.governance import AlertSettings
from app.kernel.sections.servers import BrokerSettings
from app.workflows.language import definition as definitions
from app.workflows.runs.service import Runs
from app.workflows.runs.submission import Submission
from tests.growth import keep_ended, rows_read

MODEL = {"workflow": "ask", "steps": [{"id": "a", "kind": "generate", "model": "smollm2:135m", "prompt": "Hi"}]}
WAIT = {"workflow": "later", "steps": [{"id": "w", "kind": "wait", "for": "1h"}, {"id": "n", "kind": "noop"}]}


def scrape(client: TestClient) -> Mapping[tuple[str, ...], float]:
    answer = client.get("/metrics")
    assert answer.status_code == 200, answer.text
    families = text_string_to_metric_families(answer.text)
    return {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}


def test_queues_runs_and_steps_are_counted(client: TestClient, runs: Runs) -> None:
    for document in (MODEL, MODEL, WAIT):
        runs.submit(Submission(definitions.from_document(document), {}))

    found = scrape(client)
    assert found["arriero_queue_ready_steps", "model.smollm2-135m"] == 2
    assert found["arriero_queue_messages", "model.smollm2-135m"] == 2, "although no worker reads that queue"
    assert 0 <= found["arriero_queue_oldest_step_age_seconds", "model.smollm2-135m"] < 600
    assert found["arriero_queue_ready_steps", "io"] == 2
    assert found["arriero_runs", "running"] + found["arriero_runs", "queued"] == 3
    assert found["arriero_component_up", "database"] == found["arriero_component_up", "broker"] == 1
    assert any(name[0] == "process_resident_memory_bytes" for name in found)


def test_requests_are_counted_by_route_and_not_by_path(client: TestClient) -> None:
    for place in range(3):
        client.get(f"/v1/runs/01a20000-0000-7000-8000-00000000000{place}")
        client.get(f"/nowhere/{place}")
    client.request("BREW", "/v1/runs")

    found = scrape(client)
    assert found["arriero_http_requests_total", "GET", "/v1/runs/{run_id}", "404"] == 3
    assert found["arriero_http_request_duration_seconds_count", "GET", "/v1/runs/{run_id}"] == 3
    assert found["arriero_http_requests_total", "GET", "unmatched", "404"] == 3
    assert not [name for name in found if "BREW" in name]
    assert found[("arriero_http_requests_in_flight",)] == 1, "this one"


def test_during_an_outage_of_the_broker_it_says_so(services: Services) -> None:
    url = "redis://127.0.0.1:1"
    away = CeleryPublisher(celery_app(url, BrokerSettings()), url)
    client = TestClient(serve(replace(services, publisher=away)), base_url="http://localhost")

    found = scrape(client)
    assert (found["arriero_component_up", "database"], found["arriero_component_up", "broker"]) == (1, 0)
    assert not [name for name in found if name[0] == "arriero_queue_messages"]
    assert ("arriero_runs", "running") in found


def test_its_cost_does_not_grow_with_the_history(services: Services, database: Database, runs: Runs) -> None:
    runs.submit(Submission(definitions.from_document(MODEL), {}))
    one = Database(database.url, pool_size=1)
    client = TestClient(serve(replace(services, database=one)), base_url="http://localhost")
    costs = []
    for steps in (1_000, 9_000):
        keep_ended(database, steps, each=1)
        scrape(client)
        costs.append(rows_read(one, lambda: scrape(client)))
    one.close()

    assert costs[1] < costs[0] + 100


def test_what_runs_by_itself_is_counted(client: TestClient, database: Database) -> None:
    with database.work() as work:
        service.ensure_builtin(database)
        signals.write(work, [Sample("error_rate", 1), Sample("error_rate", 0)])
        (action,) = actions.parse(["alert"])
        assert isinstance(action, AlertAction)
        AlertService(AlertSettings()).fired(work, Cause("errors", "", "critical"), action)
        for number in range(250):
            work.run(
                text("""
                    INSERT INTO rule_firing (id, rule_id, name, rule_version, rule, namespace, value, labels, state,
                        dry_run, pending_at, reason, cleared_reason, seen)
                    VALUES (:id, :id, :name, 1, '{}', '', '', '{}', 'firing', false, now(), '', '', '{}')
                """),
                {"id": ids.new_id(), "name": f"rule-{number}"},
            )
        work.run(text("INSERT INTO scheduled_job (name, passes, failures, seconds) VALUES ('sweep', 3, 1, 0.5)"))

    found = scrape(client)
    assert found["arriero_signal", "error_rate", "mean", "ratio"] == 0.5
    assert found["arriero_alerts", "critical", "open"] == 1
    assert found["arriero_alert_notifications", "failing"] == 0
    assert (found["arriero_job_passes_total", "sweep"], found["arriero_job_failures_total", "sweep"]) == (3, 1)
    assert found["arriero_job_duration_seconds_total", "sweep"] == 0.5
    firings = {name[1]: value for name, value in found.items() if name[0] == "arriero_rule_firings"}
    assert len(firings) == 201, "its cardinality is bounded"
    assert (firings["other"], sum(firings.values())) == (50, 250)
