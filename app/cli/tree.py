"""
The process tree of one machine: servers, API, workers, watched by one parent.

Everything is started in the order in which it is needed, restarted when it ends by itself, and stopped in the reverse
order, workers with time to finish. The first Ctrl-C or SIGTERM stops it at any moment; a second one hurries.
A tree that was killed leaves children behind; the next one on the same data directory ends them.
"""

from __future__ import annotations

import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import httpx2
from celery import Celery
from pydantic import SecretStr

from app.cli.client import connected, url_of
from app.cli.programs import WORKERS
from app.fleet import files, needs
from app.fleet.pool import METRICS_FOLDER
from app.kernel import broker, clock, embedded
from app.kernel.database import Database
from app.kernel.embedded import DataDirectory, Server
from app.kernel.errors import ServerNotStarted
from app.kernel.process import Child, end_leftovers
from app.kernel.settings import Settings, environment_of

#: Seconds between two looks at the children.
_PAUSE = 0.25
#: The delay before a child is started again doubles up to this, in seconds, and falls back once it has run as long.
_MAX_DELAY = 30.0

Report = Callable[[str, str], None]


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM: everything is stopped while this passes through."""


class Signals:
    """The first SIGINT or SIGTERM interrupts; those that follow only make the stopping hurry."""

    def __init__(self) -> None:
        self.asked = False
        self.hurry = False

    def install(self) -> None:
        """Take over both signals for the rest of the process."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def shield(self) -> None:
        """From now on nothing interrupts: what stops must come to its end."""
        self.asked = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 the signature is Python's
        if self.asked:
            self.hurry = True
            return
        self.asked = True
        raise Interrupted


@dataclass(slots=True)
class _Member:
    """One child, and how it fares."""

    name: str
    #: Behind `python -m`.
    arguments: Sequence[str]
    grace: timedelta
    #: Celery's name of the worker; None for a child that is no worker.
    worker: str | None = None
    child: Child | None = None
    delay: float = 1.0
    started: float = 0.0
    #: When it is started again; None while it runs.
    again: float | None = None


