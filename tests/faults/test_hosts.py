"""
Two hosts as network namespaces: an agent in each, database and broker beyond their links, and a link that is cut.

What a host that is cut off sends is lost without a word; nothing is refused or reset.
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
from app.fleet.rows import HostState
from app.kernel.embedded import PostgresServer, ValkeyServer
from app.kernel.fleet_settings import SimulatedDevice
from app.kernel.processes import private_file
from tests.faults.conftest import Stage, assert_nothing_left, until
from tests.faults.fleets import (
    ALPHA,
    BETA,
    GAMMA,
    agree,
    ask,
    assert_sound,
    lives,
    pools,
    serving,
    until_done,
    with_models,
)

HOSTS = ("west", "east")
#: Each of them holds two models.
DEVICE = (SimulatedDevice(name="sim-0", bytes=1300 * 2**20),)


class Link:
    """A namespace and the one link out of it."""

    def __init__(self, number: int) -> None:
        self.name = f"arriero-{os.getpid()}-{number}"
        self._outer, self._inner = f"arr{os.getpid() % 100_000}{number}o", f"arr{os.getpid() % 100_000}{number}i"
        net = f"10.{213 + number}.{os.getpid() % 250}"
        #: Where the servers are, as seen from within.
        self.gateway, self.address = f"{net}.1", f"{net}.2"

    def make(self, stack: ExitStack) -> None:
        """Raises CalledProcessError where that is not allowed."""
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

    def mend(self) -> None:
        _ip("link", "set", self._outer, "up")

    @property
    def prefix(self) -> Sequence[str]:
        """Begins a command that runs within."""
        return ["nsenter", f"--net=/run/netns/{self.name}"]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class OpenPostgres(PostgresServer):
    """Postgres that listens to the links too."""

    links: Sequence[Link] = ()

    def _prepare(self, limit: float) -> None:
        super()._prepare(limit)
        with (self.data / "pg_hba.conf").open("a") as file:
            file.writelines(f"host all all {link.address}/32 scram-sha-256\n" for link in self.links)

    def _command(self) -> Sequence[str]:
        addresses = ",".join(["127.0.0.1", *(link.gateway for link in self.links)])
        return (*super()._command(), "-c", f"listen_addresses={addresses}")


class OpenValkey(ValkeyServer):
    """Valkey that listens to the links too."""

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
                link.make(stack)
        except (OSError, subprocess.CalledProcessError) as error:
            told = getattr(error, "stderr", b"").decode().strip() or str(error)
            pytest.skip(f"network namespaces cannot be made here: {told}")
        yield made


@pytest.fixture
def stage(tmp_path: Path, migrated_cluster: Path, links: dict[str, Link]) -> Iterator[Stage]:
    directory = tmp_path / "stage"
    directory.mkdir(mode=0o711)
    shutil.copytree(migrated_cluster, directory / "postgres")
    postgres, valkey = OpenPostgres(directory / "postgres"), OpenValkey(directory / "valkey")
    postgres.links = valkey.links = list(links.values())
    made = Stage(directory, postgres, valkey)
    try:
        made.start()
        fleet = made.settings.fleet.model_copy(update={"lease": timedelta(seconds=8)})
        made.settings = made.settings.model_copy(update={"fleet": fleet})
        yield made
    finally:
        made.close()
        assert_nothing_left(directory)


def agent(stage: Stage, name: str, link: Link) -> CeleryTestWorker:
    urls = stage.settings.database_url, stage.settings.redis_url
    inside = [SecretStr(url.get_secret_value().replace("127.0.0.1", link.gateway)) for url in urls if url]
    changes = {"database_url": inside[0], "redis_url": inside[1]}
    return stage.agent(name, link.prefix, changes=changes, simulated=DEVICE)


def state_of(stage: Stage, host: str) -> tuple[str, bool]:
    seen = next(seen for seen in views.hosts(stage.database) if seen.name == host)
    return seen.state, seen.alive


def lease_lasts(stage: Stage, pool: str) -> bool:
    with stage.database.work() as work:
        row = work.row(text("SELECT lease_until > now() AS lasts FROM reservation WHERE id = :id"), {"id": pool})
    assert row is not None
    return bool(row.lasts)


def test_a_host_that_is_cut_off_lets_go_and_comes_back(stage: Stage, links: dict[str, Link]) -> None:
    """Its pools are gone before their leases are, their steps are done elsewhere, and it needs no restart to rejoin."""
    with_models(stage, alpha="pools = { packing = 'spread' }", beta="pools = { packing = 'spread' }")
    stage.control()
    stage.beat()
    agents = {name: agent(stage, name, links[name]) for name in HOSTS}
    assert all(one.ready() for one in agents.values())
    run_ids = [ask(stage, ALPHA), ask(stage, BETA)]
    until_done(stage, run_ids)
    assert {pool.host for pool in pools(stage)} == set(HOSTS), "placed over both"

    run_ids.append(ask(stage, ALPHA, 200))
    until(lambda: stage.is_held(run_ids[-1]))
    cut = serving(stage, ALPHA)
    assert cut is not None
    away = cut.host
    links[away].cut()
    until(lambda: not lives(cut.pid))
    assert lease_lasts(stage, cut.id), "it let go in time"
    until_done(stage, run_ids)
    assert stage.outcomes(run_ids[-1])[0] == "worker_lost"
    # Before the host counts as lost, one may be placed on it once more; it never begins there.
    begun = {pool.host for pool in pools(stage, ALPHA) if pool.id != cut.id and pool.pid is not None}
    assert begun == set(HOSTS) - {away}
    until(lambda: state_of(stage, away) == (HostState.LOST, False))

    links[away].mend()
    until(lambda: state_of(stage, away) == (HostState.SCHEDULABLE, True))
    assert agents[away].container.child.alive
    run_ids.append(ask(stage, GAMMA))
    until_done(stage, run_ids)
    assert [pool.host for pool in pools(stage, GAMMA)] == [away], "the other one is full"
    until(lambda: agree(stage))
    assert_sound(stage)
