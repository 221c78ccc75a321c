"""
The process tree of one machine: servers, API, workers, watched by one parent.

Everything is started in the order in which it is needed, restarted when it ends by itself, and stopped in the reverse
order, workers with time to finish. The first Ctrl-C or SIGTERM stops it at any moment; a second one hurries.
A tree that was killed leaves children behind; the next one on the same data directory ends them.
"""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import SecretStr

from app.catalog import files
from app.cli import readiness
from app.cli.member import FROZEN, ProcessMember, incarnation_of
from app.cli.programs import WORKERS
from app.fleet.pool import METRICS_FOLDER
from app.kernel import clock, embedded, log
from app.kernel.database import Database
from app.kernel.embedded import DataDirectory, PostgresServer, Server, ValkeyServer
from app.kernel.errors import DatabaseUnreachable, ServerNotStarted
from app.kernel.process import end_leftovers
from app.kernel.settings import Settings
from app.scheduler import needs
from app.workflows.runs.recovery import owners

#: Seconds between two looks at the children.
_PAUSE = 0.25
#: How long what a killed tree left behind may take to end in order.
_LEFTOVERS = timedelta(seconds=3)
#: Clients that wait for the API while it starts again.
_BACKLOG = 2048
#: The setting that names an embedded server's address.
_ADDRESS = {PostgresServer.name: "database_url", ValkeyServer.name: "redis_url"}

ReportLine = Callable[[str, str], None]
_log = log.get(__name__)


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
class Tree:
    """What runs. Made by `grown`."""

    settings: Settings
    directory: Path
    report: ReportLine
    servers: list[Server]
    members: list[ProcessMember] = field(default_factory=list)
    #: Since when an embedded server is seen stopped by a signal.
    _stopped: dict[str, float] = field(default_factory=dict)

    def watch(self) -> None:
        """Start again what ends by itself, for ever. Left by an interrupt."""
        while True:
            time.sleep(_PAUSE)
            self.mend()

    def mend(self) -> None:
        """Look at everything once, end what stands still, and start again what has ended."""
        for server in self.servers:
            self._mend_server(server)
        now = time.monotonic()
        for member in self.members:
            if member.stands_still(now) and member.child is not None:
                self.report("warning", f"{member.name} was stopped by a signal for {FROZEN:g} s; killing it")
                member.child.kill()
            if member.ended:
                self.report("warning", member.note_end(now))
                self.requeue(member.incarnation)
            if member.again is not None and now >= member.again:
                member.start(self.settings, self.directory)

    def requeue(self, incarnation: str | None) -> None:
        """
        What a dead worker held does not wait for its lease.

        It is done beside the tree, which waits for no database: one that is away for longer leaves it to the lease.
        """
        if incarnation:
            arguments = (_secret(self.settings.database_url), incarnation, self.settings.runs.lease)
            threading.Thread(target=_requeue, args=arguments, name="requeue", daemon=True).start()

    def _mend_server(self, server: Server) -> None:
        now = time.monotonic()
        if not server.is_stopped():
            self._stopped.pop(server.name, None)
        elif now - self._stopped.setdefault(server.name, now) > FROZEN:
            self.report("warning", f"{server.name} was stopped by a signal for {FROZEN:g} s; killing it")
            server.kill()
        if server.alive:
            return
        self.report("warning", f"{server.name} ended; starting it again")
        before = server.url
        try:
            server.start()
        except ServerNotStarted as error:
            self.report("error", str(error))
        if server.url != before:
            self._follow(server)

    def _follow(self, server: Server) -> None:
        """A stranger has taken a server's port, and it has moved: all that have its old address are started anew."""
        self.report("warning", f"{server.name} has moved to port {server.endpoint.port}; starting all others again")
        self.settings = _with_servers(self.settings, self.servers)
        children = [member.child for member in self.members if member.child is not None]
        for child in children:
            child.kill()  # alone: the next agent ends the pools, which have the old address too
        for member in self.members:
            if member.child is not None:
                member.child.stop()
                self.requeue(member.incarnation)
            member.start(self.settings, self.directory)

    def wait_until_ready(self, deadline: timedelta) -> None:
        """
        Wait until the API serves, every worker answers, and each model that is kept up has a pool that serves.

        Raises ServerNotStarted when a child or a pool ends before, or the deadline passes; with the end of its log.
        """
        readiness.wait(self.settings, self.members, self.report, deadline)

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


