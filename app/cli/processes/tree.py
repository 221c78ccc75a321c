"""
The process tree of one machine: embedded servers, the API and workers, watched by one parent.

Programs are started in the order of their dependencies, and restarted when they end by themselves. They are stopped in
the reverse order, and workers get time to finish. The first Ctrl-C or SIGTERM stops the tree at any moment; a second
one kills what still runs.
A tree that was killed leaves processes behind; the next tree on the same data directory ends them.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from app import __version__
from app.access import keyless, operator_key
from app.access.agents import roles
from app.cli.client import api_url_at, url_at
from app.cli.processes import readiness, records
from app.cli.processes.member import (
    FROZEN_SECONDS,
    ProcessMember,
    incarnation_of,
    requeue_child,
    spawned_child,
)
from app.cli.processes.preload import Preload
from app.cli.processes.programs import WORKERS
from app.cli.processes.records import LOG_FILE, RUN, TreeRecord, TreeState
from app.cli.processes.reporter import Reporter
from app.cli.processes.signals import Signals
from app.fleet.pool import METRICS_FOLDER
from app.kernel import embedded, ids
from app.kernel.database import Database
from app.kernel.embedded import DataDirectory, PostgresServer, Server, ValkeyServer
from app.kernel.errors import ServerNotStarted
from app.kernel.processes import forking, listening, log_files, waiting
from app.kernel.processes.process import Child, end_leftovers
from app.kernel.processes.spawning import Spawner
from app.kernel.security import tls
from app.kernel.settings import Settings

#: Seconds between two checks of the children; and while all of them run, whose end is noticed at once.
_PAUSE, _LONG_PAUSE = 0.25, 1.0
#: Seconds between two checks of the sizes of logs.
_ROTATE_SECONDS = 10.0
#: Most time for the processes of a killed tree to end after SIGTERM.
_LEFTOVERS = timedelta(seconds=3)
#: By embedded server, the setting with its address.
_ADDRESS = {PostgresServer.name: "database_url", ValkeyServer.name: "redis_url"}


@dataclass(slots=True)
class Tree:
    """The running servers and programs. `running_tree` creates it."""

    settings: Settings
    directory: Path
    report: Reporter
    servers: list[Server]
    #: What other commands read about it.
    record: TreeRecord
    members: list[ProcessMember] = field(default_factory=list)
    #: The programs that expire leases of dead workers.
    _requeues: list[Child] = field(default_factory=list)
    #: Starts pools for the agent.
    spawner: Spawner | None = None
    #: By embedded server, since when it is stopped by a signal.
    _frozen_since: dict[str, float] = field(default_factory=dict)
    #: When logs are rotated again, by the monotonic clock.
    _rotate_at: float = 0.0

    def watch(self, signals: Signals) -> None:
        """Check the tree until Interrupted is raised, or until a restart of everything is requested."""
        while True:
            self._wait()
            signals.check()
            self.check()
            if signals.restart_requested:
                signals.restart_requested = False
                with suppress(FileNotFoundError):
                    names = records.take_request(self.directory)
                    if not names:
                        return
                    self.restart(names)

    def restart(self, names: Collection[str]) -> None:
        """Restart programs and servers by name. Programs may finish their work first."""
        for member in self.members:
            if member.name in names:
                member.request_restart(time.monotonic())
        for server in self.servers:
            if server.name.lower() in names:
                server.stop()  # the next check starts it

    def check(self) -> None:
        """Check all servers and programs once: kill those that a signal has stopped, restart those that have ended."""
        for server in self.servers:
            self._check_server(server)
        self._forget_requeues()
        self.spawn()
        now = time.monotonic()
        if now > self._rotate_at:
            self._rotate_at = now + _ROTATE_SECONDS
            for server in self.servers:
                server.rotate_log()
            for child in [member.child for member in self.members if member.child is not None]:
                child.rotate_log()
            log_files.copy_when_long(self.directory / LOG_FILE)  # its own, when it runs in the background
        for member in self.members:
            if member.is_frozen(now) and member.child is not None:
                self.report("warning", f"{member.name} was stopped by a signal for {FROZEN_SECONDS:g} s; killing it")
                member.child.kill()
            if member.is_late(now) and member.child is not None:
                self.report("warning", f"{member.name} did not end for its restart; killing it")
                member.child.kill()
            if member.has_rested:
                member.rest()
            if member.ended:
                description = member.schedule_restart(now)
                self.report("warning", description)
                self.note_restart(member.name, description.partition("\n")[0])
                self.requeue(member.incarnation)
            is_due = member.is_asked_for or (member.restart_at is not None and now >= member.restart_at)
            if is_due and (problem := member.try_start(self.settings, self.directory, now)):
                self.report("error", problem)

    def _wait(self, seconds: float = _LONG_PAUSE) -> None:
        """Wait until a process has ended, or another one is asked for; at most so many seconds."""
        children = [member.child for member in self.members if member.child is not None]
        pids = [child.pid for child in (*children, *self._requeues)] + [server.pid for server in self.servers]
        listeners = [m.on_demand.fileno() for m in self.members if m.on_demand is not None and m.sleeps]
        if self.spawner is not None:
            pids += self.spawner.pids
            listeners.append(self.spawner.fileno())
        pause = min(_PAUSE, seconds) if any(member.restart_at is not None for member in self.members) else seconds
        waiting.wait_for_any([pid for pid in pids if pid is not None], listeners, pause)

    def spawn(self) -> None:
        """Start the pools that the agent asks for."""
        if self.spawner is not None:
            if self.spawner.has_request():
                self.report.close()  # its line is drawn by a thread, which would prevent a fork
            self.spawner.serve()

    def _forget_requeues(self) -> None:
        for ended in [child for child in self._requeues if not child.alive]:
            ended.stop()
            self._requeues.remove(ended)

    def note_restart(self, name: str, ending: str) -> None:
        """Record that a program or server is restarted, and how it ended."""
        self.record.restarts[name] = self.record.restarts.get(name, 0) + 1
        self.record.endings[name] = ending
        self.record.save(self.directory)

    def set_state(self, state: TreeState) -> None:
        """Record what the tree does."""
        self.record.state = state
        self.record.save(self.directory)

    def requeue(self, incarnation: str | None) -> None:
        """
        Expire the leases of a dead worker, so that its steps are requeued immediately.

        A program of its own does this, because the tree must not wait for the database.
        """
        if incarnation:
            child = requeue_child(self.settings, self.directory, incarnation)
            try:
                child.start()
            except ServerNotStarted as error:
                self.report("warning", f"{error}; the steps of the dead worker are requeued when their leases end")
                return
            self._requeues.append(child)

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
        self.note_restart(server.name.lower(), f"{server.name} ended")
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
            if member.child is not None or member.on_demand is None:
                member.start(self.settings, self.directory)

    def wait_until_ready(self, deadline: timedelta, signals: Signals) -> None:
        """
        Wait until the API and all workers answer, and a pool serves each model of `pools.models`.

        Raises ServerNotStarted, with the end of the log, when a program or pool ends before, or at the deadline.
        """

        def meanwhile(seconds: float) -> None:
            self._spawn_meanwhile(seconds)
            signals.check()

        readiness.wait(self.settings, self.members, self.report, deadline, self.record.instance, meanwhile)
        self.record.ready_after = round(self.report.seconds, 1)

    def set_ready(self) -> None:
        """Tell others that everything is ready; what is printed about that was printed before."""
        self.set_state(TreeState.READY)

    def _spawn_meanwhile(self, seconds: float) -> None:
        """Wait for so long, and start the pools that the agent asks for."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._wait(left)
            self.spawn()

    def stop(self, signals: Signals) -> None:
        """Stop all programs, in the reverse order of their dependencies. Returns when all have ended."""
        self.report.close()
        self.set_state(TreeState.STOPPING)
        for names in (("flower",), ("agent", "control"), ("api",)):
            group = [m for m in self.members if m.name.split(".")[0].split("-")[0] in names and m.child is not None]
            if group:
                self.report("info", f"stopping {', '.join(member.name for member in group)}")
                with ThreadPoolExecutor(len(group)) as threads:
                    list(threads.map(lambda member: _stop(member, signals), group))
        for child in self._requeues:
            child.stop(timedelta(0))
        # An agent that has just died leaves its pools to a next agent, but there is none.
        for leftover in end_leftovers(self.directory / "run" / "pools"):
            self.report("warning", f"{leftover.name} was left by its agent (pid {leftover.pid}); it was ended")
        # A killed pool could not remove the file with the address of its metrics, and neither could its agent.
        for file in (self.directory / METRICS_FOLDER).glob("*.json"):
            file.unlink(missing_ok=True)


