"""
A reconcile pass: applies a plan to the ledger and to what is desired of pools, action by action, in one transaction.

A claim that the ledger refuses is left out and its reason kept; all other actions are applied.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

from sqlalchemy import text

from app.fleet.ledger import rules
from app.fleet.ledger.reservation import ReservationRequest, ReservationState, ReservedCapacity
from app.fleet.ledger.session import LedgerSession, next_epoch
from app.fleet.pool import Desired
from app.kernel import ids, log
from app.kernel.database import UnitOfWork
from app.scheduler.planner.cluster import Cluster
from app.scheduler.planner.plan import Action, DropReserve, GrantReserve, MovePool, StartPool, StopMode, StopPool

_log = log.get(__name__)

_INSERT_POOL = text("""
    INSERT INTO pool (id, configuration, model, slots, purpose, reason, desired, estimate_seconds)
    VALUES (CAST(:id AS uuid), :configuration, :model, :slots, :purpose, :reason, 'run', :estimate)
""")
_STOP_POOL = text("""
    UPDATE pool SET desired = :desired, stop_reason = COALESCE(stop_reason, :reason), stop_at = COALESCE(stop_at, now())
    WHERE id = CAST(:id AS uuid) AND desired <> 'preempt'
""")
_LOSE_HOST = text("UPDATE host SET lost_at = now(), agent_epoch = 0 WHERE name = :host")


@dataclass(frozen=True, slots=True)
class ReconcileTimes:
    """The time limits of a pass."""

    #: Within it an agent must begin a pool that was granted.
    hold: timedelta
    #: Within it a pool that makes room must finish its steps; then they are preempted.
    drain: timedelta
    #: A host is declared lost when neither its agent nor its pools were heard for so long.
    lost_after: timedelta


@dataclass(slots=True)
class ReconcilePass:
    """The state of one pass."""

    session: LedgerSession
    times: ReconcileTimes
    #: By configuration, why the ledger refused a planned claim.
    refused: dict[str, str] = field(default_factory=dict)
    #: Hosts whose agents are notified after the commit.
    hosts_to_notify: set[str] = field(default_factory=set)

    @property
    def work(self) -> UnitOfWork:
        """The transaction."""
        return self.session.work

    def apply(self, cluster: Cluster, action: Action) -> None:
        """Apply one action of a plan that was made for this cluster."""
        match action:
            case StartPool():
                self._start(
                    cluster,
                    action,
                    action.configuration,
                    str(action.purpose),
                    action.after,
                    action.namespace,
                    pinned=action.pinned,
                )
            case StopPool():
                self.stop(
                    action.pool, Desired.PREEMPT if action.mode is StopMode.PREEMPT else Desired.DRAIN, action.reason
                )
            case MovePool():
                moved = next(pool for pool in cluster.pools if pool.id == action.pool)
                if self._start(
                    cluster,
                    action,
                    moved.configuration,
                    "move",
                    frozenset(),
                    moved.namespace,
                    pinned=moved.pinned,
                ):
                    self.stop(action.pool, Desired.DRAIN, action.reason)
            case GrantReserve():
                reserve = ReservedCapacity(str(ids.new_id()), action.configuration, action.bytes)
                refused = self.session.change(lambda ledger: rules.add_reserve(ledger, reserve))
                if refused is not None:
                    self.refused[action.configuration] = refused.reason
            case DropReserve():
                self.session.change(lambda ledger: rules.drop_reserve(ledger, action.reserve))
        _log.info("action_planned", action=type(action).__name__, **_log_fields(action))

    def stop(self, pool: str, desired: Desired, reason: str) -> None:
        """Stop a pool. The bytes of one without a process are released at once."""
        reservation = self.session.ledger.reservations.get(pool)
        if reservation is None:
            return
        if reservation.state is ReservationState.HELD:
            self.session.change(lambda ledger: rules.cancel(ledger, pool), reason)
        else:
            self.session.change(lambda ledger: rules.drain(ledger, pool))
        self.work.run(_STOP_POOL, {"id": pool, "desired": desired, "reason": reason})
        self.hosts_to_notify.add(reservation.host)

    def lose_host(self, host: str, reason: str) -> None:
        """Declare a host lost: its bytes are released, and nothing is granted there before its agent joins again."""
        self.session.change(lambda ledger: rules.declare_host_lost(ledger, host), reason)
        self.work.run(_LOSE_HOST, {"host": host})
        _log.warning("host_lost", host=host, reason=reason)

    def write(self) -> None:
        """Write what has changed."""
        self.session.write()

    def _start(
        self,
        cluster: Cluster,
        action: StartPool | MovePool,
        configuration_id: str,
        purpose: str,
        after: frozenset[str],
        namespace: str,
        *,
        pinned: bool,
    ) -> bool:
        """Claim the bytes of a pool and insert it; returns False when the ledger refuses."""
        configuration = next(one for one in cluster.configurations if one.id == configuration_id)
        host = next(device.host for device in cluster.devices if device.id in action.bytes)
        wait = self.times.hold + (self.times.drain + self.times.hold if after else timedelta(0))
        request = ReservationRequest(
            id=str(ids.new_id()),
            epoch=next_epoch(self.work),
            host=host,
            configuration=configuration.id,
            bytes=action.bytes,
            lease_until=self.session.now + wait,
            after=after,
            pinned=pinned,
            namespace=namespace,
        )
        refused = self.session.change(lambda ledger: rules.claim(ledger, request))
        if refused is not None:
            self.refused[configuration.id] = refused.reason
            _log.warning("claim_refused", configuration=configuration.id, host=host, reason=refused.reason)
            return False
        self.session.write()  # a pool's row refers to its reservation
        values = {
            "id": request.id,
            "configuration": configuration.id,
            "model": configuration.model,
            "slots": configuration.slots,
            "purpose": purpose,
            "reason": action.reason,
            "estimate": action.estimate.total_seconds(),
        }
        self.work.run(_INSERT_POOL, values)
        self.hosts_to_notify.add(host)
        return True


def _log_fields(action: Action) -> dict[str, object]:
    """The fields of an action in the log."""
    match action:
        case StartPool():
            return {"configuration": action.configuration, "devices": sorted(action.bytes), "reason": action.reason}
        case StopPool() | MovePool():
            return {"pool": action.pool, "reason": action.reason}
        case GrantReserve():
            return {"configuration": action.configuration, "devices": sorted(action.bytes), "reason": action.reason}
        case DropReserve():
            return {"reserve": action.reserve, "reason": action.reason}
