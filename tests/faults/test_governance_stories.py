"""
Governance end to end on real processes: a fault is measured, a rule fires once, its action mends it, and all clears.

The stories of pools share one `arriero up`, with a leaking pool of a real model, a server that fails, and two simulated
models of which one at a time fits. Signals look at whole minutes: `time_passes` makes what was observed an hour older.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import text

from app.catalog import files
from app.governance.alerts import dispatch
from app.governance.responses import Responses
from app.governance.rules.firing import Firing, FiringState
from app.governance.rules.rule import Rule
from app.governance.rules.service import RuleService
from app.governance.signals import store as signals
from app.governance.signals.sample import Sample, SignalLabels
from app.kernel import ids
from app.kernel.broker import CeleryPublisher
from app.kernel.database import Database
from app.kernel.sections.rules import RuleSettings
from app.kernel.settings import Settings
from tests.faults.conftest import Cluster, assert_nothing_left, until
from tests.faults.installation import api_url, database_of, is_up, up

_CATALOG = """
[[models]]
name = "leaky:1"
use_cases = ["chat"]
slots = 1
context = 512
source = {{ path = "{file}" }}

[[models]]
name = "one:1"
use_cases = ["chat"]
source = {{ path = "/nowhere/one.gguf" }}
simulated = {{ bytes = "600MiB", load = "100ms", tokens_per_second = 400 }}

[[models]]
name = "two:1"
use_cases = ["chat"]
source = {{ path = "/nowhere/two.gguf" }}
simulated = {{ bytes = "600MiB", load = "100ms", tokens_per_second = 400 }}

[[models]]
name = "spare:1"
use_cases = ["chat"]
source = {{ path = "/nowhere/spare.gguf" }}
simulated = {{ bytes = "60MiB", load = "100ms", tokens_per_second = 400 }}

[[models]]
name = "far:1"
use_cases = ["chat"]
slots = 4
[models.remote]
url = "http://127.0.0.1:{port}/v1"
model = "m"
allowed = true
private = true
retries = 0
"""
#: A module that Python imports at the start of `arriero up`, of which pools are forks. With their first thread, another
#: one begins, which leaks memory once a file names the pool.
_LEAK = """
import os, threading, time
from pathlib import Path

start, seen = threading.Thread.start, set()

def leak(kept=[]):
    place = Path(__file__).with_name("leak")
    command = Path("/proc/self/cmdline").read_text()
    while not (place.exists() and place.read_text() and place.read_text() in command):
        time.sleep(0.1)
    while True:
        kept.append(b"x" * (64 << 20) if len(kept) < 19 else b"")
        time.sleep(0.05)

def start_too(thread):
    start(thread)
    if os.getpid() not in seen and "pool" in Path("/proc/self/cmdline").read_text().replace("\\0", " ").split():
        seen.add(os.getpid())
        start(threading.Thread(target=leak, daemon=True))

