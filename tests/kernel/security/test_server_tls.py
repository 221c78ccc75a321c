"""TLS to Postgres and the broker: the right authority and name are accepted, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from pydantic import SecretStr
from redbeat.schedulers import get_redis
from sqlalchemy import text
from sqlalchemy.engine import make_url

from app.api.openai import road
from app.kernel import addresses, broker
from app.kernel.broker import CeleryPublisher
from app.kernel.database import Database
from app.kernel.errors import BrokerUnreachable, DatabaseUnreachable, InvalidSettings
from app.kernel.sections.servers import BrokerSettings, TlsSettings
from app.kernel.security.server_tls import find_weakness, is_local
from app.kernel.settings import Settings
from tests.certificates import Authority, tls_in_front_of

HOST = "db.example.com"


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:p@127.0.0.1:5432/d",
        "postgresql://u:p@localhost/d?sslmode=disable",
        "postgresql://u:p@/d?host=/var/run/postgresql",
        f"postgresql://u:p@{HOST}/d?sslmode=verify-full",
        f"postgresql://u:p@{HOST}/d?sslmode=verify-full&sslrootcert=/ca.pem",
        "redis://127.0.0.1:6379/0",
        "redis://[::1]:6379/0",
        "unix:///run/valkey.sock",
        f"rediss://u:p@{HOST}:6379/0",
        f"valkeys://u:p@{HOST}:6379/0?ssl_ca_certs=/ca.pem",
        f"rediss://u:p@{HOST}:6379/0?ssl_cert_reqs=required&ssl_check_hostname=true",
    ],
)
def test_verified_and_local_addresses_have_no_weakness(url: str) -> None:
    assert find_weakness("x", url) is None


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (f"postgresql://u:p@{HOST}/d", "not verified (sslmode=prefer)"),
        (f"postgresql://u:p@{HOST}/d?sslmode=require", "not verified (sslmode=require)"),
        (f"postgresql://u:p@{HOST}/d?sslmode=verify-ca", "not verified (sslmode=verify-ca)"),
        (f"postgres://u:p@{HOST}/d?SSLMODE=verify-full", "not verified (sslmode=prefer)"),
        (f"postgresql://u:p@/d?host=127.0.0.1:5432&host={HOST}:5432", "not verified"),
        (f"postgresql://u:p@127.0.0.1/d?host={HOST}", "not verified"),
        (f"redis://u:p@{HOST}:6379/0", "not encrypted"),
        (f"valkey://{HOST}:6379/0", "not encrypted"),
        (f"rediss://{HOST}:6379/0?ssl_cert_reqs=none", "ssl_cert_reqs"),
        (f"rediss://{HOST}:6379/0?ssl_cert_reqs=CERT_OPTIONAL", "ssl_cert_reqs"),
        (f"rediss://{HOST}:6379/0?ssl_check_hostname=False", "ssl_check_hostname"),
        ("redis://10.0.0.1/0", "not encrypted"),
        ("redis://127.0.0.1.example.com/0", "not encrypted"),
    ],
)
def test_each_weakness_is_named_without_the_password(url: str, message: str) -> None:
    found = find_weakness("redis_url", url)
    assert found is not None
    assert message in found.message
    assert "u:p" not in str(found)
    assert not is_local(url)


def test_a_weak_address_is_refused_where_tls_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    weak = {
        "database_url": SecretStr(f"postgresql://u:hunter2@{HOST}/d"),
        "redis_url": SecretStr("redis://127.0.0.1/0"),
    }
    with pytest.raises(
        InvalidSettings, match=r"database_url: the server at db\.example\.com is not verified"
    ) as refused:
        addresses.of(Settings(**weak, tls=TlsSettings(servers="require")))
    assert "hunter2" not in str(refused.value)
    addresses.of(Settings(**weak))
    addresses.of(Settings(**weak))
    said = "".join(capsys.readouterr())
    assert said.count("connection_not_verified") == 1
    assert "hunter2" not in said


@dataclass(frozen=True)
class Secured:
    """The embedded servers behind TLS, with a certificate for `localhost` alone."""

    authority: Authority
    other: Authority
    database: Callable[[str, Path], str]
    broker: Callable[[str, Path], str]


@pytest.fixture(scope="module")
def secured(migrated: Database, redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    directory = tmp_path_factory.mktemp("authorities")
    authority, other = Authority.create(directory), Authority.create(directory, "other")
    url, valkey = make_url(migrated.url), urlsplit(redis_url)
    assert url.port
    assert valkey.port
    with ExitStack() as stack:
        context = authority.context("localhost")
        postgres = stack.enter_context(tls_in_front_of(url.port, context, postgres=True))
        redis = stack.enter_context(tls_in_front_of(valkey.port, context))

        def database_url(host: str, trusted: Path) -> str:
            options = {"sslmode": "verify-full", "sslrootcert": str(trusted)}
            made = url.set(host=host, port=postgres).update_query_dict(options)
            return made.render_as_string(hide_password=False)

        def broker_url(host: str, trusted: Path) -> str:
            return f"rediss://:{valkey.password}@{host}:{redis}/0?ssl_ca_certs={trusted}"

        yield Secured(authority, other, database_url, broker_url)


def test_postgres_is_verified_by_authority_and_name(secured: Secured) -> None:
    good = Database(secured.database("localhost", secured.authority.file), pool_size=1)
    good.require_head()
    with good.work() as work:
        assert work.row(text("SELECT 1 AS one")) == (1,)
    good.close()
    for host, trusted, message in (
        ("127.0.0.1", secured.authority.file, "does not match host name"),
        ("localhost", secured.other.file, "certificate verify failed"),
        ("localhost", secured.other.file.with_name("missing.pem"), "missing.pem"),
    ):
        bad = Database(secured.database(host, trusted), pool_size=1)
        with pytest.raises(DatabaseUnreachable, match=message), bad.work():
            pass
        bad.close()


def test_a_server_without_tls_is_refused(secured: Secured, migrated: Database) -> None:
    """Nothing falls back to plain text."""
    plain = make_url(migrated.url).update_query_dict(
        {"sslmode": "verify-full", "sslrootcert": str(secured.authority.file)}
    )
    bad = Database(plain.render_as_string(hide_password=False), pool_size=1)
    with pytest.raises(DatabaseUnreachable, match="does not support SSL"), bad.work():
        pass
    bad.close()


@pytest.mark.parametrize(
    ("host", "authority", "message"),
    [
        ("localhost", "authority", ""),
        ("127.0.0.1", "authority", "IP address mismatch"),
        ("localhost", "other", "verify failed"),
    ],
)
def test_every_client_of_the_broker_verifies_it(secured: Secured, host: str, authority: str, message: str) -> None:
    """Celery and Flower, beat's schedule, messages, our own keys, and token streams."""
    url = secured.broker(host, getattr(secured, authority).file)
    celery = broker.celery_app(url, BrokerSettings())
    publisher = CeleryPublisher(celery, url)

    def connect_celery() -> None:
        with celery.connection_for_read() as connection:
            connection.ensure_connection(max_retries=1, timeout=5)
            connection.default_channel.client.ping()

    async def ping_stream() -> None:
        client = road.connect(url)
        try:
            await client.ping()
        finally:
            await client.aclose()

    clients: list[Callable[[], object]] = [
        publisher.ping,
        connect_celery,
        lambda: get_redis(celery).ping(),
        lambda: broker.connect(url).ping(),
        lambda: asyncio.run(ping_stream()),
    ]
    try:
        for client in clients:
            if not message:
                client()
                continue
            with pytest.raises(Exception, match=message) as refused:
                client()
            assert not isinstance(refused.value, AssertionError)
        if message:
            with pytest.raises(BrokerUnreachable, match=r"unreachable|does not answer"):
                publisher.ping()
        else:
            assert publisher.publish("workers.steps.run_step", ["x", 1], queue="tls")
            assert publisher.depth("tls") == 1
            broker.connect(url).delete("tls", *(f"tls\x06\x16{n}" for n in range(9)))
    finally:
        publisher.close()
