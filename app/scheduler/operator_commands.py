"""
Orders: what operators ask of the fleet. Each call is one transaction; the reconciler answers at its next turn.

An order to start is done once a pool of the model has begun; one to keep models up stands until it is taken back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import text

from app.access import accounts, namespaces
from app.access.accounts import NamespaceLimits
from app.fleet import views
from app.fleet.ledger.session import open_session
from app.fleet.rows import HostState
from app.kernel import ids, log
from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import Conflict, NotFound
from app.scheduler.reconcile_pass import ReconcilePass, ReconcileTimes

_log = log.get(__name__)

#: Nothing is started here.
_NOTHING = ReconcileTimes(timedelta(0), timedelta(0), timedelta(0))

_ORDER = text("""
    INSERT INTO pool_command (id, command, model, pool_id, reason)
    VALUES (:id, :command, :model, CAST(:pool AS uuid), :reason)
""")
_KEEP = text("""
    INSERT INTO pool_target (model, pools, pinned) VALUES (:model, :pools, :pinned)
    ON CONFLICT (model) DO UPDATE SET pools = :pools, pinned = :pinned
""")
_DROP = text("DELETE FROM pool_target WHERE model = :model")
_TAKE_BACK = text(
    "UPDATE pool_command SET done_at = now() WHERE command = 'start' AND model = :model AND done_at IS NULL"
)
_MARK = text("UPDATE host SET state = :state WHERE name = :host")
_HOST = text("SELECT name, agent_until > now() AS alive FROM host WHERE name = :host FOR UPDATE")
_REMOVE = text("DELETE FROM host WHERE name = :host")
_HELD = text("SELECT count(*) AS pools FROM reservation WHERE host = :host AND state <> 'released'")


@dataclass(frozen=True, slots=True)
class OperatorCommands:
    """The use cases of operators."""

    database: Database
    #: Called after each commit: something may be to be planned.
    wake: Callable[[], object]

    def start(self, model: str, *, keep: bool = False, pinned: bool = False) -> None:
        """Load the model. With `keep` it stays up until it is stopped; `pinned`, nothing makes room of it either."""
        with self.database.work() as work:
            if keep or pinned:
                work.run(_KEEP, {"model": model, "pools": 1, "pinned": pinned})
            _order(work, "start", model, None, "an operator wants it")
            work.after_commit(self.wake)
        _log.info("start_ordered", model=model, keep=keep or pinned, pinned=pinned)

    def stop_model(self, model: str) -> None:
        """Stop all pools of the model, and keep it up no longer. Whoever asks for it later has it started again."""
        with self.database.work() as work:
            work.run(_DROP, {"model": model})
            work.run(_TAKE_BACK, {"model": model})
            _order(work, "stop", model, None, "stopped by an operator")
            work.after_commit(self.wake)
        _log.info("stop_ordered", model=model)

    def stop(self, pool: str, *, again: bool = False) -> str:
        """
        Stop a pool, by its id or the end of it; with `again`, start another of its model. Gives its id.

        Raises NotFound, and Conflict when it has ended already or several have such an id.
        """
        found = views.pool(self.database, pool)
        if found.state is None:
            raise Conflict(f"pool {found.id} has ended already: {found.row.ending or found.row.release_reason}")
        reason = "restarted by an operator" if again else "stopped by an operator"
        with self.database.work() as work:
            _order(work, "stop", found.row.model, found.id, reason)
            if again:
                _order(work, "start", found.row.model, None, "an operator restarts it")
            work.after_commit(self.wake)
        _log.info("stop_ordered", pool=found.id, again=again)
        return found.id

    def mark(self, host: str, state: HostState) -> None:
        """Open, cordon or drain a host, until somebody says otherwise; a lost one is so again. Raises NotFound."""
        with self.database.work() as work:
            self._host(work, host)
            work.run(_MARK, {"host": host, "state": state})
            work.after_commit(self.wake)
        _log.info("host_marked", host=host, state=state)

    def remove(self, host: str, *, lost: bool = False) -> None:
        """
        Forget a host. `lost` declares that its machine is gone for ever, and with it what it holds.

        Raises NotFound, and Conflict while its agent lives or it holds bytes.
        """
        with self.database.work() as work:
            row = self._host(work, host)
            if row.alive:
                raise Conflict(f"the agent of host {host} lives: stop it first")
            held = work.rows(_HELD, {"host": host})[0].pools
            if held and not lost:
                raise Conflict(
                    f"host {host} holds {held} reservations, and nobody can say whether their processes live; "
                    "say so with --lost if its machine is gone"
                )
            if held:
                turn = ReconcilePass(open_session(work, host), _NOTHING)
                turn.lose_host(host, "an operator declared its host lost")
                turn.close()
            work.run(_REMOVE, {"host": host})
            work.after_commit(self.wake)
        _log.info("host_removed", host=host, held=held)

    def limit(self, namespace: str, limits: NamespaceLimits) -> None:
        """Set what a namespace may hold and use. Raises InvalidInput when it has no such name."""
        namespaces.require(namespace, "namespace", "request")
        with self.database.work() as work:
            open_session(work)  # nothing is granted while what it holds is counted
            accounts.set_limits(work, namespace, limits)
            work.after_commit(self.wake)
        _log.info("namespace_limited", namespace=namespace, **asdict(limits))

    def _host(self, work: UnitOfWork, host: str) -> Any:
        row = work.row(_HOST, {"host": host})
        if row is None:
            raise NotFound("host", host, [one.name for one in work.rows(text("SELECT name FROM host ORDER BY name"))])
        return row


def _order(work: UnitOfWork, command: str, model: str, pool: str | None, reason: str) -> None:
    work.run(_ORDER, {"id": ids.new_id(), "command": command, "model": model, "pool": pool, "reason": reason})