@dataclass(slots=True)
class Tree:
    """What runs. Made by `grown`."""

    settings: Settings
    directory: Path
    report: Report
    servers: list[Server]
    members: list[_Member] = field(default_factory=list)

    def watch(self) -> None:
        """Start again what ends by itself, for ever. Left by an interrupt."""
        while True:
            time.sleep(_PAUSE)
            self.mend()

    def mend(self) -> None:
        """Look at everything once, and start again what has ended."""
        for server in self.servers:
            if not server.alive:
                self.report("warning", f"{server.name} ended; starting it again")
                try:
                    server.start()
                except ServerNotStarted as error:
                    self.report("error", str(error))
        now = time.monotonic()
        for member in self.members:
            child = member.child
            if child is not None and not child.alive:
                self._note_end(member, child, now)
            if member.again is not None and now >= member.again:
                self.start(member)

    def start(self, member: _Member) -> None:
        """Start a member, or put it off when it cannot be."""
        member.child = Child(
            member.name,
            [sys.executable, "-m", *member.arguments],
            environment=environment_of(self.settings),
            log_file=self.directory / "logs" / f"{member.name}.log",
            pid_file=self.directory / "run" / f"{member.name}.pid",
        )
        member.again, member.started = None, time.monotonic()
        member.child.start()

    def wait_until_ready(self, deadline: timedelta) -> None:
        """
        Wait until the API serves, every worker answers, and each model that is kept up has a pool that serves.

        Raises ServerNotStarted when a child or a pool ends before, or the deadline passes; with the end of its log.
        """
        limit = time.monotonic() + deadline.total_seconds()
        url, waiting = url_of(self.settings), {member.worker: member for member in self.members if member.worker}
        celery = broker.celery_app(_secret(self.settings.redis_url), self.settings.broker)
        models = list(self.settings.pools.models)
        serves = False
        before: dict[str, str | None] = {}
        while not serves or waiting or models:
            for member in self.members:
                if member.child is not None and not member.child.alive:
                    raise ServerNotStarted(member.name, "it ended at once", member.child.log_tail(20))
            if time.monotonic() > limit:
                late = ", ".join([*([] if serves else ["api"]), *(member.name for member in waiting.values()), *models])
                raise ServerNotStarted(late, f"it was not ready after {deadline.total_seconds():g} s")
            if not serves and _serves(url):
                serves, before = True, self._heard()
                self.report("info", f"api serves at {url}")
            for name in _answering(celery, list(waiting)):
                self.report("info", f"{waiting.pop(name).name} is ready")
            if serves and not waiting and models:
                models = self._still_loading(models, before)

    def _heard(self) -> dict[str, str | None]:
        """Every pool that is known, and when it last told of itself."""
        with connected(self.settings) as client:
            return {pool["id"]: pool["heard_at"] for pool in client.get("/v1/pools", ended=True)["pools"]}

    def _still_loading(self, models: Sequence[str], before: Mapping[str, str | None]) -> list[str]:
        """
        Which of the models no pool serves yet. What an earlier start left in the database counts for nothing: only
        what was heard after `before`.

        Raises ServerNotStarted when the last pool of a model failed.
        """
        left = []
        with connected(self.settings) as client:
            for model in models:
                pools = client.get("/v1/pools", model=model, ended=True)["pools"]
                heard = [pool for pool in pools if before.get(pool["id"]) != pool["heard_at"]]
                if any(pool["state"] == "serving" for pool in heard):
                    self.report("info", f"{model} is served")
                    continue
                if pools and pools[0]["failed"] and pools[0]["id"] not in before:
                    log = "\n".join(client.get(f"/v1/pools/{pools[0]['id']}/log")["lines"][-20:])
                    raise ServerNotStarted(model, pools[0]["ending"] or "its pool failed", log)
                left.append(model)
        if left:
            time.sleep(_PAUSE)
        return left

    def stop(self, signals: Signals) -> None:
        """Ask every child to end, in the order in which nothing is missed, and see that all have ended."""
        for names in (("beat", "flower"), ("agent", "control"), ("api",)):
            group = [m for m in self.members if m.name.split(".")[0].split("-")[0] in names and m.child is not None]
            if group:
                with ThreadPoolExecutor(len(group)) as threads:
                    list(threads.map(lambda member: _stop(member, signals), group))
        # An agent that died just now has left its pools to the next one, which does not come.
        for leftover in end_leftovers(self.directory / "run" / "pools"):
            self.report("warning", f"{leftover.name} was left by its agent (pid {leftover.pid}); ended")
        # A pool that was killed could not take the address of its metrics back, and neither could its agent.
        for file in (self.directory / METRICS_FOLDER).glob("*.json"):
            file.unlink(missing_ok=True)

    def _note_end(self, member: _Member, child: Child, now: float) -> None:
        tail = child.log_tail(5)
        child.stop()
        member.child = None
        if now - member.started > _MAX_DELAY:
            member.delay = 1.0
        member.again = now + member.delay
        told = f"{member.name} ended ({_how(child.returncode)}); it starts again in {member.delay:g} s"
        self.report("warning", f"{told}\n{tail}" if tail else told)
        member.delay = min(member.delay * 2, _MAX_DELAY)