threading.Thread.start = start_too
"""
_SETTINGS = {
    "api.port": "0",
    "runs.sweep_every": "500ms",
    "fleet.heartbeat": "500ms",
    "fleet.reconcile_every": "500ms",
    "fleet.simulated": '[{"name": "sim-0", "bytes": "1GiB"}]',
    "pools.models": "",
    "fleet.ram": "2GiB",
    "pools.drain_timeout": "2s",
    "rules.evaluate_every": "1s",
    "alerts.group_wait": "0s",
    "alerts.group_interval": "0s",
    "alerts.check_every": "500ms",
    "actions.check_every": "500ms",
    "http.allow_private": "true",
}
_CHUNK = {
    "id": "x",
    "object": "chat.completion.chunk",
    "created": 0,
    "model": "m",
    "choices": [{"index": 0, "delta": {"role": "assistant", "content": "read"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 10, "completion_tokens": 1, "total_tokens": 11},
}
_ANSWER = f"data: {json.dumps(_CHUNK)}\n\ndata: [DONE]\n\n".encode()
_SECOND, _NONE = timedelta(seconds=1), timedelta(0)
_ERROR = b'{"error": {"message": "a CUDA error"}}'


class Server:
    """A server of a model, which fails one call in five while `fails`, and a receiver of web hooks."""

    def __init__(self) -> None:
        self.fails, self.calls = True, 0
        self.hooks: list[dict[str, Any]] = []
        here = self

        class Answers(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status, content, kind = here.answer(self.path, body)
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self, path: str, body: bytes) -> tuple[int, bytes, str]:
        if path == "/hook":
            self.hooks.append(json.loads(body))
            return 200, b"", "text/plain"
        self.calls += 1
        if self.fails and self.calls % 5 == 0:
            return 500, _ERROR, "application/json"
        return 200, _ANSWER, "text/event-stream"

    def heard(self, rule: str, type_: str) -> int:
        """The number of alerts of a rule in notifications of a type."""
        alerts = [alert for hook in self.hooks if hook["type"] == type_ for alert in hook["data"]["alerts"]]
        return sum(alert["rule"] == rule for alert in alerts)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@dataclass(frozen=True)
class Installation:
    """A running `arriero up`."""

    server: Server
    leaks: Path
    database: Database
    client: httpx2.Client

    def chat(self, model: str, **more: Any) -> httpx2.Response:
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, **more}
        return self.client.post("/v1/chat/completions", json=body, headers={"Cache-Control": "no-store"}, timeout=60)

    def pool(self, model: str) -> str | None:
        """The id of the pool that serves a model; None while none does."""
        pools = self.client.get("/v1/fleet").json()["pools"]
        serving = [one["id"] for one in pools if one["model"] == model and one["phase"] == "serving"]
        return serving[0] if serving else None

    def slots(self, model: str) -> list[int]:
        """The slots of the pools that serve a model."""
        pools = self.client.get("/v1/fleet").json()["pools"]
        return [one["slots"] for one in pools if one["model"] == model and one["phase"] == "serving"]

    def reserved(self, device: str) -> float:
        """The part of a device that is reserved."""
        with self.database.work() as work:
            row = work.row(
                text("SELECT charged_bytes::float / capacity_bytes AS part FROM device WHERE id = :id"), {"id": device}
            )
        assert row is not None
        return float(row.part)

    def acts(self, kind: str, **parameters: Any) -> dict[str, Any]:
        """What came of an action of an operator."""
        made = self.client.post("/v1/actions", json={"action": {"kind": kind, "max_per_hour": 100, **parameters}})
        assert made.status_code == 202, made.text
        place = f"/v1/actions/{made.json()['id']}"
        found = until(lambda: one if (one := self.client.get(place).json())["state"] != "pending" else None)
        return dict(found)

    def put(self, name: str, **rule: Any) -> None:
        body = {"category": "safety", "cooldown": "10m", "clear_for": "0s", **rule}
        body["actions"] = [{"action": "alert", "with": {"channels": ["hook"]}}, *rule["actions"]]
        answer = self.client.put(f"/v1/rules/{name}", json={**body, "rule": name})
        assert answer.status_code in (200, 201), answer.text

    def firings(self, rule: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.client.get("/v1/firings", params={"rule": rule}).json()["firings"]
        return [one for one in found if one["state"] != "pending"]

    def actions(self, rule: str) -> list[tuple[str, str]]:
        """The kinds and states of what a rule has done."""
        with self.database.work() as work:
            rows = work.rows(
                text("SELECT kind, state FROM action_execution WHERE rule = :rule ORDER BY id"), {"rule": rule}
            )
        return sorted((row.kind, row.state) for row in rows)

    def fires(self, rule: str) -> dict[str, Any]:
        """Wait until a rule fires and those who should know of it do, and return the firing."""
        (firing,) = until(lambda: self.firings(rule))
        until(lambda: self.server.heard(rule, "alert.firing") == 1)
        return dict(firing)

    def clears(self, rule: str) -> None:
        """Time passes until a rule has cleared. It fired once, and whoever heard of it hears of its end."""
        self.time_passes()
        until(lambda: [one["state"] for one in self.firings(rule)] == ["cleared"])
        until(lambda: self.server.heard(rule, "alert.resolved") == 1)
        assert self.server.heard(rule, "alert.firing") == 1, "once"

    def time_passes(self) -> None:
        with self.database.work() as work:
            for table in ("signal_point", "signal_group_point"):
                work.run(text(f"DELETE FROM {table} WHERE at < now() - interval '30 minutes'"))
                work.run(text(f"UPDATE {table} SET at = at - interval '1 hour'"))


@contextmanager
def _installed(folder: Path, server: Server) -> Iterator[Installation]:
    folder.chmod(0o711)
    leaks, output = folder / "leaks", folder / "up.log"
    leaks.mkdir()
    (leaks / "sitecustomize.py").write_text(_LEAK)
    file = files.locate(files.read_catalog().get("smollm2:135m"), folder)
    settings = {**_SETTINGS, "http.allowed_hosts": json.dumps([f"127.0.0.1:{server.port}"])}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(leaks), os.environ.get("PYTHONPATH", "")))))
        with up(folder / "data", output, settings, _CATALOG.format(file=file, port=server.port)) as process:
            until(lambda: is_up(process, output))
            database = database_of(folder / "data")
            with httpx2.Client(base_url=api_url(folder / "data"), timeout=60) as client:
                hook = {"kind": "webhook", "url": f"http://127.0.0.1:{server.port}/hook"}
                client.put("/v1/alerts/channels/hook", json=hook).raise_for_status()
                yield Installation(server, leaks / "leak", database, client)
            database.close()
            process.terminate()
            assert process.wait(60) == 0


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    folder, server = tmp_path_factory.mktemp("stories"), Server()
    try:
        with _installed(folder, server) as made:
            yield made
    finally:
        server.close()
        assert_nothing_left(folder)


@pytest.mark.storm
def test_a_pool_that_leaks_memory_is_cleaned_up(installation: Installation) -> None:
    """Its reservation follows what it uses, until too much is reserved; the clean-up stops it."""
    full = {"signal": "memory_reserved", "statistic": "max", "operator": ">", "threshold": 0.6, "window": "1m"}
    clean_up = {"action": "clean_up_memory", "with": {"until": 0.55}}
    assert installation.chat("leaky:1").status_code == 200
    leaking = until(lambda: installation.pool("leaky:1"))
    device = installation.client.get("/v1/hosts").json()["hosts"][0]["name"] + "/cpu"
    installation.put("memory-full", by="host", all=[{**full, "scope": {"device": device}}], actions=[clean_up])
    assert installation.firings("memory-full") == []
    installation.leaks.write_text(leaking)

    firing = installation.fires("memory-full")
    assert firing["labels"] == {"host": device.partition("/")[0]}
    until(lambda: installation.actions("memory-full") == [("clean_up_memory", "done")])
    until(lambda: installation.pool("leaky:1") is None)
    until(lambda: installation.reserved(device) < 0.6)
    installation.clears("memory-full")
    assert installation.chat("leaky:1").status_code == 200
    assert installation.pool("leaky:1") != leaking


def test_a_model_that_fails_one_call_in_five_is_replaced_until_it_works(installation: Installation) -> None:
    fails = {"signal": "error_rate", "operator": ">", "threshold": 0.1, "window": "1m", "at_least": 10}
    switch = {"action": "switch_fallback", "with": {"to": ["spare:1"]}}
    installation.put("model-fails", by="model", all=[{**fails, "scope": {"model": "far:1"}}], actions=[switch])
    answers = [installation.chat("far:1").status_code for _ in range(20)]
    # One of the calls that fail may be a check whether the pool works.
    assert answers.count(200) in (16, 17)

    assert installation.fires("model-fails")["labels"] == {"model": "far:1"}
    until(lambda: installation.actions("model-fails") == [("switch_fallback", "applied")])
    until(lambda: installation.chat("far:1").json()["model"] == "spare:1")
    calls = installation.server.calls
    assert all(installation.chat("far:1").status_code == 200 for _ in range(10))
    assert installation.server.calls == calls, "none of them reaches the server"

    installation.server.fails = False
    installation.clears("model-fails")
    until(lambda: installation.actions("model-fails") == [("switch_fallback", "undone")])
    until(lambda: installation.chat("far:1").status_code == 200 and installation.server.calls > calls)


@pytest.mark.storm
def test_of_two_models_that_thrash_one_is_kept(installation: Installation) -> None:
    """Both fit on no device together, so each call evicts the other one, until the rule keeps one of them loaded."""
    thrash = {"signal": "thrash_rate", "operator": ">", "threshold": 0.5, "window": "1m", "at_least": 4}
    keep = {"action": "keep_resident", "with": {"model": "one:1"}}
    installation.put("thrash", all=[{**thrash, "scope": {"model": "one:1"}}], actions=[keep])
    for model in ("one:1", "two:1", "one:1"):
        assert installation.chat(model).status_code == 200

    installation.fires("thrash")
    until(lambda: installation.actions("thrash") == [("keep_resident", "applied")])
    kept = until(lambda: installation.pool("one:1"))
    run = installation.client.post("/v1/runs", json={"definition": _ask("two:1")}).json()["id"]
    reason = until(lambda: installation.client.get(f"/v1/runs/{run}").json()["steps"][0]["waiting_reason"])
    assert "two:1" in reason or "pinned" in reason, reason
    assert all(installation.chat("one:1").status_code == 200 for _ in range(5))
    assert installation.pool("one:1") == kept, "it is not evicted for the other one"

    installation.clears("thrash")
    until(lambda: installation.actions("thrash") == [("keep_resident", "undone")])
    installation.client.post(f"/v1/runs/{run}/cancel").raise_for_status()  # its turn comes after a while


def test_what_a_rule_changes_holds_while_it_fires_and_is_taken_back(installation: Installation) -> None:
    client = installation.client
    assert installation.chat("spare:1").status_code == 200
    client.put("/v1/workflows/ask", json=_ask("spare:1")).raise_for_status()
    heard = {"signal": "heartbeat_age", "operator": ">=", "threshold": 0, "window": "5m"}
    kinds = {
        "shed_load": {},
        "resize_slots": {"model": "spare:1", "slots": 3},
        "scale_pool": {"model": "spare:1", "pools": 2},
        "pause_model": {"model": "far:1"},
        "pause_workflow": {"workflow": "ask"},
    }
    installation.put("all-of-it", all=[heard], actions=[{"action": kind, "with": kinds[kind]} for kind in kinds])

    installation.fires("all-of-it")
    until(lambda: installation.actions("all-of-it") == [(kind, "applied") for kind in sorted(kinds)])
    batch = {"definition": _ask("spare:1"), "priority": "batch"}
    until(lambda: client.post("/v1/runs", json=batch).status_code == 503)
    until(lambda: installation.slots("spare:1") == [3, 3])
    until(lambda: installation.chat("far:1").status_code == 503)
    waiting = client.post("/v1/runs", json={"workflow": "ask"}).json()["id"]

    client.post("/v1/rules/all-of-it/disable").raise_for_status()
    until(lambda: installation.actions("all-of-it") == [(kind, "undone") for kind in sorted(kinds)])
    until(lambda: client.get(f"/v1/runs/{waiting}").json()["state"] == "succeeded")
    until(lambda: client.post("/v1/runs", json=batch).status_code == 202)
    until(lambda: installation.chat("far:1").status_code == 200)
    until(lambda: 3 not in installation.slots("spare:1"))


def test_an_operator_restarts_and_evicts_pools_and_the_last_host_is_not_quarantined(installation: Installation) -> None:
    assert installation.chat("leaky:1").status_code == 200
    before = until(lambda: installation.pool("leaky:1"))
    assert installation.acts("restart_pool", model="leaky:1")["state"] == "done"
    until(lambda: installation.pool("leaky:1") not in (None, before))
    assert installation.chat("spare:1").status_code == 200
    until(lambda: installation.pool("spare:1"))
    evicted = until(
        lambda: found if (found := installation.acts("evict_idle", idle_for="1ms", max_pools=9))["before"] else None
    )
    assert "spare:1" in {one["model"] for one in evicted["before"]}
    until(lambda: installation.pool("spare:1") is None)
    host = installation.client.get("/v1/hosts").json()["hosts"][0]["name"]
    refused = installation.acts("quarantine_host", host=host)
    assert (refused["state"], "the last host" in refused["detail"]) == ("refused", True)


def _ask(model: str) -> dict[str, Any]:
    step = {"id": "ask", "kind": "generate", "model": model, "prompt": "hi", "max_tokens": 2}
    return {"workflow": "ask", "steps": [step]}


def test_a_stand_by_beat_goes_on_with_rules_and_nothing_fires_twice(cluster: Cluster) -> None:
    """Two control workers evaluate; the leading beat is killed while a rule fires."""
    rules = RuleSettings(evaluate_every=_SECOND)
    cluster.settings = cluster.settings.model_copy(update={"rules": rules})
    failing = {"signal": "error_rate", "operator": ">", "threshold": 0.5, "window": "10m", "at_least": 5}
    rule = {"rule": "fails", "category": "quality", "by": "model", "all": [failing]}
    shed = {"action": "shed_load"}
    RuleService(cluster.database, 100).put(
        Rule.model_validate({**rule, "actions": [{"action": "alert"}, shed]}), "test"
    )
    leader = cluster.beat("leader")
    assert leader.ready()
    stand_by, workers = cluster.beat("stand-by"), [cluster.control(name) for name in ("control-1", "control-2")]
    assert all(worker.ready() for worker in workers)
    until(lambda: cluster.clients_of(stand_by) > 0)

    _fail(cluster.database, "first")
    until(lambda: _counts(cluster.database) == {"rule_firing": 1, "alert": 1, "action_execution": 1})
    leader.kill("SIGKILL")
    assert stand_by.ready(), "it has taken the lock"
    _fail(cluster.database, "second")
    until(lambda: _counts(cluster.database) == {"rule_firing": 2, "alert": 2, "action_execution": 2})
    until(lambda: _applied(cluster.database) == 2)
    assert _counts(cluster.database) == {"rule_firing": 2, "alert": 2, "action_execution": 2}


def _fail(database: Database, model: str) -> None:
    with database.work() as work:
        signals.write(work, [Sample("error_rate", 1, SignalLabels(model=model)) for _ in range(10)])


def _counts(database: Database) -> dict[str, int]:
    with database.work() as work:
        return {
            table: work.rows(text(f"SELECT count(*) AS n FROM {table}"))[0].n
            for table in ("rule_firing", "alert", "action_execution")
        }


def _applied(database: Database) -> int:
    with database.work() as work:
        count: int = work.rows(text("SELECT count(*) AS n FROM action_execution WHERE state = 'applied'"))[0].n
        return count


@pytest.mark.parametrize("firings", [20, pytest.param(1_000, marks=pytest.mark.storm)])
def test_of_many_firings_one_is_told_in_each_cooldown(
    database: Database, publisher: CeleryPublisher, firings: int
) -> None:
    """The rule fires and clears many times; control workers dispatch after each."""
    settings = Settings()
    settings = settings.model_copy(
        update={"alerts": settings.alerts.model_copy(update={"group_wait": _NONE, "group_interval": _NONE})}
    )
    responses, fired = Responses(lambda: settings, publisher), _firing()
    for number in range(firings):
        again = replace(fired, id=ids.new_id())
        with database.work() as work:
            responses.on_firing(work, again)
            if number % 20:
                responses.on_cleared(work, replace(again, state=FiringState.CLEARED))
        if number % 20 == 0:
            dispatch.dispatch(database, settings.alerts)
            with database.work() as work:
                responses.on_cleared(work, replace(again, state=FiringState.CLEARED))
    assert _told(database) == 1
    with database.work() as work:
        responses.on_firing(work, replace(fired, id=ids.new_id()))
    dispatch.dispatch(database, settings.alerts)
    assert _told(database) == 1, "it is open, and its cooldown goes on"
    with database.work() as work:
        work.run(
            text("""
                UPDATE alert SET quiet_until = quiet_until - interval '1 hour', due_at = due_at - interval '1 hour',
                    notified_at = notified_at - interval '1 hour'
            """)
        )
    for _ in range(5):
        dispatch.dispatch(database, settings.alerts)
    assert _told(database) == 2, "the next cooldown has its own"


def _told(database: Database) -> int:
    with database.work() as work:
        rows = work.rows(text("SELECT count(*) AS n FROM alert_notification WHERE kind = 'firing'"))
    count: int = rows[0].n
    return count


def _firing() -> Firing:
    condition = {"signal": "error_rate", "operator": ">", "threshold": 0.05}
    rule = {"rule": "flaps", "category": "quality", "cooldown": "10m", "by": "model", "all": [condition]}
    return Firing(
        id=ids.new_id(),
        rule_id=ids.new_id(),
        rule=Rule.model_validate({**rule, "actions": [{"action": "alert"}]}),
        rule_version=1,
        namespace="",
        labels={"model": "one:1"},
        state=FiringState.FIRING,
        dry_run=False,
        pending_at=datetime.now(UTC),
    )