@contextmanager
def running_tree(
    settings: Settings, held: DataDirectory, signals: Signals, report: Reporter, *, flower: bool
) -> Iterator[Tree]:
    """
    Start the servers, check the schema, start the programs, and yield the tree. All of them end with the block.

    The caller has installed the signals, and holds the data directory.
    Raises ServerNotStarted, DatabaseBehind, ModelFileMissing, and other errors of a start.
    """
    tls.certificate_of(settings.api)  # a wrong one is refused here, and not by a program that is restarted for ever
    readiness.check_files(settings)
    with ExitStack() as stack:
        stack.callback(report.close)
        stack.callback(records.remove, held.path)
        record = TreeRecord(os.getpid(), str(ids.new_id()), __version__)
        record.save(held.path)
        # An agent gets no SIGTERM: it would end its pools. The next agent adopts them, with their models loaded.
        left = end_leftovers(held.path / RUN, _LEFTOVERS, kill_at_once=("agent",))
        for leftover in left:
            report(
                "warning", f"{leftover.name} of an earlier start was still running (pid {leftover.pid}); it was ended"
            )
        # Programs call no API, so none of them gets the key of the settings.
        settings = settings.model_copy(update={"api": settings.api.model_copy(update={"key": None})})
        settings, listeners = _listening(settings, stack, flower=flower)
        record.api = api_url_at(settings.api)
        record.flower = url_at(settings.flower.host, settings.flower.port) if flower else None
        record.save(held.path)
        if keyless.needs_keys(settings):
            stack.callback(operator_key.remove, held.path)
            operator_key.create(held.path)
        else:
            operator_key.remove(held.path)  # one that a killed tree has left
        is_external = settings.database_url is not None
        preload = Preload()
        preload.start()
        report.begin("servers")
        servers = stack.enter_context(
            embedded.started(held, postgres=not is_external, valkey=settings.redis_url is None)
        )
        stack.callback(signals.block_interrupts)
        running: list[Server] = [server for server in (servers.postgres, servers.valkey) if server is not None]
        settings = _with_servers(settings, running)
        report.done("servers", f"{' and '.join(server.name for server in running) or 'external ones'}")
        report.begin("schema")
        database = Database(_secret(settings.database_url), pool_size=1)
        stack.callback(database.close)
        before = None if is_external else database.revision()
        if not is_external:
            database.upgrade()
            with database.work() as work:
                roles.renew_grants(work)
        database.require_head()
        revision = database.revision()
        database.close()
        report.done("schema", f"at revision {revision}{'' if is_external or before == revision else ', upgraded'}")
        spawner = Spawner(spawned_child) if forking.is_offered() else None
        if spawner is not None:
            stack.callback(spawner.close)
        members = _members(settings, listeners, record.instance, spawner)
        tree = Tree(settings, held.path, report, running, record, members, spawner=spawner)
        meant = [member.name for member in members if member.on_demand is None]
        record.programs = [*(server.name.lower() for server in running), *meant]
        stack.callback(tree.stop, signals)
        stack.callback(signals.block_interrupts)
        preload.finish()
        report.close()  # its line is drawn by a thread, which would prevent forks
        for leftover in left:
            if leftover.forced:
                tree.requeue(incarnation_of(leftover.command))
        for member in tree.members:
            if member.on_demand is None:
                member.start(tree.settings, tree.directory)
        report.begin("api", "workers", "models")
        yield tree


