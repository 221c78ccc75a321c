"""API keys that are written to the database directly: the first one of an installation whose API needs a key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from app.access import key_store, keys
from app.access.callers import OPERATOR, KeyScope
from app.access.keys import NewKey
from app.kernel import addresses, ids
from app.kernel.database import open_at_head
from app.kernel.errors import InvalidInput, InvalidSettings, Problem
from app.kernel.settings import Settings
from app.kernel.units import durations


def create(
    settings: Settings, name: str, scopes: Sequence[KeyScope], namespace: str | None, expires: str | None
) -> dict[str, Any]:
    """
    Store a key, and return it as the API would.

    Raises InvalidInput, InvalidSettings without a database, DatabaseBehind, DatabaseUnreachable.
    """
    try:
        lifetime = None if expires is None else durations.parse(expires)
    except ValueError as error:
        raise InvalidInput([Problem("expires_in", str(error))], "key") from None
    new = NewKey.by(OPERATOR, name, namespace, scopes, lifetime)
    url = addresses.find_database(settings)
    if url is None:
        message = "no database is set, and no embedded database runs in the data directory"
        raise InvalidSettings([Problem("database_url", message, "ARRIERO_DATABASE_URL=postgresql://…")])
    key_id, secret = ids.new_text(keys.ID_CHARACTERS, lower_case=True), ids.new_text(keys.SECRET_CHARACTERS)
    database = open_at_head(url, pool_size=1)
    try:
        with database.work() as work:
            made = key_store.create(work, OPERATOR, new, key_id, secret)
    finally:
        database.close()
    instants = ("created_at", "expires_at", "revoked_at", "rotated_at", "overlap_until", "used_at", "previous_used_at")
    given = {name: value.isoformat() if value else None for name, value in asdict(made).items() if name in instants}
    return {**asdict(made), **given, "scopes": sorted(made.scopes), "key": keys.compose(key_id, secret)}
