"""
Addresses: the URLs of Postgres and the broker, for programs that did not start them.

The URLs come from the settings. Without them, they are those of the embedded servers, as long as a process tree holds
the data directory. Servers on other machines are verified by TLS, or at least said not to be.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

from app.kernel import embedded, log
from app.kernel.errors import InvalidSettings, Problem, Unavailable
from app.kernel.security import server_tls
from app.kernel.settings import Settings

_log = log.get(__name__)


@dataclass(frozen=True, slots=True)
class Addresses:
    """The URLs of both servers. Both contain passwords."""

    database_url: str = field(repr=False)
    redis_url: str = field(repr=False)


def of(settings: Settings) -> Addresses:
    """
    Return the addresses of both servers.

    Raises Unavailable, with the unknown addresses and how to provide them; InvalidSettings for a server on another
    machine that would not be verified, where the settings require it. Otherwise that is logged, once in a process.
    """
    database, redis = find_database(settings), find_redis(settings)
    if database is None or redis is None:
        missing = [name for name, url in (("DATABASE_URL", database), ("REDIS_URL", redis)) if url is None]
        raise Unavailable(
            f"no server runs on {settings.data_dir}: start everything with `arriero up`, "
            f"or set {' and '.join(f'ARRIERO_{name}' for name in missing)}"
        )
    _check(settings, database, redis)
    return Addresses(database, redis)


def find_database(settings: Settings) -> str | None:
    """Return the address of Postgres, or None when it is unknown."""
    if settings.database_url is not None:
        return settings.database_url.get_secret_value()
    return embedded.find_postgres_url(settings.data_dir)


def find_redis(settings: Settings) -> str | None:
    """Return the address of the broker, or None when it is unknown."""
    if settings.redis_url is not None:
        return settings.redis_url.get_secret_value()
    return embedded.find_valkey_url(settings.data_dir)


def _check(settings: Settings, database_url: str, redis_url: str) -> None:
    given = (("database_url", database_url), ("redis_url", redis_url))
    found = [problem for setting, url in given if (problem := server_tls.find_weakness(setting, url)) is not None]
    if found and settings.tls.servers == "require":
        raise InvalidSettings(found)
    for problem in found:
        _warn(problem)


@cache
def _warn(problem: Problem) -> None:
    _log.warning("connection_not_verified", setting=problem.where, reason=problem.message, accepted=problem.accepted)