@contextmanager
def grown(settings: Settings, signals: Signals, report: ReportLine, *, flower: bool) -> Iterator[Tree]:
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
        # An agent is not asked: it would end its pools, which the next one takes over with their models loaded.
        left = end_leftovers(held.path / "run", _LEFTOVERS, unasked=("agent",))
        for leftover in left:
            report("warning", f"{leftover.name} of an earlier start still ran (pid {leftover.pid}); ended")
        settings = _with_ports(settings)
        listener = stack.enter_context(_listening(settings))
        outside = settings.database_url is not None
        servers = stack.enter_context(embedded.started(held, postgres=not outside, valkey=settings.redis_url is None))
        stack.callback(signals.shield)
        running: list[Server] = [server for server in (servers.postgres, servers.valkey) if server is not None]
        settings = _with_servers(settings, running)
        for server in running:
            report("info", f"{server.name} is ready")
        database = Database(_secret(settings.database_url), pool_size=1)
        stack.callback(database.close)
        if not outside:
            database.upgrade()
        database.require_head()
        tree = Tree(settings, held.path, report, running, _members(settings, listener, flower=flower))
        stack.callback(tree.stop, signals)
        stack.callback(signals.shield)
        for leftover in left:
            if leftover.forced:
                tree.requeue(incarnation_of(leftover.command))
        for member in tree.members:
            member.start(tree.settings, tree.directory)
        yield tree


def _members(settings: Settings, listener: socket.socket, *, flower: bool) -> list[ProcessMember]:
    host, short = socket.gethostname(), timedelta(seconds=8)
    drain = settings.pools.drain_timeout + short
    # It begins the longest chain: it joins, and then its pools are planned, begun and loaded. It lets its pools finish,
    # and ends those that do not: that takes longer than for a pool alone.
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
    """The settings as the children see them: with the addresses of the embedded servers."""
    urls = {_ADDRESS[server.name]: SecretStr(server.url) for server in servers}
    return settings.model_copy(update=urls)


def _with_ports(settings: Settings) -> Settings:
    """The settings with ports that are free where none is named."""
    changes: dict[str, Any] = {}
    for section in ("api", "flower"):
        part = getattr(settings, section)
        changes[section] = part.model_copy(update={"port": part.port or _free_port(part.host)})
    return settings.model_copy(update=changes)


def _listening(settings: Settings) -> socket.socket:
    """
    The socket of the API, held here: while the API starts again, clients wait in its queue and are not refused.

    Raises ServerNotStarted when somebody else has the address.
    """
    host, port = settings.api.host, settings.api.port
    try:
        return socket.create_server((host, port), family=_family(host), backlog=_BACKLOG)
    except OSError as error:
        raise ServerNotStarted("api", f"it cannot listen on {host} port {port}: {error.strerror}") from error


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _requeue(url: str, incarnation: str, lease: timedelta) -> None:
    limit = time.monotonic() + lease.total_seconds()
    database = Database(url, pool_size=1)
    try:
        while time.monotonic() < limit:
            try:
                if steps := owners.expire_leases(database, incarnation):
                    _log.warning("steps_of_dead_worker_requeued", incarnation=incarnation, steps=steps)
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
        child.ask()
    while child.alive and time.monotonic() < limit and not signals.hurry:
        child.wait(timedelta(seconds=_PAUSE))
    child.stop(timedelta(seconds=0))


def _secret(value: SecretStr | None) -> str:
    assert value is not None, "both addresses are known by now"
    return value.get_secret_value()
