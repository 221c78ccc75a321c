"""
The file server of a host: sends model files to the agents of other hosts.

It sends the files that are offered, each under its SHA-256, to clients with a token for it, and nothing else.
`Range: bytes=N-` continues a file. Files over the limit of uploads, and connections over that of the server, are turned
away at once; a client that is silent, or reads nothing, is disconnected.

It speaks TLS where it has a certificate, in the thread of each connection, so that no handshake delays another client.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from io import BufferedIOBase
from pathlib import Path
from socketserver import BaseServer, TCPServer, ThreadingMixIn
from typing import Any, BinaryIO

from app.fleet import file_servers
from app.kernel import ids, log
from app.kernel.errors import ServerNotStarted
from app.kernel.processes.listening import listen
from app.kernel.sections.peers import PeerSettings
from workers.peers.pace import Pace

_log = log.get(__name__)

#: Seconds after which a client that sends or reads nothing is disconnected.
_TIMEOUT = 30.0
#: Connections beside those that get a file: each waits for its answer only.
_SPARE_CONNECTIONS = 16
#: Seconds after which a client that was turned away may try again.
_RETRY_AFTER = 5
_BLOCK = 256 * 1024
_PATH = re.compile(r"/files/([0-9a-f]{64})")
_RANGE = re.compile(r"bytes=([0-9]{1,18})-")
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----[A-Za-z0-9+/=\s]{1,65536}?-----END CERTIFICATE-----")


class FileSender:
    """A running file server. It sends nothing until files are offered."""

    def __init__(self, peers: PeerSettings) -> None:
        """
        Listen, and answer in threads.

        Raises ServerNotStarted when the address is in use, or the certificate cannot be read.
        """
        self.key = ids.new_secret()
        #: The paths of the offered files, by SHA-256. It is replaced as a whole.
        self.offered: Mapping[str, Path] = {}
        self._stopped = threading.Event()
        self._pace = Pace(peers.upload_rate, self._stopped)
        self._uploads = threading.BoundedSemaphore(peers.uploads)
        self.certificate, context = _tls(peers)
        self._server = _Server(self, listen("the file server", peers.host, peers.port, "peers.port"), context, peers)
        named = f"[{peers.host}]" if ":" in peers.host else peers.host
        scheme = "http" if context is None else "https"
        self.url = peers.url or f"{scheme}://{named}:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, name="file-server", daemon=True).start()

    def close(self) -> None:
        """Stop listening, and end every upload."""
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()

    @contextmanager
    def upload(self) -> Iterator[bool]:
        """Count an upload for the block. Yields False when there are too many."""
        may = self._uploads.acquire(blocking=False)
        try:
            yield may
        finally:
            if may:
                self._uploads.release()

    def copy(self, file: BinaryIO, count: int, to: BufferedIOBase) -> bool:
        """Send so many bytes. Returns False when the file ended before, or the server ends."""
        while count and not self._stopped.is_set():
            block = file.read(min(_BLOCK, count))
            if not block:
                break
            self._pace.spend(len(block))
            to.write(block)
            count -= len(block)
        return not count


class _Server(ThreadingMixIn, TCPServer):
    """A server with a thread per connection; these threads do not prevent the end of the process."""

    daemon_threads = True
    block_on_close = False

    def __init__(
        self, sender: FileSender, listener: socket.socket, context: ssl.SSLContext | None, peers: PeerSettings
    ) -> None:
        TCPServer.__init__(self, listener.getsockname()[:2], _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket, self.server_address = listener, listener.getsockname()
        self.sender, self.context = sender, context
        self._connections = threading.BoundedSemaphore(peers.uploads + _SPARE_CONNECTIONS)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own, or close the connection when there are too many."""
        if not self._connections.acquire(blocking=False):
            _log.warning("file_connection_refused", client=str(client_address[0]))
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer the requests of one connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 the signature is the library's
        """A connection that broke, or was no TLS, is not an error of this host."""
        error = sys.exception()
        tell = _log.info if isinstance(error, OSError) else _log.error
        tell("file_connection_ended", client=str(client_address[0]), error=f"{type(error).__name__}: {error}")


class _Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    protocol_version = "HTTP/1.1"
    timeout = _TIMEOUT
    server: _Server

    def __init__(self, request: Any, client_address: Any, server: BaseServer) -> None:
        context = server.context if isinstance(server, _Server) else None
        if context is None:
            super().__init__(request, client_address, server)
            return
        request.settimeout(_TIMEOUT)
        with context.wrap_socket(request, server_side=True) as encrypted:
            super().__init__(encrypted, client_address, server)

    def version_string(self) -> str:
        """Say nothing about the programs behind the server."""
        return "arriero"

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        sender = self.server.sender
        found = _PATH.fullmatch(self.path)
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        # Without a token nobody learns which files there are.
        if found is None or not file_servers.is_token(given, sender.key, found[1]):
            self._refuse(HTTPStatus.UNAUTHORIZED)
            return
        path = sender.offered.get(found[1])
        if path is None:
            self._refuse(HTTPStatus.NOT_FOUND)
            return
        with sender.upload() as may:
            if not may:
                self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, {"Retry-After": str(_RETRY_AFTER)})
                return
            try:
                file = path.open("rb")
            except OSError:
                self._refuse(HTTPStatus.NOT_FOUND)
                return
            with file:
                self._send(file, os.fstat(file.fileno()).st_size, f'"{found[1]}"', with_body=with_body)

    def _send(self, file: BinaryIO, size: int, etag: str, *, with_body: bool) -> None:
        wanted = _RANGE.fullmatch(self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted and self.headers.get("If-Range", etag) == etag else 0
        if start and start >= size:
            self._refuse(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, {"Content-Range": f"bytes */{size}"})
            return
        self.send_response(HTTPStatus.PARTIAL_CONTENT if start else HTTPStatus.OK)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(size - start))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", etag)
        self.end_headers()
        if with_body:
            file.seek(start)
            # A body that ends too early cannot be told in another way.
            self.close_connection = not self.server.sender.copy(file, size - start, self.wfile) or self.close_connection

    def _refuse(self, status: HTTPStatus, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.send_header("Connection", "close")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def _tls(peers: PeerSettings) -> tuple[str, ssl.SSLContext | None]:
    """Return what clients trust, and the context of the server. Raises ServerNotStarted."""
    if peers.tls_certificate is None or peers.tls_key is None:
        return "", None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(peers.tls_certificate, peers.tls_key, password=_no_passphrase)
        content = peers.tls_certificate.read_text(encoding="ascii")
    except (OSError, ValueError) as error:
        reason = f"peers.tls_certificate {peers.tls_certificate}, peers.tls_key {peers.tls_key}: {error}"
        raise ServerNotStarted("the file server", reason) from None
    # The file may hold the key, too. The first certificate is the server's own.
    found = _CERTIFICATE.search(content)
    if found is None:
        raise ServerNotStarted("the file server", f"{peers.tls_certificate} has no certificate in PEM")
    return found[0] + "\n", context


def _no_passphrase() -> str:
    """OpenSSL would ask for it on the terminal."""
    raise ValueError("the key has a passphrase; a key without one is accepted")
