"""
The reader of availability: pools, memory, waiting steps and durations of all models, by a few short queries.

What is read is kept for a second, so that requests cost no queries of their own. The cost grows with pools, hosts and
waiting steps, and not with the history.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from sqlalchemy import text

from app.catalog.catalog import Catalog
from app.catalog.model import Model
from app.fleet.hosts import unserved_model
from app.fleet.ledger.reservation import ReservationState
from app.fleet.pool import Desired, PoolPhase, PoolState, state_of
from app.inference.routing.availability import Availability, FleetAvailability, ModelState
from app.kernel.database import Database, UnitOfWork
from app.scheduler import needs
from app.scheduler.planner.cluster import SIMULATED

#: Seconds for which what was read holds.
HOLDS = 1.0
#: Attempts from which means are computed, and the fewest for a pace.
_ATTEMPTS, _FEWEST = 20, 3

_POOLS = text("""
    SELECT pool.model, pool.configuration, pool.slots, pool.desired, reservation.state, phase,
           COALESCE(busy, 0) AS busy, COALESCE(detail, '') AS detail,
           EXISTS (SELECT FROM promise WHERE reservation_id = pool.id) AS waits,
           GREATEST(estimate_seconds - extract(epoch FROM now() - created_at), 0)::float AS left
    FROM pool JOIN reservation ON reservation.id = pool.id LEFT JOIN pool_report ON pool_report.pool_id = pool.id
    WHERE reservation.state <> 'released'
""")
_HOSTS = text("SELECT files, problems FROM host WHERE lost_at IS NULL AND agent_until > now()")
_LAYOUTS = text("SELECT configuration, type, parts, ram_bytes, load_seconds FROM layout")
_FREE = text("""
    SELECT type, max(capacity_bytes - charged_bytes - unmanaged_bytes) AS free, bool_or(simulated) AS simulated
    FROM device WHERE present GROUP BY type
""")
_WAITING = text("SELECT model, count(*) AS steps FROM step WHERE state = 'ready' AND model IS NOT NULL GROUP BY model")
_ATTEMPTED = text("""
    SELECT wanted.model, avg(extract(epoch FROM took))::float AS duration, count(*) AS attempts,
           (sum(tokens_out) / NULLIF(sum(extract(epoch FROM took)), 0))::float AS pace
    FROM unnest(CAST(:models AS text[])) AS wanted (model)
    CROSS JOIN LATERAL (
        SELECT finished_at - started_at AS took, COALESCE(tokens_out, 0) AS tokens_out FROM attempt
        WHERE attempt.model = wanted.model AND outcome = 'succeeded' ORDER BY finished_at DESC LIMIT :attempts
    ) AS last GROUP BY wanted.model
