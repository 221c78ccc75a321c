"""HubSpot, Twenty and Meta's Graph API as servers on this machine, and Meta's web hooks."""

from __future__ import annotations

import hashlib
import hmac
import json
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

#: The secrets of both ends, by the names that the definitions give them.
META_SECRETS = {"meta_app": "app-secret-of-meta", "meta_verify": "a-token-that-we-chose"}
TOKEN = "token-of-the-crm"


@dataclass
class Peers:
    """What they have. `failing` is the part of requests that are refused."""

    url: str = ""
    chance: random.Random = field(default_factory=lambda: random.Random(5))
    failing: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)
    hubspot: dict[str, dict[str, Any]] = field(default_factory=dict)
    twenty: dict[str, dict[str, Any]] = field(default_factory=dict)
    #: The property by which HubSpot knows contacts.
    id_property: str = "email"
    #: The requests that took effect. Meta knows no keys: a reply that took effect and failed would be sent again.
    replies: list[dict[str, Any]] = field(default_factory=list)

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        if path == "/crm/v3/objects/contacts/batch/upsert":
            (one,) = body["inputs"]
            assert one["idProperty"] == self.id_property
            self.hubspot.setdefault(one["id"], {}).update(one["properties"])
            return 200, {"status": "COMPLETE", "results": [{"id": one["id"], "properties": {}}]}
        if path == "/rest/people?upsert=true":
            key = body["emails"]["primaryEmail"]
            self.twenty[key] = body
            return 201, {"data": {"createPerson": {"id": key}}}
        assert path.endswith("/messages")
        assert body["messaging_product"] == "whatsapp"
        self.replies.append(body)
        return 200, {"messages": [{"id": f"wamid.reply{len(self.replies)}"}]}

    def get(self, path: str) -> tuple[int, Any]:
        key = unquote(path.partition("?")[0].rpartition("/")[2])
        if path.startswith("/crm/"):
            return (200, {"id": key, "properties": self.hubspot[key]}) if key in self.hubspot else (404, {})
        return (200, {"data": {"person": self.twenty[key]}}) if key in self.twenty else (404, {})


@contextmanager
def serving(made: Peers) -> Iterator[Peers]:
    """The services on a port."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with made.lock:
                if made.chance.random() < made.failing:
                    self.answer(503, {})
                    return
                self.answer(*made.post(self.path, body))

        def do_GET(self) -> None:
            with made.lock:
                self.answer(*made.get(self.path))

        def answer(self, status: int, body: Any) -> None:
            assert self.headers["authorization"] == f"Bearer {TOKEN}"
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def text_message(id_: str, sender: str, text: str) -> dict[str, Any]:
    return {"from": sender, "id": id_, "timestamp": "1767225600", "type": "text", "text": {"body": text}}


def event(*messages: dict[str, Any], statuses: tuple[dict[str, Any], ...] = (), name: str = "Ana") -> dict[str, Any]:
    """A request in the shape of Meta's documentation."""
    value = {
        "messaging_product": "whatsapp",
        "metadata": {"display_phone_number": "15550783881", "phone_number_id": "1065"},
        "contacts": [{"profile": {"name": name}, "wa_id": one["from"]} for one in messages],
        "messages": list(messages),
        "statuses": list(statuses),
    }
    changes = [{"field": "messages", "value": value}]
    return {"object": "whatsapp_business_account", "entry": [{"id": "102290129340398", "changes": changes}]}


def signed(body: Any, secret: str = META_SECRETS["meta_app"]) -> dict[str, Any]:
    raw = json.dumps(body).encode()
    digest = hmac.new(secret.encode(), raw, hashlib.sha256).hexdigest()
    return {"content": raw, "headers": {"content-type": "application/json", "x-hub-signature-256": f"sha256={digest}"}}
