"""
Operator commands: starting and stopping pools, marking hosts, limits of namespaces. Each call is one transaction.

The reconciler carries commands out in its next pass. A command to start is complete once a pool of the model has begun.
A target keeps pools of a model running until it is removed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta

from sqlalchemy import text

from app.access import accounts, namespaces
from app.access.accounts import NamespaceLimits
from app.access.agents import invitations, roles
from app.fleet import views
from app.fleet.host import HostState
from app.fleet.ledger.session import open_session
from app.kernel import ids, log
from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import Conflict, NotFound
from app.scheduler.reconcile_pass import ReconcilePass, ReconcileTimes

_log = log.get(__name__)

#: For a pass that starts nothing.
_NO_TIMES = ReconcileTimes(timedelta(0), timedelta(0), timedelta(0))

_INSERT_COMMAND = text("""
    INSERT INTO pool_command (id, command, model, pool_id, reason)
    VALUES (:id, :command, :model, CAST(:pool AS uuid), :reason)
""")
_PUT_TARGET = text("""
    INSERT INTO pool_target (model, pools, pinned) VALUES (:model, :pools, :pinned)
    ON CONFLICT (model) DO UPDATE SET pools = :pools, pinned = :pinned
""")
_DELETE_TARGET = text("DELETE FROM pool_target WHERE model = :model")
_WITHDRAW_STARTS = text(
    "UPDATE pool_command SET done_at = now() WHERE command = 'start' AND model = :model AND done_at IS NULL"
)
_SET_STATE = text("UPDATE host SET state = :state WHERE name = :host")
_HOST = text("SELECT name, agent_until > now() AS alive FROM host WHERE name = :host FOR UPDATE")
_DELETE_HOST = text("DELETE FROM host WHERE name = :host")
_RESERVATIONS = text("SELECT count(*) AS held FROM reservation WHERE host = :host AND state <> 'released'")


@dataclass(frozen=True, slots=True)
class OperatorCommands:
    """The commands of operators."""

    database: Database
    #: Called after each commit: it wakes the reconciler.
    wake: Callable[[], object]

    def start(self, model: str, *, keep: bool = False, pinned: bool = False) -> None:
        """Start a pool of the model. `keep` keeps it running until it is stopped; `pinned` also rules out eviction."""
        with self.database.work() as work:
            if keep or pinned:
                work.run(_PUT_TARGET, {"model": model, "pools": 1, "pinned": pinned})
            insert_command(work, "start", model, None, "an operator wants it")
            work.after_commit(self.wake)
        _log.info("start_commanded", model=model, keep=keep or pinned, pinned=pinned)

    def stop_model(self, model: str) -> None:
        """Stop all pools of the model, and no longer keep it running. Later demand starts it again."""
        with self.database.work() as work:
            work.run(_DELETE_TARGET, {"model": model})
            work.run(_WITHDRAW_STARTS, {"model": model})
            insert_command(work, "stop", model, None, "stopped by an operator")
            work.after_commit(self.wake)
        _log.info("stop_commanded", model=model)

    def stop(self, pool: str, *, again: bool = False) -> str:
        """
        Stop a pool, given its id or the end of it; with `again`, start another pool of its model. Returns the id.

        Raises NotFound, and Conflict when the pool has ended already or several ids have that end.
        """
        found = views.pool(self.database, pool)
        if found.state is None:
            raise Conflict(f"pool {found.id} has ended already: {found.ending}")
        reason = "restarted by an operator" if again else "stopped by an operator"
        with self.database.work() as work:
            insert_command(work, "stop", found.model, found.id, reason)
            if again:
                insert_command(work, "start", found.model, None, "an operator restarts it")
            work.after_commit(self.wake)
        _log.info("stop_commanded", pool=found.id, again=again)
        return found.id

    def restart(self, pool: str, model: str, reason: str) -> None:
        """Drain a pool, given its id, and start another one of its model. `reason` is shown with the pool."""
        with self.database.work() as work:
            insert_command(work, "stop", model, pool, reason)
            insert_command(work, "start", model, None, reason)
            work.after_commit(self.wake)
        _log.info("pool_restart_commanded", pool=pool, model=model, reason=reason)

    def mark(self, host: str, state: HostState) -> None:
        """Set the state of a host: schedulable, cordoned or draining. A lost host keeps it. Raises NotFound."""
        with self.database.work() as work:
            self._lock_host(work, host)
            work.run(_SET_STATE, {"host": host, "state": state})
            work.after_commit(self.wake)
        _log.info("host_state_set", host=host, state=state)

    def remove(self, host: str, *, lost: bool = False) -> None:
        """
        Remove a host, and the roles of its agent.

        `lost` declares that its machine is gone for good, with every process on it.

        Raises NotFound; Conflict while its agent is alive, or while it has reservations and is not declared lost.
        """
        with self.database.work() as work:
            if self._lock_host(work, host):
                raise Conflict(f"the agent of host {host} is alive: stop it first")
            held = work.rows(_RESERVATIONS, {"host": host})[0].held
            if held and not lost:
                raise Conflict(
                    f"host {host} has {held} reservations, and their processes may still be alive; "
                    "declare the machine gone with --lost"
                )
            if held:
                pass_ = ReconcilePass(open_session(work, host), _NO_TIMES)
                pass_.lose_host(host, "an operator declared its host lost")
                pass_.write()
            invitations.withdraw_host(work, host)
            roles.revoke_host(work, host)
            work.run(_DELETE_HOST, {"host": host})
            work.after_commit(self.wake)
        _log.info("host_removed", host=host, held=held)

    def limit(self, namespace: str, limits: NamespaceLimits) -> None:
        """Set the limits of a namespace. Raises InvalidInput for an invalid name."""
        namespaces.require(namespace, "namespace", "request")
        with self.database.work() as work:
            open_session(work)  # under its locks nothing is granted while the bytes of the namespace are counted
            accounts.set_limits(work, namespace, limits)
            work.after_commit(self.wake)
        _log.info("namespace_limits_set", namespace=namespace, **asdict(limits))

    def _lock_host(self, work: UnitOfWork, host: str) -> bool:
        """Lock the host; returns whether its agent is alive. Raises NotFound."""
        row = work.row(_HOST, {"host": host})
        if row is None:
            raise NotFound("host", host, [one.name for one in work.rows(text("SELECT name FROM host ORDER BY name"))])
        alive: bool = row.alive
        return alive


def insert_command(work: UnitOfWork, command: str, model: str, pool: str | None, reason: str) -> None:
    """Store a command, `start` or `stop`, which the next reconcile pass carries out."""
    work.run(_INSERT_COMMAND, {"id": ids.new_id(), "command": command, "model": model, "pool": pool, "reason": reason})
