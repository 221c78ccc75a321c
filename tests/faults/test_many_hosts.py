"""
Three hosts: one with the API, the control worker and the servers behind TLS, and two network namespaces whose agents
have joined by a token.

Each agent has a role of Postgres of its own, and the broker's user of agents. Each of their connections is verified by
an authority that only these tests know.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis
from pydantic import SecretStr
from pytest_celery import CeleryTestWorker
from sqlalchemy import text

from app.access.agents import broker_rules
from app.catalog import addressed, catalog, install
from app.fleet import views
from app.fleet.host import HostState
from app.kernel import ids
from app.kernel.processes.process import Child
from app.kernel.sections.peers import PeerSettings
from app.kernel.settings import environment_of, load
from tests.catalog.hostile_gguf import model as gguf_file
from tests.certificates import Authority, tls_in_front_of
from tests.faults.conftest import ROOT, Cluster, until
from tests.faults.fleets import (
    ALPHA,
    BETA,
    assert_consistent,
    is_alive,
    ledger_matches_processes,
    pools,
    serving,
    submit_generate,
    until_done,
    with_models,
)
from tests.faults.test_hosts import DEVICE, HOSTS, Link, _ip, links, state_of

__all__ = ["links"]  # a fixture


@dataclass(frozen=True)
class Installation:
    """The first host, as operators see it."""

    cluster: Cluster
    address: str
    url: str
    environment: dict[str, str]
    authority: Authority

    def command(self, *arguments: str, prefix: Sequence[str] = (), **more: Any) -> str:
        """Run `arriero`, and return its standard output."""
        line = [*prefix, sys.executable, "-m", "app", *arguments]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120, **more)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def join(self, name: str, link: Link, **more: Any) -> CeleryTestWorker:
        """Invite a host, let it join from its namespace, and start its agent with what it got."""
        token = self.command("hosts", "invite", name, env=self.environment).strip()
        home = self.cluster.directory / name
        line = ["--set", f"data_dir={home}", "agent", "join", self.url, "--host", name, "--token-file", "-"]
        bare = {key: value for key, value in os.environ.items() if not key.startswith("ARRIERO_")}
        trusted = ["--ca-file", str(self.authority.file)]
        self.command(*line, *trusted, prefix=link.prefix, input=token, env=bare)
        got = load(config=home / "arriero.toml", environment={}).settings
        assert got.tls.servers == "require"
        changes = {"database_url": got.database_url, "redis_url": got.redis_url, "tls": got.tls, **more}
        return self.cluster.agent(name, link.prefix, changes=changes, simulated=DEVICE)


@pytest.fixture
def installation(cluster: Cluster, links: dict[str, Link], tmp_path: Path) -> Iterator[Installation]:
    """The API speaks TLS itself; a server in front of Postgres and Valkey does so for them."""
    address = f"10.219.{os.getpid() % 250}.1"
    authority = Authority.create(tmp_path)
    with ExitStack() as stack:
        _ip("addr", "add", f"{address}/32", "dev", "lo")
        stack.callback(_ip, "addr", "del", f"{address}/32", "dev", "lo")
        for link in links.values():
            _ip("-n", link.name, "route", "add", "default", "via", link.gateway)
        owner, broker_url = cluster.settings.database_url, cluster.settings.redis_url
        assert owner is not None
        assert broker_url is not None
        postgres, valkey = urlsplit(owner.get_secret_value()), urlsplit(broker_url.get_secret_value())
        assert postgres.port
        assert valkey.port
        context = authority.context(address)
        database = stack.enter_context(tls_in_front_of(postgres.port, context, postgres=True, host=address))
        broker = stack.enter_context(tls_in_front_of(valkey.port, context, host=address))
        password = ids.new_secret()
        with redis.Redis.from_url(broker_url.get_secret_value(), protocol=2) as client:
            client.execute_command("ACL", "SETUSER", broker_rules.USER, *broker_rules.rules(password))
        with_models(cluster, alpha="pools = { packing = 'spread' }", beta="pools = { packing = 'spread' }")
        certificate = authority.issue(address)
        url = f"https://{address}:8470"
        changes = {
            "api": cluster.settings.api.model_copy(
                update={
                    "host": address,
                    "tls_certificate": certificate,
                    "tls_key": certificate,
                    "ca_file": authority.file,
                    "url": url,
                }
            ),
            "agents": cluster.settings.agents.model_copy(
                update={
                    "database_url": f"postgresql://{address}:{database}{postgres.path}?sslmode=verify-full",
                    "redis_url": SecretStr(f"rediss://{broker_rules.USER}:{password}@{address}:{broker}/0"),
                    "ca_file": authority.file,
                }
            ),
        }
        environment = environment_of(cluster.settings.model_copy(update=changes))
        made = Installation(cluster, address, url, environment, authority)
        key = made.command(
            "keys", "create", "admin", "--direct", "--scope", "admin", "--scope", "read", env=environment
        )
        environment["ARRIERO_API__KEY"] = key.strip()
        api = Child(
            "api",
            (sys.executable, "-m", "app", "api"),
            environment=environment,
            log_file=cluster.directory / "api.log",
            pid_file=cluster.directory / "api.pid",
            directory=ROOT,
        )
        api.start()
        stack.callback(api.stop)
        until(lambda: is_served(made))
        yield made


def is_served(installation: Installation) -> bool:
    line = [sys.executable, "-m", "app", "hosts", "list"]
    return not subprocess.run(line, cwd=ROOT, env=installation.environment, capture_output=True, timeout=120).returncode


@pytest.mark.storm
def test_hosts_join_by_tokens_serve_over_tls_and_survive_a_cut(
    installation: Installation, links: dict[str, Link]
) -> None:
    cluster = installation.cluster
    cluster.control()
    cluster.beat()
    agents = {name: installation.join(name, links[name]) for name in HOSTS}
    assert all(agent.ready() for agent in agents.values())
    run_ids = [submit_generate(cluster, ALPHA), submit_generate(cluster, BETA)]
    until_done(cluster, run_ids)
    assert {pool.host for pool in pools(cluster)} == set(HOSTS), "a model on each"
    with cluster.database.work() as work:
        roles = "SELECT count(DISTINCT usename) AS n FROM pg_stat_activity WHERE usename LIKE 'arriero_agent_%'"
        assert work.rows(text(roles))[0].n == 2, "each host has its own role"

    run_ids.append(submit_generate(cluster, ALPHA, 200))
    until(lambda: cluster.is_held(run_ids[-1]))
    cut = serving(cluster, ALPHA)
    assert cut is not None
    links[cut.host].cut()
    until(lambda: not is_alive(cut.pid))
    until_done(cluster, run_ids)
    until(lambda: state_of(cluster, cut.host) == (HostState.LOST, False))

    links[cut.host].restore()
    # The route of a link goes with it.
    _ip("-n", links[cut.host].name, "route", "replace", "default", "via", links[cut.host].gateway)
    until(lambda: state_of(cluster, cut.host) == (HostState.SCHEDULABLE, True))
    until_done(cluster, [submit_generate(cluster, ALPHA), submit_generate(cluster, BETA)])
    until(lambda: ledger_matches_processes(cluster))
    assert_consistent(cluster)
    log = b"".join(path.read_bytes() for path in cluster.directory.rglob("*.log"))
    assert b"permission denied" not in log
    assert b"NOPERM" not in log
    assert {host.name for host in views.hosts(cluster.database)} == set(HOSTS)


@pytest.mark.storm
def test_a_model_file_goes_from_host_to_host_through_a_cut(
    installation: Installation, links: dict[str, Link], tmp_path: Path
) -> None:
    cluster, name = installation.cluster, HOSTS[0]
    content = gguf_file(tmp_path / "made.gguf", data=8 << 20).read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    entry = (
        '[[models]]\nname = "handed:1m"\nuse_cases = ["chat"]\n'
        f'source = {{ url = "http://127.0.0.1:9/m.gguf", sha256 = "{sha256}", size = {len(content)} }}\n'
    )
    with (cluster.directory / "catalog.toml").open("a") as catalog_file:
        catalog_file.write(entry)
    model = catalog.parse(entry, "catalog.toml").get("handed:1m")
    here, there = (addressed.of(model, cluster.directory / host)[0].path for host in ("depot", name))
    here.parent.mkdir(parents=True)
    here.write_bytes(content)
    certificate = installation.authority.issue("anything.example.com")
    depot = PeerSettings(
        serve=True, host=installation.address, port=0, tls_certificate=certificate, tls_key=certificate
    )
    cluster.control()
    cluster.beat()
    assert cluster.agent("depot", changes={"peers": depot}, simulated=DEVICE).ready()
    assert installation.join(name, links[name], peers=PeerSettings(models=("handed:1m",), fetch_rate="1MiB")).ready()

    partial = install.partial_path(there)
    until(lambda: partial.exists() and partial.stat().st_size > 1 << 20)
    shown = installation.command("hosts", "list", "--json", env=installation.environment)
    assert "m.gguf of handed:1m is being fetched from depot" in shown
    links[name].cut()
    until(lambda: state_of(cluster, name) == (HostState.LOST, False))
    kept = partial.stat().st_size
    assert kept < len(content)
    links[name].restore()
    _ip("-n", links[name].name, "route", "replace", "default", "via", links[name].gateway)
    until(there.exists)
    assert there.read_bytes() == content
    log = b"".join(path.read_bytes() for path in cluster.directory.rglob("*.log")).decode()
    ends = [line for line in log.splitlines() if "model_file_fetched" in line or "model_file_not_fetched" in line]
    received = [int(found) for line in ends for found in re.findall(r'"bytes": (\d+)', line)]
    assert sum(received) == len(content), "nothing is sent twice"
    with cluster.database.work() as work:
        key = work.rows(text("SELECT key FROM file_server"))[0].key
    assert key not in log
