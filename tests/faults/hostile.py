"""
Hostile inputs that a client of the API, or of the broker, may send to attack an installation.

Each attack is one call to a running installation. The chaos test checks that it has no effect: no answer with status
500 and no slow answer, no file is read and no server is called, no process ends, and every created run ends.
"""

from __future__ import annotations

import base64
import json
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2
import redis

#: A file for references, and a text that its content contains.
_FILE, _CONTENT = "file:///etc/passwd", "root:"


class Bait:
    """A server that must not be called; it counts its connections."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/schema.json"
        self.connections = 0
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            with peer:
                self.connections += 1
                peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")


@dataclass
class Target:
    """The attacked installation, and the results of the attacks."""

    client: httpx2.Client
    redis_url: str
    bait: Bait
    #: By id of a created run, the name of its attack.
    runs: dict[str, str] = field(default_factory=dict)
    #: Descriptions of wrong answers.
    problems: list[str] = field(default_factory=list)


Attack = Callable[[Target], httpx2.Response | None]


def _definition(target: Target, definition: Any, **more: Any) -> httpx2.Response:
    return target.client.post("/v1/runs", json={"definition": definition, **more})


def _raw(target: Target, body: bytes, kind: str = "application/json") -> httpx2.Response:
    return target.client.post("/v1/runs", content=body, headers={"Content-Type": kind})


def _schema(schema: Mapping[str, Any], value: Any = "x") -> Attack:
    def attack(target: Target) -> httpx2.Response:
        filled = json.loads(json.dumps(schema).replace("$BAIT", target.bait.url))
        noop = {"workflow": "w", "inputs": {"v": filled}, "steps": [{"id": "a", "kind": "noop"}]}
        return _definition(target, noop, inputs={"v": value})

    return attack


def _output_schema(schema: Mapping[str, Any]) -> Attack:
    """A schema for the output of a run that ends with a wait, so that the sweep computes the output."""

    def attack(target: Target) -> httpx2.Response:
        filled = json.loads(json.dumps(schema).replace("$BAIT", target.bait.url))
        outputs = {"o": {"value": "{'x': 1}", "schema": filled}}
        steps = [{"id": "a", "kind": "wait", "for": "100ms"}]
        return _definition(target, {"workflow": "w", "steps": steps, "outputs": outputs})

    return attack


def _steps(*steps: Mapping[str, Any], inputs: Mapping[str, Any] | None = None, **given: Any) -> Attack:
    def attack(target: Target) -> httpx2.Response:
        definition = {"workflow": "w", "inputs": dict(inputs or {}), "steps": list(steps)}
        return _definition(target, definition, inputs=given)

    return attack


def _template(template: str) -> Attack:
    return _steps({"id": "a", "kind": "generate", "model": "alpha:1", "prompt": template, "max_tokens": 1})


def _body(body: bytes, kind: str = "application/json") -> Attack:
    return lambda target: _raw(target, body, kind)


def _message(body: bytes, *, queues: tuple[str, ...] = ("io", "control", "model.alpha-1")) -> Attack:
    """Put an invalid message into queues."""

    def attack(target: Target) -> None:
        with redis.Redis.from_url(target.redis_url, protocol=2, socket_timeout=5) as client:
            for queue in queues:
                client.rpush(queue, body)

    return attack


def _envelope(body: Any, *, encoding: str = "base64", task: str = "workers.steps.run_step") -> bytes:
    """A message of Celery with this body."""
    properties = {
        "correlation_id": "x", "delivery_mode": 2, "delivery_info": {"exchange": "", "routing_key": "io"},
        "priority": 0, "body_encoding": encoding, "delivery_tag": "x",
    }  # fmt: skip
    headers = {"lang": "py", "task": task, "id": "x", "argsrepr": "", "kwargsrepr": "", "root_id": "x"}
    text = json.dumps(
        {
            "body": body,
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": headers,
            "properties": properties,
        }
    )
    return text.encode()


_ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [" + ", ".join(f"*a{n - 1}" for _ in range(9)) + "]\n" for n in range(1, 12)
)
_MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}], k{n}: 1}}\n" for n in range(1, 30))
_DOUBLING = "{% set a = 'xxxxxxxxxxxxxxxx' %}" + "{% set a = a ~ a %}" * 40 + "{{ a }}"
_NUMBER = b'{"definition": {"workflow": "w", "inputs": {"x": {}}, "steps": [{"id": "a", "kind": "noop", '
_NUMBER += b'"when": "double(inputs.x) > 1.0"}]}, "inputs": {"x": 1' + b"0" * 400 + b"}}"

#: The attacks, by name.
ATTACKS: Mapping[str, Attack] = {
    "reference to http": _schema({"$ref": "$BAIT"}),
    "reference to a file": _schema({"$ref": _FILE}),
    "reference to http in an output": _output_schema({"$ref": "$BAIT"}),
    "reference to nothing": _output_schema({"$ref": "#/definitions/nothing"}),
    "exponential pattern": _schema({"type": "string", "pattern": "^(a+)+$"}, "a" * 40 + "!"),
    "exponential pattern in CEL": _steps(
        {"id": "a", "kind": "transform", "cel": "inputs.x.matches('^(a+)+$')"},
        inputs={"x": {"type": "string"}},
        x="a" * 40 + "!",
    ),
    "number beyond floats": _body(_NUMBER),
    "endless retries": _steps(
        {
            "id": "a",
            "kind": "transform",
            "cel": "1 / 0",
            "retry": {"max_attempts": 60, "delay": "1ms", "factor": 100, "cap": "1ms", "on": ["template_error"]},
        }
    ),
    "deep JSON": _body(b"[" * 500),
    "deeper JSON": _body(b'{"definition": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "aliases that multiply": _body(_ALIASES.encode(), "application/yaml"),
    "merges that double": _body(_MERGES.encode(), "application/yaml"),
    "aliases in a text": lambda target: _definition(target, _ALIASES),
    "wide text": _template("{{ 'x'.ljust(900000000) }}"),
    "wide filter": _template("{{ 'x' | center(900000000) }}"),
    "text that doubles": _template(_DOUBLING),
    "NUL": _steps({"id": "a", "kind": "transform", "cel": "'a\\u0000b'"}),
    "lone surrogate": _body(b'{"definition": {"workflow": "w", "steps": [{"id": "a", "kind": "noop"}]}, "labels": '
                            b'{"x": "\\ud800"}}'),
    "body of another kind": _body(b"\x1f\x8b\x00\xff" * 1000, "application/octet-stream"),
    "foreign host": lambda target: target.client.get("/v1/runs", headers={"Host": "evil.example"}),
    "message without base64": _message(_envelope("%%%")),
    "message of a list": _message(b"[1, 2, 3]"),
    "message that is not JSON": _message(b"\xff\xfenonsense"),
    "message with a foreign task": _message(_envelope(base64.b64encode(b"[[], {}, {}]").decode(), task="os.system")),
    "message with odd arguments": _message(_envelope(base64.b64encode(b'[["x", {}], {}, {}]').decode())),
}  # fmt: skip

#: Attacks that must be rejected, never accepted.
_REJECTED = frozenset({"reference to http", "reference to a file", "foreign host", "deep JSON", "deeper JSON"})


def attack(target: Target, name: str) -> None:
    """Send an attack, and note problems of the answer. 503 is no problem: parts are killed meanwhile."""
    try:
        answer = ATTACKS[name](target)
    except (httpx2.TransportError, redis.RedisError):
        return  # a part may be unavailable meanwhile
    if answer is None:
        return
    if answer.status_code == 500:
        target.problems.append(f"{name}: answered with 500: {answer.text[:200]}")
    if name in _REJECTED and answer.is_success:
        target.problems.append(f"{name}: it was accepted")
    if _CONTENT in answer.text:
        target.problems.append(f"{name}: the answer contains a file")
    if len(answer.content) > 100_000:
        target.problems.append(f"{name}: the answer has {len(answer.content)} bytes")
    if answer.status_code == 202 and "id" in answer.json():
        target.runs[answer.json()["id"]] = name
