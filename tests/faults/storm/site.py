"""
The place of a storm: Postgres and Valkey behind proxies, `arriero up` on them, a second control worker and beat.

Everything lies on one small disk where this account may mount one. What ends is started again, as a service manager
does; `arriero up` that ends by itself is recorded, since it should not.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2

from app.kernel.database import Database
from app.kernel.embedded import PostgresServer, Server, ValkeyServer
from app.kernel.embedded.endpoint import free_port
from app.kernel.errors import ServerNotStarted
from app.kernel.processes import pid_file
from tests.faults import installation
from tests.faults.conftest import ROOT, until
from tests.faults.fleets import ALPHA, BETA, GAMMA
from tests.faults.installation_chaos import SETTINGS
from tests.faults.replicas import Standby, promote_valkey, valkey_replica
from tests.faults.storm.effects import EffectServer
from tests.faults.storm.proxy import Network, Proxy

MODELS = (ALPHA, BETA, GAMMA)
_DISK_MIB = 2048
#: Seconds before a server or a program that ended is started again.
_RESTART_AFTER = 0.5
#: Programs beside `arriero up`, with their arguments.
_BESIDE = {"second-control": ["control", "--name", "second"], "second-beat": ["beat"]}


@dataclass
class Beside:
    """A program beside `arriero up`, with its process."""

    arguments: list[str]
    process: subprocess.Popen[bytes] | None = None


@dataclass
class Site:
    """The installation. `start` before use, `close` after it."""

    root: Path
    #: What should not have happened, seen while the storm ran.
    problems: list[str] = field(default_factory=list)
    #: Starts by program.
    starts: Counter[str] = field(default_factory=Counter)

    def start(self) -> None:
        """Start everything, and return when all is up."""
        self._stack = ExitStack()
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        self.has_disk = self._mount()
        self.data, self.output = self.root / "data", self.root / "output.txt"
        self._clock = self.root / "clock"
        self._clock.write_bytes(struct.pack("q", 0))
        self.has_clock = self._compile_clock()
        self.servers: dict[str, Server] = {
            "Postgres": PostgresServer(self.root / "postgres"),
            "Valkey": ValkeyServer(self.root / "valkey"),
        }
        #: Held while a server is started again, or replaced.
        self.servers_lock = threading.RLock()
        self._stack.callback(lambda: [server.stop() for server in self.servers.values()])
        for server in self.servers.values():
            server.start()
        #: What checks from outside read through: it is never cut, and follows the server that serves.
        direct = Proxy(lambda: self.postgres.endpoint.port)
        self._stack.callback(direct.close)
        url = self.postgres.url.replace(f":{self.postgres.endpoint.port}", f":{direct.port}")
        self.database = Database(url, pool_size=6)
        self._stack.callback(self.database.close)
        self.database.upgrade()
        self.proxies = {
            name: Proxy(lambda name=name: self.servers[name].endpoint.port)  # type: ignore[misc] # a default binds it
            for name in self.servers
        }
        for proxy in self.proxies.values():
            self._stack.callback(proxy.close)
        self.effects = EffectServer()
        self._stack.callback(self.effects.close)
        self.port = free_port(self.root)
        self._settings = SETTINGS | {
            "api.port": str(self.port),
            "http.allowed_hosts": f'["127.0.0.1:{self.effects.port}"]',
            "http.allow_private": "true",
        }
        self._closing = threading.Event()
        #: Held while a fault ends or starts `arriero up` by intent.
        self.up_lock = threading.RLock()
        self.up: subprocess.Popen[bytes] | None = None
        self._up_stack = ExitStack()
        self._stack.callback(lambda: self._up_stack.close())
        self.beside = {name: Beside(arguments) for name, arguments in _BESIDE.items()}
        self._stack.callback(self._end_beside)
        self.start_up()
        for name in self.beside:
            self._start_beside(name)
        keepers = [threading.Thread(target=self._keep, args=(one,), daemon=True) for one in ("servers", "programs")]
        for keeper in keepers:
            keeper.start()
            self._stack.callback(keeper.join)
        self._stack.callback(self._closing.set)

    def close(self) -> None:
        """End everything, and unmount the disk."""
        self._stack.close()
        if getattr(self, "has_disk", False):
            subprocess.run(["umount", "--lazy", str(self.root)], check=False)

    @property
    def postgres(self) -> PostgresServer:
        """The Postgres that serves now."""
        server = self.servers["Postgres"]
        assert isinstance(server, PostgresServer)
        return server

    @property
    def valkey(self) -> ValkeyServer:
        """The Valkey that serves now."""
        server = self.servers["Valkey"]
        assert isinstance(server, ValkeyServer)
        return server

    def fail_over(self, name: str) -> None:
        """
        Kill a server while a replica has all that it has, and let the replica take its place.

        No client reaches it from the moment at which the replica has caught up, as with a synchronous standby. Raises
        ServerNotStarted, OSError, AssertionError or an error of the client when no replica can be made now.
        """
        with self.servers_lock, ExitStack() as undo:
            old = self.servers[name]
            self.starts[f"replica of {name}"] += 1
            directory = self.root / f"{name}-{self.starts[f'replica of {name}']}"
            undo.callback(shutil.rmtree, directory, ignore_errors=True)
            replica: Server
            if isinstance(old, PostgresServer):
                standby = replica = Standby.of(old, directory)
                undo.callback(replica.stop)
                self.proxies[name].set(Network.DROP)
                undo.callback(self.proxies[name].set, Network.UP)
                standby.catch_up(old)
            else:
                assert isinstance(old, ValkeyServer)
                follower = replica = valkey_replica(old, directory)
                undo.callback(replica.stop)
                self.proxies[name].set(Network.DROP)
                undo.callback(self.proxies[name].set, Network.UP)
            if old.pid is not None and old.alive:
                installation.kill(old.pid)
            if isinstance(replica, Standby):
                replica.promote()
            else:
                promote_valkey(follower)
            self.servers[name] = replica
            self.proxies[name].set(Network.UP)
            undo.pop_all()
            until(lambda: not old.alive, 60)
            shutil.rmtree(old.directory, ignore_errors=True)

    def client(self, timeout: float) -> httpx2.Client:
        """A client of the API."""
        return httpx2.Client(base_url=f"http://127.0.0.1:{self.port}", trust_env=False, timeout=timeout)

    def as_cluster(self) -> Any:
        """The attributes of a cluster that the helpers for fleets use."""
        return SimpleNamespace(directory=self.data, database=self.database)

    def pids(self) -> dict[str, int]:
        """The processes by name; pools are `pool ID`."""
        found = installation.pids(self.data)
        for name, server in self.servers.items():
            if server.pid is not None and server.alive:
                found[name] = server.pid
        for name, one in self.beside.items():
            if one.process is not None and one.process.poll() is None:
                found[name] = one.process.pid
        if self.up is not None and self.up.poll() is None:
            found["up"] = self.up.pid
        return found

    def step_clock(self, seconds: int) -> None:
        """Step the wall clock of all programs, not of the servers, to so many seconds from the true time."""
        with self._clock.open("r+b") as stream:  # the processes have it mapped
            stream.write(struct.pack("q", seconds))

    def fill_disk(self) -> Callable[[], None]:
        """Fill the disk; returns what frees it again."""
        file = self.root / "ballast"
        with file.open("wb") as stream, contextlib.suppress(OSError):
            free = os.statvfs(self.root)
            os.posix_fallocate(stream.fileno(), 0, max(free.f_bavail * free.f_frsize - 65_536, 1))
        with file.open("ab") as stream, contextlib.suppress(OSError):
            while True:
                os.write(stream.fileno(), b"\0" * 4096)
        return lambda: file.unlink(missing_ok=True)

    def start_up(self) -> None:
        """Start `arriero up`, and wait until it reports that everything is up."""
        with self.up_lock:
            self._up_stack.close()
            self.starts["up"] += 1
            before = self.output.read_text().count("arriero is up") if self.output.exists() else 0
            catalog = installation.catalog_of(*MODELS, load="300ms")
            up = self._up_stack.enter_context(
                installation.up(self.data, self.output, self._settings, catalog, self._environment())
            )
            self.up = up
            until(lambda: installation.is_up(up, self.output, times=before + 1), 180)

    def _environment(self) -> dict[str, str]:
        def through(name: str) -> str:
            server = self.servers[name]
            return server.url.replace(f":{server.endpoint.port}", f":{self.proxies[name].port}")

        stepped = {"LD_PRELOAD": str(self._clock_library), "STEPPED_CLOCK": str(self._clock)}
        return {
            **os.environ,
            **(stepped if self.has_clock else {}),
            "ARRIERO_DATABASE_URL": through("Postgres"),
            "ARRIERO_REDIS_URL": through("Valkey"),
        }

    def _mount(self) -> bool:
        """Mount a small disk of memory, where this account may."""
        self.root.mkdir(parents=True, exist_ok=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_MIB}m,mode=0711", "storm", str(self.root)]
        return os.geteuid() == 0 and subprocess.run(mount, check=False, capture_output=True).returncode == 0

    def _compile_clock(self) -> bool:
        """Compile what steps the clock of a program, where there is a compiler."""
        self._clock_library = self.root / "stepped_clock.so"
        compiler = shutil.which("cc")
        if compiler is None or not sys.platform.startswith("linux"):
            return False
        source = Path(__file__).with_name("stepped_clock.c")
        command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(self._clock_library), str(source)]
        return subprocess.run(command, check=False, capture_output=True).returncode == 0

    # ---- the service manager ----

    def _keep(self, what: str) -> None:
        while not self._closing.wait(0.2):
            if what == "servers":
                for name in self.servers:
                    if not self.servers[name].alive and not self._closing.wait(_RESTART_AFTER):
                        # Without room on the disk it cannot start; the next turn tries again.
                        with self.servers_lock, contextlib.suppress(ServerNotStarted, OSError):
                            if not self.servers[name].alive:
                                self.starts[name] += 1
                                self.servers[name].start()
                continue
            for name, one in self.beside.items():
                if one.process is not None and one.process.poll() is not None:
                    self._closing.wait(_RESTART_AFTER)
                    self._start_beside(name)
            with self.up_lock:
                if self.up is not None and self.up.poll() is not None and not self._closing.is_set():
                    tail = self.output.read_text(errors="replace")[-1500:]
                    self.problems.append(f"`arriero up` ended by itself with {self.up.returncode}: {tail}")
                    self._start_up_again()

    def _start_up_again(self) -> None:
        limit = time.monotonic() + 300
        while not self._closing.is_set():
            try:
                return self.start_up()
            except (AssertionError, OSError) as error:
                if time.monotonic() > limit:
                    self.problems.append(f"`arriero up` did not start again: {error}")
                    return None
            self._closing.wait(2)
        return None

    def _start_beside(self, name: str) -> None:
        one = self.beside[name]
        options = [f"--set={key}={value}" for key, value in self._settings.items()]
        catalog = self.output.with_name("catalog.toml")
        options += [f"--set=catalog.files={catalog}"]
        command = [sys.executable, "-m", "app", "--data-dir", str(self.data), *options]
        self.starts[name] += 1
        with contextlib.suppress(OSError), (self.root / f"{name}.log").open("ab") as log:
            one.process = subprocess.Popen(
                [*command, *one.arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT,
                env=self._environment(), start_new_session=True,
            )  # fmt: skip

    def _end_beside(self) -> None:
        for one in self.beside.values():
            if one.process is not None:
                one.process.terminate()
        for one in self.beside.values():
            if one.process is not None:
                try:
                    one.process.wait(30)
                except subprocess.TimeoutExpired:
                    one.process.kill()
                    one.process.wait()


def is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    return pid_file.birth(pid) is not None