def _members(
    settings: Settings, listeners: Mapping[str, socket.socket], instance: str, spawner: Spawner | None
) -> list[ProcessMember]:
    host, short = socket.gethostname(), timedelta(seconds=8)
    drain = settings.pools.drain_timeout + short
    fds = {name: listener.fileno() for name, listener in listeners.items()}
    api = ["app", "api", f"--fd={fds['api']}", f"--instance={instance}"]
    spawning = [] if spawner is None else [spawner.inherited.fileno()]
    # The agent starts first, because its pools need the longest time until they serve: it joins, then they are planned,
    # started and loaded. It lets its pools finish and then ends the others, so it needs more time to stop than a pool.
    members = [
        ProcessMember(
            "agent",
            [WORKERS, "agent", *map(str, spawning)],
            drain + timedelta(seconds=10),
            descriptors=spawning,
        ),
        ProcessMember("api", api, short, descriptors=[fds["api"]]),
    ]
    for number in range(1, settings.control.processes + 1):
        name = "control" if number == 1 else f"control-{number}"
        beat = ["--beat"] if number == 1 else []
        members.append(ProcessMember(name, [WORKERS, "control", name, *beat], drain, f"{name}@{host}"))
    if "flower" in fds:
        arguments = [WORKERS, "flower", str(fds["flower"])]
        members.append(
            ProcessMember("flower", arguments, short, descriptors=[fds["flower"]], on_demand=listeners["flower"])
        )
    return members


def _with_servers(settings: Settings, servers: Sequence[Server]) -> Settings:
    """Return the settings of the programs: with the addresses of the embedded servers."""
    urls = {_ADDRESS[server.name]: SecretStr(server.url) for server in servers}
    return settings.model_copy(update=urls)


def _listening(settings: Settings, stack: ExitStack, *, flower: bool) -> tuple[Settings, Mapping[str, socket.socket]]:
    """
    Return the listening sockets of API and Flower, and the settings with their ports: a free one for each that is 0.

    The parent holds the sockets, so that clients wait while a program restarts, and no other program takes its port.
    Raises ServerNotStarted, with the holder of the port, when one is in use.
    """
    listeners: dict[str, socket.socket] = {}
    changes: dict[str, Any] = {}
    for name in ("api", "flower") if flower else ("api",):
        part = getattr(settings, name)
        listeners[name] = listening.listen(name, part.host, part.port, f"{name}.port")
        stack.callback(listeners[name].close)
        changes[name] = part.model_copy(update={"port": listening.port_of(listeners[name])})
    return settings.model_copy(update=changes), listeners


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
