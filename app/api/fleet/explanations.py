"""The resource `explain`: why a model, or the model of a step, is not running, and when it is expected to run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated
from uuid import UUID

from fastapi import Query
from pydantic import BaseModel, Field

from app.access.callers import Caller, KeyScope
from app.api import problems
from app.api.callers import InjectedCaller, requires
from app.api.routers import ApiRouter
from app.api.services import InjectedServices, Services
from app.inference import demand
from app.inference.demand import ModelStep
from app.kernel.errors import InvalidInput, Problem
from app.scheduler import reconcile
from app.scheduler.planner.explanation import Condition, Explanation
from app.workflows.runs import views
from app.workflows.state_machine.states import StepState

router = ApiRouter(prefix="/v1/fleet", tags=["fleet"], dependencies=[requires(KeyScope.READ)])


class StepPlaceOut(BaseModel):
    """A step and its state."""

    id: UUID
    run: UUID
    key: str
    state: StepState
    detail: str = Field(description="whether it waits for its model, or for something else")


class ExplanationOut(BaseModel):
    """The explanation of why a model is, or is not, served."""

    model: str
    step: StepPlaceOut | None = Field(description="the step of the query")
    condition: Condition
    reason: str = Field(description="why, what must happen, and what it costs")
    waiting: int = Field(description="number of steps that wait for it")
    estimate_s: float | None = Field(
        description="seconds until the last of them starts; null when waiting alone does not help"
    )


#: What the conditions mean, without what others do.
_OUTLINES = {
    Condition.UNASKED: "no pool serves it; a first step would have one started where there is room",
    Condition.SERVED: "a pool serves it",
    Condition.QUEUED: "a pool serves it, and all of its slots are taken",
    Condition.COMING: "a pool of it is being started",
    Condition.REFUSED: "no pool of it can be started now; an operator sees why",
}


@router.get("/explain", summary="Why is it not running?", responses=problems.documented(404, 422))
def explain(
    services: InjectedServices,
    caller: InjectedCaller,
    model: Annotated[str | None, Query(description="name of a model", examples=["smollm2:135m"])] = None,
    step: Annotated[UUID | None, Query(description="id of a step that waits")] = None,
) -> ExplanationOut:
    """
    Why a model, or the model of a step, is not served, what must happen first, and when it is expected to serve.

    With a key of a namespace the reason does not say what others do, and only steps of the namespace are counted.
    """
    if (model is None) == (step is None):
        raise InvalidInput(
            [Problem("query", "exactly one of model and step is required", "model=… or step=…")], "request"
        )
    if step is not None:
        model_step = demand.find_step(services.database, step, caller.namespace)
        found = explain_model(services, model_step.model, model_step)
    else:
        found = explain_model(services, str(model))
    return _for(services, caller, {found.model: found})[found.model]


def explain_all(services: Services, caller: Caller, models: Sequence[str]) -> dict[str, ExplanationOut]:
    """Explain the state of models of the catalogue, for a caller."""
    demanded = demand.observe(services.database, services.catalog, services.always_on)
    found = reconcile.explain(services.database, demanded, models)
    return _for(services, caller, {model: _out(one, None) for model, one in found.items()})


def explain_model(services: Services, model: str, model_step: ModelStep | None = None) -> ExplanationOut:
    """Explain the state of a model, optionally for a step that needs it. Raises NotFound for an unknown model."""
    name = services.catalog.get(model).name
    demanded = demand.observe(services.database, services.catalog, services.always_on)
    return _out(reconcile.explain(services.database, demanded, [name])[name], model_step)


def _for(services: Services, caller: Caller, found: dict[str, ExplanationOut]) -> dict[str, ExplanationOut]:
    """Explanations as a caller may see them: for one of a namespace without what others do."""
    if caller.namespace is None:
        return found
    needed = views.demand(services.database, caller.namespace)
    return {
        model: one.model_copy(update={"reason": _OUTLINES[one.condition], "waiting": needed.get(model, (0, 0))[0]})
        for model, one in found.items()
    }


def _out(found: Explanation, model_step: ModelStep | None) -> ExplanationOut:
    return ExplanationOut(
        model=found.model,
        step=None if model_step is None else _place(model_step),
        condition=found.condition,
        reason=found.reason,
        waiting=found.waiting,
        estimate_s=None if found.estimate is None else found.estimate.total_seconds(),
    )


def _place(model_step: ModelStep) -> StepPlaceOut:
    return StepPlaceOut(
        id=model_step.id,
        run=model_step.run_id,
        key=model_step.key,
        state=StepState(model_step.state),
        detail=model_step.detail,
    )
