"""
`arriero health PROGRAM`: whether one program of this host works, for the health checks of containers.

The API answers for itself; control workers, beat and the agent listen nowhere, so what they leave is looked at: signs
of life and the lock of beat in the broker, the heartbeat of the host in the database.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from enum import StrEnum
from typing import Annotated, Any

import httpx2
import redis
import typer
from sqlalchemy import text

from app.cli.client import url_of
from app.cli.output import console, settings_of
from app.governance.health import components, signs
from app.kernel import addresses, broker
from app.kernel.database import Database
from app.kernel.errors import Unavailable
from app.kernel.security.tls import verification
from app.kernel.settings import Settings

#: Time for an answer.
_PATIENCE = timedelta(seconds=5)
#: Most control workers of this host that are looked at.
_MOST = 1_000
_AGENT = text("SELECT agent_until > now() AS alive FROM host WHERE name = :name")


class HealthTarget(StrEnum):
    """A program that runs by itself."""

    API = "api"
    CONTROL = "control"
    BEAT = "beat"
    AGENT = "agent"
    FLOWER = "flower"


def health(
    context: typer.Context,
    program: Annotated[HealthTarget, typer.Argument(help="Which program.")],
    name: Annotated[str, typer.Option(help="Of a control worker: its name.")] = "control",
) -> None:
    """
    Check one program of this host, for the health check of its container: exits with 0 when it works, with 1 otherwise.

    The API must answer `/readyz`, Flower `/healthcheck`. A control worker has given a sign of life within 15 s and
    begun a scheduled job within a minute. Some beat is elected. The agent has sent a heartbeat within
    fleet.agent_lease.
    """
    settings = settings_of(context)
    wrong = {
        HealthTarget.API: lambda: _answers(f"{_local(settings)}/readyz", settings),
        HealthTarget.FLOWER: lambda: _answers(
            f"http://{_here(settings.flower.host)}:{settings.flower.port}/healthcheck", settings
        ),
        HealthTarget.CONTROL: lambda: _control(settings, name),
        HealthTarget.BEAT: lambda: _beat(settings),
        HealthTarget.AGENT: lambda: _agent(settings),
    }[program]()
    console().print(wrong or f"{program} works")
    raise typer.Exit(int(bool(wrong)))


def _local(settings: Settings) -> str:
    """Return the address of the API of this host, whatever `api.url` says."""
    return url_of(settings.model_copy(update={"api": settings.api.model_copy(update={"url": ""})}))


def _here(host: str) -> str:
    return "127.0.0.1" if host in ("", "0.0.0.0", "::") else host  # noqa: S104 compared, not bound


def _answers(url: str, settings: Settings) -> str:
    try:
        answer = httpx2.get(
            url, timeout=_PATIENCE.total_seconds(), trust_env=False, verify=verification(url, settings.api)
        )
    except httpx2.HTTPError as error:
        return f"{url} does not answer: {error or type(error).__name__}"
    return "" if answer.status_code == 200 else f"{url} answers {answer.status_code}: {answer.text[:300]}"


def _control(settings: Settings, name: str) -> str:
    host = socket.gethostname()
    client = broker.connect(addresses.of(settings).redis_url)
    try:
        names: list[Any] = []
        for found in client.scan_iter(signs.key(f"{name}@{host}*"), count=1_000):
            names.append(found)
            if len(names) >= _MOST:
                break
        values: Any = client.mget(names) if names else []
    except redis.RedisError as error:
        return f"the broker does not answer: {error}"
    finally:
        client.close()
    ages = [age for value in values if (age := signs.age(value)) is not None]
    if not ages:
        return f"{name}@{host} has given no sign of life for {signs.LASTS.total_seconds():g} s"
    if min(ages) > components.IDLE:
        return f"{name}@{host} has begun no scheduled job for {min(ages):.0f} s"
    return ""


def _beat(settings: Settings) -> str:
    client = broker.connect(addresses.of(settings).redis_url)
    try:
        elected = components.is_elected(client)
    except redis.RedisError as error:
        return f"the broker does not answer: {error}"
    finally:
        client.close()
    return "" if elected else "no beat is elected"


def _agent(settings: Settings) -> str:
    database = Database(addresses.of(settings).database_url, pool_size=1, answer_timeout=_PATIENCE)
    try:
        with database.work() as work:
            row = work.row(_AGENT, {"name": settings.fleet.host_here})
    except Unavailable as error:
        return str(error)
    finally:
        database.close()
    if row is None:
        return f"the host {settings.fleet.host_here} has not joined the fleet"
    lease = settings.fleet.agent_lease.total_seconds()
    return "" if row.alive else f"the agent of {settings.fleet.host_here} has sent no heartbeat for {lease:g} s"
