"""
Stored API keys: created, listed, rotated, revoked, and read for the check of a request.

A caller of a namespace sees and changes only the keys of that namespace; others do not exist for it.
Every function runs in a transaction of its caller. The clock of the database decides about expiry and overlap.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from sqlalchemy import text

from app.access import keys
from app.access.callers import Caller, KeyScope
from app.access.keys import ApiKey, NewKey, StoredSecrets
from app.kernel.database import UnitOfWork
from app.kernel.errors import Conflict, NotFound

#: A use is written when the written one is older than this, in seconds.
USE_INTERVAL = 60.0

_COLUMNS = """
    id, name, namespace, scopes, created_at, created_by, expires_at, revoked_at, revoked_by, rotated_at, used_at,
    overlap_until, previous_used_at
"""
_OF_CALLER = "(CAST(:caller AS text) IS NULL OR namespace = :caller)"
_CREATE = text(f"""
    INSERT INTO api_key (id, name, namespace, scopes, secret_hash, created_by, expires_at)
    VALUES (:id, :name, :namespace, :scopes, :hash, :created_by, now() + CAST(:seconds AS float) * interval '1 s')
    RETURNING {_COLUMNS}
""")
_LIST = text(f"SELECT {_COLUMNS} FROM api_key WHERE {_OF_CALLER} ORDER BY created_at, id LIMIT :limit")
_GET = text(f"SELECT {_COLUMNS} FROM api_key WHERE id = :id AND {_OF_CALLER}")
_LOCK = text(f"SELECT {_COLUMNS} FROM api_key WHERE id = :id AND {_OF_CALLER} FOR UPDATE")
_ROTATE = text(f"""
    UPDATE api_key SET previous_hash = secret_hash, secret_hash = :hash, rotated_at = now(), previous_used_at = NULL,
        overlap_until = now() + CAST(:seconds AS float) * interval '1 s'
    WHERE id = :id RETURNING {_COLUMNS}
""")
_REVOKE = text(f"""
    UPDATE api_key SET revoked_at = COALESCE(revoked_at, now()), revoked_by = COALESCE(revoked_by, :by)
    WHERE id = :id RETURNING {_COLUMNS}
""")
_FIND = text("""
    SELECT id, name, namespace, scopes, secret_hash, previous_hash, revoked_at IS NOT NULL AS revoked,
        CAST(extract(epoch FROM expires_at - now()) AS float) AS expires_in,
        CAST(extract(epoch FROM overlap_until - now()) AS float) AS overlap_ends_in,
        CAST(extract(epoch FROM now() - used_at) AS float) AS used_ago,
        CAST(extract(epoch FROM now() - previous_used_at) AS float) AS previous_used_ago
    FROM api_key WHERE id = :id
""")
_MARK_USED = text("""
    UPDATE api_key SET used_at = now(), previous_used_at = CASE WHEN :previous THEN now() ELSE previous_used_at END
    WHERE id = :id AND ((CASE WHEN :previous THEN previous_used_at ELSE used_at END) IS NULL
        OR (CASE WHEN :previous THEN previous_used_at ELSE used_at END) < now() - :seconds * interval '1 s')
""")
_ANY = text("SELECT EXISTS (SELECT FROM api_key) AS found")


def create(work: UnitOfWork, caller: Caller, new: NewKey, key_id: str, secret: str) -> ApiKey:
    """Store a key with this id and this secret, created by the caller."""
    values = {
        "id": key_id,
        "name": new.name,
        "namespace": new.namespace,
        "scopes": sorted(new.scopes),
        "hash": keys.hash_of(keys.compose(key_id, secret)),
        "created_by": caller.name,
        "seconds": None if new.lifetime is None else new.lifetime.total_seconds(),
    }
    return _key(work.row(_CREATE, values))


def list_keys(work: UnitOfWork, caller: Caller, limit: int) -> list[ApiKey]:
    """Return the keys that the caller may manage, the oldest first."""
    return [_key(row) for row in work.rows(_LIST, {"caller": caller.namespace, "limit": limit})]


def get(work: UnitOfWork, caller: Caller, key_id: str) -> ApiKey:
    """Return a key. Raises NotFound."""
    return _key(_found(work.row(_GET, {"id": key_id, "caller": caller.namespace}), key_id))


def rotate(work: UnitOfWork, caller: Caller, key_id: str, secret: str, overlap: timedelta) -> ApiKey:
    """
    Give a key a new secret; the old one works for `overlap`. One from a rotation before that ends at once.

    Raises NotFound, Conflict for a revoked key, and InvalidInput for a key with scopes that the caller lacks.
    """
    key = _key(_found(work.row(_LOCK, {"id": key_id, "caller": caller.namespace}), key_id))
    keys.require_may_rotate(caller, key)
    if key.revoked_at is not None:
        raise Conflict(f"the API key {key_id} ({key.name!r}) is revoked; create another one")
    values = {"id": key_id, "hash": keys.hash_of(keys.compose(key_id, secret)), "seconds": overlap.total_seconds()}
    return _key(work.row(_ROTATE, values))


def revoke(work: UnitOfWork, caller: Caller, key_id: str) -> ApiKey:
    """End a key, with both its secrets. Raises NotFound."""
    _found(work.row(_LOCK, {"id": key_id, "caller": caller.namespace}), key_id)
    return _key(work.row(_REVOKE, {"id": key_id, "by": caller.name}))


def find_secrets(work: UnitOfWork, key_id: str) -> StoredSecrets | None:
    """Return what a request's key is checked against, or None for an unknown id."""
    row = work.row(_FIND, {"id": key_id})
    if row is None:
        return None
    caller = Caller(row.name, row.namespace, frozenset(map(KeyScope, row.scopes)), row.id)
    return StoredSecrets(
        caller,
        bytes(row.secret_hash),
        None if row.previous_hash is None else bytes(row.previous_hash),
        row.revoked,
        row.expires_in,
        row.overlap_ends_in,
        row.used_ago,
        row.previous_used_ago,
    )


def mark_used(work: UnitOfWork, key_id: str, *, is_previous: bool) -> None:
    """Write that a key was used now, unless a use was written within the last minute."""
    work.run(_MARK_USED, {"id": key_id, "previous": is_previous, "seconds": USE_INTERVAL})


def has_any(work: UnitOfWork) -> bool:
    """Whether a key was ever created."""
    row = work.row(_ANY)
    return row is not None and bool(row.found)


def _found(row: Any | None, key_id: str) -> Any:
    if row is None:
        raise NotFound("API key", key_id)
    return row


def _key(row: Any) -> ApiKey:
    values = row._asdict()
    return ApiKey(**{**values, "scopes": frozenset(map(KeyScope, values["scopes"]))})
