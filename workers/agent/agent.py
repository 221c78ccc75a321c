"""
The agent of a host: it measures the host's devices, and starts and stops pools until the observed state is desired.

It joins the fleet once every process of an earlier agent is adopted or ended.
The process of a pool is started only when its bytes are reserved and really free. The bytes are released only when the
process has ended and the driver reports them free.
While the database is unavailable, pools continue; the agent writes what happened when the database is back.
An agent that was replaced by another one joins again. On SIGTERM it lets its pools finish, and ends.

It reads devices from the driver, never through CUDA, and loads no model in its own process.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from queue import Empty, SimpleQueue

import psycopg

from app.catalog.served import live_catalog
from app.devices import control_group
from app.devices.device import Inventory
from app.devices.inventory import Devices
from app.fleet.hosts import AssignedPool, Hosts, ObservedProcess, PoolEnded
from app.fleet.pool import METRICS_FOLDER, Desired, ProcessState
from app.kernel import addresses, clock, ids, log
from app.kernel import database as databases
from app.kernel.activity import Activity
from app.kernel.errors import (
    Conflict,
    DatabaseDenied,
    DatabaseUnreachable,
    LeaseLost,
    ModelFileUnusable,
    NotFound,
    ServerNotStarted,
)
from app.kernel.live import live_settings
from app.kernel.loop_guard import LoopGuard
from app.kernel.processes import private_file
from app.kernel.processes.process import AdoptedProcess, Child, adopt
from app.kernel.processes.spawning import SpawnerClient
from app.kernel.settings import Settings, environment_of
from app.scheduler.wake_up import AgentCalls
from app.workflows.runs.recovery import owners
from workers.agent import convergence, inventory
from workers.agent.convergence import (
    ConvergenceLimits,
    DatabaseContact,
    Kill,
    LocalProcess,
    Release,
    StartProcess,
    Terminate,
)
from workers.agent.model_files import ModelFiles
from workers.agent.pool_process import PoolProcess
from workers.peers.sharing import Sharing

_log = log.get(__name__)

#: Lines of a pool's log that are stored in the database.
_TAIL = 40
#: Most time from the requeue of a pool's steps until its process has ended.
_EXIT = timedelta(seconds=10)
#: Seconds for which granted bytes may still be in use before the start of a pool fails.
_SETTLE = 5.0
#: While all pools serve as they should, heartbeats are so many intervals apart, at most that part of the agent's lease.
_REST, _SILENT = 2, 0.4
#: Logs of ended pools that are kept, the newest ones.
_LOGS = 50


class Agent:
    """The agent of this host: the loop, and what it does with each pool."""

    def __init__(self, settings: Settings, spawner: int | None = None) -> None:
        """
        Connect to the database. `spawner` is the descriptor of the socket to a parent that can start pools.

        Raises DatabaseBehind, DatabaseUnreachable, Unavailable.
        """
        servers = addresses.of(settings)
        self._settings = settings
        urls = {"ARRIERO_DATABASE_URL": servers.database_url, "ARRIERO_REDIS_URL": servers.redis_url}
        self._environment = environment_of(settings) | urls
        #: A digest of the addresses, in the command line of each pool: a process keeps those that it started with.
        self._addresses = hashlib.sha256("\n".join(urls.values()).encode()).hexdigest()[:16]
        self.host = settings.fleet.host_here
        self._database = databases.open_at_head(servers.database_url, pool_size=2)
        self._hosts = Hosts(self._database, settings.fleet.agent_lease, settings.fleet.lease)
        self._devices, self._catalogs = Devices(settings.fleet), live_catalog(settings)
        self._processes: dict[str, PoolProcess] = {}
        self._epoch: int | None = None
        self._files = ModelFiles(settings, self._catalogs, self._database, self._hosts)
        self._sharing = Sharing(settings, self._catalogs, self._database)
        self._stopping = False
        #: Items wake the agent. A SimpleQueue may be filled by a signal handler at any moment.
        self._wake: SimpleQueue[None] = SimpleQueue()
        #: By pool, since when its granted bytes are not really free.
        self._short_since: dict[str, float] = {}
        #: An error of one pool does not stop the others.
        self._guard = LoopGuard(DatabaseUnreachable, LeaseLost, Conflict)
        self._activity, self._calls = Activity(servers.redis_url), AgentCalls(servers.redis_url)
        #: What was last written about each process.
        self._observed: dict[str, ObservedProcess] = {}
        #: In the last pass, each pool served as it should.
        self._at_rest = False
        #: Why it could not join, as last logged.
        self._join_refusal = ""
        self._run, self._logs = settings.data_dir / "run" / "pools", settings.data_dir / "logs"
        self._limits = ConvergenceLimits(
            start=settings.pools.start_timeout,
            drain=settings.pools.drain_timeout,
            exit=_EXIT,
            progress=settings.fleet.progress_timeout,
            heartbeat=settings.fleet.heartbeat_timeout,
        )
        self._contact = DatabaseContact(self._limits.heartbeat)
        self._spawner = None if spawner is None else SpawnerClient(spawner, lambda: self._wake.put(None))

    def run(self) -> int:
        """Serve until SIGTERM. Returns the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._request_stop())
        signal.signal(signal.SIGCHLD, lambda *_: self._wake.put(None))
        self._run.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._exclusive():
            arguments = (self.host, lambda: self._wake.put(None), lambda: self._stopping)
            threading.Thread(target=self._calls.listen, args=arguments, name="listener", daemon=True).start()
            url, apply = addresses.of(self._settings).redis_url, self._catalogs.follow
            changes = live_settings.follow(self._settings, self._database, url, apply)
            self._adopt()
            self._sharing.start()
            while not self._stopping:
                self._run_pass()
                self._sleep()
            self._shut_down()
        for resource in (self._sharing, changes, self._devices, self._database):
            resource.close()
        return 0

    def _request_stop(self) -> None:
        self._stopping = True
        self._wake.put(None)

    def _sleep(self) -> None:
        """Wait until the next heartbeat is due, or until the agent is woken."""
        with contextlib.suppress(Empty):
            self._wake.get(timeout=self._pause().total_seconds())
        while not self._wake.empty():
            self._wake.get()

    def _pause(self) -> timedelta:
        fleet = self._settings.fleet
        return max(fleet.heartbeat, min(fleet.heartbeat * _REST, fleet.agent_lease * _SILENT) * self._at_rest)

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Hold the lock of the data directory's pools. Raises Conflict when another agent holds it."""
        with (self._run / "agent.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Conflict(f"another agent runs on the data directory {self._settings.data_dir}") from None
            yield

    def _adopt(self) -> None:
        """Adopt the processes of an earlier agent. Those without a reservation are ended when this agent joins."""
        for file in sorted(self._run.glob("*.pid")):
            id_, _, epoch = file.stem.partition("@")
            process = adopt(file, self._log_file(id_)) if epoch.isdecimal() else None
            if process is not None and not self._has_current_addresses(process):
                _log.warning(
                    "pool_ended", pool=id_, pid=process.pid, reason="the address of the database or broker has changed"
                )
                process.stop(timedelta(0))
            elif process is not None:
                _log.info("pool_adopted", pool=id_, pid=process.pid)
                self._processes[id_] = PoolProcess(
                    process, int(epoch), {}, False, False, 1, time.monotonic(), control_group.oom_kills()
                )

    def _has_current_addresses(self, process: AdoptedProcess) -> bool:
        """Whether a process was started with the current addresses of database and broker."""
        return shlex.split(process.command)[-1] == self._addresses

    def _run_pass(self) -> None:
        """Run one pass: measure, send a heartbeat, converge all pools, and write what is observed."""
        self._at_rest = False
        try:
            measured = self._devices.measure()
            if self._epoch is None:
                self._join(measured)
            self._files.refresh(measured)
            pools = self._send_heartbeat(measured)
            self._converge(pools, measured)
            self._observe(measured)
            self._at_rest = all(convergence.is_at_rest(pool, self._settings.fleet.heartbeat) for pool in pools)
        except DatabaseUnreachable as error:
            _log.warning("agent_lost_database", error=str(error))
        except LeaseLost as error:
            _log.warning("agent_replaced", error=str(error))
            self._epoch = None
        except (Conflict, DatabaseDenied) as error:
            if self._join_refusal != str(error):
                self._join_refusal = str(error)
                _log.error("agent_cannot_join", error=str(error))
        except Exception:  # noqa: BLE001 the outermost loop: a defect must not leave pools without an agent
            _log.exception("agent_pass_failed")

    def _join(self, measured: Inventory) -> None:
        """End processes without a reservation, then join as the agent of the host."""
        held = {pool.id: pool for pool in self._hosts.pools(self.host)}
        for id_, running in list(self._processes.items()):
            pool = held.get(id_)
            if pool is None or pool.epoch != running.epoch:
                self._end_orphan(id_)
            else:
                running.devices = dict(pool.bytes)
                running.on_gpus = inventory.on_gpus(self.host, measured, pool.bytes)
                running.is_remote = self._is_remote(pool)
        declared = inventory.declared(self.host, measured, self._settings.fleet)
        adopted = {id_: running.epoch for id_, running in self._processes.items()}
        self._epoch = self._hosts.join(self.host, self._identity(), os.cpu_count() or 1, declared, adopted)
        self._files.invalidate()
        self._activity.note()

    def _identity(self) -> str:
        """Return the permanent id of this data directory, which alone knows the processes of its pools."""
        file = self._run / "identity"
        try:
            return file.read_text(encoding="ascii").strip()
        except FileNotFoundError:
            private_file.write(file, ids.new_secret() + "\n")
            return self._identity()

    def _send_heartbeat(self, measured: Inventory) -> list[AssignedPool]:
        assert self._epoch is not None, "it has joined"
        devices = inventory.measured(self.host, measured, self._settings.fleet, self._held())
        of_settings = inventory.settings_problems(measured, self._settings.fleet)
        problems = [*measured.problems, *of_settings, *self._files.problems, *self._sharing.problems]
        pools = self._hosts.heartbeat(self.host, self._epoch, devices, self._files.configurations, problems)
        self._contact.note(clock.now())
        return pools

    def _converge(self, pools: list[AssignedPool], measured: Inventory) -> None:
        for pool in pools:
            with self._guard.item("pool", pool.id):
                self._converge_one(pool, measured)
        held = {pool.id for pool in pools}
        for id_ in [id_ for id_ in self._processes if id_ not in held]:
            # Its host was declared lost, or an operator released its bytes: it may use no device any more.
            with self._guard.item("orphan", id_):
                self._end_orphan(id_)

    def _converge_one(self, pool: AssignedPool, measured: Inventory) -> None:
        running = self._processes.get(pool.id)
        match convergence.decide(pool, self._local(running), self._limits):
            case StartProcess():
                self._start(pool, measured)
            case Terminate(reason=reason):
                assert running is not None, "only a running process is asked"
                self._terminate(pool, running, reason)
            case Kill(reason=reason):
                assert running is not None, "only a running process is killed"
                self._kill(pool, running, reason)
            case Release(reason=reason):
                self._release_if_free(pool, running, reason)

    def _end_orphan(self, id_: str) -> None:
        """End a process without a reservation, and record that it existed."""
        running = self._processes[id_]
        _log.warning("orphan_ended", pool=id_, pid=running.process.pid)
        running.process.stop(timedelta(0))
        self._expire_leases(id_)
        self._hosts.record_orphan_end(id_, running.process.log_tail(_TAIL))
        del self._processes[id_]

    def _local(self, running: PoolProcess | None) -> LocalProcess | None:
        if running is None:
            return None
        now = time.monotonic()
        return LocalProcess(
            alive=running.process.alive,
            age=timedelta(seconds=now - running.started_at),
            stop_requested=running.stop_requested,
            stop_requested_ago=timedelta(seconds=now - running.stop_requested_at if running.stop_requested else 0),
            contact=self._contact.duration,
        )

    def _start(self, pool: AssignedPool, measured: Inventory) -> None:
        if shortage := inventory.shortage(self.host, measured, pool.bytes):
            # After the end of a process the driver needs a moment. A longer shortage means that another program has
            # taken the memory since the plan was made: the load would fail, or other programs would run out of memory.
            if time.monotonic() - self._short_since.setdefault(pool.id, time.monotonic()) > _SETTLE:
                self._release(pool, None, failed=True, ending=shortage)
            return
        assert self._epoch is not None, "it has joined"
        on_gpus = inventory.on_gpus(self.host, measured, pool.bytes)
        is_remote = self._is_remote(pool)
        threads = 1 if is_remote else self._thread_shares(pool.id, on_gpus)[pool.id]
        try:
            self._hosts.activate(self.host, self._epoch, pool.id, threads)
        except LeaseLost as error:
            _log.info("pool_not_started", pool=pool.id, reason=str(error))
            return
        devices = inventory.device_environment(self.host, measured, pool.bytes)
        environment = {**inventory.THREAD_ENVIRONMENT, **self._environment, **devices}
        self._remove_old_logs()
        oom_kills = control_group.oom_kills()
        try:
            process = self._start_process(pool, environment)
        except ServerNotStarted as error:
            self._release(pool, None, failed=True, ending=str(error))
            return
        self._processes[pool.id] = PoolProcess(
            process, pool.epoch, dict(pool.bytes), on_gpus, is_remote, threads, time.monotonic(), oom_kills
        )
        _log.info("pool_started", pool=pool.id, model=pool.model, pid=process.pid, devices=sorted(pool.bytes))

    def _start_process(self, pool: AssignedPool, environment: Mapping[str, str]) -> Child | AdoptedProcess:
        """Start the process of a pool: by the parent, where that is faster, or here. Raises ServerNotStarted."""
        name, arguments = f"pool {pool.model}", ["workers.programs", "pool", pool.id, str(pool.epoch), self._addresses]
        log_file, file = self._log_file(pool.id), self._run / f"{pool.id}@{pool.epoch}.pid"
        if self._spawner is not None:
            spawned = self._spawner.start(name, arguments, environment, log_file, file)
            if spawned is not None:
                return spawned
        child = Child(
            name,
            [sys.executable, "-P", "-m", *arguments],
            environment=environment,
            log_file=log_file,
            pid_file=file,
        )
        child.start()
        return child

    def _terminate(self, pool: AssignedPool, running: PoolProcess, reason: str) -> None:
        if running.stop_requested is None:
            running.process.request_stop()
        running.stop_requested, running.stop_requested_at, running.reason = pool.desired, time.monotonic(), reason
        _log.info("pool_stop_requested", pool=pool.id, model=pool.model, how=pool.desired, reason=reason)

    def _kill(self, pool: AssignedPool, running: PoolProcess, reason: str) -> None:
        _log.warning("pool_killed", pool=pool.id, model=pool.model, reason=reason)
        running.killed, running.reason = True, reason
        running.process.stop(timedelta(0))

    def _release_if_free(self, pool: AssignedPool, running: PoolProcess | None, reason: str) -> None:
        """Release the bytes of an ended process, once the driver reports them free."""
        if running is None:
            self._expire_leases(pool.id)
            self._release(pool, None, failed=True, ending=reason)
            return
        running.process.stop(timedelta(0))  # ends the rest of its session
        self._expire_leases(pool.id)
        measured = self._devices.measure()
        if not inventory.are_released(self.host, measured, pool.bytes, {running.process.pid or 0}):
            return  # the driver needs a moment; the next pass checks again
        code = running.process.returncode
        stopped = running.stop_requested is not None and not running.killed
        ending = running.ending(pool)
        failed = not stopped and code != 0
        oom_kills = control_group.oom_kills() - running.oom_kills
        tail = running.process.log_tail(_TAIL)
        if failed and not running.killed and inventory.is_out_of_memory(code, tail, oom_kills):
            ending = f"memory ran out: {ending}; the next pool of the model reserves more"
            self._count_failure(pool, measured)
        self._release(pool, running, failed=failed, ending=ending)

    def _expire_leases(self, id_: str) -> None:
        """Expire the leases of a dead process, so that its steps are requeued immediately."""
        if steps := owners.expire_leases(self._database, id_):
            _log.warning("leases_of_dead_pool_expired", pool=id_, steps=steps)

    def _count_failure(self, pool: AssignedPool, measured: Inventory) -> None:
        try:
            model = self._catalogs.current().get(pool.model)
            inventory.count_failure(model, self._settings, measured, self._database, self.host, pool.bytes)
        except (NotFound, ModelFileUnusable) as error:
            _log.warning("failure_not_counted", model=pool.model, error=str(error))

    def _release(self, pool: AssignedPool, running: PoolProcess | None, *, failed: bool, ending: str) -> None:
        assert self._epoch is not None, "it has joined"
        tail = running.process.log_tail(_TAIL) if running is not None else ""
        code = None if running is None else running.process.returncode
        self._hosts.release(self.host, self._epoch, PoolEnded(pool.id, code, failed, ending, tail))
        for by_pool in (self._processes, self._observed, self._short_since):
            by_pool.pop(pool.id, None)
        # A killed pool could not remove the file with the address of its metrics.
        for file in (self._settings.data_dir / METRICS_FOLDER).glob(f"*pool.*.{pool.id[-6:]}.json"):
            file.unlink(missing_ok=True)
        self._wake.put(None)  # other pools may wait for these bytes
        self._activity.note()

    def _observe(self, measured: Inventory) -> None:
        changed = []
        shares = self._thread_shares()
        for id_, running in self._processes.items():
            with self._guard.item("process", id_):
                running.process.rotate_log()
                running.threads = shares.get(id_, 1)
                used = inventory.used(self.host, measured, running.devices, running.process.pid or 0)
                running.peak = {key: max(size, running.peak.get(key, 0)) for key, size in used.items()}
                state = ProcessState.RUNNING if running.stop_requested is None else ProcessState.STOPPING
                tail = running.process.log_tail(_TAIL)
                now = ObservedProcess(id_, state, running.process.pid, running.threads, used, running.peak, tail)
                if self._observed.get(id_) != now:
                    changed.append(now)
        self._hosts.record_processes(changed)
        self._observed |= {one.id: one for one in changed}

    def _shut_down(self) -> None:
        """Let all pools finish, and leave the fleet meanwhile, so that no new pool is placed here."""
        _log.info("agent_stopping", host=self.host, pools=len(self._processes))
        for running in self._processes.values():
            running.process.request_stop()
            running.stop_requested, running.stop_requested_at = Desired.DRAIN, time.monotonic()
            running.reason = "its agent ends"
        limit = time.monotonic() + (self._limits.drain + self._limits.exit).total_seconds()
        pause = threading.Event()
        left_fleet = False
        while self._processes:
            with contextlib.suppress(DatabaseUnreachable, LeaseLost):
                if self._epoch is not None and not left_fleet:
                    self._hosts.leave(self.host, self._epoch)
                    left_fleet = True
            late = time.monotonic() > limit
            for id_, running in list(self._processes.items()):
                if late:
                    running.process.stop(timedelta(0))
                if not running.process.alive:
                    self._release_at_shutdown(id_, running, late=late)
            pause.wait(0.1)
        with contextlib.suppress(DatabaseUnreachable, LeaseLost):
            if self._epoch is not None:
                self._hosts.leave(self.host, self._epoch)

    def _release_at_shutdown(self, id_: str, running: PoolProcess, *, late: bool) -> None:
        """Release the bytes of a process that has ended. If that fails until the limit, the next agent does it."""
        running.process.stop(timedelta(0))
        ended = PoolEnded(
            id_,
            running.process.returncode,
            failed=False,
            ending=running.reason,
            log_tail=running.process.log_tail(_TAIL),
        )
        try:
            self._expire_leases(id_)
            if self._epoch is not None:
                self._hosts.release(self.host, self._epoch, ended)
        except (DatabaseUnreachable, LeaseLost, psycopg.Error) as error:
            _log.warning("pool_not_released", pool=id_, error=str(error))
            if not late:
                return
        del self._processes[id_]

    def _is_remote(self, pool: AssignedPool) -> bool:
        return (model := self._catalogs.current().find(pool.model)) is not None and model.remote is not None

    def _thread_shares(self, starting: str | None = None, on_gpus: bool = False) -> dict[str, int]:
        """Return the threads of each pool that computes, including the pool that is about to start."""
        pools = {id_: running.on_gpus for id_, running in self._processes.items() if not running.is_remote}
        if starting is not None:
            pools[starting] = on_gpus
        return inventory.thread_shares(self._settings.pools.threads, pools)

    def _held(self) -> dict[int, dict[str, int]]:
        """Return the reserved bytes by device, for each process id."""
        return {
            running.process.pid: running.devices
            for running in self._processes.values()
            if running.process.pid is not None
        }

    def _log_file(self, id_: str) -> Path:
        return self._logs / f"pool.{id_}.log"

    def _remove_old_logs(self) -> None:
        kept = {self._log_file(id_) for id_ in self._processes}
        ended = [file for file in sorted(self._logs.glob("pool.*.log")) if file not in kept]
        for file in ended[:-_LOGS]:
            file.unlink(missing_ok=True)
