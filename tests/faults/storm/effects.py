"""
A server with effects: it does the work of an idempotency key once, and counts what it was asked for.

The body names the effect. An effect with two keys is doubled: the server cannot know that it is the same.
"""

from __future__ import annotations

import json
import threading
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class EffectServer:
    """The server, on a port of loopback."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: By effect, how often each key came.
        self.requests: defaultdict[str, Counter[str]] = defaultdict(Counter)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    outer.requests[body["effect"]][self.headers["Idempotency-Key"] or ""] += 1
                content = json.dumps({"done": body["effect"]}).encode()
                self.send_response(201)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, name="effects", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def problems(self, expected: set[str]) -> list[str]:
        """Effects that were doubled, came without a key, or never came."""
        with self._lock:
            found = {effect: Counter(keys) for effect, keys in self.requests.items()}
        doubled = [f"effect {effect} came with {len(keys)} keys" for effect, keys in found.items() if len(keys) > 1]
        bare = [f"effect {effect} came without a key" for effect, keys in found.items() if "" in keys]
        missing = [f"effect {effect} of a succeeded run never came" for effect in sorted(expected - found.keys())]
        return doubled + bare + missing

    def counts(self) -> dict[str, int]:
        """Effects, requests, and requests that repeated a key."""
        with self._lock:
            requests = sum(keys.total() for keys in self.requests.values())
            return {"effects": len(self.requests), "requests": requests, "repeated": requests - len(self.requests)}
