"""
The reader of the queues of models: what the estimates of waiting calls need, in one transaction.

Its cost grows with the steps that are ready for the models in question, and not with what is kept.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sqlalchemy import text

from app.catalog.model import Model
from app.inference import demand
from app.inference.prediction import expected_work
from app.inference.waiting import ModelQueue
from app.kernel import broker
from app.kernel.database import Database
from app.kernel.priority import Priority
from app.scheduler import needs

#: Most waiting runs of a model whose positions are told.
_MOST = 2_000

_READY = text("""
    SELECT wanted.model, ready.run_id, ready.priority, ready.waiting, ready.key, run.namespace, run.workflow,
           COALESCE(run.inputs_bytes, 0) AS inputs_bytes
    FROM unnest(CAST(:models AS text[]), CAST(:queues AS text[])) AS wanted (model, queue)
    CROSS JOIN LATERAL (
        SELECT id, run_id, key, priority, COALESCE(ready_at, published_at) AS since, count(*) OVER () AS waiting
        FROM step
        WHERE state = 'ready' AND queue = wanted.queue AND model = wanted.model
        ORDER BY array_position(CAST(:priorities AS text[]), priority), COALESCE(ready_at, published_at), id
        LIMIT :most
    ) AS ready JOIN run ON run.id = ready.run_id
    ORDER BY wanted.model, array_position(CAST(:priorities AS text[]), ready.priority), ready.since, ready.id
""")
_POOLS = text("""
    SELECT pool.model, pool.slots, COALESCE(phase, 'starting') = 'serving' AS serves, COALESCE(progress, 0) AS progress,
           GREATEST(estimate_seconds - extract(epoch FROM now() - pool.created_at), 1)::float AS starts_in
    FROM pool JOIN reservation ON reservation.id = pool.id LEFT JOIN pool_report ON pool_report.pool_id = pool.id
    WHERE reservation.state <> 'released' AND desired = 'run' AND pool.model = ANY(:models)
      AND COALESCE(phase, 'starting') IN ('starting', 'measuring', 'loading', 'warming', 'serving')
""")
_REFUSALS = text("SELECT model, reason, estimate_seconds FROM refusal WHERE model = ANY(:models) ORDER BY since DESC")
_LOADS = text("""
    SELECT configuration, min(load_seconds)::float AS load FROM layout
    WHERE configuration = ANY(:configurations) GROUP BY configuration
""")


def read(database: Database, models: Collection[Model]) -> Mapping[str, ModelQueue]:
    """The queues of the models, by name."""
    names = {"models": [model.name for model in models]}
    with database.work() as work:
        ready = work.rows(
            _READY,
            {
                **names,
                "queues": [broker.model_queue(model.slug) for model in models],
                "priorities": [priority.value for priority in Priority],
                "most": _MOST,
            },
        )
        pools, refusals = work.rows(_POOLS, names), work.rows(_REFUSALS, names)
        configurations = {needs.configuration_id(model): model.name for model in models}
        loads = work.rows(_LOADS, {"configurations": list(configurations)})
        durations = demand.mean_durations(work, names["models"])
        known = expected_work.read(work, ready, names["models"])
    waiting: dict[str, list[Any]] = {}
    for row in ready:
        waiting.setdefault(row.model, []).append(row)
    load = {configurations[row.configuration]: row.load for row in loads}
    refused = {row.model: row for row in refusals}
    found = {}
    for model in models:
        own, steps = [pool for pool in pools if pool.model == model.name], waiting.get(model.name, [])
        starting = min((pool for pool in own if not pool.serves), key=lambda pool: float(pool.starts_in), default=None)
        refusal = refused.get(model.name)
        found[model.name] = ModelQueue(
            model.name,
            slots=sum(pool.slots for pool in own if pool.serves),
            slots_per_pool=model.slots,
            starts_in=None if starting is None else starting.starts_in,
            loaded=0.0 if starting is None else starting.progress,
            load=load.get(model.name, 0.0),
            duration=durations[model.name].total_seconds(),
            work=known.seconds(steps, durations[model.name].total_seconds()),
            spread=known.spread(model.name),
            runs={str(row.run_id): place for place, row in reversed(list(enumerate(steps, 1)))},
            waiting=steps[0].waiting if steps else 0,
            before_new=sum(row.priority == Priority.INTERACTIVE for row in steps),
            before_standard=sum(row.priority != Priority.BATCH for row in steps),
            before_batch=steps[0].waiting if steps else 0,
            refusal="" if refusal is None else refusal.reason,
            refused_for=None if refusal is None else refusal.estimate_seconds,
        )
    return found
