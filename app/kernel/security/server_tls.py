"""
TLS to Postgres and the broker: whether an address verifies the server behind it.

An address is verified when the connection is encrypted, the certificate comes from a trusted authority, and it has the
name in the address: `sslmode=verify-full` for Postgres, `rediss://` for Redis and Valkey without options that turn a
check off. Without that, somebody on the network can read prompts and passwords, or answer in the place of the server.
Connections that stay on the machine need no TLS.

Nothing here opens a connection.
"""

from __future__ import annotations

from urllib.parse import parse_qsl, urlsplit

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from app.kernel.errors import Problem
from app.kernel.security.origins import is_loopback

_VERIFIED = "verify-full"
_FALSE = frozenset({"", "0", "f", "false", "n", "no", "off", "none"})


def is_local(url: str) -> bool:
    """Whether a connection to this address stays on the machine: a Unix socket, or loopback addresses only."""
    return all(map(_stays_here, _hosts(url)))


def find_weakness(setting: str, url: str) -> Problem | None:
    """Return why the server at this address is not verified; None when it is, or on the same machine."""
    if is_local(url):
        return None
    place = ", ".join(_hosts(url))
    query = {key: value.lower() for key, value in parse_qsl(urlsplit(url).query, keep_blank_values=True)}
    if url.startswith("postgres"):
        mode = query.get("sslmode", "prefer")
        if mode == _VERIFIED:
            return None
        message = f"the server at {place} is not verified (sslmode={mode})"
        return Problem(setting, message, "?sslmode=verify-full&sslrootcert=/path/to/ca.pem")
    if not url.startswith(("rediss://", "valkeys://")):
        return Problem(
            setting, f"the connection to {place} is not encrypted", "rediss://…?ssl_ca_certs=/path/to/ca.pem"
        )
    if query.get("ssl_cert_reqs", "required").removeprefix("cert_") != "required":
        return Problem(setting, f"the certificate of {place} is not verified (ssl_cert_reqs)", "no ssl_cert_reqs")
    if query.get("ssl_check_hostname", "true") in _FALSE:
        return Problem(setting, f"the name of {place} is not verified (ssl_check_hostname)", "no ssl_check_hostname")
    return None


def _hosts(url: str) -> list[str]:
    """The hosts in an address: Postgres may have several, and those in the query come before the one in front."""
    if not url.startswith("postgres"):
        return [urlsplit(url).hostname or ""] if url.startswith(("redis://", "rediss://", "valkey")) else []
    try:
        parts = make_url(url)
    except (ArgumentError, ValueError):
        return [urlsplit(url).hostname or ""]  # not readable: the connection says why
    named = parts.query.get("host", ())
    listed = [named] if isinstance(named, str) else list(named)
    # `host:port` is SQLAlchemy's form of several hosts.
    found = [one.partition(":")[0] if one.count(":") == 1 else one for text in listed for one in text.split(",")]
    return found or ([] if parts.host is None else [parts.host])


def _stays_here(host: str) -> bool:
    return host in ("", "localhost") or host.startswith(("/", "@")) or is_loopback(host)