@contextmanager
def grown(settings: Settings, signals: Signals, report: Report, *, flower: bool) -> Iterator[Tree]:
    """
    The tree, growing: servers are up, the schema is right, children are started; all of it ends with the block.
    The caller has installed the signals.

    Raises DataDirectoryHeld, ServerNotStarted, DatabaseBehind, ModelFileMissing and what else keeps it from starting.
    """
    catalog = files.read_catalog(settings.catalog.files)
    for name in settings.pools.models:
        model = catalog.get(name)
        if not (settings.fleet.simulated and needs.simulated(model, 1)):  # a stand-in needs no file
            files.locate(model, settings.data_dir)
    with ExitStack() as stack:
        # Begun first, so ended last: from the first exit on, nothing interrupts the stopping.
        held = stack.enter_context(DataDirectory(settings.data_dir, now=clock.now(), command="arriero up"))
        for leftover in end_leftovers(held.path / "run"):
            report("warning", f"{leftover.name} of an earlier start still ran (pid {leftover.pid}); ended")
        outside = settings.database_url is not None
        servers = stack.enter_context(embedded.started(held, postgres=not outside, valkey=settings.redis_url is None))
        stack.callback(signals.shield)
        settings = _with_addresses(settings, servers)
        for server in (servers.postgres, servers.valkey):
            if server is not None:
                report("info", f"{server.name} is ready")
        database = Database(_secret(settings.database_url), pool_size=1)
        stack.callback(database.close)
        if not outside:
            database.upgrade()
        database.require_head()
        running: list[Server] = [server for server in (servers.postgres, servers.valkey) if server is not None]
        tree = Tree(settings, held.path, report, running, _members(settings, flower=flower))
        stack.callback(tree.stop, signals)
        stack.callback(signals.shield)
        for member in tree.members:
            tree.start(member)
        yield tree


def _members(settings: Settings, *, flower: bool) -> list[_Member]:
    host, short = socket.gethostname(), timedelta(seconds=8)
    drain = settings.pools.drain_timeout + short
    # It begins the longest chain: it joins, and then its pools are planned, begun and loaded. It lets its pools finish,
    # and ends those that do not: that takes longer than for a pool alone.
    members = [
        _Member("agent", [WORKERS, "agent"], drain + timedelta(seconds=10)),
        _Member("api", ["app", "api"], short),
    ]
    for number in range(1, settings.control.processes + 1):
        name = "control" if number == 1 else f"control-{number}"
        members.append(_Member(name, [WORKERS, "control", name], drain, f"{name}@{host}"))
    members.append(_Member("beat", [WORKERS, "beat"], short))
    if flower:
        members.append(_Member("flower", ["app", "flower"], short))
    return members


def _with_addresses(settings: Settings, servers: embedded.Servers) -> Settings:
    """The settings as the children see them: where the servers are, and ports that are free."""
    changes: dict[str, Any] = {}
    if servers.postgres is not None:
        changes["database_url"] = SecretStr(servers.postgres.url)
    if servers.valkey is not None:
        changes["redis_url"] = SecretStr(servers.valkey.url)
    for section in ("api", "flower"):
        part = getattr(settings, section)
        changes[section] = part.model_copy(update={"port": part.port or _free_port(part.host)})
    return settings.model_copy(update=changes)


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def _stop(member: _Member, signals: Signals) -> None:
    child = member.child
    assert child is not None
    limit = time.monotonic() + member.grace.total_seconds()
    if child.alive and child.pid is not None:
        child.ask()
    while child.alive and time.monotonic() < limit and not signals.hurry:
        child.wait(timedelta(seconds=_PAUSE))
    child.stop(timedelta(seconds=0))


def _serves(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/readyz", timeout=2.0, trust_env=False).is_success
    except httpx2.TransportError:
        time.sleep(_PAUSE)
        return False


def _answering(celery: Celery, names: Sequence[str]) -> list[str]:
    """Which of these workers answer."""
    if not names:
        return []
    replies = celery.control.ping(destination=list(names), timeout=0.5, limit=len(names))
    return [name for reply in replies or () for name in reply]


def _how(returncode: int | None) -> str:
    if returncode is not None and returncode < 0:
        return f"by {signal.Signals(-returncode).name}"
    return f"exit code {returncode}"


def _secret(value: SecretStr | None) -> str:
    assert value is not None, "both addresses are known by now"
    return value.get_secret_value()
