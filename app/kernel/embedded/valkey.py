"""
The embedded Valkey: an append-only file that is flushed to disk each second, and no eviction of keys.

A file that was damaged, such as by a full disk and a kill, is set aside, and the server starts empty: what is in it are
messages and caches, which Postgres and the sweep make good.
Its password is in a configuration file that only its owner can read. The file is rewritten at each start.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from app.kernel import log
from app.kernel.embedded import binaries
from app.kernel.embedded.endpoint import LOOPBACK, Endpoint
from app.kernel.embedded.server import Server
from app.kernel.processes import private_file
from app.kernel.processes.data_directory import make_directory

_log = log.get(__name__)

#: What Valkey says of an append-only file that it will never load, and the folder of these files.
_DAMAGED, _FILES = "Bad file format reading the append only file", "appendonlydir"

_CONFIGURATION = """\
# Written by arriero at each start: changes made here are lost.
bind {host}
port {port}
protected-mode yes
requirepass {password}
unixsocket ""
daemonize no
logfile ""
always-show-logo no
set-proc-title no
tcp-backlog 128
databases 16
dir .
appendonly yes
appendfsync everysec
save ""
maxmemory-policy noeviction
"""


def url_of(endpoint: Endpoint) -> str:
    """`redis://:password@127.0.0.1:port/0`."""
    return f"redis://:{endpoint.password}@{LOOPBACK}:{endpoint.port}/0"


class ValkeyServer(Server):
    """Valkey in its directory: the append-only file in `data`, next to it configuration, endpoint and log."""

    name = "Valkey"
    stop_signal = signal.SIGTERM
    stop_deadline = timedelta(seconds=20)

    @property
    def data(self) -> Path:
        """The directory of the append-only file."""
        return self.directory / "data"

    @property
    def url(self) -> str:
        """`redis://:password@127.0.0.1:port/0`. Raises ServerNotStarted before the first start."""
        return url_of(self.endpoint)

    def _find_program(self) -> None:
        self._binary = binaries.valkey_binary()

    def _program(self) -> Path:
        return self._binary

    def _prepare(self, limit: float) -> None:  # noqa: ARG002 creating a directory takes no time
        make_directory(self.data)

    def _can_try_again(self, tail: str) -> bool:
        """Set a damaged append-only file aside, in the place of an earlier one."""
        files, aside = self.data / _FILES, self.data / "damaged"
        if _DAMAGED not in tail or not files.exists():
            return False
        shutil.rmtree(aside, ignore_errors=True)
        files.rename(aside)
        _log.warning("valkey_files_set_aside", path=str(aside), reason=_DAMAGED)
        return True

    def _working_directory(self) -> Path:
        return self.data

    def _command(self) -> Sequence[str]:
        file = self.directory / "valkey.conf"
        endpoint = self.endpoint
        text = _CONFIGURATION.format(host=LOOPBACK, port=endpoint.port, password=endpoint.password)
        private_file.write(file, text)
        return (str(self._binary), str(file))

    def _answers(self) -> bool:
        # Protocol 2: with 3, Valkey counts redis-py's HELLO as an error of every connection.
        try:
            with redis.Redis(
                host=LOOPBACK,
                port=self.endpoint.port,
                password=self.endpoint.password,
                protocol=2,
                socket_timeout=1,
                socket_connect_timeout=1,
                retry=Retry(NoBackoff(), 0),
            ) as client:
                client.ping()  # unlike INFO, it is refused while the data is being loaded
                # Another server may have taken the port just before the start; the pid shows it.
                return bool(client.info("server")["process_id"] == self.pid)
        except redis.RedisError as error:  # it is loading its data, or does not listen yet
            self._last_error = str(error)
            return False
