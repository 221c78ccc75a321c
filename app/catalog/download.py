"""
A download: one file over HTTP, resumed where it broke off.

What is there already is kept only if the server proves that its file is still the same (If-Range with its validator);
else the download begins anew. A broken connection is retried, a fixed number of times without progress.
The disk is asked for room, and the server for the size, before anything is written.
A refusal names the host, what it answered, and what to do.

A token goes to the address that it is meant for, to no other host, and into no message.
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
from app.catalog.install import FileProgress, FreeSpace, InstallRecord, InstallState, OnProgress, shown
from app.kernel.errors import DownloadFailed

#: Attempts in a row that may end without `GAIN` bytes.
ATTEMPTS = 5
#: Bytes after which a broken attempt counts as progress.
GAIN = 1 << 20
#: Seconds before the second attempt; doubled each time, or as long as the server says, up to the limit.
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0
#: Seconds to connect, and seconds without a byte.
CONNECT_TIMEOUT, READ_TIMEOUT = 10.0, 30.0
MAX_REDIRECTS = 10

_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
_CONTENT_RANGE = re.compile(r"^bytes (\d+)-(\d+)/(\d+|\*)$")
_SHA256 = re.compile(r"^[0-9a-f]{64}$")


@dataclass(frozen=True, slots=True)
class Download:
    """A file that is to be fetched."""

    url: str
    target: Path
    #: What the catalogue says of it, if it does.
    size: int | None = None
    sha256: str | None = None
    #: For the host of `url` alone.
    token: SecretStr | None = None
    #: Where a person accepts the licence of a gated model.
    page: str = ""

    @property
    def host(self) -> str:
        """The host, with its port if it is given."""
        return urlsplit(self.url).netloc

    @property
    def shown_url(self) -> str:
        """The address without its query, which may hold a signature."""
        return urlunsplit(urlsplit(self.url)._replace(query="", fragment=""))


def fetch(
    wanted: Download,
    report: OnProgress,
    *,
    free_space: FreeSpace = install.free_bytes,
    pause: Callable[[float], None] = time.sleep,
    attempts: int = ATTEMPTS,
) -> None:
    """
    Bring the file to its place. The caller holds its lock.

    Raises DownloadFailed; what has come so far is then kept for the next time, unless it is not the file wanted.
    """
    timeout = httpx2.Timeout(READ_TIMEOUT, connect=CONNECT_TIMEOUT)
    headers = {"User-Agent": f"arriero/{__version__}", "Accept-Encoding": "identity"}
    with httpx2.Client(timeout=timeout, headers=headers, follow_redirects=True, max_redirects=MAX_REDIRECTS) as client:
        _Download(wanted, report, client, free_space).run(pause, attempts)


@dataclass(frozen=True, slots=True)
class _Known:
    """What the server said of the file whose first bytes are there; kept beside them, as `NAME.part.json`."""

    url: str = ""
    etag: str = ""
    modified: str = ""
    total: int | None = None
    #: The hash by which Hugging Face names the content.
    linked_sha256: str = ""

    @property
    def validator(self) -> str:
        """What If-Range can carry: a strong ETag, or a date (RFC 9110, section 13.1.5)."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.modified


class _Transient(Exception):
    """An attempt failed where another may not."""

    def __init__(self, reason: str, *, pause: float | None = None, unreachable: bool = False) -> None:
        #: `pause` is in seconds; None takes the usual one.
        self.reason, self.pause, self.unreachable = reason, pause, unreachable
        super().__init__(reason)


