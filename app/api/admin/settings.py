"""The resource `settings`: what holds now, and changes while the processes run."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import Query, Request
from pydantic import BaseModel, ConfigDict, Field

from app.access.audit import log as audit_log
from app.access.callers import KeyScope
from app.api import auditing, bodies, problems
from app.api.callers import InjectedCaller, requires
from app.api.routers import ApiRouter
from app.api.services import InjectedServices, Services
from app.kernel import settings as all_settings
from app.kernel.live import notices, versions
from app.kernel.live.notices import ChangeTopic
from app.kernel.live.versions import MAX_REASON, SettingChange, SettingVersion

router = ApiRouter(
    prefix="/v1/admin/settings", tags=["admin"], dependencies=[requires(KeyScope.ADMIN, all_namespaces=True)]
)


class SettingsPatch(BaseModel):
    """A change of settings."""

    model_config = ConfigDict(extra="forbid")

    settings: dict[str, Any] = Field(
        min_length=1,
        max_length=100,
        description="by dotted key, the new value; null removes the run-time value",
        examples=[{"log.level": "debug", "runs.retention": "7d"}],
    )
    reason: str = Field(min_length=1, max_length=MAX_REASON, pattern=r"^[^\x00]*$", examples=["fewer disks"])
    version: int | None = Field(default=None, ge=0, le=2**31 - 1, description="refused if another version holds")


class RevertIn(BaseModel):
    """A return to an earlier version."""

    model_config = ConfigDict(extra="forbid")

    version: int = Field(ge=0, le=2**31 - 1, description="0 removes all run-time values")
    reason: str = Field(min_length=1, max_length=MAX_REASON, pattern=r"^[^\x00]*$")


class SettingOut(BaseModel):
    """A setting."""

    key: str
    value: Any = Field(description="the value of this moment; secrets are masked")
    origin: str = Field(description="`default`, `configuration` (file, variable, command line), `run time, version N`")
    default: Any
    changeable: bool = Field(description="whether it can change while the processes run")


class SettingsOut(BaseModel):
    """All settings of the API."""

    version: int = Field(description="the version of the run-time values; 0 before the first change")
    settings: list[SettingOut]


class SettingVersionOut(BaseModel):
    """A version of the run-time values."""

    version: int
    values: dict[str, Any] = Field(description="all run-time values")
    changes: dict[str, Any] = Field(description="by changed key, its value `before` and `now`; null for none")
    author: str
    reason: str
    reverted_to: int | None
    created_at: datetime | None


class SettingHistoryOut(BaseModel):
    """Versions from the newest to the oldest."""

    versions: list[SettingVersionOut]
    next_before: int | None = Field(description="the value of `before` for the next page; null on the last page")


@router.get("", summary="All settings", responses=problems.documented())
def get(services: InjectedServices) -> SettingsOut:
    """Every setting with its value, its origin, its default, and whether it can change while the processes run."""
    return _out(services)


@router.patch(
    "",
    summary="Change settings",
    responses=problems.documented(409, 413, 415, 422),
    openapi_extra=bodies.documented_as(SettingsPatch),
)
def patch(
    request: Request,
    services: InjectedServices,
    caller: InjectedCaller,
    body: Annotated[SettingsPatch, bodies.of(SettingsPatch)],
) -> SettingVersionOut:
    """
    Change settings while the processes run. All are valid, or none is changed.

    They hold in all processes within seconds, over files, variables and command lines, until they are removed or
    reverted.
    """
    with services.database.work() as work:
        by = SettingChange(caller.name, body.reason, body.version)
        found = versions.change(work, services.live.base, body.settings, by)
        audit_log.add(work, auditing.record_of(request, caller, body.model_dump(exclude_none=True)))
    return _announced(services, found)


@router.post(
    "/revert",
    summary="Revert settings",
    responses=problems.documented(404, 409, 413, 415, 422),
    openapi_extra=bodies.documented_as(RevertIn),
)
def revert(
    request: Request,
    services: InjectedServices,
    caller: InjectedCaller,
    body: Annotated[RevertIn, bodies.of(RevertIn)],
) -> SettingVersionOut:
    """Make the run-time values of an earlier version hold again, as a new version."""
    with services.database.work() as work:
        by = SettingChange(caller.name, body.reason)
        found = versions.revert(work, services.live.base, body.version, by)
        audit_log.add(work, auditing.record_of(request, caller, body.model_dump()))
    return _announced(services, found)


@router.get("/history", summary="History of settings", responses=problems.documented(422))
def history(
    services: InjectedServices,
    before: Annotated[int, Query(ge=1, le=2**31 - 1, description="`next_before` of the previous page")] = 2**31 - 1,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> SettingHistoryOut:
    """The versions of the run-time values, each with its changes, author and reason."""
    with services.database.work() as work:
        found = versions.history(work, before=before, limit=limit + 1)
    more = len(found) > limit
    return SettingHistoryOut(
        versions=[_version_out(one) for one in found[:limit]], next_before=found[limit - 1].version if more else None
    )


def _announced(services: Services, version: SettingVersion) -> SettingVersionOut:
    services.live.apply(version)
    notices.send(services.publisher, ChangeTopic.SETTINGS)
    return _version_out(version)


def _out(services: Services) -> SettingsOut:
    able, live = all_settings.changeable(), services.live.version
    found = []
    for key, value in all_settings.values_of(services.settings):
        default = all_settings.default_of(key)
        origin = "default" if value == default else "configuration"
        if key in live.values:
            origin = f"run time, version {live.version}"
        found.append(
            SettingOut(
                key=key,
                value=all_settings.shown(value),
                origin=origin,
                default=all_settings.shown(default),
                changeable=key in able,
            )
        )
    return SettingsOut(version=live.version, settings=found)


def _version_out(version: SettingVersion) -> SettingVersionOut:
    return SettingVersionOut.model_validate(version, from_attributes=True)
