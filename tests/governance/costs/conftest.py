from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import text

from app.governance.costs import store
from app.kernel import ids
from app.kernel.database import Database

#: Writes an attempt that ended; returns nothing.
Spend = Callable[..., None]


@pytest.fixture
def spend(database: Database) -> Spend:
    """Costs are added up from now on."""
    store.add_up(database, lambda: True)

    def spent(
        cost: str | None,
        *,
        namespace: str = "a",
        workflow: str = "w",
        model: str = "m",
        tokens: tuple[int, int, int] = (10, 4, 5),
        at: datetime | None = None,
        outcome: str = "succeeded",
        labels: dict[str, str] | None = None,
        device_us: int | None = None,
    ) -> None:
        values: dict[str, Any] = {"run": ids.new_id(), "step": ids.new_id(), "namespace": namespace}
        values |= {"workflow": workflow, "model": model, "labels": json.dumps(labels or {}), "outcome": outcome}
        values |= dict(zip(("in", "cached", "out"), tokens, strict=True))
        values |= {"cost": None if cost is None else Decimal(cost), "at": at}
        values["basis"] = None if device_us is None else json.dumps({"device_us": device_us})
        with database.work() as work:
            work.run(text("INSERT INTO definition (sha256, document) VALUES ('d', '{}') ON CONFLICT DO NOTHING"))
            work.run(
                text("""
                    INSERT INTO run (id, workflow, sha256, state, priority, inputs, retention_s, namespace, labels,
                                     paused, workflow_paused, rank, depth)
                    VALUES (:run, :workflow, 'd', 'running', 'interactive', '{}', 60, :namespace,
                            CAST(:labels AS jsonb), false, false, 1, 0)
                """),
                values,
            )
            work.run(
                text("""
                    INSERT INTO step (id, run_id, key, position, kind, model, queue, priority, state, ready_at,
                                      model_index, rank, delegated, attempt, failures, losses, tokens_in, tokens_out)
                    VALUES (:step, :run, 's', 0, 'generate', :model, 'q', 'interactive', 'succeeded',
                            now(), 0, 1, false, 1, 0, 0, 0, 0)
                """),
                values,
            )
            work.run(
                text("""
                    INSERT INTO attempt (step_id, attempt, owner, model, started_at, finished_at, outcome, tokens_in,
                                         tokens_out, tokens_cached, cost, cost_basis)
                    VALUES (:step, 1, 'o', :model, now(), COALESCE(CAST(:at AS timestamptz), now()), :outcome, :in,
                            :out, :cached, :cost, CAST(:basis AS json))
                """),
                values,
            )

    return spent
