"""Addresses of Postgres with one and with several hosts."""

from __future__ import annotations

import pytest
from psycopg.conninfo import conninfo_to_dict

from app.kernel.postgres import address
from app.kernel.security import server_tls


@pytest.mark.parametrize(
    ("url", "hosts", "ports"),
    [
        ("postgresql://a:b@one:1/db", "one", "1"),
        ("postgresql://a:b@one:1,two:2/db", "one,two", "1,2"),
        ("postgresql://a:b@one,two/db?target_session_attrs=read-write", "one,two", ","),
        ("postgresql://a:b@/db?host=one:1&host=two:2", "one,two", "1,2"),
        ("postgresql://a:b,c@one:1,two:2", "one,two", "1,2"),
        ("postgresql://a:b@[::1]:5/db", "::1", "5"),
    ],
)
def test_libpq_gets_every_host(url: str, hosts: str, ports: str) -> None:
    found = conninfo_to_dict(address.conninfo(address.normalize(url), {"keepalives_idle": 5}))
    assert (found["host"], found["port"], found["keepalives_idle"]) == (hosts, ports, "5")
    assert found.get("target_session_attrs") == ("read-write" if "target" in url else None)


def test_a_password_stays_what_it_is() -> None:
    found = conninfo_to_dict(address.conninfo(address.normalize("postgresql://a:b%2Cc%40@one:1,two:2/db"), {}))
    assert (found["user"], found["password"], found["dbname"]) == ("a", "b,c@", "db")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://a:secret@one:x/db",
        "postgresql://a:secret@one:1,two:y/db",
        "postgresql://a:secret@[::1]:1,two:2/db",
    ],
)
def test_what_is_no_address_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ValueError, match="host:port,host:port") as refused:
        address.normalize(url)
    assert "secret" not in str(refused.value)


def test_every_one_of_several_hosts_must_be_verified() -> None:
    several = address.normalize("postgresql://a:b@127.0.0.1:1,db.example.com:2/db")
    assert not server_tls.is_local(several)
    assert server_tls.find_weakness("database_url", several) is not None
    assert server_tls.find_weakness("database_url", f"{several}&sslmode=verify-full") is None
    assert server_tls.is_local(address.normalize("postgresql://a:b@127.0.0.1:1,localhost:2/db"))
