"""
The process tree of one machine: embedded servers, the API and workers, watched by one parent.

Programs are started in the order of their dependencies, and restarted when they end by themselves. They are stopped in
the reverse order, and workers get time to finish. The first Ctrl-C or SIGTERM stops the tree at any moment; a second
one kills what still runs.
A tree that was killed leaves processes behind; the next tree on the same data directory ends them.
"""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import SecretStr

from app.cli.processes import readiness
from app.cli.processes.member import FROZEN_SECONDS, ProcessMember, incarnation_of
from app.cli.processes.programs import WORKERS
from app.cli.processes.readiness import ReportLine
from app.fleet.pool import METRICS_FOLDER
from app.kernel import clock, embedded, log
from app.kernel.database import Database
from app.kernel.embedded import DataDirectory, PostgresServer, Server, ValkeyServer
from app.kernel.errors import DatabaseUnreachable, ServerNotStarted
from app.kernel.processes.process import end_leftovers
from app.kernel.settings import Settings
from app.workflows.runs.recovery import owners

#: Seconds between two checks of the children.
_PAUSE = 0.25
#: Most time for the processes of a killed tree to end after SIGTERM.
_LEFTOVERS = timedelta(seconds=3)
#: Clients that can wait for the API while it restarts.
_BACKLOG = 2048
#: By embedded server, the setting with its address.
_ADDRESS = {PostgresServer.name: "database_url", ValkeyServer.name: "redis_url"}

_log = log.get(__name__)


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM. While this exception propagates, everything is stopped."""


class Signals:
    """The handler of SIGINT and SIGTERM: the first one interrupts, later ones only speed up the stop."""

    def __init__(self) -> None:
        self.received = False
        self.hurry = False

    def install(self) -> None:
        """Handle both signals for the rest of the process."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def block_interrupts(self) -> None:
        """Raise no Interrupted from now on: the stop must not be interrupted."""
        self.received = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 the signature is Python's
        if self.received:
            self.hurry = True
            return
        self.received = True
        raise Interrupted


@dataclass(slots=True)
class Tree:
    """The running servers and programs. `running_tree` creates it."""

    settings: Settings
    directory: Path
    report: ReportLine
    servers: list[Server]
    members: list[ProcessMember] = field(default_factory=list)
    #: By embedded server, since when it is stopped by a signal.
    _frozen_since: dict[str, float] = field(default_factory=dict)

    def watch(self) -> None:
        """Check the tree until Interrupted is raised."""
        while True:
            time.sleep(_PAUSE)
            self.check()

    def check(self) -> None:
        """Check all servers and programs once: kill those that a signal has stopped, restart those that have ended."""
        for server in self.servers:
            self._check_server(server)
        now = time.monotonic()
        for member in self.members:
            if member.is_frozen(now) and member.child is not None:
                self.report("warning", f"{member.name} was stopped by a signal for {FROZEN_SECONDS:g} s; killing it")
                member.child.kill()
            if member.ended:
                self.report("warning", member.schedule_restart(now))
                self.requeue(member.incarnation)
            if member.restart_at is not None and now >= member.restart_at:
                member.start(self.settings, self.directory)

    def requeue(self, incarnation: str | None) -> None:
        """
        Expire the leases of a dead worker, so that its steps are requeued immediately.

        This runs on a thread of its own, because the tree must not wait for the database. If the database is
        unavailable for longer than a lease, the leases expire by themselves.
        """
        if incarnation:
            arguments = (_secret(self.settings.database_url), incarnation, self.settings.runs.lease)
            threading.Thread(target=_expire_leases, args=arguments, name="expire-leases", daemon=True).start()

    def _check_server(self, server: Server) -> None:
        now = time.monotonic()
        if not server.is_stopped():
            self._frozen_since.pop(server.name, None)
        elif now - self._frozen_since.setdefault(server.name, now) > FROZEN_SECONDS:
            self.report("warning", f"{server.name} was stopped by a signal for {FROZEN_SECONDS:g} s; killing it")
            server.kill()
        if server.alive:
            return
        self.report("warning", f"{server.name} ended; restarting it")
        before = server.url
        try:
            server.start()
        except ServerNotStarted as error:
            self.report("error", str(error))
        if server.url != before:
            self._restart_with_new_address(server)

    def _restart_with_new_address(self, server: Server) -> None:
        """Restart all programs, because another process took the port of a server, and its address has changed."""
        self.report("warning", f"{server.name} has moved to port {server.endpoint.port}; restarting all programs")
        self.settings = _with_servers(self.settings, self.servers)
        children = [member.child for member in self.members if member.child is not None]
        for child in children:
            child.kill()  # without their descendants: the next agent ends the pools, which have the old address too
        for member in self.members:
            if member.child is not None:
                member.child.stop()
                self.requeue(member.incarnation)
            member.start(self.settings, self.directory)

    def wait_until_ready(self, deadline: timedelta) -> None:
        """
        Wait until the API and all workers answer, and a pool serves each model of `pools.models`.

        Raises ServerNotStarted, with the end of the log, when a program or pool ends before, or at the deadline.
        """
        readiness.wait(self.settings, self.members, self.report, deadline)

    def stop(self, signals: Signals) -> None:
        """Stop all programs, in the reverse order of their dependencies. Returns when all have ended."""
        for names in (("beat", "flower"), ("agent", "control"), ("api",)):
            group = [m for m in self.members if m.name.split(".")[0].split("-")[0] in names and m.child is not None]
            if group:
                with ThreadPoolExecutor(len(group)) as threads:
                    list(threads.map(lambda member: _stop(member, signals), group))
        # An agent that has just died leaves its pools to a next agent, but there is none.
        for leftover in end_leftovers(self.directory / "run" / "pools"):
            self.report("warning", f"{leftover.name} was left by its agent (pid {leftover.pid}); it was ended")
        # A killed pool could not remove the file with the address of its metrics, and neither could its agent.
        for file in (self.directory / METRICS_FOLDER).glob("*.json"):
            file.unlink(missing_ok=True)


