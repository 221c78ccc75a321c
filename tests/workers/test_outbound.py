"""Calls of `http` steps, to real servers on this machine."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from app.kernel import log
from app.kernel.errors import FailureReason, StepFailure
from app.kernel.sections.http import HttpSettings
from app.kernel.sections.servers import LogSettings
from app.workflows.http.calls import HttpCall, json_body, text_body
from app.workflows.http.responses import HttpResponse
from workers import outbound
from workers.connections import Resolve

TLS = Path(__file__).parent / "tls"
SECRET = "s3cr3t/tökën+value"
SECRETS = (SECRET,)


class Server:
    """An HTTP server with a route per path, which records the requests."""

    def __init__(self, certificate: Path | None = None) -> None:
        self.routes: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {}
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []
        #: Set when a request has arrived, and when its client has gone.
        self.arrived, self.left = threading.Event(), threading.Event()
        #: Set when a part of a response was sent, and by a test to end routes that wait.
        self.flowing, self.go_on = threading.Event(), threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                server.seen.append((self.command, self.path, dict(self.headers), body))
                server.arrived.set()
                try:
                    server.routes[self.path.partition("?")[0]](self)
                    self.wfile.flush()
                except OSError:
                    server.left.set()
                self.close_connection = True

            do_GET = do_HEAD = do_POST = answer  # noqa: N815 the names are the library's

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                server.left.set()

        self.http = Quiet(("127.0.0.1", 0), Handler)
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.http.socket = context.wrap_socket(self.http.socket, server_side=True, do_handshake_on_connect=False)
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()
        self.port = self.http.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    def says(
        self, path: str, body: bytes = b"", status: int = 200, kind: str = "application/json", **headers: str
    ) -> None:
        def route(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(status)
            handler.send_header("Content-Type", kind)
            handler.send_header("Content-Length", str(len(body)))
            for name, value in headers.items():
                handler.send_header(name.replace("_", "-"), value)
            handler.end_headers()
            if handler.command != "HEAD":
                handler.wfile.write(body)

        self.routes[path] = route

    def does(self, path: str, route: Callable[[BaseHTTPRequestHandler], None]) -> None:
        self.routes[path] = route

    def close(self) -> None:
        self.go_on.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture
def other() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


class Resolver:
    """A resolver that returns the lists of addresses in turn, and then always the last one."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers, self.asked = list(answers), 0

    def __call__(self, *_: object) -> Sequence[str]:
        self.asked += 1
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def settings(*servers: Server, **more: Any) -> HttpSettings:
    listed = [f"{host}:{one.port}" for one in servers for host in ("127.0.0.1", "api.example.test", "localhost")]
    return HttpSettings(**{"allowed_hosts": tuple(listed), "allow_private": True} | more)


def call(request: HttpCall, *servers: Server, resolve: Resolve | None = None, **more: Any) -> HttpResponse:
    given = {} if resolve is None else {"resolve": resolve}
    return outbound.call(request, settings=settings(*servers, **more), on_stop=lambda _: None, **given)


def failed(request: HttpCall, *servers: Server, **more: Any) -> StepFailure:
    with pytest.raises(StepFailure) as caught:
        call(request, *servers, **more)
    assert caught.value.__cause__ is None
    return caught.value


def test_a_call_and_its_response(server: Server) -> None:
    server.says("/orders", b'{"id": 7}', X_Kind="order", Set_Cookie="session=1")
    response = call(
        HttpCall(
            f"{server.url}/orders?a=1",
            headers={"X-Trace": "t"},
            query={"q": "two words & more"},
            body=json_body({"n": "é"}),
            idempotency_key="run/step",
        ),
        server,
    )

    assert (response.status, response.body, response.headers["x-kind"]) == (200, {"id": 7}, "order")
    assert "set-cookie" not in response.headers
    method, path, headers, body = server.seen[0]
    assert (method, path, json.loads(body)) == ("POST", "/orders?a=1&q=two+words+%26+more", {"n": "é"})
    assert headers["Host"] == f"127.0.0.1:{server.port}"
    assert (headers["Idempotency-Key"], headers["X-Trace"]) == ("run/step", "t")
    assert headers["Content-Type"] == "application/json"


