"""The grants of agents: every table is decided about, and Postgres has exactly what is written there."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url

from app.access.agents import grants, passwords, roles
from app.fleet import file_servers
from app.fleet.file_servers import FileServer
from app.kernel import ids
from app.kernel.database import Database
from app.kernel.errors import Conflict, DatabaseDenied, DatabaseUnreachable, NotFound

PASSWORD = "a-password-of-an-agent"


def created(database: Database, host: str | None, password: str = PASSWORD) -> str:
    with database.work() as work:
        return roles.create(work, host, passwords.verifier(password, ids.new_salt())).role


def login(database: Database, role: str, password: str = PASSWORD) -> Database:
    url = make_url(database.url).set(username=role, password=password)
    return Database(url.render_as_string(hide_password=False), pool_size=1)


@pytest.fixture
def clean(database: Database) -> Iterator[Database]:
    yield database
    with database.work() as work:
        for one in roles.listed(work):
            roles.revoke(work, one.role)


def test_every_table_is_decided_about(database: Database) -> None:
    tables = """
        SELECT relname::text AS name FROM pg_class
        WHERE relkind = 'r' AND relnamespace = current_schema()::regnamespace
    """
    with database.work() as work:
        found = {row.name for row in work.rows(text(tables))}
    assert set(grants.PRIVILEGES) == found, "app/access/agents/grants.py names each table of the schema"


def test_agents_get_exactly_the_grants(clean: Database) -> None:
    role = created(clean, "west")
    held = text("""
        SELECT c.relname::text AS name, p.kind FROM pg_class AS c,
             unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'REFERENCES', 'TRIGGER']) AS p(kind)
        WHERE c.relnamespace = current_schema()::regnamespace AND c.relkind = 'r'
          AND has_table_privilege(:role, c.oid, p.kind)
    """)
    with clean.work() as work:
        found = {(row.name, row.kind) for row in work.rows(held, {"role": role})}
    # Rights on columns are no rights on the table.
    wanted = {
        (table, kind.strip())
        for table, kinds in grants.granted().items()
        for kind in kinds.partition("UPDATE (")[0].split(",")
        if kind.strip()
    }
    assert found == wanted


def test_the_password_works_and_another_one_does_not(clean: Database) -> None:
    role = created(clean, "west")
    mine, other = login(clean, role), login(clean, role, PASSWORD + "x")
    with mine.work() as work:
        found = work.row(text("SELECT session_user::text AS name, agent_host() AS host"))
    assert (found.name, found.host) == (role, "west")
    with pytest.raises(DatabaseUnreachable, match="password authentication failed"), other.work():
        pass
    mine.close()
    other.close()


def test_a_revoked_role_loses_its_rights_in_open_sessions(clean: Database) -> None:
    role = created(clean, "west")
    mine = login(clean, role)
    url = make_url(mine.url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url, autocommit=True) as session:
        session.execute("SELECT 1 FROM host")
        with clean.work() as work:
            assert roles.revoke_host(work, "west") == 1
        with pytest.raises(psycopg.Error, match=r"terminating|permission denied|closed"):
            session.execute("SELECT 1 FROM host")
    with pytest.raises(DatabaseUnreachable), mine.work():
        pass
    with clean.work() as work:
        assert roles.listed(work) == []
        with pytest.raises(NotFound):
            roles.revoke(work, role)
    mine.close()


def test_a_host_changes_only_its_own_rows(clean: Database) -> None:
    hosts = """
        INSERT INTO host (name, state, identity, agent_epoch, agent_until, cores, files, problems)
        VALUES (:name, 'schedulable', 'x', 1, now(), 1, '[]', '[]')
    """
    with clean.work() as work:
        for name in ("west", "east"):
            work.run(text(hosts), {"name": name})
    west = login(clean, created(clean, "west"))
    with west.work() as work:
        assert len(work.rows(text("SELECT name FROM host"))) == 2, "it sees both"
        changed = work.rows(text("UPDATE host SET cores = 7 RETURNING name"))
        assert [row.name for row in changed] == ["west"]
        assert [row.name for row in work.rows(text("SELECT name FROM host FOR UPDATE"))] == ["west"]
    with pytest.raises(DatabaseDenied, match="row-level security"), west.work() as work:
        work.run(text(hosts), {"name": "north"})
    file_servers.put(clean, FileServer("east", "http://east", "", "k"), ["ab"])
    file_servers.put(west, FileServer("west", "http://west", "", "k"), ["ab"])
    with pytest.raises(DatabaseDenied, match="row-level security"):
        file_servers.put(west, FileServer("east", "http://west", "", "mine"), ["ab"])
    with west.work() as work:
        assert work.run(text("UPDATE file_server SET url = 'http://west' WHERE host = 'east'")) == 0
    anywhere = login(clean, created(clean, None))
    with anywhere.work() as work:
        assert work.run(text("UPDATE host SET cores = 8")) == 2
    west.close()
    anywhere.close()


def test_an_owner_that_is_no_superuser_creates_and_revokes_roles(clean: Database) -> None:
    """It needs CREATEROLE; without it the refusal says so."""
    admin = make_url(clean.url).set(drivername="postgresql").render_as_string(hide_password=False)
    url = make_url(clean.url).set(database="owned", username="plain_owner", password=PASSWORD)
    owned = Database(url.render_as_string(hide_password=False), pool_size=1)
    with psycopg.connect(admin, autocommit=True) as session:
        session.execute(f"CREATE ROLE plain_owner LOGIN PASSWORD '{PASSWORD}'")
        session.execute("CREATE DATABASE owned OWNER plain_owner")
        try:
            in_it = make_url(admin).set(database="owned").render_as_string(hide_password=False)
            with psycopg.connect(in_it, autocommit=True) as other:
                other.execute("CREATE EXTENSION vector")
            owned.upgrade()
            with pytest.raises(Conflict, match="ALTER ROLE plain_owner CREATEROLE"), owned.work() as work:
                roles.create(work, "west", passwords.verifier(PASSWORD, ids.new_salt()))
            session.execute("ALTER ROLE plain_owner CREATEROLE")
            west = login(owned, created(owned, "west"))
            with west.work() as work:
                assert work.row(text("SELECT agent_host() AS host")).host == "west"
            west.close()
            with owned.work() as work:
                assert roles.renew_grants(work)
                assert roles.revoke_host(work, "west") == 1
        finally:
            owned.close()
            session.execute("DROP DATABASE owned WITH (FORCE)")
            session.execute("DROP ROLE IF EXISTS owned_agents")
            session.execute("DROP ROLE plain_owner")


@pytest.mark.parametrize("password", ["short", "x" * 201, "with a space in it", "ä" * 20, "tab\tin-a-password"])
def test_passwords_that_postgres_might_read_otherwise_are_refused(password: str) -> None:
    assert not passwords.is_valid(password)
    assert passwords.is_valid(ids.new_secret())
    assert passwords.FORM.fullmatch(passwords.verifier(ids.new_secret(), ids.new_salt()))