class _Download:
    def __init__(self, wanted: Download, report: OnProgress, client: httpx2.Client, free_space: FreeSpace) -> None:
        self._wanted, self._report, self._client, self._free_space = wanted, report, client, free_space
        self._part = install.part_of(wanted.target)
        self._notes = self._part.with_name(self._part.name + ".json")
        self._known = self._read_notes()
        self._hash, self._hashed = hashlib.sha256(), 0

    def run(self, pause: Callable[[float], None], attempts: int) -> None:
        failures = 0
        while True:
            before = self._have()
            try:
                self._attempt()
                break
            except _Transient as error:
                failures = 1 if self._have() - before >= GAIN else failures + 1
                if failures >= attempts:
                    raise self._given_up(error, failures) from None
                self._tell(InstallState.RETRYING, detail=error.reason)
                wait = FIRST_PAUSE * 2 ** (failures - 1) if error.pause is None else error.pause
                pause(min(wait, LONGEST_PAUSE))
        self._settle()

    def _attempt(self) -> None:
        have = self._have()
        if have and not self._known.validator:
            have = self._forget()
        if have and have == self._known.total:
            return
        headers: dict[str, str] = {}
        if have:
            headers |= {"Range": f"bytes={have}-", "If-Range": self._known.validator}
        if self._wanted.token is not None:
            headers["Authorization"] = f"Bearer {self._wanted.token.get_secret_value()}"
        with self._translated(), self._client.stream("GET", self._wanted.url, headers=headers) as response:
            self._judge(response)
            self._receive(response, self._begin(response, have))

    def _begin(self, response: httpx2.Response, have: int) -> int:
        """Where the body of this answer begins in the file. Nothing has been written yet."""
        start, total = 0, _number(response.headers.get("content-length"))
        if response.status_code == 206:
            given = _CONTENT_RANGE.match(response.headers.get("content-range", ""))
            etag = response.headers.get("etag", "")
            same = not (etag and self._known.etag) or etag == self._known.etag
            if not given or int(given[1]) != have or not same:
                self._forget()
                raise _Transient("the file changed at its source; beginning anew", pause=0)
            start = have
            total = _number(given[3]) if given[3] != "*" else total and have + total
        linked = _first_header(response, "x-linked-etag").strip('"')
        if total is None:
            total = _number(_first_header(response, "x-linked-size"))
        if self._wanted.size is not None and total not in {None, self._wanted.size}:
            self._forget()
            raise DownloadFailed(
                f"{self._wanted.shown_url} has {total:,} bytes, the catalogue says {self._wanted.size:,}; "
                "it was not fetched. Either the file was changed, or the entry is wrong"
            )
        expected = total if total is not None else self._wanted.size
        if expected is not None:
            install.ensure_room(self._part.parent, expected - start, self._free_space, self._wanted.target.name)
        if start == 0:
            if have:
                self._tell(InstallState.RETRYING, detail="the source sends the file from its beginning")
            self._forget()
            self._known = _Known(
                self._wanted.shown_url,
                response.headers.get("etag", ""),
                response.headers.get("last-modified", ""),
                expected,
                linked if _SHA256.match(linked) else "",
            )
            self._notes.write_text(json.dumps(asdict(self._known)), encoding="utf-8")
        return start

    def _receive(self, response: httpx2.Response, start: int) -> None:
        done, head = start, b""
        if self._hashed != start:
            self._tell(InstallState.VERIFYING, done=start, detail="reading what is there already")
            self._hash, self._hashed = install.sha256_of(self._part, start), start
        with self._part.open("r+b" if start else "wb") as file:
            file.seek(start)
            file.truncate()
            for block in response.iter_raw():
                if not start and len(head) < 4:
                    head += block[:4]
                    self._refuse_a_stranger(head, response)
                file.write(block)
                self._hash.update(block)
                done = self._hashed = done + len(block)
                self._tell(InstallState.DOWNLOADING, done=done)
        if self._known.total is not None and done < self._known.total:
            raise _Transient(f"the connection ended after {done:,} of {self._known.total:,} bytes")

    def _settle(self) -> None:
        known, wanted, size = self._known, self._wanted, self._have()
        self._tell(InstallState.VERIFYING, done=size)
        if self._hashed != size:
            self._hash, self._hashed = install.sha256_of(self._part), size
        record = InstallRecord(wanted.shown_url, self._hash.hexdigest(), size, known.etag)
        by_server = wanted.sha256 is None and bool(known.linked_sha256)
        self._notes.unlink(missing_ok=True)
        install.settle(
            wanted.target,
            record,
            sha256=known.linked_sha256 if by_server else wanted.sha256,
            size=wanted.size if wanted.size is not None else known.total,
            told_by=wanted.host if by_server or (wanted.sha256 is None and wanted.size is None) else "the catalogue",
        )
        self._tell(InstallState.DONE, done=size)

    def _judge(self, response: httpx2.Response) -> None:
        """Raise what an answer other than the file means."""
        status, wanted = response.status_code, self._wanted
        code = response.headers.get("x-error-code", "")
        answer = f"HTTP {status}{f', {code}' if code else ''}"
        if urlsplit(wanted.url).scheme == "https" and response.url.scheme != "https":
            raise DownloadFailed(
                f"{wanted.host} redirects to {response.url.host} without encryption; it was not followed"
            )
        if status in {200, 206}:
            if response.headers.get("content-encoding", "identity") != "identity":
                raise DownloadFailed(f"{wanted.host} sends the file compressed, which it was asked not to do")
            return
        if status == 416:
            self._forget()
            raise _Transient("the source has fewer bytes than are here; beginning anew", pause=0)
        if status in _TRANSIENT:
            later = response.headers.get("retry-after", "")
            raise _Transient(f"{wanted.host} answers {answer}", pause=float(later) if later.isdigit() else None)
        raise DownloadFailed(f"{wanted.shown_url}: {self._refusal(status, answer)}")

    def _refusal(self, status: int, answer: str) -> str:
        host, page = self._wanted.host, self._wanted.page
        if status in {401, 403}:
            at = f" at {page}" if page else ""
            if self._wanted.token is None:
                return (
                    f"{host} refuses access ({answer}): the file is private, its licence must be accepted{at}, or "
                    "there is no such repository. Set catalog.hub_token to the token of an account that may read it"
                )
            return (
                f"{host} refuses this token ({answer}); accept the licence{at} with its account, or use another token"
            )
        if status in {404, 410}:
            return f"{host} has no such file ({answer}); check the address, file and revision of the entry"
        return f"{host} answers {answer}"

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        host = self._wanted.host
        try:
            yield
        except httpx2.TooManyRedirects:
            raise DownloadFailed(f"{self._wanted.shown_url}: more than {MAX_REDIRECTS} redirects") from None
        except (httpx2.UnsupportedProtocol, httpx2.InvalidURL) as error:
            raise DownloadFailed(f"{self._wanted.shown_url}: {error}") from None
        except httpx2.TransportError as error:
            causes = tuple(_causes(error))
            certificate = next((cause for cause in causes if isinstance(cause, ssl.SSLCertVerificationError)), None)
            if certificate is not None:
                raise DownloadFailed(f"the certificate of {host} is not valid: {certificate.verify_message}") from None
            raise _transient(host, error, causes) from None
        except OSError as error:
            raise DownloadFailed(f"{self._part} cannot be written: {error.strerror or error}") from error

    def _refuse_a_stranger(self, head: bytes, response: httpx2.Response) -> None:
        if len(head) >= 4 and head[:4] != b"GGUF":
            kind = response.headers.get("content-type", "something of no type")
            self._forget()
            raise DownloadFailed(
                f"{self._wanted.shown_url}: {self._wanted.host} sends no GGUF file but {kind}, "
                f"which begins with {head[:4]!r}; is the address that of a page rather than of the file?"
            )

    def _given_up(self, error: _Transient, failures: int) -> DownloadFailed:
        have, target = self._have(), self._wanted.target
        tried = f"tried {failures} times" if failures > 1 else "tried once"
        if error.unreachable:
            return DownloadFailed(
                f"{self._wanted.shown_url}: {error.reason} ({tried}). Check the network and the proxy (HTTPS_PROXY), "
                f"or fetch the file elsewhere and put it at {target}"
            )
        kept = f"; {shown(have)} are kept, and the same command goes on from there" if have else ""
        return DownloadFailed(f"{self._wanted.shown_url}: {error.reason} ({tried}){kept}")

    def _have(self) -> int:
        try:
            return self._part.stat().st_size
        except FileNotFoundError:
            return 0

    def _forget(self) -> int:
        install.discard(self._wanted.target)
        self._notes.unlink(missing_ok=True)
        self._known = _Known()
        self._hash, self._hashed = hashlib.sha256(), 0
        return 0

    def _read_notes(self) -> _Known:
        try:
            known = _Known(**json.loads(self._notes.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return _Known()
        return known if known.url == self._wanted.shown_url else _Known()

    def _tell(self, state: InstallState, *, done: int | None = None, detail: str = "") -> None:
        total = self._known.total if self._known.total is not None else self._wanted.size
        at = self._have() if done is None else done
        self._report(FileProgress(self._wanted.target.name, state, at, total, detail))


def _transient(host: str, error: httpx2.TransportError, causes: tuple[BaseException, ...]) -> _Transient:
    def has(kind: type[BaseException]) -> bool:
        return any(isinstance(cause, kind) for cause in causes)

    if has(socket.gaierror):
        return _Transient(f"the name {host} cannot be resolved: this machine seems to be offline", unreachable=True)
    if has(ConnectionRefusedError):
        return _Transient(f"{host} refuses connections", unreachable=True)
    if isinstance(error, httpx2.ConnectTimeout):
        return _Transient(f"{host} does not answer within {CONNECT_TIMEOUT:g} s", unreachable=True)
    if isinstance(error, httpx2.ConnectError | httpx2.ProxyError):
        return _Transient(f"{host} cannot be reached: {error}", unreachable=True)
    if isinstance(error, httpx2.TimeoutException):
        return _Transient(f"{host} sent nothing for {READ_TIMEOUT:g} s")
    return _Transient(f"the connection to {host} broke: {error}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_header(response: httpx2.Response, name: str) -> str:
    """A header of this answer, or of one that redirected to it: Hugging Face tells of the content in the latter."""
    headers: list[Mapping[str, str]] = [answer.headers for answer in (*response.history, response)]
    return next((value for header in headers if (value := header.get(name))), "")


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() else None
