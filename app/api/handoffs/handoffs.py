"""The resource `handoffs`: store, show, try, and scores."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated, Any

from fastapi import Depends, Path, Query, Response
from pydantic import BaseModel, Field

from app.access.callers import KeyScope
from app.api import bodies, problems
from app.api.bodies import RequestBody
from app.api.callers import ListedNamespace, NamedNamespace, requires
from app.api.problems import FieldProblem
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.handoffs import check, service, store
from app.handoffs.service import HandoffService
from app.handoffs.store import HandoffVersion, SenderScores
from app.kernel.errors import InvalidInput, NotFound, Problem
from app.kernel.units.durations import Duration

router = ApiRouter(prefix="/v1/handoffs", tags=["hand-offs"], dependencies=[requires(KeyScope.READ)])

HandoffName = Annotated[str, Path(description="the name of the hand-off", max_length=100, examples=["new-leads"])]


def _service(services: InjectedServices, namespace: NamedNamespace) -> HandoffService:
    return HandoffService(services.database, namespace)


#: The type of an endpoint's argument: the hand-offs of the caller's namespace.
InjectedHandoffs = Annotated[HandoffService, Depends(_service)]


class HandoffOut(BaseModel):
    """A version of a hand-off."""

    name: str
    namespace: str
    version: int
    source: str = Field(description="the kind of its source")
    target: str = Field(description="the kind of its target")
    path: str = Field(description="where other systems send messages", examples=["/v1/hooks/default/new-leads"])
    created_at: datetime
    handoff: dict[str, Any] = Field(description="the stored document")


class HandoffList(BaseModel):
    """The newest version of each hand-off."""

    handoffs: list[HandoffOut]


class SampleIn(BaseModel):
    """A message to try."""

    message: dict[str, Any]


class TrialOut(BaseModel):
    """What would come of a message."""

    valid: bool
    payload: dict[str, Any] = Field(description="what would be delivered")
    problems: list[FieldProblem]
    completeness: float = Field(description="the part of the expected fields that are there")


class ScoresOut(BaseModel):
    """The scores of the messages that ended in a window; null without such messages."""

    sender: str | None = Field(description="null: all senders together")
    messages: int = Field(description="messages that were delivered, are invalid, or failed")
    delivered: int
    invalid: int
    failed: int
    duplicates: int = Field(description="deliveries of messages that were known")
    success: float | None = Field(description="delivered messages, by all")
    accuracy: float | None = Field(description="fields that validate and, where it was read back, that the target has")
    completeness: float | None = Field(description="expected fields that are there")
    timeliness: float | None = Field(description="1 within the deadline, less after it")


class ScoreList(BaseModel):
    """The scores of a hand-off."""

    target: float = Field(description="the least success of the document")
    total: ScoresOut
    senders: list[ScoresOut] = Field(description="those with most messages first; at most a thousand")


_EXAMPLES = {
    "web hooks to a CRM": {
        "handoff": "new-leads",
        "source": {"kind": "webhook", "secret": "shop_hook", "sender": "message.shop"},
        "schema": {"type": "object", "required": ["shop", "email"]},
        "mapping": {"cel": "{'email': message.email}"},
        "target": {"kind": "http", "url": "https://crm.example.com/leads"},
        "expected": ["email"],
    }
}
_Window = Annotated[Duration, Query(description="up to now", examples=["1h"])]


@router.get("", summary="List hand-offs", responses=problems.documented(422))
def page(services: InjectedServices, listed: ListedNamespace) -> HandoffList:
    """The newest version of each hand-off."""
    with services.database.work() as work:
        return HandoffList(handoffs=[_out(one) for one in store.newest_of_all(work, listed)])


@router.get("/{name}", summary="One hand-off", responses=problems.documented(404, 422))
def get(
    name: HandoffName,
    handoffs: InjectedHandoffs,
    version: Annotated[int | None, Query(ge=1, le=2_000_000_000, description="by default the newest")] = None,
) -> HandoffOut:
    """A version of a hand-off."""
    return _out(handoffs.get(name, version))


@router.put(
    "/{name}",
    dependencies=[requires(KeyScope.OPERATE)],
    summary="Store a hand-off",
    responses=problems.documented(
        409, 413, 415, 422, others={201: {"model": HandoffOut, "description": "Stored as a new version"}}
    ),
    openapi_extra=bodies.documented({"$ref": "#/components/schemas/Handoff"}, _EXAMPLES),
)
def put(name: HandoffName, body: RequestBody, handoffs: InjectedHandoffs, response: Response) -> HandoffOut:
    """
    Store a hand-off, in JSON or YAML, as the newest version; 200 when it equals the newest one.

    Its tests must pass. Messages that came before are sent under the version at which they came.
    """
    handoff = check.check(body)
    if handoff.handoff != name:
        message = f"the hand-off is named {handoff.handoff!r}, the URL names {name!r}"
        raise InvalidInput([Problem("handoff", message, repr(name), body.line("handoff"))], "hand-off")
    stored, created = handoffs.put(handoff)
    response.status_code = 201 if created else 200
    return _out(stored)


@router.delete(
    "/{name}",
    status_code=204,
    dependencies=[requires(KeyScope.OPERATE)],
    summary="Remove a hand-off",
    responses=problems.documented(404, 422),
)
def delete(name: HandoffName, handoffs: InjectedHandoffs) -> None:
    """Remove a hand-off. Messages that were not sent yet fail; their records are kept."""
    handoffs.delete(name)


@router.post(
    "/{name}/test",
    summary="Try a message",
    responses=problems.documented(404, 413, 415, 422),
    openapi_extra=bodies.documented_as(SampleIn),
)
def trial(name: HandoffName, handoffs: InjectedHandoffs, body: Annotated[SampleIn, bodies.of(SampleIn)]) -> TrialOut:
    """What would come of a message: its payload, or its problems. Nothing is stored or sent."""
    found, completeness = service.tried(check.stored(handoffs.get(name).document), body.message)
    listed = [FieldProblem.model_validate(problem, from_attributes=True) for problem in found.problems]
    return TrialOut(valid=found.is_valid, payload=found.payload, problems=listed, completeness=completeness)


@router.get("/{name}/scores", summary="The scores of a hand-off", responses=problems.documented(404, 422))
def scores(
    name: HandoffName, services: InjectedServices, handoffs: InjectedHandoffs, window: _Window = timedelta(days=1)
) -> ScoreList:
    """Accuracy, completeness, timeliness and success of the messages that ended in the window, in all and by sender."""
    handoff = check.stored(handoffs.get(name).document)
    with services.database.work() as work:
        found = store.scores(work, handoffs.namespace, name, window)
    total = next((one for one in found if one.sender is None), None)
    if total is None:
        raise NotFound("hand-off", name)
    senders = [_scores(one) for one in found if one.sender is not None]
    return ScoreList(target=handoff.success.target, total=_scores(total), senders=senders)


def _out(found: HandoffVersion) -> HandoffOut:
    return HandoffOut(
        name=found.name,
        namespace=found.namespace,
        version=found.version,
        source=found.document["source"]["kind"],
        target=found.document["target"]["kind"],
        path=f"/v1/hooks/{found.namespace}/{found.name}",
        created_at=found.created_at,
        handoff=found.document,
    )


def _scores(found: SenderScores) -> ScoresOut:
    return ScoresOut.model_validate(found, from_attributes=True)
