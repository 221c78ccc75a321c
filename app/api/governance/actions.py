"""The resource `actions`: what rules and operators have done, with what was before, and what is taken back."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import Query
from pydantic import BaseModel, ConfigDict, Field

from app.access.callers import KeyScope
from app.api import bodies, problems
from app.api.callers import InjectedCaller, ListedNamespace, requires
from app.api.governance.own_namespace import OwnNamespace
from app.api.routers import ApiRouter
from app.api.services import InjectedServices, Services
from app.governance.actions import action as actions
from app.governance.actions import service, store
from app.governance.actions.action import ActionKind
from app.governance.actions.execution import ActionExecution, Cause
from app.governance.actions.outcome import ExecutionState
from app.governance.tasks import ACTIONS
from app.kernel.broker import CONTROL_QUEUE
from app.kernel.errors import Conflict, InvalidInput, NotFound, Problem

router = ApiRouter(prefix="/v1/actions", tags=["governance"], dependencies=[requires(KeyScope.READ)])

#: Seconds after which a wake-up is obsolete.
_EXPIRES = 10.0


class ActionIn(BaseModel):
    """An action that an operator wants now."""

    model_config = ConfigDict(extra="forbid")

    action: dict[str, Any] = Field(
        description="as in a rule: its kind, with its parameters", examples=[{"kind": "evict_idle", "idle_for": "10m"}]
    )
    reason: str = Field(default="", max_length=500)
    dry_run: bool = Field(default=False, description="record what would be done, and do nothing")


class ActionOut(BaseModel):
    """An action for one firing, or for an operator, and what came of it."""

    id: UUID
    namespace: str = Field(description="that of the rule; empty for one of the installation")
    rule: str = Field(description="empty for an operator")
    firing_id: UUID | None
    kind: str
    target: str = Field(examples=["model smollm2:135m"])
    parameters: dict[str, Any]
    cause: dict[str, Any] = Field(description="what was measured, and for what labels")
    state: ExecutionState
    dry_run: bool
    detail: str = Field(description="what was done, or why it was not")
    before: Any
    after: Any
    attempts: int
    created_at: datetime
    finished_at: datetime | None
    cleared_at: datetime | None = Field(description="when its rule cleared")
    undone_at: datetime | None
    undo_detail: str


class ActionPage(BaseModel):
    """Actions from the newest to the oldest."""

    actions: list[ActionOut]
    next_cursor: UUID | None = Field(description="the value of `cursor` for the next page; null on the last page")


class ActionKindOut(BaseModel):
    """A kind of action."""

    kind: ActionKind
    description: str
    undone: bool = Field(description="it is taken back when its rule clears, unless `undo` is false")
    namespaces: bool = Field(description="a rule of a namespace may name it")
    parameters: dict[str, Any] = Field(description="the JSON Schema of its parameters")


class ActionKindList(BaseModel):
    """The kinds of actions."""

    kinds: list[ActionKindOut]


@router.get("", summary="List actions", responses=problems.documented(422))
def page(
    services: InjectedServices,
    namespace: ListedNamespace,
    rule: Annotated[str | None, Query(max_length=200, pattern=r"^[^\x00]*$")] = None,
    state: ExecutionState | None = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
    cursor: Annotated[UUID | None, Query(description="`next_cursor` of the previous page")] = None,
) -> ActionPage:
    """What was done, refused and taken back, from the newest to the oldest."""
    with services.database.work() as work:
        found = store.page(work, namespace, rule, None if state is None else state.value, cursor, limit + 1)
    shown = [_out(one) for one in found[:limit]]
    return ActionPage(actions=shown, next_cursor=shown[-1].id if len(found) > limit else None)


@router.get("/kinds", summary="The kinds of actions", responses=problems.documented())
def kinds() -> ActionKindList:
    """The kinds of actions that a rule may name, and their parameters."""
    return ActionKindList(
        kinds=[
            ActionKindOut(
                kind=kind,
                description=(one.__doc__ or "").strip(),
                undone="undo" in one.model_fields,
                namespaces=kind in actions.OF_NAMESPACES,
                parameters=one.model_json_schema(),
            )
            for kind, one in actions.CLASSES.items()
        ]
    )


@router.get("/{action_id}", summary="One action", responses=problems.documented(404, 422))
def get(services: InjectedServices, namespace: ListedNamespace, action_id: UUID) -> ActionOut:
    """An action, and what came of it."""
    return _out(_found(services, action_id, namespace))


@router.post(
    "",
    status_code=202,
    dependencies=[requires(KeyScope.OPERATE)],
    summary="Act now",
    responses=problems.documented(409, 413, 415, 422),
    openapi_extra=bodies.documented_as(ActionIn),
)
def act(
    services: InjectedServices,
    caller: InjectedCaller,
    namespace: OwnNamespace,
    body: Annotated[ActionIn, bodies.of(ActionIn)],
) -> ActionOut:
    """
    Carry out an action by hand, with the limits that hold for rules. It holds until it is undone by hand.

    Poll `GET /v1/actions/{id}` for what came of it.
    """
    wanted = actions.parse([body.action], namespace, "action", "request")
    if wanted[0].kind is ActionKind.ALERT:
        accepted = ", ".join(kind for kind in ActionKind if kind is not ActionKind.ALERT)
        raise InvalidInput([Problem("action.kind", "an alert belongs to a rule", accepted)], "request")
    cause = Cause("", body.reason or "by hand", namespace=namespace, dry_run=body.dry_run, actor=caller.name)
    with services.database.work() as work:
        found = service.fired(work, cause, wanted, services.settings.actions)
        if not found:
            raise Conflict("actions are off (the setting actions.mode)")
        made = store.get(work, found[0])
    assert made is not None, "it was stored"
    _wake(services)
    return _out(made)


@router.post(
    "/{action_id}/undo",
    status_code=202,
    dependencies=[requires(KeyScope.OPERATE)],
    summary="Take an action back",
    responses=problems.documented(404, 409, 422),
)
def undo(services: InjectedServices, namespace: ListedNamespace, action_id: UUID) -> ActionOut:
    """Take back an action that holds, before its rule clears. What somebody else has changed since stays."""
    found = _found(services, action_id, namespace)
    with services.database.work() as work:
        if not store.request_undo(work, action_id):
            raise Conflict(f"action {action_id} holds nothing: it is {found.state}")
    _wake(services)
    return _out(_found(services, action_id, namespace))


def _found(services: Services, action_id: UUID, namespace: str | None) -> ActionExecution:
    with services.database.work() as work:
        found = store.find(work, action_id, namespace)
    if found is None:
        raise NotFound("action", str(action_id))
    return found


def _wake(services: Services) -> None:
    services.publisher.publish(ACTIONS, (), queue=CONTROL_QUEUE, description="wake-up", expires=_EXPIRES)


def _out(found: ActionExecution) -> ActionOut:
    return ActionOut.model_validate(found, from_attributes=True)
