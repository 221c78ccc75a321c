"""
Stored invitations: created, listed, withdrawn, and exchanged for a role.

The exchange is one transaction under the lock of the invitation: of many clients with one token, one gets a role. Every
function runs in a transaction of its caller; the clock of the database decides about expiry.
"""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import text

from app.access.agents import invitation, roles
from app.access.agents.invitation import Invitation
from app.access.agents.roles import AgentRole
from app.access.callers import NotAuthenticated
from app.kernel.database import UnitOfWork
from app.kernel.errors import Conflict, NotFound

#: Most invitations that are kept; used and expired ones are removed after this time.
MAX_KEPT, KEPT = 1_000, timedelta(days=30)

_COLUMNS = "id, host, created_at, created_by, expires_at, used_at, used_by"
_PRUNE = text("DELETE FROM host_invitation WHERE expires_at < now() - CAST(:kept AS interval)")
_COUNT = text("SELECT count(*) AS n FROM host_invitation")
_INSERT = text(f"""
    INSERT INTO host_invitation (id, host, token_hash, created_by, expires_at)
    VALUES (:id, :host, :hash, :by, now() + CAST(:lifetime AS interval)) RETURNING {_COLUMNS}
""")
_LIST = text(f"SELECT {_COLUMNS} FROM host_invitation ORDER BY created_at, id LIMIT :limit")
_WITHDRAW = text("DELETE FROM host_invitation WHERE id = :id RETURNING id")
_LOCK = text(f"""
    SELECT {_COLUMNS}, token_hash, expires_at <= now() AS is_over FROM host_invitation WHERE id = :id FOR UPDATE
""")
_USE = text("UPDATE host_invitation SET used_at = now(), used_by = :host WHERE id = :id")
_IS_KNOWN = text("""
    SELECT EXISTS (SELECT FROM host WHERE name = :host) OR EXISTS (SELECT FROM agent_role WHERE host = :host) AS known
""")
_WITHDRAW_HOST = text("DELETE FROM host_invitation WHERE host = :host AND used_at IS NULL")


def create(work: UnitOfWork, id_: str, secret: str, host: str | None, lifetime: timedelta, by: str) -> Invitation:
    """Store an invitation. Raises Conflict when this role may not create roles, or too many invitations are open."""
    roles.require_rights(work)
    work.run(_PRUNE, {"kept": KEPT})
    if work.rows(_COUNT)[0].n >= MAX_KEPT:
        raise Conflict(f"there are {MAX_KEPT} invitations: withdraw some of them")
    token = invitation.hash_of(invitation.compose(id_, secret))
    values = {"id": id_, "host": host, "hash": token, "by": by, "lifetime": lifetime}
    return work.rows_of(Invitation, _INSERT, values)[0]


def listed(work: UnitOfWork) -> list[Invitation]:
    """Return the invitations, the oldest first."""
    return work.rows_of(Invitation, _LIST, {"limit": MAX_KEPT})


def withdraw(work: UnitOfWork, id_: str) -> None:
    """Remove an invitation: its token is worth nothing then. Raises NotFound."""
    if work.row(_WITHDRAW, {"id": id_}) is None:
        raise NotFound("invitation", id_, [one.id for one in listed(work)[:20]])


def exchange(work: UnitOfWork, token: str, host: str, verifier: str) -> AgentRole:
    """
    Use a token, and return the new role of the host. Earlier roles of the host are revoked.

    Raises NotAuthenticated for a token that is not genuine. For one that is: Conflict when it was used, has expired, is
    for another host, or names no host while the given one is known already.
    """
    found = work.row(_LOCK, {"id": invitation.id_of(token) or ""})
    if not invitation.is_genuine(token, None if found is None else bytes(found.token_hash)) or found is None:
        raise NotAuthenticated("the token is not valid; `arriero hosts invite` makes one", has_key=True)
    if found.used_at is not None:
        raise Conflict(f"the token was used by host {found.used_by} at {found.used_at:%Y-%m-%d %H:%M:%S} UTC")
    if found.is_over:
        raise Conflict(f"the token expired at {found.expires_at:%Y-%m-%d %H:%M:%S} UTC; make another one")
    if found.host not in (None, host):
        raise Conflict(f"the token is for host {found.host}, and not for {host}")
    if found.host is None and work.rows(_IS_KNOWN, {"host": host})[0].known:
        raise Conflict(f"there is a host {host} already: choose another name, or `arriero hosts invite {host}`")
    roles.revoke_host(work, host)
    work.run(_USE, {"id": found.id, "host": host})
    return roles.create(work, host, verifier)


def withdraw_host(work: UnitOfWork, host: str) -> None:
    """Remove the unused invitations of a host."""
    work.run(_WITHDRAW_HOST, {"host": host})
