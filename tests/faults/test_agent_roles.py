"""An agent and its pools under a role of Postgres that has only their rights."""

from __future__ import annotations

from datetime import timedelta

import pytest
import redis
from pydantic import SecretStr
from sqlalchemy import text
from sqlalchemy.engine import make_url

from app.access.agents import broker_rules, passwords, roles
from app.fleet import views
from app.kernel import ids
from app.kernel.database import Database
from app.kernel.errors import DatabaseDenied
from tests.faults.conftest import Cluster, until
from tests.faults.fleets import (
    ALPHA,
    BETA,
    ONE_DEVICE,
    assert_consistent,
    ledger_matches_processes,
    submit_generate,
    until_done,
    with_models,
)


def url_of_role(cluster: Cluster, host: str | None) -> tuple[str, str]:
    """A new role of the host, and the address with which it logs in."""
    password = ids.new_secret()
    with cluster.database.work() as work:
        role = roles.create(work, host, passwords.verifier(password, ids.new_salt())).role
    url = make_url(cluster.database.url).set(username=role, password=password)
    return role, url.render_as_string(hide_password=False)


def url_of_user(cluster: Cluster) -> str:
    """The address with which the user of agents logs in to the broker."""
    password = ids.new_secret()
    with redis.Redis.from_url(cluster.broker.container.url, protocol=2) as client:
        client.execute_command("ACL", "SETUSER", broker_rules.USER, *broker_rules.rules(password))
    return str(
        make_url(cluster.broker.container.url)
        .set(username=broker_rules.USER, password=password)
        .render_as_string(hide_password=False)
    )


def refusals(cluster: Cluster) -> list[bytes]:
    """What the broker has refused to users: the newest entries of its log."""
    with redis.Redis.from_url(cluster.broker.container.url, protocol=2) as client:
        return list(client.execute_command("ACL", "LOG"))


def test_an_agent_and_its_pools_need_no_other_rights(cluster: Cluster) -> None:
    """Two models in turn on one device: granted, loaded, served, evicted, released; then the role is revoked."""
    with_models(cluster)
    cluster.control()
    cluster.beat()
    role, url = url_of_role(cluster, "west")
    urls = {"database_url": SecretStr(url), "redis_url": SecretStr(url_of_user(cluster))}
    agent = cluster.agent("west", changes=urls, simulated=ONE_DEVICE)
    assert agent.ready()
    with Database(url, pool_size=1).work() as work:
        assert work.row(text("SELECT session_user::text AS name")).name == role

    until_done(cluster, [submit_generate(cluster, ALPHA), submit_generate(cluster, BETA)])
    with cluster.database.work() as work:
        sessions = text("SELECT count(*) AS n FROM pg_stat_activity WHERE usename = :role")
        assert work.row(sessions, {"role": role}).n > 1, "the agent and a pool"
    until(lambda: ledger_matches_processes(cluster))
    assert_consistent(cluster)
    log = b"".join(path.read_bytes() for path in cluster.directory.rglob("*.log"))
    assert b"permission denied" not in log
    assert b"row-level security" not in log
    assert b"NOPERM" not in log
    assert refusals(cluster) == []

    with cluster.database.work() as work:
        roles.revoke(work, role)
    until(lambda: not next(host for host in views.hosts(cluster.database) if host.name == "west").alive)


def test_an_agent_of_one_host_cannot_join_as_another(cluster: Cluster) -> None:
    _, url = url_of_role(cluster, "west")
    agent = cluster.agent("east", changes={"database_url": SecretStr(url)}, simulated=ONE_DEVICE)
    until(lambda: b"agent_cannot_join" in agent.container.log())
    assert b"row-level security" in agent.container.log()
    assert views.hosts(cluster.database) == []
    agent.container.child.stop(timedelta(seconds=30))


def test_the_user_of_agents_can_neither_empty_nor_read_the_broker(cluster: Cluster) -> None:
    with redis.Redis.from_url(url_of_user(cluster), protocol=2) as client:
        assert client.ping()
        client.lpush("model.a", "x")
        for command in (
            ("FLUSHALL",),
            ("KEYS", "*"),
            ("CONFIG", "SET", "maxmemory", "1"),
            ("SHUTDOWN",),
            ("ACL", "SETUSER", "other", "on"),
            ("CLIENT", "KILL", "TYPE", "normal"),
            ("GET", "arriero:session:x"),
            ("DEL", "redbeat::lock"),
            ("SET", "arriero:limits:key:x:requests", "0"),
            ("EVAL", "return redis.call('GET', KEYS[1])", "1", "arriero:session:x"),
        ):
            with pytest.raises(redis.exceptions.ResponseError, match=r"NOPERM|permission"):
                client.execute_command(*command)


@pytest.mark.parametrize("host", ["west", None])
def test_no_role_does_what_agents_never_do(cluster: Cluster, host: str | None) -> None:
    _, url = url_of_role(cluster, host)
    database = Database(url, pool_size=1)
    for statement in (
        "DROP TABLE run",
        "CREATE TABLE mine (id int)",
        "TRUNCATE run",
        "DELETE FROM run",
        "DELETE FROM step",
        "UPDATE host SET state = 'schedulable'",
        "UPDATE quota SET max_bytes = NULL",
        "INSERT INTO reservation (id) VALUES (gen_random_uuid())",
        "SELECT secret_hash FROM api_key",
        "SELECT * FROM audit_entry",
        "SELECT document FROM alert_channel",
        "SELECT document FROM handoff",
        "SELECT * FROM agent_role",
        "UPDATE agent_role SET host = NULL",
        "ALTER TABLE host DISABLE ROW LEVEL SECURITY",
        "CREATE ROLE another",
        "COPY run TO PROGRAM 'cat'",
        "SELECT pg_read_file('/etc/passwd')",
    ):
        with pytest.raises(DatabaseDenied, match=r"permission denied|must be owner|not allow"), database.work() as work:
            work.execute(text(statement)).fetchall()
    database.close()