""")


class FleetReader:
    """Reads the availability of all models, at most once a second. Safe for threads."""

    def __init__(self, database: Database) -> None:
        self._database, self._lock = database, threading.Lock()
        self._read_at = float("-inf")
        self._catalog: Catalog | None = None
        #: What was read last; None before.
        self.latest: FleetAvailability | None = None

    def is_fresh(self, catalog: Catalog) -> bool:
        """Whether what was read last still holds."""
        return self._catalog is catalog and time.monotonic() - self._read_at < HOLDS

    def current(self, catalog: Catalog) -> FleetAvailability:
        """Return the availability of the models of a catalogue. Raises DatabaseUnreachable."""
        with self._lock:
            if self.latest is None or not self.is_fresh(catalog):
                self.latest = read(self._database, catalog)
                self._read_at, self._catalog = time.monotonic(), catalog
            return self.latest


def read(database: Database, catalog: Catalog) -> FleetAvailability:
    """Read the availability of the models of a catalogue. Raises DatabaseUnreachable."""
    with database.work() as work:
        return _Read(work, catalog).availability()


class _Read:
    """One reading."""

    def __init__(self, work: UnitOfWork, catalog: Catalog) -> None:
        self._models = catalog.models
        self._ids = {model.name: needs.configuration_id(model) for model in catalog.models}
        self._pools: dict[str, list[Any]] = defaultdict(list)
        for pool in work.rows(_POOLS):
            self._pools[pool.model].append(pool)
        hosts = work.rows(_HOSTS)
        self._files = {configuration for host in hosts for configuration in host.files}
        self._problems = dict(found for host in hosts for found in map(unserved_model, host.problems) if found)
        self._has_hosts = bool(hosts)
        self._layouts: dict[str, list[Any]] = defaultdict(list)
        for layout in work.rows(_LAYOUTS):
            self._layouts[layout.configuration].append(layout)
        self._free = {row.type: row.free for row in work.rows(_FREE)}
        self._waiting = {row.model: row.steps for row in work.rows(_WAITING)}
        asked = {"models": list(self._ids), "attempts": _ATTEMPTS}
        self._attempted = {row.model: row for row in work.rows(_ATTEMPTED, asked)}

    def availability(self) -> FleetAvailability:
        """The availability of all models."""
        resident = {model.source.model_dump_json() for model in self._models if self._is_coming(model)}
        return FleetAvailability({model.name: self._of(model, resident) for model in self._models})

    def _is_coming(self, model: Model) -> bool:
        return model.remote is None and any(_state(pool) is PoolState.SERVING for pool in self._pools[model.name])

    def _of(self, model: Model, resident: set[str]) -> Availability:
        pools = [(pool, _state(pool)) for pool in self._pools[model.name]]
        serving = [pool for pool, state in pools if state is PoolState.SERVING]
        starting = [pool for pool, state in pools if state in (PoolState.STARTING, PoolState.WAITING)]
        state, problem = ModelState.COLD, ""
        if serving:
            state = ModelState.RESIDENT
            if model.remote is not None and all(pool.detail for pool in serving):
                state, problem = ModelState.UNAVAILABLE, str(serving[0].detail)
        elif starting:
            state = ModelState.LOADING
        elif (why := self._why_not_placed(model)) is not None:
            state, problem = ModelState.UNAVAILABLE, why
        attempted = self._attempted.get(model.name)
        size, to_free, load = self._memory(model)
        return Availability(
            state=state,
            problem=problem,
            slots=sum(pool.slots for pool in serving or starting),
            busy=sum(pool.busy for pool in serving),
            waiting=self._waiting.get(model.name, 0),
            duration=5.0 if attempted is None else max(attempted.duration, 0.01),
            pace=attempted.pace if attempted is not None and attempted.attempts >= _FEWEST and attempted.pace else None,
            loading_left=min((pool.left for pool in starting), default=0.0),
            load=load,
            bytes=size,
            to_free=0 if serving or starting else to_free,
            shares_file=not serving and model.remote is None and model.source.model_dump_json() in resident,
        )

    def _why_not_placed(self, model: Model) -> str | None:
        """Why no host can start a pool of the model; None when one can."""
        if model.remote is not None and not model.remote.allowed:
            return "its entry in the catalogue does not allow its server"
        if self._ids[model.name] in self._files:
            return None
        layouts = self._layouts[self._ids[model.name]]
        if SIMULATED in self._free and any(layout.type == SIMULATED for layout in layouts):
            return None
        if not self._has_hosts:
            return "no host is up"
        return self._problems.get(model.name) or f"no host has its file; {model.source.installation(model.name)}"

    def _memory(self, model: Model) -> tuple[int, int, float]:
        """Bytes that a pool needs where it needs the fewest others to go, bytes to be freed, seconds to load."""
        found: Sequence[tuple[int, int, float]] = [
            (max(max(layout.parts) - self._free[layout.type], 0), max(layout.parts), layout.load_seconds)
            for layout in self._layouts[self._ids[model.name]]
            if layout.type in self._free and layout.parts
        ]
        if not found:
            return 0, 0, 10.0
        to_free, size, load = min(found)
        return size, to_free, load


def _state(pool: Any) -> PoolState:
    phase = None if pool.phase is None else PoolPhase(pool.phase)
    return state_of(ReservationState(pool.state), waits=pool.waits, desired=Desired(pool.desired), phase=phase)
