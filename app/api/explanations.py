"""Explanations: why a model, or the model of a step, is not running, what must happen, and when it will be."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from app.api import problems
from app.api.services import Services, Use
from app.inference import demand
from app.inference.demand import Asker
from app.kernel.errors import InvalidInput, Problem
from app.scheduler import reconcile
from app.scheduler.explanation import Condition
from app.workflows.state_machine.states import StepState

router = APIRouter(prefix="/v1/fleet", tags=["fleet"])


class StepPlaceOut(BaseModel):
    """A step, and where it stands."""

    id: UUID
    run: UUID
    key: str
    state: StepState
    told: str = Field(description="whether it waits for its model, or for something else")


class ExplanationOut(BaseModel):
    """Why a model is, or is not, served."""

    model: str
    step: StepPlaceOut | None = Field(description="the step that was asked for")
    condition: Condition
    reason: str = Field(description="why, what must happen, and what it costs")
    waiting: int = Field(description="steps that wait for it")
    estimate_s: float | None = Field(
        description="until the last of them begins; null when that takes more than the passing of time"
    )


@router.get("/explain", summary="Why is it not running?", responses=problems.documented(404, 422))
def explain(
    services: Use,
    model: Annotated[str | None, Query(description="name of a model", examples=["smollm2:135m"])] = None,
    step: Annotated[UUID | None, Query(description="id of a step that waits")] = None,
) -> ExplanationOut:
    """Why a model, or the model of a step, is not served; what must happen, and when it will be."""
    if (model is None) == (step is None):
        raise InvalidInput(
            [Problem("query", "exactly one of model and step is needed", "model=… or step=…")], "request"
        )
    if step is not None:
        asker = demand.find_step(services.database, step)
        return explained(services, asker.model, asker)
    return explained(services, str(model))


def explained(services: Services, model: str, asker: Asker | None = None) -> ExplanationOut:
    """How a model of the catalogue stands, for a step that needs it or for itself. Raises NotFound."""
    name = services.catalog.get(model).name
    asked = demand.asked(services.database, services.catalog, services.settings.pools.models)
    found = reconcile.explain(services.database, asked, name)
    return ExplanationOut(
        model=found.model,
        step=None if asker is None else _place(asker),
        condition=found.condition,
        reason=found.reason,
        waiting=found.waiting,
        estimate_s=None if found.estimate is None else found.estimate.total_seconds(),
    )


def _place(asker: Asker) -> StepPlaceOut:
    return StepPlaceOut(id=asker.id, run=asker.run_id, key=asker.key, state=asker.state, told=asker.told)
