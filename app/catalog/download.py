"""
A download: fetches one file over HTTP and resumes after an interruption.

A partial file is kept only if the server proves that its file has not changed (If-Range with its validator); else the
download restarts. Where the validator is the hash of the content, another server may send the rest.
A broken connection is retried; attempts without progress are limited.
Free disk space and the size that the server reports are checked before anything is written.
An error names the host, its response, and what to do.

A token is sent only to the URL it is meant for, never to another host, and never appears in a message.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import httpx2
from pydantic import SecretStr

from app import __version__
from app.catalog import install
from app.catalog.install import FileProgress, FreeSpace, InstallRecord, InstallState, OnProgress, format_bytes
from app.kernel.errors import DownloadFailed
from app.kernel.security.egress import EgressPolicy

#: Consecutive attempts that may end before they have received `PROGRESS_BYTES`.
MAX_ATTEMPTS = 5
#: Bytes after which an interrupted attempt counts as progress.
PROGRESS_BYTES = 1 << 20
#: Seconds before the second attempt, doubled each time, and their maximum. `Retry-After` replaces them, up to it.
FIRST_DELAY, MAX_DELAY = 0.5, 60.0
#: Seconds to connect, and seconds without a received byte.
CONNECT_TIMEOUT, READ_TIMEOUT = 10.0, 30.0
MAX_REDIRECTS = 10
#: Free space is checked again after so many bytes of a file whose length is not known.
_UNKNOWN_STEP = 64 << 20

#: Statuses after which another attempt may succeed.
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
_CONTENT_RANGE = re.compile(r"^bytes (\d+)-(\d+)/(\d+|\*)$")
_SHA256 = re.compile(r"^[0-9a-f]{64}$")


@dataclass(frozen=True, slots=True)
class Download:
    """A file to fetch, and where to store it."""

    url: str
    target: Path
    #: Bytes and hash that the catalogue states, if it does.
    size: int | None = None
    sha256: str | None = None
    #: Sent only to the host of `url`.
    token: SecretStr | None = None
    #: Web page on which a user accepts the licence of a gated model.
    page: str = ""
    #: What it means when the server refuses, if it is no hub.
    refused: str = ""

    @property
    def host(self) -> str:
        """The host, with the port if the URL has one."""
        return urlsplit(self.url).netloc

    @property
    def shown_url(self) -> str:
        """The URL without its query, which may hold a signature."""
        return urlunsplit(urlsplit(self.url)._replace(query="", fragment=""))


def fetch(
    wanted: Download,
    report: OnProgress,
    *,
    free_space: FreeSpace = install.free_bytes,
    sleep: Callable[[float], None] = time.sleep,
    attempts: int = MAX_ATTEMPTS,
    client: httpx2.Client | None = None,
) -> None:
    """
    Downloads the file to its target. The caller holds the lock of the file, and may have a `client` of its own.

    Raises DownloadFailed. The partial file is then kept for the next attempt, unless it is the wrong file.
    """
    with contextlib.nullcontext(client) if client is not None else http_client() as used:
        _Transfer(wanted, report, used, free_space).run(sleep, attempts)


def http_client() -> httpx2.Client:
    """
    Returns a client that follows redirects, but reads no answer of a private address to which a public one redirects.

    Raises DownloadFailed for such a redirect.
    """
    peers: list[str] = []

    def check_peer(response: httpx2.Response) -> None:
        stream = response.extensions.get("network_stream")
        peer = stream.get_extra_info("server_addr") if stream is not None else None
        if peer is None:
            return
        peers.append(str(peer[0]).partition("%")[0])
        public, refused = EgressPolicy(), None
        if public.refuse_address("", peers[0]) is None:
            refused = public.refuse_address(response.url.host, peers[-1])
        if refused is not None:
            raise DownloadFailed(f"a redirect to {response.url.host} was not followed: {refused}")
        if not response.has_redirect_location:
            peers.clear()

    return httpx2.Client(
        timeout=httpx2.Timeout(READ_TIMEOUT, connect=CONNECT_TIMEOUT),
        headers={"User-Agent": f"arriero/{__version__}", "Accept-Encoding": "identity"},
        follow_redirects=True,
        max_redirects=MAX_REDIRECTS,
        event_hooks={"response": [check_peer]},
    )


def refusal(host: str, status: int, answer: str, page: str, *, with_token: bool) -> str:
    """Returns what an answer without the requested content means, and what to do about it."""
    if status in {401, 403}:
        at = f" at {page}" if page else ""
        if not with_token:
            return (
                f"{host} refuses access ({answer}): the file is private, its licence must be accepted{at}, or "
                "the repository does not exist. Set catalog.hub_token to the token of an account that may read it"
            )
        return f"{host} refuses this token ({answer}); accept the licence{at} with its account, or use another token"
    if status in {404, 410}:
        return f"{host} has no such file ({answer}); check the address, file and revision of the entry"
    return f"{host} answers {answer}"


@dataclass(frozen=True, slots=True)
class _RemoteFile:
    """What the server said about the file that the partial file belongs to; stored next to it as `NAME.part.json`."""

    url: str = ""
    etag: str = ""
    modified: str = ""
    total: int | None = None
    #: The content hash that Hugging Face sends as `X-Linked-ETag`.
    linked_sha256: str = ""

    @property
    def validator(self) -> str:
        """The value for If-Range: a strong ETag, or a date (RFC 9110, section 13.1.5)."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.modified


