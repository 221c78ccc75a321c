"""The files for Prometheus and Grafana: they load, and name only metrics and labels that Arriero exports."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry, generate_latest

from app.api.main import serve
from app.api.services import Services
from workers.engine.simulated import SimulatedEngine
from workers.pool.exporter import PoolCollector
from workers.pool.progress import Status
from workers.telemetry.work import WorkFigures

DEPLOY = Path(__file__).parents[3] / "deploy"
RULES = DEPLOY / "prometheus/arriero.rules.yml"
DASHBOARDS = sorted((DEPLOY / "grafana/dashboards").glob("*.json"))
_NAME = re.compile(r"(?<![\w:])(?:arriero|process)[_:][a-z0-9_:]+")
_TYPE = re.compile(r"^# TYPE (\S+) (\S+)$", re.MULTILINE)
_SUFFIXES = {"counter": ("",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def expressions() -> list[tuple[str, str]]:
    found = [(rule.get("alert") or rule["record"], rule["expr"]) for rule in rules()]
    for file in DASHBOARDS:
        found += [
            (f"{file.name}: {panel['title']}", target["expr"])
            for panel in json.loads(file.read_text())["panels"]
            for target in panel["targets"]
        ]
    return found


def exported(services: Services) -> set[str]:
    """All names of metrics of the API and of a pool, whether they have a value now or not."""
    api = TestClient(serve(services), base_url="http://localhost").get("/metrics").text
    engine = SimulatedEngine(1, 100.0, timedelta(0))
    registry = CollectorRegistry()
    collector = PoolCollector(Status("m"), {"model": "m", "device": "cpu", "worker": "w"})
    collector.engine, collector.work.figures = engine, WorkFigures()
    registry.register(collector)
    pool = generate_latest(registry).decode()
    engine.close()
    return {name + suffix for name, type_ in _TYPE.findall(api + pool) for suffix in _SUFFIXES[type_]}


def test_rules_and_dashboards_name_only_what_is_exported(services: Services) -> None:
    known = exported(services) | {rule["record"] for rule in rules() if "record" in rule}
    unknown = {(where, name) for where, text in expressions() for name in _NAME.findall(text) if name not in known}

    assert unknown == set()
    assert len(expressions()) > 40
    assert len(DASHBOARDS) == 3


def test_dashboards_have_what_grafana_needs() -> None:
    seen = set()
    for file in DASHBOARDS:
        board = json.loads(file.read_text())
        seen.add(board["uid"])
        assert {"title", "panels", "schemaVersion", "templating", "time"} <= set(board)
        assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
        for panel in board["panels"]:
            place = panel["gridPos"]
            assert place["x"] + place["w"] <= 24
            assert panel["datasource"]["uid"] == "${datasource}", "it works with any Prometheus"
    assert len(seen) == len(DASHBOARDS)


def test_alerts_say_what_is_wrong_and_how_grave_it_is() -> None:
    for rule in rules():
        if "alert" in rule:
            assert rule["labels"]["severity"] in ("info", "warning", "critical")
            assert rule["annotations"]["summary"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is in Debian's package prometheus")
@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "--syntax-only", "prometheus.yml"),
        ("check", "rules", "--lint-fatal", "arriero.rules.yml"),
        ("test", "rules", "arriero.rules.test.yml"),
    ],
)
def test_promtool_accepts_them(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        ["promtool", *arguments], cwd=RULES.parent, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is in Debian's package prometheus")
def test_promtool_finds_no_fault_in_the_names_of_metrics(services: Services) -> None:
    text = TestClient(serve(services), base_url="http://localhost").get("/metrics").content
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")
