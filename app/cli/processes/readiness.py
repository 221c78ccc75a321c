"""The readiness of the process tree: the conditions for which `arriero up` waits."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import partial

import httpx2
from celery import Celery

from app.access import operator_key
from app.catalog import files
from app.catalog.model import Model
from app.cli.client import Client, connected_to, url_at
from app.cli.processes.member import ProcessMember
from app.cli.processes.reporter import Reporter
from app.kernel import broker
from app.kernel.errors import ServerNotStarted
from app.kernel.settings import Settings, variable
from app.scheduler import needs

#: Seconds between two polls.
_PAUSE = 0.1
#: Seconds for which a model is refused, with a reason that does not pass by itself, before the start is given up.
_HOPELESS = 15.0

#: Connects to the API.
_Connect = Callable[[], AbstractContextManager[Client]]


def check_files(settings: Settings) -> None:
    """Raises ModelFileUnusable when a model of `pools.models` cannot be served, with the cause and what to do."""
    catalog = files.catalog_of(settings)
    _check_files([catalog.get(name) for name in settings.pools.models], settings)


def _check_files(models: Sequence[Model], settings: Settings) -> None:
    for model in models:
        if not (settings.fleet.simulated and needs.simulated(model, 1)):  # a simulated engine needs no file
            files.check(model, settings.data_dir)


def wait(
    settings: Settings,
    members: Sequence[ProcessMember],
    report: Reporter,
    deadline: timedelta,
    instance: str,
    pause: Callable[[float], object] = time.sleep,
) -> None:
    """
    Wait until the API and all workers answer, and a pool serves each model of `pools.models`.

    Only an API of this `instance` counts. `report` has begun the phases api, workers and models. `pause` waits for so
    many seconds between two polls.
    Raises ServerNotStarted, with the end of the log, when a program or pool ends before, or at the deadline; and with
    the reason, when a model cannot be served. Raises ModelFileUnusable when a file becomes unusable meanwhile.
    """
    limit = time.monotonic() + deadline.total_seconds()
    url, waiting = url_at(settings.api.host, settings.api.port), {m.worker: m for m in members if m.worker}
    connect = partial(connected_to, url, key=operator_key.read(settings.data_dir))
    assert settings.redis_url is not None, "it is known here"
    celery = broker.celery_app(settings.redis_url.get_secret_value(), settings.broker)
    models = list(settings.pools.models)
    if not models:
        report.done("models", "none are in pools.models")
    catalog, refusals = files.catalog_of(settings), _Refusals()
    serves = False
    before: dict[str, str | None] = {}
    told: dict[str, str] = {}
    while not serves or waiting or models:
        for member in members:
            if member.child is not None and not member.child.alive:
                raise ServerNotStarted(member.name, "it ended during the start", member.child.log_tail(20))
        if time.monotonic() > limit:
            late = ", ".join([*([] if serves else ["api"]), *(member.name for member in waiting.values()), *models])
            raise ServerNotStarted(late, f"it was not ready after {deadline.total_seconds():g} s")
        if not serves and _serves(url, instance):
            serves, before = True, _heartbeats(connect)
            report.done("api", f"serves at {url}")
        for name in _answering(celery, list(waiting)):
            waiting.pop(name)
            if not waiting:
                report.done("workers", ", ".join(member.name for member in members if member.worker))
        _check_files([catalog.get(name) for name in models], settings)
        if serves and not waiting and models:
            models = _still_loading(connect, report, models, before, told)
            refusals.check(connect, models)
            if not models:
                report.done("models", f"{', '.join(settings.pools.models)} served")
        if not serves or waiting or models:
            pause(_PAUSE)


def _heartbeats(connect: _Connect) -> dict[str, str | None]:
    """Return the time of the last heartbeat of every known pool."""
    with connect() as client:
        return {pool["id"]: pool["heartbeat_at"] for pool in client.get("/v1/pools", ended=True)["pools"]}


def _still_loading(
    connect: _Connect, report: Reporter, models: Sequence[str], before: Mapping[str, str | None], told: dict[str, str]
) -> list[str]:
    """
    Return the models that no pool serves yet. A pool counts only with a heartbeat after those in `before`, because
    the database may still contain pools of an earlier start. `told` has the last printed line about each model.

    Raises ServerNotStarted when the newest pool of a model failed.
    """
    left, doing = [], []
    with connect() as client:
        for model in models:
            pools = client.get("/v1/pools", model=model, ended=True)["pools"]
            alive = [pool for pool in pools if before.get(pool["id"]) != pool["heartbeat_at"]]
            if any(pool["state"] == "serving" for pool in alive):
                continue
            if pools and pools[0]["failed"] and pools[0]["id"] not in before:
                log = "\n".join(client.get(f"/v1/pools/{pools[0]['id']}/log")["lines"][-20:])
                raise ServerNotStarted(model, pools[0]["ending"] or "its pool failed", log)
            left.append(model)
            phase = alive[0]["phase"] or alive[0]["state"] if alive else "waiting for its pool"
            if told.get(model) != phase:
                told[model] = phase
                report.note("models", f"{model}: {phase}")
            doing.append(f"{model}: {phase} {alive[0]['progress']:.0%}" if phase == "loading" else f"{model}: {phase}")
    if left:
        report.show("; ".join(doing))
    return left


class _Refusals:
    """
    Models for which waiting does not help, as the scheduler explains.

    It says so too while the agent of this host has not reported yet; so only what it says for long counts.
    """

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def check(self, connect: _Connect, models: Sequence[str]) -> None:
        """Raises ServerNotStarted for a model that has been refused for long, with the reason."""
        with connect() as client:
            for model in models:
                found = client.get("/v1/fleet/explain", model=model)
                if found["condition"] != "refused" or found["estimate_s"] is not None:
                    self._since.pop(model, None)
                elif time.monotonic() - self._since.setdefault(model, time.monotonic()) > _HOPELESS:
                    raise ServerNotStarted(model, found["reason"])


def _serves(url: str, instance: str) -> bool:
    """
    Whether the API of this instance is ready.

    Raises ServerNotStarted when another one answers.
    """
    try:
        answer = httpx2.get(f"{url}/readyz", timeout=2.0, trust_env=False, verify=False)
    except httpx2.TransportError:
        return False
    found = _instance_of(answer)
    if found != instance and (found or not answer.is_server_error):
        who = f"{'another Arriero' if found else 'another program'} answers at {url}"
        raise ServerNotStarted("api", f"{who}; choose another port with api.port ({variable('api.port')})")
    return answer.is_success


def _instance_of(answer: httpx2.Response) -> str | None:
    try:
        body = answer.json()
    except ValueError:
        return None
    found = body.get("instance") if isinstance(body, dict) else None
    return found if isinstance(found, str) else None


def _answering(celery: Celery, names: Sequence[str]) -> list[str]:
    """Return the workers among these that answer a ping."""
    if not names:
        return []
    replies = celery.control.ping(destination=list(names), timeout=0.2, limit=len(names))
    return [name for reply in replies or () for name in reply]