def test_text_and_compressed_responses_are_read(server: Server) -> None:
    server.says("/text", "größe".encode("latin-1"), kind="text/plain; charset=iso-8859-1")
    server.says("/packed", gzip.compress(b'["a"]') + gzip.compress(b""), Content_Encoding="gzip")
    server.says("/nothing", b"")

    assert call(HttpCall(f"{server.url}/text"), server).body == "größe"
    assert call(HttpCall(f"{server.url}/packed"), server).body == ["a"]
    assert call(HttpCall(f"{server.url}/nothing"), server).body is None
    assert call(HttpCall(f"{server.url}/packed", "HEAD"), server).body is None


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"{", "application/json"),
        (b"[NaN]", "application/json"),
        (b"[1e999]", "application/json"),
        (b'["\\ud800"]', "application/problem+json"),
        (b"[" * 100_000, "application/json"),
        (b"\xff\xd8\xff", "image/jpeg"),
        (b"\xe9", "text/plain; charset=punycode"),
    ],
)
def test_a_response_that_cannot_be_stored_fails_the_attempt(server: Server, body: bytes, kind: str) -> None:
    server.says("/", body, kind=kind)
    assert failed(HttpCall(server.url), server).reason is FailureReason.HTTP_UNUSABLE


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (404, FailureReason.HTTP_4XX),
        (429, FailureReason.HTTP_THROTTLED),
        (503, FailureReason.HTTP_5XX),
        (302, FailureReason.HTTP_UNUSABLE),
    ],
)
def test_other_statuses_are_failures_with_the_start_of_the_body(
    server: Server, status: int, reason: FailureReason
) -> None:
    server.says("/x", b"no\0 luck" + b"." * 10_000, status, Retry_After="7", Location="/y")
    failure = failed(HttpCall(f"{server.url}/x?q=1"), server)

    assert (failure.reason, failure.status) == (reason, status)
    assert failure.message.startswith(f"GET {server.url}/x returned {status}")
    assert failure.text is not None
    assert failure.text.startswith("no\ufffd luck...")
    assert len(failure.text) == 4000
    assert failure.retry_after == (timedelta(seconds=7) if status in (429, 503) else None)


def test_the_expected_statuses_are_successes(server: Server) -> None:
    server.says("/", b"gone", 404, kind="text/plain")
    found = call(HttpCall(server.url, expect=(404,)), server).output()
    assert (found["status"], found["headers"]["content-type"], found["body"]) == (404, "text/plain", "gone")
    server.says("/", b"{}", 200)
    assert failed(HttpCall(server.url, expect=(404,)), server).reason is FailureReason.HTTP_UNUSABLE


def test_a_host_that_is_not_listed_is_not_called(server: Server) -> None:
    failure = failed(HttpCall(server.url))

    assert failure.reason is FailureReason.HTTP_REFUSED
    assert f"http.allowed_hosts does not list '127.0.0.1:{server.port}'" in failure.message
    assert server.seen == []


def test_private_addresses_are_refused_for_every_name(server: Server) -> None:
    """One private address of a name is enough: no connection is made."""
    named = HttpCall(f"http://api.example.test:{server.port}/")
    for addresses in (["127.0.0.1"], ["93.184.216.34", "10.0.0.1"], ["::ffff:127.0.0.1"], ["169.254.169.254"]):
        failure = failed(named, server, resolve=Resolver(addresses), allow_private=False)
        assert failure.reason is FailureReason.HTTP_REFUSED
        assert addresses[-1] in failure.message
    assert "http.allow_private would allow it" in failed(HttpCall(server.url), server, allow_private=False).message
    for spelling in ("2130706433", "0x7f.1", "localhost"):
        listed = {"allowed_hosts": (f"{spelling}:{server.port}",), "allow_private": False}
        assert "this machine itself" in failed(HttpCall(f"http://{spelling}:{server.port}/"), **listed).message
    assert failed(named, server, resolve=Resolver(["169.254.169.254"])).reason is FailureReason.HTTP_REFUSED
    assert server.seen == []


def test_a_name_is_resolved_once_and_the_checked_address_is_called(server: Server) -> None:
    """DNS rebinding: the name has another address a moment later."""
    server.says("/", b"1")
    resolver = Resolver(["127.0.0.1"], ["169.254.169.254"])

    assert call(HttpCall(f"http://api.example.test:{server.port}/"), server, resolve=resolver).body == 1
    assert resolver.asked == 1
    assert server.seen[0][2]["Host"] == f"api.example.test:{server.port}"
    assert failed(HttpCall(f"http://api.example.test:{server.port}/"), server, resolve=resolver).reason is (
        FailureReason.HTTP_REFUSED
    )


