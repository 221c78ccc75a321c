"""
A turn: what a plan makes of the ledger and of what is desired, step by step, in one transaction.

A claim that the ledger refuses is left out, with its reason; everything else is done.
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
from app.scheduler.cluster import Cluster
from app.scheduler.placement import Action, DropReserve, GrantReserve, MovePool, StartPool, StopMode, StopPool

_log = log.get(__name__)

#: The channel on which agents hear that something is desired; the payload is the host's name.
CHANNEL = "arriero_fleet"

_INSERT_POOL = text("""
    INSERT INTO pool (id, configuration, model, slots, purpose, reason, desired, estimate_seconds)
    VALUES (CAST(:id AS uuid), :configuration, :model, :slots, :purpose, :reason, 'run', :estimate)
""")
_STOP_POOL = text("""
    UPDATE pool SET desired = :desired, stop_reason = COALESCE(stop_reason, :reason), stop_at = COALESCE(stop_at, now())
    WHERE id = CAST(:id AS uuid) AND desired <> 'preempt'
""")
_LOSE_HOST = text("UPDATE host SET lost_at = now(), agent_epoch = 0 WHERE name = :host")
_NOTIFY = text("SELECT pg_notify(:channel, :host)")


@dataclass(frozen=True, slots=True)
class ReconcileTimes:
    """How long who has for what."""

    #: An agent has that long to begin a pool that was granted.
    hold: timedelta
    #: A pool that makes room has that long to finish its steps, before it hands them back.
    drain: timedelta
    #: A host of which nobody heard for that long, neither agent nor pools, is declared lost.
    lost_after: timedelta


@dataclass(slots=True)
class ReconcilePass:
    """One turn, as far as it has come."""

    books: LedgerSession
    terms: ReconcileTimes
    #: By configuration, the claims that the ledger refused though they were planned.
    refused: dict[str, str] = field(default_factory=dict)
    #: Hosts whose agents have something to do.
    hosts_to_notify: set[str] = field(default_factory=set)

    @property
    def work(self) -> UnitOfWork:
        """The transaction."""
        return self.books.work

    def apply(self, fleet: Cluster, action: Action) -> None:
        """Do one thing of a plan that was made for this fleet."""
        match action:
            case StartPool():
                self._start(fleet, action, action.configuration, str(action.purpose), action.after, action.namespace)
            case StopPool():
                self.stop(
                    action.pool, Desired.PREEMPT if action.how is StopMode.PREEMPT else Desired.DRAIN, action.reason
                )
            case MovePool():
                moved = next(pool for pool in fleet.pools if pool.id == action.pool)
                if self._start(fleet, action, moved.configuration, "move", frozenset(), moved.namespace):
                    self.stop(action.pool, Desired.DRAIN, action.reason)
            case GrantReserve():
                reserve = ReservedCapacity(str(ids.new_id()), action.configuration, action.bytes)
                refused = self.books.change(lambda found: rules.add_reserve(found, reserve))
                if refused is not None:
                    self.refused[action.configuration] = refused.reason
            case DropReserve():
                self.books.change(lambda found: rules.drop_reserve(found, action.reserve))
        _log.info("planned", action=type(action).__name__, **_told(action))

    def stop(self, pool: str, desired: Desired, reason: str) -> None:
        """Let a pool end. One that no process was begun for is given back at once."""
        held = self.books.ledger.reservations.get(pool)
        if held is None:
            return
        if held.state is ReservationState.HELD:
            self.books.change(lambda found: rules.cancel(found, pool), reason)
        else:
            self.books.change(lambda found: rules.drain(found, pool))
        self.work.run(_STOP_POOL, {"id": pool, "desired": desired, "reason": reason})
        self.hosts_to_notify.add(held.host)

    def lose_host(self, host: str, reason: str) -> None:
        """Declare a host lost: its bytes are given back, and nothing is granted there before its agent joins anew."""
        self.books.change(lambda found: rules.declare_host_lost(found, host), reason)
        self.work.run(_LOSE_HOST, {"host": host})
        _log.warning("host_lost", host=host, reason=reason)

    def close(self) -> None:
        """Write what has changed, and tell the agents at the commit."""
        self.books.close()
        for host in sorted(self.hosts_to_notify):
            self.work.run(_NOTIFY, {"channel": CHANNEL, "host": host})

    def _start(
        self,
        fleet: Cluster,
        action: StartPool | MovePool,
        configuration_id: str,
        purpose: str,
        after: frozenset[str],
        namespace: str,
    ) -> bool:
        """Grant a pool; False when the ledger refuses."""
        configuration = next(one for one in fleet.configurations if one.id == configuration_id)
        host = next(device.host for device in fleet.devices if device.id in action.bytes)
        wait = self.terms.hold + (self.terms.drain + self.terms.hold if after else timedelta(0))
        wanted = ReservationRequest(
            id=str(ids.new_id()),
            epoch=next_epoch(self.work),
            host=host,
            configuration=configuration.id,
            bytes=action.bytes,
            lease_until=self.books.now + wait,
            after=after,
            pinned=configuration.pinned,
            namespace=namespace,
        )
        refused = self.books.change(lambda found: rules.claim(found, wanted))
        if refused is not None:
            self.refused[configuration.id] = refused.reason
            _log.warning("claim_refused", configuration=configuration.id, host=host, reason=refused.reason)
            return False
        self.books.close()  # a pool's row refers to its reservation
        values = {
            "id": wanted.id,
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


def _told(action: Action) -> dict[str, object]:
    """What the log says of an action."""
    match action:
        case StartPool():
            return {"configuration": action.configuration, "devices": sorted(action.bytes), "reason": action.reason}
        case StopPool() | MovePool():
            return {"pool": action.pool, "reason": action.reason}
        case GrantReserve():
            return {"configuration": action.configuration, "devices": sorted(action.bytes), "reason": action.reason}
        case DropReserve():
            return {"reserve": action.reserve, "reason": action.reason}