class TransientFailure(Exception):
    """An attempt failed, and another may succeed."""

    def __init__(self, reason: str, *, delay: float | None = None, unreachable: bool = False) -> None:
        #: `delay` is in seconds; None means the usual backoff.
        self.reason, self.delay, self.unreachable = reason, delay, unreachable
        super().__init__(reason)


class _Transfer:
    def __init__(self, wanted: Download, report: OnProgress, client: httpx2.Client, free_space: FreeSpace) -> None:
        self._wanted, self._report, self._client, self._free_space = wanted, report, client, free_space
        self._partial = install.partial_path(wanted.target)
        self._remote_path = self._partial.with_name(self._partial.name + ".json")
        self._remote = self._read_remote()
        self._hash, self._hashed = hashlib.sha256(), 0

    def run(self, sleep: Callable[[float], None], attempts: int) -> None:
        failures = 0
        while True:
            before = self._partial_size()
            try:
                self._attempt()
                break
            except TransientFailure as error:
                failures = 1 if self._partial_size() - before >= PROGRESS_BYTES else failures + 1
                if failures >= attempts:
                    raise self._final_error(error, failures) from None
                self._report_state(InstallState.RETRYING, detail=error.reason)
                delay = FIRST_DELAY * 2 ** (failures - 1) if error.delay is None else error.delay
                sleep(min(delay, MAX_DELAY))
        self._finish()

    def _attempt(self) -> None:
        have = self._partial_size()
        if have and not self._remote.validator:
            have = self._discard_partial()
        if have and have == self._remote.total:
            return
        headers: dict[str, str] = {}
        if have:
            headers |= {"Range": f"bytes={have}-", "If-Range": self._remote.validator}
        if self._wanted.token is not None:
            headers["Authorization"] = f"Bearer {self._wanted.token.get_secret_value()}"
        with (
            _translated_write(self._partial),
            translated(self._wanted.url),
            self._client.stream("GET", self._wanted.url, headers=headers) as response,
        ):
            self._check_response(response)
            self._write_body(response, self._body_offset(response, have))

    def _body_offset(self, response: httpx2.Response, have: int) -> int:
        """Returns the offset in the file at which the body of this response begins. Nothing has been written yet."""
        start, total = 0, _number(response.headers.get("content-length"))
        if response.status_code == 206:
            given = _CONTENT_RANGE.match(response.headers.get("content-range", ""))
            etag = response.headers.get("etag", "")
            same = not (etag and self._remote.etag) or etag == self._remote.etag
            if not given or int(given[1]) != have or not same:
                self._discard_partial()
                raise TransientFailure("the file changed at its source; restarting", delay=0)
            start = have
            total = _number(given[3]) if given[3] != "*" else total and have + total
        linked = _first_header(response, "x-linked-etag").strip('"')
        if total is None:
            total = _number(_first_header(response, "x-linked-size"))
        if self._wanted.size is not None and total not in {None, self._wanted.size}:
            self._discard_partial()
            raise DownloadFailed(
                f"{self._wanted.shown_url} has {total:,} bytes, the catalogue says {self._wanted.size:,}; "
                "it was not downloaded. Either the file was changed, or the entry is wrong"
            )
        expected = total if total is not None else self._wanted.size
        if expected is not None:
            folder, name = self._partial.parent, self._wanted.target.name
            install.ensure_free_space(folder, expected - start, self._free_space, name)
        if start == 0:
            if have:
                self._report_state(InstallState.RETRYING, detail="the source sends the file from its start")
            self._discard_partial()
            self._remote = _RemoteFile(
                self._wanted.shown_url,
                response.headers.get("etag", ""),
                response.headers.get("last-modified", ""),
                expected,
                linked if _SHA256.match(linked) else "",
            )
            self._remote_path.write_text(json.dumps(asdict(self._remote)), encoding="utf-8")
        return start

    def _write_body(self, response: httpx2.Response, start: int) -> None:
        done, head = start, b""
        if self._hashed != start:
            self._report_state(InstallState.VERIFYING, done=start, detail="hashing the partial file")
            self._hash, self._hashed = install.sha256_of(self._partial, start), start
        with self._partial.open("r+b" if start else "wb") as file:
            file.seek(start)
            file.truncate()
            for block in response.iter_raw():
                if not start and len(head) < 4:
                    head += block[:4]
                    self._reject_other_format(head, response)
                self._check_length(done, done + len(block))
                file.write(block)
                self._hash.update(block)
                done = self._hashed = done + len(block)
                self._report_state(InstallState.DOWNLOADING, done=done)
        if self._remote.total is not None and done < self._remote.total:
            raise TransientFailure(f"the connection ended after {done:,} of {self._remote.total:,} bytes")

    def _check_length(self, before: int, after: int) -> None:
        """Stop at the first byte too many; without a known length, at a full disk."""
        total = self._remote.total
        if total is None:
            if before // _UNKNOWN_STEP != after // _UNKNOWN_STEP:
                install.ensure_free_space(self._partial.parent, 0, self._free_space, self._wanted.target.name)
        elif after > total:
            self._discard_partial()
            raise DownloadFailed(
                f"{self._wanted.shown_url}: {self._wanted.host} sends more than the {total:,} bytes of the file; "
                "they were deleted"
            )

    def _finish(self) -> None:
        known, wanted, size = self._remote, self._wanted, self._partial_size()
        self._report_state(InstallState.VERIFYING, done=size)
        if self._hashed != size:
            self._hash, self._hashed = install.sha256_of(self._partial), size
        record = InstallRecord(wanted.shown_url, self._hash.hexdigest(), size, known.etag)
        by_server = wanted.sha256 is None and bool(known.linked_sha256)
        checked_by_catalogue = wanted.sha256 is not None or wanted.size is not None
        self._remote_path.unlink(missing_ok=True)
        install.verify_and_rename(
            wanted.target,
            record,
            sha256=known.linked_sha256 if by_server else wanted.sha256,
            size=wanted.size if wanted.size is not None else known.total,
            expected_by=wanted.host if by_server or not checked_by_catalogue else "the catalogue",
        )
        self._report_state(InstallState.DONE, done=size)

    def _check_response(self, response: httpx2.Response) -> None:
        """Raises an error for a response that does not carry the file."""
        status, wanted = response.status_code, self._wanted
        code = response.headers.get("x-error-code", "")
        answer = f"HTTP {status}{f', {code}' if code else ''}"
        if urlsplit(wanted.url).scheme == "https" and response.url.scheme != "https":
            raise DownloadFailed(
                f"{wanted.host} redirects to {response.url.host} without encryption; the redirect was not followed"
            )
        if status in {200, 206}:
            if response.headers.get("content-encoding", "identity") != "identity":
                raise DownloadFailed(f"{wanted.host} sends the file compressed; it must be sent uncompressed")
            return
        if status == 416:
            self._discard_partial()
            raise TransientFailure("the source has fewer bytes than the partial file; restarting", delay=0)
        if status in TRANSIENT:
            retry_after = response.headers.get("retry-after", "")
            delay = float(retry_after) if retry_after.isdigit() else None
            raise TransientFailure(f"{wanted.host} answers {answer}", delay=delay)
        with_token = wanted.token is not None
        why = wanted.refused and f"{wanted.host} answers {answer}: {wanted.refused}"
        why = why or refusal(wanted.host, status, answer, wanted.page, with_token=with_token)
        raise DownloadFailed(f"{wanted.shown_url}: {why}")

    def _reject_other_format(self, head: bytes, response: httpx2.Response) -> None:
        if len(head) >= 4 and head[:4] != b"GGUF":
            kind = response.headers.get("content-type", "content without a type")
            self._discard_partial()
            raise DownloadFailed(
                f"{self._wanted.shown_url}: {self._wanted.host} sends {kind} instead of a GGUF file; "
                f"it begins with {head[:4]!r}. Is the URL that of a page rather than of the file?"
            )

    def _final_error(self, error: TransientFailure, failures: int) -> DownloadFailed:
        have, target = self._partial_size(), self._wanted.target
        tried = f"tried {failures} times" if failures > 1 else "tried once"
        if error.unreachable:
            return DownloadFailed(
                f"{self._wanted.shown_url}: {error.reason} ({tried}). Check the network and the proxy (HTTPS_PROXY), "
                f"or download the file elsewhere and put it at {target}"
            )
        kept = f"; {format_bytes(have)} are kept; run the same command again to resume" if have else ""
        return DownloadFailed(f"{self._wanted.shown_url}: {error.reason} ({tried}){kept}")

    def _partial_size(self) -> int:
        try:
            return self._partial.stat().st_size
        except FileNotFoundError:
            return 0

    def _discard_partial(self) -> int:
        install.delete_partial(self._wanted.target)
        self._remote_path.unlink(missing_ok=True)
        self._remote = _RemoteFile()
        self._hash, self._hashed = hashlib.sha256(), 0
        return 0

    def _read_remote(self) -> _RemoteFile:
        try:
            known = _RemoteFile(**json.loads(self._remote_path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return _RemoteFile()
        # A server whose ETag is the hash of the file has the same bytes as another one.
        is_same = self._wanted.sha256 is not None and known.etag == f'"{self._wanted.sha256}"'
        return known if is_same or known.url == self._wanted.shown_url else _RemoteFile()

    def _report_state(self, state: InstallState, *, done: int | None = None, detail: str = "") -> None:
        total = self._remote.total if self._remote.total is not None else self._wanted.size
        at = self._partial_size() if done is None else done
        self._report(FileProgress(self._wanted.target.name, state, at, total, detail))


@contextlib.contextmanager
def translated(url: str) -> Iterator[None]:
    """Translates errors of the HTTP client. Raises DownloadFailed, and TransientFailure when another attempt may do."""
    host = urlsplit(url).netloc
    shown = urlunsplit(urlsplit(url)._replace(query="", fragment=""))
    try:
        yield
    except httpx2.TooManyRedirects:
        raise DownloadFailed(f"{shown}: more than {MAX_REDIRECTS} redirects") from None
    except (httpx2.UnsupportedProtocol, httpx2.InvalidURL) as error:
        raise DownloadFailed(f"{shown}: {error}") from None
    except httpx2.TransportError as error:
        causes = tuple(_causes(error))
        certificate = next((cause for cause in causes if isinstance(cause, ssl.SSLCertVerificationError)), None)
        if certificate is not None:
            raise DownloadFailed(f"the certificate of {host} is not valid: {certificate.verify_message}") from None
        raise _transient_error(host, error, causes) from None


@contextlib.contextmanager
def _translated_write(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DownloadFailed(f"{path} cannot be written: {error.strerror or error}") from error


def _transient_error(host: str, error: httpx2.TransportError, causes: tuple[BaseException, ...]) -> TransientFailure:
    def has(kind: type[BaseException]) -> bool:
        return any(isinstance(cause, kind) for cause in causes)

    if has(socket.gaierror):
        return TransientFailure(
            f"the name {host} cannot be resolved: this machine seems to be offline", unreachable=True
        )
    if has(ConnectionRefusedError):
        return TransientFailure(f"{host} refuses connections", unreachable=True)
    if isinstance(error, httpx2.ConnectTimeout):
        return TransientFailure(f"{host} does not answer within {CONNECT_TIMEOUT:g} s", unreachable=True)
    if isinstance(error, httpx2.ConnectError | httpx2.ProxyError):
        return TransientFailure(f"{host} cannot be reached: {error}", unreachable=True)
    if isinstance(error, httpx2.TimeoutException):
        return TransientFailure(f"{host} sent nothing for {READ_TIMEOUT:g} s")
    return TransientFailure(f"the connection to {host} broke: {error}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_header(response: httpx2.Response, name: str) -> str:
    """Returns a header of the first response that has it, redirects first: Hugging Face sets some there."""
    headers: list[Mapping[str, str]] = [answer.headers for answer in (*response.history, response)]
    return next((value for header in headers if (value := header.get(name))), "")


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() else None
