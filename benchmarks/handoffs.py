"""
Hand-offs under load: `python -m benchmarks.handoffs [--messages 10000] [--duplicates 2] [--failing 0.3] [--json FILE]`.

An `arriero up` on temporary data takes signed web hooks from several senders at a time and gives them to a CRM: an HTTP
server of this program, which may fail. Measured are the rate at which messages are accepted and at which the target has
them, the time from the first acknowledgement of a message until the target has it, and the memory of the API and of
the control worker. At the end each message is at the target exactly once, or the exit code is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import hmac
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2

from benchmarks import installations

_SECRET = "whsec_" + base64.b64encode(b"a secret of thirty-two bytes, now").decode()
_DOCUMENT = {
    "handoff": "leads",
    "source": {"kind": "webhook", "secret": "hook", "sender": "message.shop"},
    "schema": {"type": "object", "required": ["id", "shop", "email"]},
    "mapping": {
        "cel": '{"id": message.id, "email": message.email.lowerAscii()}',
        "schema": {"type": "object", "properties": {"email": {"type": "string", "format": "email"}}},
    },
    "retry": {"max_attempts": 30, "delay": "200ms", "cap": "2s"},
    "expected": ["id", "email"],
}
#: Seconds without a new arrival after which the benchmark gives up.
_PATIENCE = 300.0


@dataclass(slots=True)
class Target:
    """What the CRM has."""

    failing: float
    chance: random.Random = field(default_factory=lambda: random.Random(1))
    arrived: dict[int, float] = field(default_factory=dict)
    writes: Counter[int] = field(default_factory=Counter)
    requests: int = 0


@dataclass(slots=True)
class HandoffReport:
    """The figures."""

    messages: int
    requests_in: int
    accepted_per_s: float = 0.0
    delivered_per_s: float = 0.0
    #: Seconds from the acknowledgement until the target has it.
    p50_s: float = 0.0
    p99_s: float = 0.0
    missing: int = 0
    doubled: int = 0
    #: MiB at the first tenth of the messages, and after the last one.
    memory_first: dict[str, float] = field(default_factory=dict)
    memory_last: dict[str, float] = field(default_factory=dict)
    success: float | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.handoffs")
    parser.add_argument("--messages", type=int, default=10_000)
    parser.add_argument("--duplicates", type=int, default=2, help="how often each message comes")
    parser.add_argument("--failing", type=float, default=0.0, help="the part of requests that the target refuses")
    parser.add_argument("--senders", type=int, default=16, help="requests at a time")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args(arguments)
    target = Target(asked.failing)
    server = _server(target)
    address = f"127.0.0.1:{server.server_port}"
    with tempfile.TemporaryDirectory() as folder:
        secret = Path(folder, "hook")
        secret.write_text(_SECRET)
        secret.chmod(0o600)
        options = [f'http.allowed_hosts=["{address}"]', "http.allow_private=true", f"secrets_dir={folder}"]
        with installations.up(threads=1, slots=1, context=512, options=options) as platform:
            report = asyncio.run(_measured(platform, target, address, asked))
    server.shutdown()
    print(json.dumps(asdict(report), indent=2))
    if asked.json is not None:
        asked.json.write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    return 1 if report.missing or report.doubled else 0


async def _measured(
    platform: installations.Up, target: Target, address: str, asked: argparse.Namespace
) -> HandoffReport:
    report = HandoffReport(asked.messages, asked.messages * asked.duplicates)
    document = {**_DOCUMENT, "target": {"kind": "http", "url": f"http://{address}/leads"}}
    acknowledged: dict[int, float] = {}
    deliveries = [number for number in range(asked.messages) for _ in range(asked.duplicates)]
    # Nearby ones change places: senders repeat soon, and in any order.
    chance = random.Random(2)
    deliveries = [n for _, n in sorted((place + chance.uniform(0, 200), n) for place, n in enumerate(deliveries))]
    async with httpx2.AsyncClient(base_url=platform.url, timeout=120, trust_env=False) as client:
        (await client.put("/v1/handoffs/leads", json=document)).raise_for_status()
        began = time.monotonic()
        left = iter(deliveries)

        async def send() -> None:
            for number in left:
                answer = await client.post("/v1/hooks/default/leads", **_signed(number))
                answer.raise_for_status()
                acknowledged.setdefault(number, time.monotonic())

        async def watch() -> None:
            while len(target.arrived) < asked.messages // 10:
                await asyncio.sleep(0.2)
            report.memory_first = _memory(platform)

        watching = asyncio.create_task(watch())
        await asyncio.gather(*(send() for _ in range(asked.senders)))
        report.accepted_per_s = round(len(deliveries) / (time.monotonic() - began), 1)
        seen, at = len(target.arrived), time.monotonic()
        while len(target.arrived) < asked.messages and time.monotonic() - at < _PATIENCE:
            await asyncio.sleep(0.5)
            if len(target.arrived) > seen:
                seen, at = len(target.arrived), time.monotonic()
        report.delivered_per_s = round(len(target.arrived) / (max(target.arrived.values()) - began), 1)
        await watching
        report.memory_last = _memory(platform)
        await asyncio.sleep(3)  # what would come twice comes by then, and the last ones are confirmed
        report.success = (await client.get("/v1/handoffs/leads/scores")).json()["total"]["success"]
    waits = sorted(at - acknowledged[number] for number, at in target.arrived.items())
    report.p50_s, report.p99_s = (round(waits[int(len(waits) * part)], 2) for part in (0.5, 0.99))
    report.missing = asked.messages - len(target.arrived)
    report.doubled = sum(count > 1 for count in target.writes.values())
    return report


def _signed(number: int) -> dict[str, object]:
    body = json.dumps({"id": number, "shop": f"shop-{number % 7}", "email": f"P{number}@example.com"}).encode()
    id_, at = f"msg_{number}", str(int(time.time()))
    key = base64.b64decode(_SECRET.removeprefix("whsec_"))
    signature = base64.b64encode(hmac.digest(key, f"{id_}.{at}.".encode() + body, hashlib.sha256)).decode()
    headers = {"webhook-id": id_, "webhook-timestamp": at, "webhook-signature": f"v1,{signature}"}
    return {"content": body, "headers": {**headers, "content-type": "application/json"}}


def _memory(platform: installations.Up) -> dict[str, float]:
    return {
        name: round(process.memory_full_info().pss / 2**20, 1)
        for name, process in platform.processes().items()
        if name in ("api", "control")
    }


def _server(target: Target) -> ThreadingHTTPServer:
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            number = json.loads(self.rfile.read(int(self.headers["content-length"])))["id"]
            with lock:
                target.requests += 1
                fails = target.chance.random() < target.failing
                if not fails:
                    target.arrived.setdefault(number, time.monotonic())
                    target.writes[number] += 1
            self.send_response(503 if fails else 200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


if __name__ == "__main__":
    sys.exit(main())