def test_the_next_address_is_tried_when_one_refuses_the_connection(server: Server) -> None:
    server.says("/", b"1")
    resolver = Resolver(["127.0.0.2", "127.0.0.1"])
    assert call(HttpCall(f"http://api.example.test:{server.port}/"), server, resolve=resolver).body == 1


def test_an_unreachable_server_is_reported_with_the_reason(server: Server) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        failure = failed(HttpCall(f"http://127.0.0.1:{port}/"), allowed_hosts=(f"127.0.0.1:{port}",))
    assert (failure.reason, failure.message) == (
        FailureReason.HTTP_UNREACHABLE,
        f"GET http://127.0.0.1:{port}/ cannot be reached: 127.0.0.1: Connection refused",
    )
    server.does("/cut", lambda handler: handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"))
    server.does("/nonsense", lambda handler: handler.wfile.write(b"SSH-2.0-x\r\n\r\n"))
    server.does("/silence", lambda _: None)
    for path in ("/cut", "/nonsense", "/silence"):
        assert failed(HttpCall(server.url + path), server).reason is FailureReason.HTTP_UNREACHABLE


def test_redirects_are_followed_on_request_only_and_each_is_checked(server: Server, other: Server) -> None:
    server.says("/a", status=302, Location="/b?x=1")
    server.says("/b", b"2")
    server.says("/out", status=307, Location="http://127.0.0.1:1/admin")
    server.says("/cloud", status=307, Location="http://169.254.169.254/latest/meta-data")
    server.says("/round", status=302, Location="/round")

    assert "set follow_redirects to follow the redirect" in failed(HttpCall(f"{server.url}/a"), server).message
    assert call(HttpCall(f"{server.url}/a", follow_redirects=True), server).body == 2
    assert "does not list '127.0.0.1:1'" in failed(HttpCall(f"{server.url}/out", follow_redirects=True), server).message
    everything = {"allowed_hosts": (f"127.0.0.1:{server.port}", "169.254.169.254")}
    failure = failed(HttpCall(f"{server.url}/cloud", follow_redirects=True), **everything)
    assert "the metadata service of a cloud" in failure.message
    assert "more than 5 redirects" in failed(HttpCall(f"{server.url}/round", follow_redirects=True), server).message


def test_a_redirect_sends_no_secret_to_another_origin(server: Server, other: Server) -> None:
    other.says("/in", b"1")
    server.says("/move", status=307, Location=f"{other.url}/in")
    server.says("/echo", status=302, Location=f"{other.url}/in?key=abc%2Fdef")
    server.says("/same", status=307, Location="/back")
    server.says("/back", b"1")
    headers = {"Authorization": "Bearer abc/def", "X-Key": "abc/def", "Accept": "text/plain"}
    given = {"headers": headers, "follow_redirects": True, "secrets": ("abc/def",)}

    call(HttpCall(f"{server.url}/move", **given), server, other)
    assert {"Authorization", "X-Key"} & set(other.seen[0][2]) == set()
    assert other.seen[0][2]["Accept"] == "text/plain"
    call(HttpCall(f"{server.url}/same", **given), server)
    assert server.seen[-1][2]["Authorization"] == "Bearer abc/def"
    for request in (
        HttpCall(f"{server.url}/move", body=text_body("key: abc/def"), **given),
        HttpCall(f"{server.url}/echo", **given),
    ):
        failure = failed(request, server, other)
        assert (failure.reason, "abc" in failure.message) == (FailureReason.HTTP_REFUSED, False)
    assert len(other.seen) == 1


def test_long_responses_and_decompression_bombs_stop_at_the_bound(server: Server) -> None:
    bomb = io.BytesIO()
    with gzip.GzipFile(fileobj=bomb, mode="wb") as packed:
        for _ in range(64):
            packed.write(bytes(1 << 20))
    server.says("/bomb", bomb.getvalue(), Content_Encoding="gzip", kind="text/plain")
    server.says("/bombed", bomb.getvalue(), 500, Content_Encoding="gzip", kind="text/plain")
    server.says("/long", b"." * 2000, kind="text/plain")
    server.says("/fits", b"." * 1000, kind="text/plain")

    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            handler.wfile.write(b"." * 65_536)

    server.does("/endless", endless)
    for path in ("/bomb", "/long", "/endless"):
        failure = failed(HttpCall(server.url + path, max_bytes=1000), server)
        assert (failure.reason, "max_bytes (1000)" in failure.message) == (FailureReason.HTTP_UNUSABLE, True)
    assert server.left.wait(60)
    assert failed(HttpCall(f"{server.url}/bombed"), server).reason is FailureReason.HTTP_5XX
    assert call(HttpCall(f"{server.url}/fits", max_bytes=1000), server).body == "." * 1000


def test_a_truncated_gzip_is_rejected(server: Server) -> None:
    server.says("/", gzip.compress(b"x" * 9)[:-4], Content_Encoding="gzip", kind="text/plain")
    assert "ends too early" in failed(HttpCall(server.url), server).message
    server.says("/", b"plain", Content_Encoding="br", kind="text/plain")
    assert "content encoding 'br'" in failed(HttpCall(server.url), server).message


def slow_route(server: Server) -> Callable[[BaseHTTPRequestHandler], None]:
    """A route that sends a byte every 10 ms without an end: no wait for a single byte is long."""

    def route(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        for count in itertools.count():
            if server.go_on.wait(0.01):
                return
            handler.wfile.write(b".")
            if count == 3:
                server.flowing.set()

    return route


def test_the_timeout_is_for_the_whole_call(server: Server) -> None:
    server.does("/slow", slow_route(server))
    server.does("/never", lambda _: server.go_on.wait(60))

    for path in ("/slow", "/never"):
        failure = failed(HttpCall(server.url + path, timeout=timedelta(seconds=0.05)), server)
        assert (failure.reason, failure.message) == (FailureReason.TIMEOUT, "the call did not end within 0.05 s")


@contextmanager
def silent_server() -> Iterator[tuple[int, threading.Event]]:
    """A server that accepts a connection and sends nothing: its port, and an event for received bytes."""
    received = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                while connection.recv(10_000):
                    received.set()

        thread = threading.Thread(target=serve)
        thread.start()
        yield listening.getsockname()[1], received
        thread.join()


def test_a_connection_has_a_timeout_of_its_own() -> None:
    with silent_server() as (port, _):
        listed = {"allowed_hosts": (f"127.0.0.1:{port}",), "connect_timeout": "50ms"}
        failure = failed(HttpCall(f"https://127.0.0.1:{port}/"), **listed)
    assert (failure.reason, "http.connect_timeout" in failure.message) == (FailureReason.TIMEOUT, True)


def assert_cancelled(request: HttpCall, allowed: HttpSettings, when: threading.Event, **more: Any) -> None:
    """Make a call on a thread, cancel it when the event is set, and check that it ends."""
    outcome: list[BaseException] = []
    stops: list[Callable[[], None]] = []

    def work() -> None:
        try:
            outbound.call(request, settings=allowed, on_stop=stops.append, **more)
        except BaseException as error:  # noqa: BLE001 the test looks at it
            outcome.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert when.wait(60)
    stops[0]()
    thread.join(10)
    assert [type(error) for error in outcome] == [CancelledError]
    stops[0]()


def test_a_call_is_cancelled_while_it_waits_for_a_response(server: Server) -> None:
    server.does("/never", lambda _: server.go_on.wait(60))
    assert_cancelled(HttpCall(f"{server.url}/never"), settings(server), server.arrived)


def test_a_call_is_cancelled_in_the_middle_of_a_response(server: Server) -> None:
    server.does("/slow", slow_route(server))
    assert_cancelled(HttpCall(f"{server.url}/slow"), settings(server), server.flowing)
    assert server.left.wait(60)


def test_a_call_is_cancelled_while_the_name_is_resolved() -> None:
    asked, go_on = threading.Event(), threading.Event()

    def resolve(host: str, port: int) -> Sequence[str]:
        asked.set()
        go_on.wait(60)
        return []

    assert_cancelled(
        HttpCall("http://api.example.test/"), HttpSettings(allowed_hosts=("api.example.test",)), asked, resolve=resolve
    )
    go_on.set()


def test_a_call_is_cancelled_during_the_tls_handshake() -> None:
    with silent_server() as (port, received):
        allowed = HttpSettings(allowed_hosts=(f"127.0.0.1:{port}",), allow_private=True)
        assert_cancelled(HttpCall(f"https://127.0.0.1:{port}/"), allowed, received)


def test_a_call_that_is_cancelled_before_its_start_does_nothing(server: Server) -> None:
    with pytest.raises(CancelledError):
        outbound.call(HttpCall(server.url), settings=settings(server), on_stop=lambda stop: stop())
    assert server.seen == []


def test_the_certificate_is_verified_for_the_name_not_the_address() -> None:
    server = Server(TLS / "server.pem")
    server.says("/", b'"safe"')
    trusted = {"ca_file": TLS / "authority.pem"}
    named = HttpCall(f"https://api.example.test:{server.port}/")
    try:
        assert call(named, server, resolve=Resolver(["127.0.0.1"]), **trusted).body == "safe"
        wrong = failed(HttpCall(f"https://127.0.0.1:{server.port}/"), server, **trusted)
        unknown = failed(named, server, resolve=Resolver(["127.0.0.1"]))
        plain = failed(HttpCall(f"http://api.example.test:{server.port}/"), server, resolve=Resolver(["127.0.0.1"]))
    finally:
        server.close()
    assert {one.reason for one in (wrong, unknown, plain)} == {FailureReason.HTTP_UNREACHABLE}
    assert "its certificate was rejected: IP address mismatch" in wrong.message
    assert "its certificate was rejected: unable to get local issuer certificate" in unknown.message
    assert len(server.seen) == 1


@pytest.mark.parametrize("error", [UnicodeError("label empty or too long"), ValueError("embedded null character")])
def test_a_name_that_cannot_be_encoded_fails_immediately(server: Server, error: Exception) -> None:
    """An error on the resolver's thread reaches the call: the call does not wait until its timeout."""

    def refusing(host: str, port: int) -> Sequence[str]:
        raise error

    asked = HttpCall(f"http://api.example.test:{server.port}/", timeout=timedelta(days=1))
    failure = failed(asked, server, resolve=refusing)

    assert failure.reason is FailureReason.HTTP_UNREACHABLE
    assert "the name cannot be resolved" in failure.message


def test_an_unexpected_error_of_the_resolver_is_raised(server: Server) -> None:
    def broken(host: str, port: int) -> Sequence[str]:
        raise RuntimeError("no resolver here")

    with pytest.raises(RuntimeError, match="no resolver here"):
        call(HttpCall(f"http://api.example.test:{server.port}/", timeout=timedelta(days=1)), server, resolve=broken)


def test_no_secret_is_in_responses_errors_or_logs(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """The server echoes the whole request, and the log level is debug."""

    def echo(handler: BaseHTTPRequestHandler) -> None:
        said = json.dumps({"headers": dict(handler.headers), "path": handler.path, SECRET: [SECRET]}).encode()
        handler.send_response(500 if "fail" in handler.path else 200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("X-Echo", handler.path)
        handler.send_header("Content-Length", str(len(said)))
        handler.end_headers()
        handler.wfile.write(said)

    handlers, level = logging.getLogger().handlers[:], logging.getLogger().level
    log.configure(LogSettings(level="debug", format="json"))
    try:
        server.does("/echo", echo)
        server.does("/fail", echo)
        given = {
            "headers": {"X-Key": "s3cr3t"},
            "query": {"token": SECRET},
            "body": json_body({"token": SECRET}),
            "secrets": (*SECRETS, "s3cr3t"),
        }
        response = call(HttpCall(f"{server.url}/echo", **given), server)
        failures = [
            failed(HttpCall(f"{server.url}/fail", **given), server),
            failed(HttpCall(f"{server.url}/{SECRET}", **given)),
            failed(HttpCall("http://s3cr3t.example.test/", **given), allowed_hosts=("*.example.test",)),
            failed(HttpCall(server.url, headers={"X-Key": f"{SECRET}\n"}, secrets=SECRETS), server),
            failed(HttpCall(f"ftp://{SECRET}@h/", secrets=SECRETS), server),
        ]
    finally:
        logging.getLogger().handlers[:], logging.getLogger().level = handlers, level
    shown = [repr(response), *(repr(vars(failure)) for failure in failures), *map(str, failures)]
    shown += [repr(HttpCall(f"{server.url}/?{SECRET}", **given)), *capsys.readouterr()]

    assert server.seen[0][2]["X-Key"] == "s3cr3t"
    assert response.body["***"] == ["***"]
    assert any("http_called" in text for text in shown)
    for text in shown:
        assert [part for part in ("s3cr3t", "kën", "k%C3%AB", "k\\u00eb", "+value", "%2Bvalue") if part in text] == []