@contextmanager
def running_tree(settings: Settings, signals: Signals, report: ReportLine, *, flower: bool) -> Iterator[Tree]:
    """
    Start the servers, check the schema, start the programs, and yield the tree. All of them end with the block.

    The caller has installed the signals.
    Raises DataDirectoryHeld, ServerNotStarted, DatabaseBehind, ModelFileMissing, and other errors of a start.
    """
    readiness.check_files(settings)
    with ExitStack() as stack:
        # Entered first, so exited last.
        held = stack.enter_context(DataDirectory(settings.data_dir, now=clock.now(), command="arriero up"))
        # An agent gets no SIGTERM: it would end its pools. The next agent adopts them, with their models loaded.
        left = end_leftovers(held.path / "run", _LEFTOVERS, kill_at_once=("agent",))
        for leftover in left:
            report(
                "warning", f"{leftover.name} of an earlier start was still running (pid {leftover.pid}); it was ended"
            )
        settings = _with_ports(settings)
        listener = stack.enter_context(_listening(settings))
        is_external = settings.database_url is not None
        servers = stack.enter_context(
            embedded.started(held, postgres=not is_external, valkey=settings.redis_url is None)
        )
        stack.callback(signals.block_interrupts)
        running: list[Server] = [server for server in (servers.postgres, servers.valkey) if server is not None]
        settings = _with_servers(settings, running)
        for server in running:
            report("info", f"{server.name} is ready")
        database = Database(_secret(settings.database_url), pool_size=1)
        stack.callback(database.close)
        if not is_external:
            database.upgrade()
        database.require_head()
        tree = Tree(settings, held.path, report, running, _members(settings, listener, flower=flower))
        stack.callback(tree.stop, signals)
        stack.callback(signals.block_interrupts)
        for leftover in left:
            if leftover.forced:
                tree.requeue(incarnation_of(leftover.command))
        for member in tree.members:
            member.start(tree.settings, tree.directory)
        yield tree


def _members(settings: Settings, listener: socket.socket, *, flower: bool) -> list[ProcessMember]:
    host, short = socket.gethostname(), timedelta(seconds=8)
    drain = settings.pools.drain_timeout + short
    # The agent starts first, because its pools need the longest time until they serve: it joins, then they are planned,
    # started and loaded. It lets its pools finish and then ends the others, so it needs more time to stop than a pool.
    members = [
        ProcessMember("agent", [WORKERS, "agent"], drain + timedelta(seconds=10)),
        ProcessMember("api", ["app", "api", f"--fd={listener.fileno()}"], short, descriptors=[listener.fileno()]),
    ]
    for number in range(1, settings.control.processes + 1):
        name = "control" if number == 1 else f"control-{number}"
        members.append(ProcessMember(name, [WORKERS, "control", name], drain, f"{name}@{host}"))
    members.append(ProcessMember("beat", [WORKERS, "beat"], short))
    if flower:
        members.append(ProcessMember("flower", ["app", "flower"], short))
    return members


def _with_servers(settings: Settings, servers: Sequence[Server]) -> Settings:
    """Return the settings of the programs: with the addresses of the embedded servers."""
    urls = {_ADDRESS[server.name]: SecretStr(server.url) for server in servers}
    return settings.model_copy(update=urls)


def _with_ports(settings: Settings) -> Settings:
    """Return the settings with a free port wherever the port is 0."""
    changes: dict[str, Any] = {}
    for section in ("api", "flower"):
        part = getattr(settings, section)
        changes[section] = part.model_copy(update={"port": part.port or _free_port(part.host)})
    return settings.model_copy(update=changes)


def _listening(settings: Settings) -> socket.socket:
    """
    Return the listening socket of the API. The parent holds it, so that clients wait while the API restarts.

    Raises ServerNotStarted when the address is in use.
    """
    host, port = settings.api.host, settings.api.port
    try:
        return socket.create_server((host, port), family=_family(host), backlog=_BACKLOG)
    except OSError as error:
        raise ServerNotStarted("api", f"it cannot listen on {host} port {port}: {error.strerror}") from error


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _expire_leases(url: str, incarnation: str, lease: timedelta) -> None:
    limit = time.monotonic() + lease.total_seconds()
    database = Database(url, pool_size=1)
    try:
        while time.monotonic() < limit:
            try:
                if steps := owners.expire_leases(database, incarnation):
                    _log.warning("leases_of_dead_worker_expired", incarnation=incarnation, steps=steps)
            except DatabaseUnreachable:
                time.sleep(1.0)
            else:
                return
    finally:
        database.close()


def _free_port(host: str) -> int:
    with socket.socket(_family(host)) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def _stop(member: ProcessMember, signals: Signals) -> None:
    child = member.child
    assert child is not None
    limit = time.monotonic() + member.grace.total_seconds()
    if child.alive and child.pid is not None:
        child.request_stop()
    while child.alive and time.monotonic() < limit and not signals.hurry:
        child.wait(timedelta(seconds=_PAUSE))
    child.stop(timedelta(seconds=0))


def _secret(value: SecretStr | None) -> str:
    assert value is not None, "both addresses are known here"
    return value.get_secret_value()
