"""The resource `limits`: limits on calls, of keys and namespaces."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Request
from pydantic import BaseModel, ConfigDict, Field

from app.access import key_store, namespaces
from app.access.audit import log as audit_log
from app.access.callers import Caller, KeyScope, NotAllowed
from app.access.limits import store
from app.access.limits.limits import NAMES, LimitOverride, LimitSubject, SubjectKind, effective
from app.api import auditing, bodies, problems
from app.api.callers import InjectedCaller, requires
from app.api.routers import ApiRouter
from app.api.services import InjectedServices, Services
from app.kernel.database import UnitOfWork
from app.kernel.errors import NotFound
from app.kernel.live import notices
from app.kernel.live.notices import ChangeTopic

router = ApiRouter(prefix="/v1/limits", tags=["admin"], dependencies=[requires(KeyScope.ADMIN)])

_Id = Annotated[str, Path(alias="id", min_length=1, max_length=100, pattern=r"^[A-Za-z0-9._-]+$")]
_Count = Annotated[int | None, Field(ge=0, le=1_000_000_000)]


class CallLimitsIn(BaseModel):
    """Limits on calls. What is left out comes from the settings; 0 means no limit."""

    model_config = ConfigDict(extra="forbid")

    requests_per_minute: _Count = Field(default=None, description="calls of models and submissions of runs")
    tokens_per_minute: _Count = Field(default=None, description="tokens of prompts and answers together")
    concurrent_calls: _Count = Field(default=None, description="calls that are being answered")
    waiting_interactive: _Count = Field(default=None, description="interactive calls that no pool has begun")
    waiting_batch: _Count = Field(default=None, description="calls of the class `batch` that no pool has begun")


class CallLimitsOut(BaseModel):
    """The limits of a key or a namespace that hold now."""

    kind: SubjectKind
    id: str
    requests_per_minute: int
    tokens_per_minute: int
    concurrent_calls: int
    waiting_interactive: int
    waiting_batch: int
    set: list[str] = Field(description="the limits that were set for it; all others come from the settings")


class CallLimitList(BaseModel):
    """The limits that were set, and those of the settings."""

    keys: CallLimitsIn = Field(description="the settings for each key")
    namespaces: CallLimitsIn = Field(description="the settings for each namespace")
    limits: list[CallLimitsOut] = Field(description="the keys and namespaces with limits of their own")


@router.get("", summary="List limits", responses=problems.documented())
def page(services: InjectedServices, caller: InjectedCaller) -> CallLimitList:
    """The limits of the settings, and those that were set for keys and namespaces. 0 means no limit."""
    with services.database.work() as work:
        found = store.overrides(work, caller.namespace)
    return CallLimitList(
        keys=_of_settings(services, SubjectKind.KEY),
        namespaces=_of_settings(services, SubjectKind.NAMESPACE),
        limits=[_out(services, subject, override) for subject, override in found.items()],
    )


@router.get("/{kind}/{id}", summary="Limits of one key or namespace", responses=problems.documented(404, 422))
def get(services: InjectedServices, caller: InjectedCaller, kind: SubjectKind, subject_id: _Id) -> CallLimitsOut:
    """The limits that hold for a key (by its id) or a namespace. 0 means no limit."""
    subject = LimitSubject(kind, subject_id)
    with services.database.work() as work:
        if kind is SubjectKind.KEY:
            key_store.get(work, caller, subject_id)
        elif caller.namespace not in (None, subject_id):
            raise NotFound("namespace", subject_id)
        found = store.overrides(work, caller.namespace)
    return _out(services, subject, found.get(subject))


@router.put(
    "/{kind}/{id}",
    summary="Limit a key or namespace",
    responses=problems.documented(404, 413, 415, 422),
    openapi_extra=bodies.documented_as(CallLimitsIn),
)
def put(
    request: Request,
    services: InjectedServices,
    caller: InjectedCaller,
    kind: SubjectKind,
    subject_id: _Id,
    body: Annotated[CallLimitsIn, bodies.of(CallLimitsIn)],
) -> CallLimitsOut:
    """
    Set the limits of a key (by its id) or a namespace; they replace the earlier ones, and hold within moments.

    A key of a namespace limits the keys of that namespace, and not the namespace itself.
    """
    subject, override = LimitSubject(kind, subject_id), LimitOverride(**body.model_dump())
    with services.database.work() as work:
        store.set_override(work, subject, _namespace_of(work, caller, subject), override)
        audit_log.add(work, auditing.record_of(request, caller, body.model_dump(exclude_none=True)))
    _announce(services)
    return _out(services, subject, override)


@router.delete("/{kind}/{id}", summary="Remove limits", responses=problems.documented(404, 422))
def delete(
    request: Request, services: InjectedServices, caller: InjectedCaller, kind: SubjectKind, subject_id: _Id
) -> CallLimitsOut:
    """Remove the limits of a key or namespace, so that those of the settings hold."""
    subject = LimitSubject(kind, subject_id)
    with services.database.work() as work:
        if caller.namespace is not None:
            _namespace_of(work, caller, subject)
        if not store.clear_override(work, subject):
            raise NotFound(f"limit of the {kind}", subject_id)
        audit_log.add(work, auditing.record_of(request, caller, None))
    _announce(services)
    return _out(services, subject, None)


def _announce(services: Services) -> None:
    services.call_limits.refresh(services.database)
    notices.send(services.publisher, ChangeTopic.LIMITS)


def _namespace_of(work: UnitOfWork, caller: Caller, subject: LimitSubject) -> str:
    """
    Return the namespace to which a subject belongs; empty for a key of all namespaces.

    Raises NotFound for a key that the caller does not see, NotAllowed for the namespace of the caller's own key.
    """
    if subject.kind is SubjectKind.KEY:
        return key_store.get(work, caller, subject.id).namespace or ""
    name = namespaces.require(subject.id, "id", "request")
    if caller.namespace is not None:
        message = "the limits of a namespace are set by a key without a namespace"
        raise NotAllowed(message, frozenset({KeyScope.ADMIN}))
    return name


def _of_settings(services: Services, kind: SubjectKind) -> CallLimitsIn:
    defaults = services.settings.limits
    return CallLimitsIn(**{name: getattr(defaults, f"{kind}_{name}") for name in NAMES})


def _out(services: Services, subject: LimitSubject, override: LimitOverride | None) -> CallLimitsOut:
    limits = effective(subject.kind, services.settings.limits, override)
    own = [name for name in NAMES if override is not None and getattr(override, name) is not None]
    return CallLimitsOut(kind=subject.kind, id=subject.id, set=own, **{name: getattr(limits, name) for name in NAMES})
