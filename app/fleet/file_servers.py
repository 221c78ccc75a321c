"""
File servers: which hosts serve which model files to other hosts.

Each call is one transaction. An agent writes the row of its own host; Postgres refuses any other. A client shows a
token that only members of the installation can make: the HMAC of the file's hash under the key in the server's row. It
is worth one file of one server, until that server is started again.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import text

from app.kernel.database import Database

#: Most hosts among which a client chooses.
_MAX_OFFERS = 200

_PUT = text("""
    INSERT INTO file_server (host, url, certificate, key, files)
    SELECT name, :url, :certificate, :key, CAST(:files AS jsonb) FROM host WHERE name = :host
    ON CONFLICT (host) DO UPDATE SET url = :url, certificate = :certificate, key = :key,
        files = CAST(:files AS jsonb), changed_at = now()
    WHERE (file_server.url, file_server.certificate, file_server.key, file_server.files)
        IS DISTINCT FROM (:url, :certificate, :key, CAST(:files AS jsonb))
""")
_REMOVE = text("DELETE FROM file_server WHERE host = :host AND key = :key")
_OFFERS = text("""
    SELECT s.host, s.url, s.certificate, s.key FROM file_server AS s JOIN host AS h ON h.name = s.host
    WHERE s.files @> to_jsonb(CAST(:sha256 AS text)) AND s.host <> :host AND h.agent_until > now()
    ORDER BY md5(s.host || :host || :sha256) LIMIT :limit
""")


@dataclass(frozen=True, slots=True)
class FileServer:
    """Where a host serves its files, and with which key."""

    host: str
    url: str
    #: What clients trust, as PEM; empty without TLS.
    certificate: str
    key: str


def put(database: Database, server: FileServer, files: Collection[str]) -> None:
    """Say where a host serves which files, by their SHA-256. A host that has not joined is not written."""
    values = {"host": server.host, "url": server.url, "certificate": server.certificate, "key": server.key}
    with database.work() as work:
        work.run(_PUT, {**values, "files": json.dumps(sorted(files))})


def remove(database: Database, server: FileServer) -> None:
    """Remove what `put` has written, unless another server of the host has written since."""
    with database.work() as work:
        work.run(_REMOVE, {"host": server.host, "key": server.key})


def offering(database: Database, sha256: str, host: str) -> list[FileServer]:
    """
    Return the servers of other living hosts with this file.

    Their order differs from one asking host and file to the next, so that no server is everybody's first.
    """
    with database.work() as work:
        return work.rows_of(FileServer, _OFFERS, {"sha256": sha256, "host": host, "limit": _MAX_OFFERS})


def token(key: str, sha256: str) -> str:
    """Return the token for a file of the server with this key."""
    return hmac.new(key.encode(), sha256.encode(), hashlib.sha256).hexdigest()


def is_token(given: str, key: str, sha256: str) -> bool:
    """Whether this is the token for the file. The time that it takes says nothing about it."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), token(key, sha256).encode())
