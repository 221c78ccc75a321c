"""
An installation to look at: `arriero up` with simulated devices, and what people would find in one that is used.

Its processes are the real ones; only the engine computes nothing. All data come through the API.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from tests.live.conftest import PATIENCE, Live, running, until

#: Models of the simulated devices, the large and the small one.
LARGE, SMALL = "sim-large:8b", "sim-small:1b"
#: A model that does not fit anywhere.
HUGE = "sim-huge:400b"

_CATALOG = f"""
[[models]]
name = "{LARGE}"
use_cases = ["chat", "extract"]
context = 8192
slots = 4
source = {{ path = "/nowhere/large.gguf" }}
simulated = {{ bytes = "9GiB", load = "1s", tokens_per_second = 60 }}

[[models]]
name = "{SMALL}"
use_cases = ["chat"]
context = 4096
slots = 4
source = {{ path = "/nowhere/small.gguf" }}
simulated = {{ bytes = "2GiB", load = "0.5s", tokens_per_second = 200 }}

[[models]]
name = "{HUGE}"
use_cases = ["chat"]
context = 8192
source = {{ path = "/nowhere/huge.gguf" }}
simulated = {{ bytes = "400GiB", load = "9s", tokens_per_second = 5 }}
"""
#: A model with a price: a server, which is this installation itself.
PRICED = "hosted:chat"
_PRICED = """
[[models]]
name = "{name}"
use_cases = ["chat"]
context = 2048
slots = 2
[models.remote]
url = "{url}/v1"
model = "{model}"
allowed = true
private = true
cost_in = 200
cost_out = 600
"""
_DEVICES = '[{"name": "sim-0", "bytes": "24GiB"}, {"name": "sim-1", "bytes": "16GiB"}]'

TRIAGE: dict[str, Any] = {
    "workflow": "ticket-triage",
    "description": "Sorts a customer's message and drafts an answer.",
    "inputs": {"message": {"type": "string", "maxLength": 4000, "default": "My parcel has not arrived. Where is it?"}},
    "defaults": {"model": LARGE},
    "steps": [
        {
            "id": "classify",
            "kind": "generate",
            "prompt": "Which kind of message is this?\n{{ inputs.message }}",
            "output": {
                "schema": {"type": "object", "properties": {"kind": {"enum": ["question", "complaint", "praise"]}}}
            },
        },
        {"id": "facts", "kind": "generate", "model": SMALL, "prompt": "List the facts.\n{{ inputs.message }}"},
        {
            "id": "answer",
            "kind": "generate",
            "needs": ["classify", "facts"],
            "prompt": "Answer, with {{ steps.facts.output }}:\n{{ inputs.message }}",
        },
    ],
    "outputs": {"answer": "steps.answer.output"},
}
APPROVAL: dict[str, Any] = {
    "workflow": "refund-approval",
    "description": "Drafts a refund, and pays it when a person has approved it.",
    "inputs": {"order": {"type": "string", "default": "A-1729"}},
    "defaults": {"model": SMALL},
    "steps": [
        {"id": "draft", "kind": "generate", "prompt": "Write a note about the refund of order {{ inputs.order }}."},
        {
            "id": "ok",
            "kind": "wait",
            "needs": ["draft"],
            "approval": {"message": "Refund order {{ inputs.order }}? {{ steps.draft.output }}"},
            "expires": "1d",
        },
        {"id": "pay", "kind": "join", "needs": ["ok.approved"], "template": "paid {{ inputs.order }}"},
        {"id": "decline", "kind": "noop", "needs": ["ok.rejected"]},
    ],
}
FAILS: dict[str, Any] = {
    "workflow": "price-lookup",
    "description": "Asks a server for a price.",
    "steps": [
        {
            "id": "ask",
            "kind": "http",
            "url": "https://prices.invalid/today",
            "retry": {"max_attempts": 2, "delay": "0s"},
        },
        {"id": "say", "kind": "generate", "model": SMALL, "needs": ["ask"], "prompt": "Say it: {{ steps.ask.output }}"},
    ],
}
REVIEWS: dict[str, Any] = {
    "workflow": "review-digest",
    "description": "Reads every review of a day.",
    "inputs": {"reviews": {"type": "array", "items": {"type": "string"}, "default": ["Good tent.", "Bad lamp."]}},
    "steps": [
        {
            "id": "each",
            "kind": "map",
            "over": "inputs.reviews",
            "step": {"kind": "generate", "model": SMALL, "prompt": "Sentiment of: {{ item }}", "max_tokens": 12},
        }
    ],
    "outputs": {"sentiments": "steps.each.output"},
}
HANDOFF = {
    "handoff": "shop-messages",
    "description": "Messages of web shops to the triage of tickets.",
    "source": {"kind": "api", "sender": "message.shop"},
    "mapping": {
        "cel": '{"message": message.text, "email": message.email}',
        "schema": {"type": "object", "properties": {"email": {"type": "string", "format": "email"}}},
    },
    "target": {"kind": "http", "url": "http://127.0.0.1:9/tickets"},
    "retry": {"max_attempts": 1},
    "expected": ["message", "email"],
}
RULE: dict[str, Any] = {
    "rule": "chat-busy",
    "description": "More calls of the small model than people expect.",
    "category": "performance",
    "severity": "warning",
    "by": "model",
    "all": [{"signal": "tokens", "operator": ">", "threshold": 5, "window": "10m"}],
    "clear_for": "2m",
    "actions": [{"action": "alert"}],
}


@dataclass(frozen=True)
class Tree:
    """The installation, and the ids of what was put into it."""

    live: Live
    #: By name: `failed`, `approval`, `approval2`, `conversation`, `block`, `batch`, …
    ids: dict[str, str] = field(default_factory=dict)
    #: API keys, by the name of their user.
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """The address of the API."""
        return self.live.api

    def call(self, method: str, path: str, *, expect: int | None = None, key: str | None = None, **more: Any) -> Any:
        """Return the JSON answer of a call. Fails when it is a refusal, or not the expected status."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        answer = httpx2.request(method, self.url + path, headers=headers, timeout=60, **more)
        assert answer.status_code == expect if expect else answer.is_success, f"{method} {path}: {answer.text}"
        return answer.json() if answer.content and "json" in answer.headers.get("content-type", "") else answer.text

    def state_of(self, run: str) -> str:
        """The state of a run."""
        return str(self.call("GET", f"/v1/runs/{run}")["state"])


