"""
The agent: one per host. It measures the host's devices and makes what is observed of its pools what is desired.

It joins the fleet once every process of an earlier agent is adopted or ended. A pool begins only when its bytes are
reserved and really free; its bytes are given back only when its process is gone and they are back.
While the database is away pools go on; what they do is caught up with. An agent that another one replaced joins anew,
unless it is told to end: then it lets its pools finish, and leaves.

It asks the driver, never CUDA, and starts no model in its own process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from queue import Empty, SimpleQueue

import psutil
import psycopg

from app.catalog import files
from app.catalog.catalog import Catalog
from app.devices import control_group
from app.devices.device import Inventory
from app.devices.inventory import Devices
from app.fleet.hosts import Granted, Hosts, Observed, PoolEnded
from app.fleet.pool import Desired, ProcessState
from app.kernel import addresses, clock, ids, log, private_file
from app.kernel import database as databases
from app.kernel.errors import (
    Conflict,
    DatabaseUnreachable,
    LeaseLost,
    ModelFileUnusable,
    NotFound,
    ServerNotStarted,
)
from app.kernel.guard import LoopGuard
from app.kernel.process import Adopted, Child, adopt
from app.kernel.settings import Settings, environment_of
from app.scheduler.reconcile_pass import CHANNEL
from app.workflows.runs.recovery import owners
from workers.agent import convergence, inventory
from workers.agent.convergence import Begin, ConvergenceLimits, GiveBack, Kill, Local, Terminate, Watch
from workers.agent.model_files import ModelFiles
from workers.agent.running import Running
from workers.pool import exporter

_log = log.get(__name__)

#: Lines of a pool's log that everybody can read.
_TAIL = 40
#: How long a pool may take to be gone once it has handed its steps back.
_LEAVE = timedelta(seconds=10)
#: Seconds in which bytes that were granted may turn out to be free.
_SETTLE = 5.0
#: Where a process finds database and broker: it never learns that they have moved.
_ADDRESSES = ("ARRIERO_DATABASE_URL", "ARRIERO_REDIS_URL")
#: Logs of pools that have ended, the last ones, are kept.
_LOGS = 50


class Agent:
    """The agent of this host."""

    def __init__(self, settings: Settings) -> None:
        """Connects to nothing but the database. Raises DatabaseBehind, DatabaseUnreachable, Unavailable."""
        servers = addresses.of(settings)
        self._settings = settings
        self._environment = environment_of(settings) | {
            "ARRIERO_DATABASE_URL": servers.database_url,
            "ARRIERO_REDIS_URL": servers.redis_url,
        }
        self.host = settings.fleet.host_here
        self._database = databases.at_head(servers.database_url, pool_size=2)
        self._hosts = Hosts(self._database, settings.fleet.agent_lease, settings.fleet.lease)
        self._devices = Devices(settings.fleet)
        self._catalog: Catalog = files.read_catalog(settings.catalog.files)
        self._running: dict[str, Running] = {}
        self._epoch: int | None = None
        self._files = ModelFiles(settings, self._catalog, self._database, self._hosts)
        self._stopping = False
        #: What wakes the agent. A queue of this kind may be filled by a signal at any moment.
        self._wake: SimpleQueue[None] = SimpleQueue()
        #: By pool, since when bytes that were granted are not really there.
        self._short: dict[str, float] = {}
        #: What breaks for one pool stops none of the others.
        self._guard = LoopGuard(DatabaseUnreachable, LeaseLost, Conflict)
        self._seen: dict[str, Observed] = {}
        #: Why it could not join.
        self._refused = ""
        self._run, self._logs = settings.data_dir / "run" / "pools", settings.data_dir / "logs"
        self._limits = ConvergenceLimits(
            start=settings.pools.start_timeout,
            drain=settings.pools.drain_timeout,
            leave=_LEAVE,
            progress=settings.fleet.progress_timeout,
            silence=settings.fleet.heartbeat_timeout,
        )
        self._watch = Watch(self._limits.silence)

    def run(self) -> int:
        """Serve until SIGTERM; gives the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._end())
        signal.signal(signal.SIGCHLD, lambda *_: self._wake.put(None))
        self._run.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._alone():
            listener = threading.Thread(target=self._listen, name="listener", daemon=True)
            listener.start()
            self._adopt()
            while not self._stopping:
                self._turn()
                self._sleep()
            self._leave()
        self._devices.close()
        self._database.close()
        return 0

    def _end(self) -> None:
        self._stopping = True
        self._wake.put(None)

    def _sleep(self) -> None:
        """Until the next beat, or until something happens."""
        with contextlib.suppress(Empty):
            self._wake.get(timeout=self._settings.fleet.heartbeat.total_seconds())
        while not self._wake.empty():
            self._wake.get()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the data directory's pools. Raises Conflict when another agent has them."""
        with (self._run / "agent.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Conflict(f"another agent runs on {self._settings.data_dir}") from None
            yield

    def _adopt(self) -> None:
        """Take over what an earlier agent left running. What the ledger does not hold is ended when this one joins."""
        for file in sorted(self._run.glob("*.pid")):
            id_, _, epoch = file.stem.partition("@")
            process = adopt(file, self._log_file(id_)) if epoch.isdecimal() else None
            if process is not None and not self._reaches_our_servers(process):
                _log.warning(
                    "pool_ended", pool=id_, pid=process.pid, reason="database or broker have another address now"
                )
                process.stop(timedelta(0))
            elif process is not None:
                _log.info("pool_adopted", pool=id_, pid=process.pid)
                running = Running(process, int(epoch), {}, False, 1, time.monotonic(), control_group.kills())
                self._running[id_] = running

    def _reaches_our_servers(self, process: Adopted) -> bool:
        """Whether a process was started with the addresses of today."""
        try:
            environment = psutil.Process(process.pid).environ()
        except psutil.Error:
            return False
        return all(environment.get(name) == self._environment[name] for name in _ADDRESSES)

    def _turn(self) -> None:
        """Look at everything once, and do what is to be done."""
        try:
            inventory_ = self._devices.measure()
            if self._epoch is None:
                self._join(inventory_)
            self._files.look(inventory_)
            pools = self._beat(inventory_)
            self._converge(pools, inventory_)
            self._observe(inventory_)
        except DatabaseUnreachable as error:
            _log.warning("agent_cut_off", error=str(error))
        except LeaseLost as error:
            _log.warning("agent_replaced", error=str(error))
            self._epoch = None
        except Conflict as error:
            if self._refused != str(error):
                self._refused = str(error)
                _log.error("agent_cannot_join", error=str(error))
        except Exception:  # noqa: BLE001 the outermost loop: a defect of ours must not leave pools without an agent
            _log.exception("agent_turn_broke")

    def _join(self, inventory_: Inventory) -> None:
        """End what the ledger does not hold, then speak for the host."""
        held = {pool.id: pool for pool in self._hosts.pools(self.host)}
        for id_, running in list(self._running.items()):
            pool = held.get(id_)
            if pool is None or pool.epoch != running.epoch:
                self._end_orphan(id_)
            else:
                running.devices = dict(pool.bytes)
                running.on_gpus = inventory.on_gpus(self.host, inventory_, pool.bytes)
        declared = inventory.declared(self.host, inventory_, self._settings.fleet)
        adopted = {id_: running.epoch for id_, running in self._running.items()}
        self._epoch = self._hosts.join(self.host, self._identity(), os.cpu_count() or 1, declared, adopted)
        self._files.forget()

    def _identity(self) -> str:
        """Names this data directory for ever: the processes of its pools are known here and nowhere else."""
        file = self._run / "identity"
        try:
            return file.read_text(encoding="ascii").strip()
        except FileNotFoundError:
            private_file.write(file, ids.new_secret() + "\n")
            return self._identity()

    def _beat(self, inventory_: Inventory) -> list[Granted]:
        assert self._epoch is not None, "it has joined"
        measured = inventory.measured(self.host, inventory_, self._settings.fleet, self._held())
        complaints = inventory.complaints(inventory_, self._settings.fleet)
        problems = [*inventory_.problems, *complaints, *self._files.problems]
        pools = self._hosts.beat(self.host, self._epoch, measured, self._files.configurations, problems)
        self._watch.reached(clock.now())
        return pools

    def _converge(self, pools: list[Granted], inventory_: Inventory) -> None:
        for pool in pools:
            with self._guard.one("pool", pool.id):
                self._converge_one(pool, inventory_)
        held = {pool.id for pool in pools}
        for id_ in [id_ for id_ in self._running if id_ not in held]:
            # Its host was declared lost, or an operator gave its bytes back: it may touch nothing any more.
            with self._guard.one("orphan", id_):
                self._end_orphan(id_)

    def _converge_one(self, pool: Granted, inventory_: Inventory) -> None:
        running = self._running.get(pool.id)
        match convergence.decide(pool, self._local(running), self._limits):
            case Begin():
                self._begin(pool, inventory_)
            case Terminate(reason=reason):
                assert running is not None, "only what runs is asked"
                self._ask(pool, running, reason)
            case Kill(reason=reason):
                assert running is not None, "only what runs is killed"
                self._kill(pool, running, reason)
            case GiveBack(reason=reason):
                self._give_back(pool, running, reason)

    def _end_orphan(self, id_: str) -> None:
        """End a process that holds no bytes any more, and let everybody see that there was one."""
        running = self._running[id_]
        _log.warning("orphan_ended", pool=id_, pid=running.process.pid)
        running.process.stop(timedelta(0))
        self._requeue(id_)
        self._hosts.end_orphan(id_, running.process.log_tail(_TAIL))
        del self._running[id_]

    def _local(self, running: Running | None) -> Local | None:
        if running is None:
            return None
        now = time.monotonic()
        return Local(
            alive=running.process.alive,
            age=timedelta(seconds=now - running.began),
            asked=running.asked,
            asked_ago=timedelta(seconds=now - running.asked_at if running.asked else 0),
            watched=self._watch.lasted,
        )

    def _begin(self, pool: Granted, inventory_: Inventory) -> None:
        if missing := inventory.missing(self.host, inventory_, pool.bytes):
            # The driver takes a moment after the end of a process. If it lasts, somebody else has taken it since the
            # plan was made: a load would fail, or take it from others.
            if time.monotonic() - self._short.setdefault(pool.id, time.monotonic()) > _SETTLE:
                self._release(pool, None, failed=True, ending=missing)
            return
        assert self._epoch is not None, "it has joined"
        on_gpus = inventory.on_gpus(self.host, inventory_, pool.bytes)
        threads = self._shares(pool.id, on_gpus)[pool.id]
        try:
            self._hosts.activate(self.host, self._epoch, pool.id, threads)
        except LeaseLost as error:
            _log.info("pool_not_begun", pool=pool.id, reason=str(error))
            return
        child = Child(
            f"pool {pool.model}",
            [sys.executable, "-m", "workers.programs", "pool", pool.id, str(pool.epoch)],
            environment=self._environment | inventory.pinned(self.host, inventory_, pool.bytes),
            log_file=self._log_file(pool.id),
            pid_file=self._run / f"{pool.id}@{pool.epoch}.pid",
        )
        self._forget_old_logs()
        kills = control_group.kills()
        running = Running(child, pool.epoch, dict(pool.bytes), on_gpus, threads, time.monotonic(), kills)
        self._running[pool.id] = running
        try:
            child.start()
        except ServerNotStarted as error:
            del self._running[pool.id]
            self._release(pool, None, failed=True, ending=str(error))
            return
        _log.info("pool_begun", pool=pool.id, model=pool.model, pid=child.pid, devices=sorted(pool.bytes))

    def _ask(self, pool: Granted, running: Running, reason: str) -> None:
        if running.asked is None:
            running.process.ask()
        running.asked, running.asked_at, running.reason = pool.desired, time.monotonic(), reason
        _log.info("pool_asked_to_end", pool=pool.id, model=pool.model, how=pool.desired, reason=reason)

    def _kill(self, pool: Granted, running: Running, reason: str) -> None:
        _log.warning("pool_killed", pool=pool.id, model=pool.model, reason=reason)
        running.killed, running.reason = True, reason
        running.process.stop(timedelta(0))

    def _give_back(self, pool: Granted, running: Running | None, reason: str) -> None:
        if running is None:
            self._requeue(pool.id)
            self._release(pool, None, failed=True, ending=reason)
            return
        running.process.stop(timedelta(0))  # what is left of its session
        self._requeue(pool.id)
        inventory_ = self._devices.measure()
        if not inventory.are_back(self.host, inventory_, pool.bytes, {running.process.pid or 0}):
            return  # the driver takes a moment; it is looked at again
        code = running.process.returncode
        asked = running.asked is not None and not running.killed
        ending = running.ending(pool)
        failed = not asked and code != 0
        kills = control_group.kills() - running.kills
        if failed and not running.killed and inventory.ran_out(code, running.process.log_tail(_TAIL), kills):
            ending = f"memory ran out: {ending}; the next pool of the model reserves more"
            self._count_failure(pool, inventory_)
        self._release(pool, running, failed=failed, ending=ending)

    def _requeue(self, id_: str) -> None:
        """The process of a pool is dead: its steps do not wait for their leases."""
        if steps := owners.expire_leases(self._database, id_):
            _log.warning("steps_of_dead_pool_requeued", pool=id_, steps=steps)

    def _count_failure(self, pool: Granted, inventory_: Inventory) -> None:
        try:
            inventory.count_failure(
                self._catalog.get(pool.model), self._settings, inventory_, self._database, self.host, pool.bytes
            )
        except (NotFound, ModelFileUnusable) as error:
            _log.warning("failure_not_counted", model=pool.model, error=str(error))

    def _release(self, pool: Granted, running: Running | None, *, failed: bool, ending: str) -> None:
        assert self._epoch is not None, "it has joined"
        tail = running.process.log_tail(_TAIL) if running is not None else ""
        code = None if running is None else running.process.returncode
        self._hosts.release(self.host, self._epoch, PoolEnded(pool.id, code, failed, ending, tail))
        for known in (self._running, self._seen, self._short):
            known.pop(pool.id, None)
        # One that was killed could not take the address of its metrics back.
        for file in (self._settings.data_dir / exporter.FOLDER).glob(f"*pool.*.{pool.id[-6:]}.json"):
            file.unlink(missing_ok=True)
        self._wake.put(None)  # others may have waited for these bytes

    def _observe(self, inventory_: Inventory) -> None:
        changed = []
        shares = self._shares()
        for id_, running in self._running.items():
            with self._guard.one("process", id_):
                running.threads = shares[id_]
                used = inventory.used(self.host, inventory_, running.devices, running.process.pid or 0)
                running.peak = {key: max(size, running.peak.get(key, 0)) for key, size in used.items()}
                state = ProcessState.RUNNING if running.asked is None else ProcessState.STOPPING
                tail = running.process.log_tail(_TAIL)
                seen = Observed(id_, state, running.process.pid, running.threads, used, running.peak, tail)
                if self._seen.get(id_) != seen:
                    changed.append(seen)
        self._hosts.observe(changed)
        self._seen |= {seen.id: seen for seen in changed}

    def _leave(self) -> None:
        """Let every pool finish, and go. Nothing new is placed here meanwhile."""
        _log.info("agent_leaves", host=self.host, pools=len(self._running))
        for running in self._running.values():
            running.process.ask()
            running.asked, running.asked_at, running.reason = Desired.DRAIN, time.monotonic(), "its agent ends"
        limit = time.monotonic() + (self._limits.drain + self._limits.leave).total_seconds()
        pause = threading.Event()
        gone_from_books = False
        while self._running:
            with contextlib.suppress(DatabaseUnreachable, LeaseLost):
                if self._epoch is not None and not gone_from_books:
                    self._hosts.leave(self.host, self._epoch)
                    gone_from_books = True
            late = time.monotonic() > limit
            for id_, running in list(self._running.items()):
                if late:
                    running.process.stop(timedelta(0))
                if not running.process.alive:
                    self._settle(id_, running, late=late)
            pause.wait(0.1)
        with contextlib.suppress(DatabaseUnreachable, LeaseLost):
            if self._epoch is not None:
                self._hosts.leave(self.host, self._epoch)

    def _settle(self, id_: str, running: Running, *, late: bool) -> None:
        """Give the bytes of a process back that has ended while the agent leaves; the next agent does it otherwise."""
        running.process.stop(timedelta(0))
        ended = PoolEnded(
            id_,
            running.process.returncode,
            failed=False,
            ending=running.reason,
            log_tail=running.process.log_tail(_TAIL),
        )
        try:
            self._requeue(id_)
            if self._epoch is not None:
                self._hosts.release(self.host, self._epoch, ended)
        except (DatabaseUnreachable, LeaseLost, psycopg.Error) as error:
            _log.warning("pool_not_released", pool=id_, error=str(error))
            if not late:
                return
        del self._running[id_]

    def _shares(self, coming: str | None = None, on_gpus: bool = False) -> dict[str, int]:
        """The part of the cores of each pool, with one that is about to begin."""
        pools = {id_: running.on_gpus for id_, running in self._running.items()}
        if coming is not None:
            pools[coming] = on_gpus
        return inventory.shares(self._settings.pools.threads, pools)

    def _held(self) -> dict[int, dict[str, int]]:
        """By process, what it has reserved."""
        return {
            running.process.pid: running.devices
            for running in self._running.values()
            if running.process.pid is not None
        }

    def _log_file(self, id_: str) -> Path:
        return self._logs / f"pool.{id_}.log"

    def _forget_old_logs(self) -> None:
        kept = {self._log_file(id_) for id_ in self._running}
        ended = [file for file in sorted(self._logs.glob("pool.*.log")) if file not in kept]
        for file in ended[:-_LOGS]:
            file.unlink(missing_ok=True)

    def _listen(self) -> None:
        """Wake when something is desired of this host."""
        while not self._stopping:
            try:
                with psycopg.connect(self._database.raw_url(), autocommit=True, connect_timeout=5) as connection:
                    connection.execute(f"LISTEN {CHANNEL}")
                    while not self._stopping:
                        for note in connection.notifies(timeout=0.5, stop_after=1):
                            if note.payload == self.host:
                                self._wake.put(None)
            except psycopg.OperationalError as error:
                _log.warning("agent_cannot_listen", error=str(error).strip())
                time.sleep(1.0)
            except Exception:  # noqa: BLE001 the outermost loop of the thread
                _log.exception("agent_cannot_listen")
                time.sleep(1.0)
