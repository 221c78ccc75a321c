"""
A network partition: two hosts as network namespaces with an agent each, and a link to the servers that is cut.

Packets of the disconnected host are lost silently; no connection is refused or reset.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import pytest
from pydantic import SecretStr
from pytest_celery import CeleryTestWorker
from sqlalchemy import text

from app.fleet import views
from app.fleet.host import HostState
from app.kernel.embedded import PostgresServer, ValkeyServer
from app.kernel.processes import private_file
from app.kernel.sections.fleet import SimulatedDevice
from tests.faults.conftest import Cluster, assert_nothing_left, until
from tests.faults.fleets import (
    ALPHA,
    BETA,
    GAMMA,
    assert_consistent,
    is_alive,
    ledger_matches_processes,
    pools,
    serving,
    submit_generate,
    until_done,
    with_models,
)
from tests.faults.zygote import Zygote

HOSTS = ("west", "east")
#: It fits two models.
DEVICE = (SimulatedDevice(name="sim-0", bytes=1300 * 2**20),)


class Link:
    """A network namespace and its only link."""

    def __init__(self, number: int) -> None:
        self.name = f"arriero-{os.getpid()}-{number}"
        self._outer, self._inner = f"arr{os.getpid() % 100_000}{number}o", f"arr{os.getpid() % 100_000}{number}i"
        net = f"10.{213 + number}.{os.getpid() % 250}"
        #: The address of the servers, and that of the host.
        self.gateway, self.address = f"{net}.1", f"{net}.2"

    def create(self, stack: ExitStack) -> None:
        """Create the namespace and the link. Raises CalledProcessError without the permission."""
        _ip("netns", "add", self.name)
        stack.callback(_ip, "netns", "del", self.name)
        _ip("link", "add", self._outer, "type", "veth", "peer", "name", self._inner, "netns", self.name)
        _ip("addr", "add", f"{self.gateway}/30", "dev", self._outer)
        _ip("link", "set", self._outer, "up")
        _ip("-n", self.name, "addr", "add", f"{self.address}/30", "dev", self._inner)
        _ip("-n", self.name, "link", "set", self._inner, "up")
        _ip("-n", self.name, "link", "set", "lo", "up")

    def cut(self) -> None:
        _ip("link", "set", self._outer, "down")

    def restore(self) -> None:
        _ip("link", "set", self._outer, "up")

    @property
    def prefix(self) -> Sequence[str]:
        """The start of a command that runs in the namespace."""
        return ["nsenter", f"--net=/run/netns/{self.name}"]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class OpenPostgres(PostgresServer):
    """A Postgres that also listens on the links."""

    links: Sequence[Link] = ()

    def _prepare(self, limit: float) -> None:
        super()._prepare(limit)
        with (self.data / "pg_hba.conf").open("a") as file:
            file.writelines(f"host all all {link.address}/32 scram-sha-256\n" for link in self.links)

    def _command(self) -> Sequence[str]:
        addresses = ",".join(["127.0.0.1", *(link.gateway for link in self.links)])
        return (*super()._command(), "-c", f"listen_addresses={addresses}")


class OpenValkey(ValkeyServer):
    """A Valkey that also listens on the links."""

    links: Sequence[Link] = ()

    def _command(self) -> Sequence[str]:
        command = super()._command()
        file = Path(command[-1])
        addresses = " ".join(link.gateway for link in self.links)
        private_file.write(file, file.read_text().replace("bind 127.0.0.1", f"bind 127.0.0.1 {addresses}"))
        return command


@pytest.fixture
def links() -> Iterator[dict[str, Link]]:
    made = {name: Link(number) for number, name in enumerate(HOSTS)}
    with ExitStack() as stack:
        try:
            for link in made.values():
                link.create(stack)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", b"").decode().strip() or str(error)
            pytest.skip(f"network namespaces cannot be created here: {reason}")
        yield made


@pytest.fixture
def cluster(tmp_path: Path, migrated_postgres: Path, zygote: Zygote, links: dict[str, Link]) -> Iterator[Cluster]:
    directory = tmp_path / "cluster"
    directory.mkdir(mode=0o711)
    shutil.copytree(migrated_postgres, directory / "postgres")
    postgres, valkey = OpenPostgres(directory / "postgres"), OpenValkey(directory / "valkey")
    postgres.links = valkey.links = list(links.values())
    made = Cluster(directory, zygote, postgres, valkey)
    try:
        made.start()
        fleet = made.settings.fleet.model_copy(update={"lease": timedelta(seconds=8)})
        made.settings = made.settings.model_copy(update={"fleet": fleet})
        yield made
    finally:
        made.close()
        assert_nothing_left(directory)


def agent(cluster: Cluster, name: str, link: Link) -> CeleryTestWorker:
    urls = cluster.settings.database_url, cluster.settings.redis_url
    inside = [SecretStr(url.get_secret_value().replace("127.0.0.1", link.gateway)) for url in urls if url]
    changes = {"database_url": inside[0], "redis_url": inside[1]}
    return cluster.agent(name, link.prefix, changes=changes, simulated=DEVICE)


def state_of(cluster: Cluster, host: str) -> tuple[str, bool]:
    seen = next(seen for seen in views.hosts(cluster.database) if seen.name == host)
    return seen.state, seen.alive


def is_lease_valid(cluster: Cluster, pool: str) -> bool:
    with cluster.database.work() as work:
        row = work.row(text("SELECT lease_until > now() AS valid FROM reservation WHERE id = :id"), {"id": pool})
    assert row is not None
    return bool(row.valid)


@pytest.mark.storm
def test_a_disconnected_host_ends_its_pools_and_rejoins(cluster: Cluster, links: dict[str, Link]) -> None:
    """Its pools end before their leases expire, their steps run elsewhere, and it rejoins without a restart."""
    with_models(cluster, alpha="pools = { packing = 'spread' }", beta="pools = { packing = 'spread' }")
    cluster.control()
    cluster.beat()
    agents = {name: agent(cluster, name, links[name]) for name in HOSTS}
    assert all(one.ready() for one in agents.values())
    run_ids = [submit_generate(cluster, ALPHA), submit_generate(cluster, BETA)]
    until_done(cluster, run_ids)
    assert {pool.host for pool in pools(cluster)} == set(HOSTS), "placed over both"

    run_ids.append(submit_generate(cluster, ALPHA, 200))
    until(lambda: cluster.is_held(run_ids[-1]))
    cut = serving(cluster, ALPHA)
    assert cut is not None
    disconnected = cut.host
    links[disconnected].cut()
    until(lambda: not is_alive(cut.pid))
    assert is_lease_valid(cluster, cut.id), "it ended in time"
    until_done(cluster, run_ids)
    assert cluster.outcomes(run_ids[-1])[0] == "worker_lost"
    # Until the host counts as lost, another pool may be placed on it, but it is never started there.
    begun = {pool.host for pool in pools(cluster, ALPHA) if pool.id != cut.id and pool.pid is not None}
    assert begun == set(HOSTS) - {disconnected}
    until(lambda: state_of(cluster, disconnected) == (HostState.LOST, False))

    links[disconnected].restore()
    until(lambda: state_of(cluster, disconnected) == (HostState.SCHEDULABLE, True))
    assert agents[disconnected].container.child.alive
    run_ids.append(submit_generate(cluster, GAMMA))
    until_done(cluster, run_ids)
    assert [pool.host for pool in pools(cluster, GAMMA)] == [disconnected], "the other host is full"
    until(lambda: ledger_matches_processes(cluster))
    assert_consistent(cluster)
