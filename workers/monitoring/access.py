"""
Who may use Flower: the callers of the API, with the same keys.

A program on this machine needs no key where the API asks for none and Flower itself listens on a loopback address. Any
other request has an API key: `Authorization: Bearer arr_…`, or in a browser the password of its dialog. Flower shows
all namespaces, so a key of one namespace is refused. To look needs the scope `read`, to change anything `operate`.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import time
from collections.abc import Callable
from dataclasses import dataclass

from tornado.httputil import HTTPServerRequest

from app.access import key_store, keyless, keys, operator_key
from app.access.callers import LOCAL, OPERATOR, Caller, KeyScope, NotAllowed, NotAuthenticated
from app.access.keys import StoredSecrets
from app.kernel.database import Database
from app.kernel.settings import Settings

#: Seconds for which a key is valid without another look at the database, and most keys that are remembered.
_MAX_AGE, _MOST = 5.0, 1_000
#: Methods that change nothing, and paths of which no method does.
_READS = frozenset({"GET", "HEAD", "OPTIONS"})
_READ_PATHS = ("/tasks/datatable",)
#: Paths that anybody may read: whether it runs, and the files of its pages.
_OPEN_PATHS = ("/healthcheck", "/static/")


@dataclass(frozen=True, slots=True)
class _Entry:
    stored: StoredSecrets | None
    #: When the database was asked, on the monotonic clock.
    at: float


class FlowerAccess:
    """Decides about requests to Flower. Its look-ups block: they run on a thread."""

    def __init__(
        self, settings: Settings, database: Database, prefix: str = "", now: Callable[[], float] = time.monotonic
    ) -> None:
        """`prefix` is that of Flower's paths."""
        self._settings, self._database, self._now = settings, database, now
        self._prefix = f"/{prefix.strip('/')}" if prefix.strip("/") else ""
        self._known: dict[str, _Entry] = {}

    def is_open(self, request: HTTPServerRequest) -> bool:
        """Whether anybody may send this request."""
        return self._path(request).startswith(_OPEN_PATHS)

    def changes(self, request: HTTPServerRequest) -> bool:
        """Whether the request may change something."""
        return request.method not in _READS and not self._path(request).startswith(_READ_PATHS)

    def caller_of(self, request: HTTPServerRequest) -> Caller:
        """Return the caller of a request. Raises NotAuthenticated, NotAllowed, Unavailable."""
        caller = self._authenticated(request)
        scope = KeyScope.OPERATE if self.changes(request) else KeyScope.READ
        if scope not in caller.scopes:
            raise NotAllowed(f"the API key {caller.name!r} lacks the scope '{scope}', which this needs", {scope})
        if caller.namespace is not None:
            message = (
                f"the API key {caller.name!r} is limited to the namespace {caller.namespace!r}, and Flower shows all "
                "namespaces; use a key without a namespace"
            )
            raise NotAllowed(message, {scope})
        return caller

    def _authenticated(self, request: HTTPServerRequest) -> Caller:
        key = _key_of(request.headers.get_list("Authorization"))
        if key.startswith(keys.PREFIX):
            return self._of_key(key)
        headers = [
            (name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in request.headers.get_all()
        ]
        settings = self._settings
        if keyless.is_loopback(settings.flower.host) and keyless.is_local(settings, request.remote_ip, headers):
            return LOCAL
        message = "an API key is needed: as the password of the browser's dialog, or as Authorization: Bearer arr_…"
        raise NotAuthenticated(message, has_key=bool(key))

    def _of_key(self, key: str) -> Caller:
        key_id, given = keys.id_of(key), keys.hash_of(key)
        if key_id is None:
            raise NotAuthenticated(f"{keys.UNKNOWN}: it does not have the form of one", has_key=True)
        operator = operator_key.read(self._settings.data_dir)
        if operator is not None and hmac.compare_digest(given, keys.hash_of(operator)):
            return OPERATOR
        entry = self._known.get(key_id)
        if entry is None or self._now() - entry.at >= _MAX_AGE:
            at = self._now()
            with self._database.work() as work:
                entry = _Entry(key_store.find_secrets(work, key_id), at)
            self._known.pop(key_id, None)
            while len(self._known) >= _MOST:
                self._known.pop(next(iter(self._known)), None)
            self._known[key_id] = entry
        verdict = keys.verify(given, entry.stored, self._now() - entry.at)
        if verdict.refusal is not None or entry.stored is None:
            raise NotAuthenticated(verdict.refusal or keys.UNKNOWN, has_key=True)
        return entry.stored.caller

    def _path(self, request: HTTPServerRequest) -> str:
        return request.path.removeprefix(self._prefix)


def _key_of(values: list[str]) -> str:
    """Return the key of a header Authorization: the token, or the password; empty without one."""
    if len(values) != 1:
        return ""
    scheme, _, content = values[0].strip().partition(" ")
    if scheme.lower() == "bearer":
        return content.strip()
    if scheme.lower() != "basic":
        return ""
    try:
        user, _, password = base64.b64decode(content.strip(), validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return ""
    return password or user
