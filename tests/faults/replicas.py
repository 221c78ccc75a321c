"""Replicas of the embedded servers, which take the place of a server that was killed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import psycopg
import redis

from app.kernel.embedded import PostgresServer, ValkeyServer, binaries
from app.kernel.embedded.endpoint import ENDPOINT_FILE, Endpoint, free_port, store_endpoint
from app.kernel.embedded.postgres import ROLE
from tests.faults.conftest import until

_LSN = "SELECT pg_current_wal_flush_lsn()"


class Standby(PostgresServer):
    """A server that streams from a primary, until it is promoted."""

    def _is_ready(self) -> bool:
        lines = (self.data / "postmaster.pid").read_text().splitlines() if self.data.exists() else []
        return len(lines) > 7 and lines[0].strip() == str(self.pid) and lines[7].strip() in ("ready", "standby")

    @classmethod
    def of(cls, primary: PostgresServer, directory: Path) -> Standby:
        """Copy a primary, and start the copy as its standby."""
        directory.mkdir(mode=0o755)
        port = free_port(directory, other_than=primary.endpoint.port)
        store_endpoint(directory / ENDPOINT_FILE, Endpoint(port, primary.endpoint.password))
        source = f"host=127.0.0.1 port={primary.endpoint.port} user={ROLE} password={primary.endpoint.password}"
        copy = [binaries.postgres_binaries() / "pg_basebackup", "-D", directory / "data", "-R", "-X", "stream"]
        subprocess.run([*copy, "--checkpoint=fast", "-d", source], check=True, capture_output=True, timeout=120)
        made = cls(directory)
        made.start()
        return made

    def catch_up(self, primary: PostgresServer) -> None:
        """Wait until it has all that the primary has written by now."""
        with psycopg.connect(primary.url, autocommit=True) as there, psycopg.connect(self.url, autocommit=True) as here:
            written = there.execute(_LSN).fetchone()
            assert written is not None
            behind = f"SELECT pg_last_wal_replay_lsn() >= '{written[0]}'::pg_lsn"
            until(lambda: here.execute(behind).fetchone() == (True,), 60)

    def promote(self) -> None:
        """Make it a primary."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            assert connection.execute("SELECT pg_promote()").fetchone() == (True,)


def valkey_replica(primary: ValkeyServer, directory: Path) -> ValkeyServer:
    """Start a Valkey that follows another one, with the same password, and wait until it has its data."""
    directory.mkdir(mode=0o755)
    port = free_port(directory, other_than=primary.endpoint.port)
    store_endpoint(directory / ENDPOINT_FILE, Endpoint(port, primary.endpoint.password))
    made = ValkeyServer(directory)
    made.start()
    with redis.Redis.from_url(made.url) as client:
        client.config_set("masterauth", primary.endpoint.password)
        client.replicaof("127.0.0.1", primary.endpoint.port)
        until(lambda: client.info("replication")["master_link_status"] == "up", 60)
    return made


def promote_valkey(replica: ValkeyServer) -> None:
    """End following."""
    with redis.Redis.from_url(replica.url) as client:
        client.replicaof("NO", "ONE")