@contextmanager
def running_tree(folder: Path) -> Iterator[Tree]:
    """Run an installation with data, in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "catalog.toml").write_text(_CATALOG)
    options = (
        f"--set=fleet.simulated={_DEVICES}",
        '--set=http.allowed_hosts=["prices.invalid"]',
        "--set=rules.evaluate_every=1s",
        "--set=alerts.group_wait=1s",
    )
    with running(folder, *options) as live:
        tree = Tree(live)
        with (folder / "catalog.toml").open("a") as catalog:
            catalog.write(_PRICED.format(name=PRICED, url=tree.url, model=SMALL))
        until(lambda: any(one["name"] == PRICED for one in tree.call("GET", "/v1/catalog")["models"]))
        seed(tree)
        yield tree


def seed(tree: Tree) -> None:
    """Put data into an installation: what a week of use leaves, in small."""
    _workflows(tree)
    _calls(tree)
    _conversations(tree)
    _memories(tree)
    _batch(tree)
    _rules(tree)
    _handoffs(tree)
    _trials(tree)
    _keys(tree)
    _runs(tree)


def _workflows(tree: Tree) -> None:
    old = {**TRIAGE, "steps": TRIAGE["steps"][:1], "outputs": {"kind": "steps.classify.output"}}
    for document in (old, TRIAGE, APPROVAL, FAILS, REVIEWS):
        tree.call("PUT", f"/v1/workflows/{document['workflow']}", json=document)
    for name, more in (
        ("morning-triage", {"cron": "30 7 * * 1-5", "timezone": "Europe/Madrid", "workflow": "ticket-triage"}),
        ("hourly-digest", {"every": "1h", "workflow": "review-digest"}),
    ):
        document = {"schedule": name, "description": "What came in since the last time.", **more}
        tree.call("PUT", f"/v1/schedules/{name}", json=document)
    tree.call("POST", "/v1/schedules/morning-triage/trigger", json={})
    tree.call("POST", "/v1/schedules/hourly-digest/pause", params={"reason": "The shop is closed."}, json={})


def _calls(tree: Tree) -> None:
    for model in (SMALL, LARGE, PRICED):
        for text in ("Say hello.", "What is a tent?", "Which shoes for snow?"):
            body = {"model": model, "max_tokens": 24, "messages": [{"role": "user", "content": text}]}
            tree.call("POST", "/v1/chat/completions", json=body)


def _conversations(tree: Tree) -> None:
    said = [
        ("user", "Which tent do you recommend for two in the Pyrenees?"),
        ("assistant", "A three-season tent with 4000 mm. The ridge model weighs 2.1 kg."),
        ("user", "I prefer a light one, and I pay by invoice."),
        ("assistant", "Then the ultralight: 1.4 kg. I have noted that you pay by invoice."),
    ]
    items = [{"type": "message", "role": role, "content": text} for role, text in said]
    body = {"items": items, "user": "ada", "title": "A tent for two", "metadata": {"shop": "north"}}
    talk = tree.call("POST", "/v1/conversations", json=body)["id"]
    tree.ids["conversation"] = talk
    tree.call("POST", "/v1/conversations", json={"items": items[:1], "user": "grace", "title": "Shoes"})


def _memories(tree: Tree) -> None:
    for text, kind in (
        ("Ada prefers light equipment to cheap equipment.", "preference"),
        ("Ada pays by invoice.", "fact"),
        ("The shop sends parcels on weekdays only.", "fact"),
    ):
        body = {"text": text, "kind": kind, "user": "ada"}
        memory = tree.call("POST", "/v1/memories", json=body)["id"]
        tree.ids.setdefault("memory", memory)
    body = {
        "label": "human",
        "value": "Name: Ada.\nLives in Jaca.",
        "description": "what is known of the customer",
        "attach": [{"kind": "conversation", "name": tree.ids["conversation"]}],
    }
    block = tree.call("POST", "/v1/blocks", json=body)["id"]
    tree.ids["block"] = block
    for version, value in ((1, "Name: Ada.\nLives in Huesca."), (2, "Name: Ada.\nLives in Huesca.\nLikes snow.")):
        tree.call("PATCH", f"/v1/blocks/{block}", json={"version": version, "value": value})
    body = {
        "model": SMALL,
        "conversation": tree.ids["conversation"],
        "max_output_tokens": 30,
        "input": "And which sleeping bag goes with it? I prefer light equipment.",
    }
    tree.ids["response"] = tree.call("POST", "/v1/responses", json=body)["id"]


def _batch(tree: Tree) -> None:
    lines = "\n".join(
        json.dumps(
            {
                "custom_id": f"q{number}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {
                    "model": SMALL,
                    "max_tokens": 8,
                    "messages": [{"role": "user", "content": f"Number {number}?"}],
                },
            }
        )
        for number in range(6)
    )
    for name, content in (("batch", lines), ("failed_batch", "this is not JSON")):
        files = {"file": (f"{name}.jsonl", content.encode(), "application/jsonl")}
        file = tree.call("POST", "/v1/files", data={"purpose": "batch"}, files=files)["id"]
        body = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        tree.ids[name] = tree.call("POST", "/v1/batches", json=body)["id"]


def _handoffs(tree: Tree) -> None:
    tree.call("PUT", f"/v1/handoffs/{HANDOFF['handoff']}", json=HANDOFF)
    for number, email in enumerate(("ana@example.com", "bo@example.com", "nobody")):
        message = {"email": email, "text": f"Where is parcel {number}?", "shop": f"shop-{number % 2}"}
        made = tree.call("POST", f"/v1/handoffs/{HANDOFF['handoff']}/messages", json=message)
        tree.ids["handoff_message"] = made["id"]


def _trials(tree: Tree) -> None:
    """A split and a shadow of a model that nothing else calls, and a call that both see."""
    candidate = {"set": {"temperature": 0.5}}
    split = {"split": "brief", "model": LARGE, "candidates": [{"name": "calm", **candidate}], "unit": "run"}
    shadow = {"shadow": "next", "model": LARGE, "share": 1.0, "candidate": candidate}
    tree.call("POST", "/v1/splits", json=split)
    tree.call("POST", "/v1/shadows", json=shadow)
    body = {"model": LARGE, "messages": [{"role": "user", "content": "Where is my parcel?"}], "max_tokens": 8}
    tree.call("POST", "/v1/chat/completions", json=body)


def _rules(tree: Tree) -> None:
    tree.call("PUT", f"/v1/rules/{RULE['rule']}", json=RULE)
    tree.call(
        "POST",
        "/v1/alerts/silences",
        json={"matchers": {"rule": "memory-high", "host": "gpu-*"}, "time": "2h", "comment": "The host is repaired."},
    )


def _keys(tree: Tree) -> None:
    for name, more in (
        ("shop", {"namespace": "shop", "scopes": ["submit", "read", "operate"]}),
        ("reader", {"scopes": ["read"]}),
        ("admin", {"scopes": ["submit", "read", "operate", "admin"]}),
    ):
        tree.keys[name] = tree.call("POST", "/v1/keys", json={"name": name, **more})["key"]
    shop = tree.keys["shop"]
    tree.call("PUT", "/v1/workflows/shop-only", json={**REVIEWS, "workflow": "shop-only"}, key=shop)
    body = {"items": [], "title": "Only for the shop"}
    tree.ids["shop_conversation"] = tree.call("POST", "/v1/conversations", json=body, key=shop)["id"]


def _runs(tree: Tree) -> None:
    def submit(name: str, **more: Any) -> str:
        return str(tree.call("POST", "/v1/runs", json={"workflow": name, **more})["id"])

    done = [submit("ticket-triage", inputs={"message": f"Message {number}"}) for number in range(6)]
    tree.ids["succeeded"] = done[0]
    tree.ids["digest"] = submit("review-digest", inputs={"reviews": [f"Review {number}" for number in range(12)]})
    tree.ids["failed"] = submit("price-lookup")
    submit("price-lookup")
    tree.ids["approval"], tree.ids["approval2"] = submit("refund-approval"), submit("refund-approval")
    tree.ids["cancelled"] = submit("refund-approval", inputs={"order": "A-1730"})
    tree.ids["waiting"] = str(
        tree.call(
            "POST",
            "/v1/runs",
            json={
                "definition": {
                    "workflow": "too-large",
                    "steps": [{"id": "ask", "kind": "generate", "model": HUGE, "prompt": "Hello"}],
                }
            },
        )["id"]
    )
    final = {"succeeded", "failed", "cancelled"}
    for run in (*done, tree.ids["digest"], tree.ids["failed"]):
        until(lambda run=run: tree.state_of(run) in final, PATIENCE)
    tree.call("POST", f"/v1/runs/{tree.ids['cancelled']}/cancel", json={})
    for name in ("approval", "approval2"):
        until(lambda name=name: _awaits(tree, tree.ids[name]), PATIENCE)
    until(lambda: tree.call("GET", "/v1/alerts")["alerts"], 60)
    until(lambda: tree.call("GET", "/v1/metrics/models")["models"], 60)


def _awaits(tree: Tree, run: str) -> bool:
    return any(step["state"] == "awaiting" for step in tree.call("GET", f"/v1/runs/{run}")["steps"])
