"""
Roles of agents in Postgres: created, listed, revoked, and given their grants.

An agent logs in with a role of its own. The role is a member of the group of this database, which has the grants
(`grants.py`); the policies of the tables let it change only rows of its host. A revoked role loses its grants at once,
also in sessions that are open, and cannot log in again.

Every function runs in a transaction of its caller, whose role must own the tables and may create roles (CREATEROLE); it
need not be a superuser. No statement has a password: Postgres gets the verifier.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import text

from app.access.agents import grants
from app.kernel import ids
from app.kernel.database import UnitOfWork
from app.kernel.errors import Conflict, NotFound

#: Most sessions of an agent and its pools together: one host cannot take all connections of the server.
MAX_SESSIONS = 100

_LOCK = text("SELECT pg_advisory_xact_lock(7205759403813)::text AS locked")
_MAY_CREATE = text("""
    SELECT current_user::text AS name, left(current_database(), 40) || '_agents' AS members,
           rolsuper OR rolcreaterole AS may, EXISTS (
               SELECT FROM pg_roles WHERE rolname = left(current_database(), 40) || '_agents'
           ) AS has_group
    FROM pg_roles WHERE rolname = current_user
""")
# Names and privileges go through `format`, which quotes them; the statements themselves take no parameters.
_SET = text("SELECT set_config('arriero.agents', :value, true)")
_CREATE_GROUP = text("""
    DO $$ BEGIN
        EXECUTE format('CREATE ROLE %I NOLOGIN', current_setting('arriero.agents')::json->>'members');
    END $$
""")
_GRANT = text("""
    DO $$
    DECLARE given json; members text; entry record;
    BEGIN
        given = current_setting('arriero.agents')::json;
        members = given->>'members';
        EXECUTE format('REVOKE ALL ON ALL TABLES IN SCHEMA %I FROM %I', current_schema(), members);
        EXECUTE format('GRANT USAGE ON SCHEMA %I TO %I', current_schema(), members);
        FOR entry IN SELECT key, value FROM json_each_text(given->'tables') LOOP
            IF to_regclass(quote_ident(entry.key)) IS NOT NULL THEN
                EXECUTE format('GRANT %s ON TABLE %I TO %I', entry.value, entry.key, members);
            END IF;
        END LOOP;
        FOR entry IN SELECT value FROM json_array_elements_text(given->'sequences') AS value LOOP
            EXECUTE format('GRANT USAGE ON SEQUENCE %I TO %I', entry.value, members);
        END LOOP;
    END $$
""")
_CREATE = text("""
    DO $$
    DECLARE given json;
    BEGIN
        given = current_setting('arriero.agents')::json;
        EXECUTE format('CREATE ROLE %I LOGIN INHERIT CONNECTION LIMIT %s PASSWORD %L',
                       given->>'role', given->>'sessions', given->>'verifier');
        EXECUTE format('GRANT %I TO %I', given->>'members', given->>'role');
    END $$
""")
# The group is taken away before the role: a session that is open keeps running, and may do nothing from then on.
_DROP = text("""
    DO $$
    DECLARE given json;
    BEGIN
        given = current_setting('arriero.agents')::json;
        IF EXISTS (SELECT FROM pg_roles WHERE rolname = given->>'role') THEN
            EXECUTE format('REVOKE %I FROM %I', given->>'members', given->>'role');
            EXECUTE format('DROP ROLE %I', given->>'role');
        END IF;
    END $$
""")
# Only a superuser, or a member of the role, may end its sessions.
_END_SESSIONS = text("""
    SELECT count(pg_terminate_backend(pid)) AS ended FROM pg_stat_activity
    WHERE usename = :role AND pg_has_role(usename, 'USAGE')
""")
_INSERT = text("INSERT INTO agent_role (role, host) VALUES (:role, :host) RETURNING role, host, created_at")
_LIST = text("SELECT role, host, created_at FROM agent_role ORDER BY host NULLS FIRST, created_at LIMIT :limit")
_LOCK_ROLE = text("SELECT role FROM agent_role WHERE role = :role FOR UPDATE")
_OF_HOST = text("SELECT role FROM agent_role WHERE host = :host ORDER BY role FOR UPDATE")
_DELETE = text("DELETE FROM agent_role WHERE role = :role")


@dataclass(frozen=True, slots=True)
class AgentRole:
    """A role of Postgres with which an agent logs in."""

    role: str
    #: The only host for which it may speak; None: any.
    host: str | None
    created_at: datetime


def require_rights(work: UnitOfWork) -> str:
    """Return the name of the group of agents. Raises Conflict when this role may not create roles."""
    own = work.row(_MAY_CREATE)
    assert own is not None, "every session has a role"
    if not own.may:
        raise Conflict(
            f"the database role {own.name} may not create roles for agents: `ALTER ROLE {own.name} CREATEROLE`, or "
            "run `arriero db create-agent-role` with a role that may and that owns the tables"
        )
    members: str = own.members
    return members


def renew_grants(work: UnitOfWork) -> bool:
    """Give the group its grants again, after tables have been added. Returns False when there is no group."""
    own = work.row(_MAY_CREATE)
    if own is None or not own.has_group:
        return False
    _grant(work, own.members)
    return True


def create(work: UnitOfWork, host: str | None, verifier: str) -> AgentRole:
    """
    Create a role for the agent of a host, or with None for the agents of any hosts.

    Raises Conflict when this role may not create roles.
    """
    work.row(_LOCK)
    members = require_rights(work)
    own = work.row(_MAY_CREATE)
    assert own is not None, "it was read just now"
    if not own.has_group:
        _set(work, members=members)
        work.execute(_CREATE_GROUP)
    _grant(work, members)
    role = f"{members.removesuffix('s')}_{ids.new_text(10, lower_case=True)}"
    _set(work, members=members, role=role, verifier=verifier, sessions=MAX_SESSIONS)
    work.execute(_CREATE)
    return _role(work.row(_INSERT, {"role": role, "host": host}))


def listed(work: UnitOfWork, limit: int = 1_000) -> list[AgentRole]:
    """Return the roles of agents by their hosts."""
    return [_role(row) for row in work.rows(_LIST, {"limit": limit})]


def revoke(work: UnitOfWork, role: str) -> None:
    """Take the grants of a role away, end its sessions and drop it. Raises NotFound, Conflict."""
    if work.row(_LOCK_ROLE, {"role": role}) is None:
        raise NotFound("role of an agent", role, [one.role for one in listed(work, 20)])
    _drop(work, role)


def revoke_host(work: UnitOfWork, host: str) -> int:
    """Revoke all roles of a host. Returns their number. Raises Conflict when this role may not drop roles."""
    found = work.rows(_OF_HOST, {"host": host})
    for row in found:
        _drop(work, row.role)
    return len(found)


def _drop(work: UnitOfWork, role: str) -> None:
    members = require_rights(work)
    work.row(_END_SESSIONS, {"role": role})
    _set(work, members=members, role=role)
    work.execute(_DROP)
    work.run(_DELETE, {"role": role})


def _grant(work: UnitOfWork, members: str) -> None:
    _set(work, members=members, tables=grants.granted(), sequences=list(grants.SEQUENCES))
    work.execute(_GRANT)


def _set(work: UnitOfWork, **values: object) -> None:
    work.row(_SET, {"value": json.dumps(values)})


def _role(row: AgentRole | None) -> AgentRole:
    assert row is not None, "it was written or read just now"
    return AgentRole(row.role, row.host, row.created_at)
