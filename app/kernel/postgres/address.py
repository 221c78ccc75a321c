"""
Addresses of Postgres: the URL of a setting, and what libpq needs of it.

A URL may name several hosts, of which libpq takes the first that is as `target_session_attrs` says. libpq writes them
before the path (`postgresql://one:5432,two:5432/arriero`), SQLAlchemy in the query (`?host=one:5432&host=two:5432`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import urlsplit

_PARTS = re.compile(r"(?P<front>[a-z]+://(?:[^/?#]*@)?)(?P<hosts>[^/?#@]*)(?P<path>[^?#]*)(?P<query>.*)", re.DOTALL)
#: Arguments of psycopg that are none of libpq.
_NOT_LIBPQ = frozenset({"context"})
_ACCEPTED = (
    "is no address of Postgres; accepted: postgresql://user:password@host:port/database, "
    "also with several hosts that are names or IPv4 addresses: host:port,host:port"
)


def normalize(url: str) -> str:
    """
    Return a URL with its hosts where SQLAlchemy reads them.

    Raises ValueError, without the URL in its text: it may have a password.
    """
    found = _PARTS.fullmatch(url)
    if found is None or not all(_is_host(host) for host in found["hosts"].split(",")):
        raise ValueError(_ACCEPTED)
    if "," not in found["hosts"]:
        return url
    # SQLAlchemy reads `host=[::1]:1` as something else.
    if "[" in found["hosts"]:
        raise ValueError(_ACCEPTED)
    hosts = "&".join(f"host={host}" for host in found["hosts"].split(","))
    query = found["query"].removeprefix("?")
    return f"{found['front']}{found['path'] or '/'}?{hosts}{'&' if query else ''}{query}"


def _is_host(text: str) -> bool:
    """Return whether a text is `host:port`, either of which may lack."""
    try:
        return urlsplit(f"//{text}").port != 0
    except ValueError:
        return False


def arguments(url: str) -> dict[str, str]:
    """Return the arguments of libpq, of a normalized URL."""
    # Imported here: settings are read by every command, and these take longer than most.
    from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
    from sqlalchemy.engine import make_url

    dialect = PGDialect_psycopg()  # type: ignore[no-untyped-call] # unknown to the stubs
    _, found = dialect.create_connect_args(make_url(url).set(drivername="postgresql+psycopg"))  # type: ignore[no-untyped-call] # as above
    return {key: str(value) for key, value in found.items() if key not in _NOT_LIBPQ}


def conninfo(url: str, options: Mapping[str, object]) -> str:
    """Return the connection string of libpq for a URL, with more options."""
    from psycopg.conninfo import make_conninfo  # as above

    return make_conninfo("", **(arguments(url) | {key: str(value) for key, value in options.items()}))
