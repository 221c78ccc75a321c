"""The resource `keys`: API keys, which are created, listed, rotated and revoked."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated

from fastapi import Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from app.access import key_store, keys
from app.access.callers import KeyScope
from app.access.keys import ApiKey, NewKey
from app.api import bodies, problems
from app.api.access.keyring import Keyring
from app.api.callers import InjectedCaller, requires
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.kernel import ids
from app.kernel.units.durations import Duration

router = ApiRouter(prefix="/v1/keys", tags=["keys"], dependencies=[requires(KeyScope.ADMIN)])

_Id = Annotated[str, Path(description="the public part of the key", examples=["k3v9x2m8qa"], max_length=100)]
_NO_STORE = {"Cache-Control": "no-store"}


class KeyIn(BaseModel):
    """A new key."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="what it is for; logs and history show it", examples=["triage-service"])
    scopes: list[KeyScope] = Field(max_length=16, description="what it may do; no scope includes another one")
    namespace: str | None = Field(
        default=None,
        description="the only namespace that it sees; by default that of your own key, or else all namespaces",
        examples=["research"],
    )
    expires_in: Duration | None = Field(
        default=None, description="the time until it expires; by default never", examples=["90d"]
    )


class RotationIn(BaseModel):
    """The rotation of a key."""

    model_config = ConfigDict(extra="forbid")

    overlap: Duration = Field(
        default=timedelta(days=1),
        ge=timedelta(0),
        le=timedelta(days=90),
        description="how long the old secret works beside the new one",
    )


class KeyOut(BaseModel):
    """A key, without its secret."""

    id: str = Field(description="the public part of the key: it begins with `arr_<id>_`")
    name: str
    namespace: str | None = Field(description="null: all namespaces")
    scopes: list[KeyScope]
    created_at: datetime
    created_by: str = Field(description="the name of the key with which it was created")
    expires_at: datetime | None
    revoked_at: datetime | None
    revoked_by: str | None
    rotated_at: datetime | None
    overlap_until: datetime | None = Field(description="until then the secret from before the rotation works too")
    used_at: datetime | None = Field(description="its last use, to the minute")
    previous_used_at: datetime | None = Field(description="the last use of the secret from before the rotation")


class NewKeyOut(KeyOut):
    """A key with its secret, which is shown only in this answer."""

    key: str = Field(description="the key itself; it cannot be shown again")


class KeyList(BaseModel):
    """Keys, the oldest first."""

    keys: list[KeyOut]


@router.get("", summary="List keys", responses=problems.documented(422))
def page(
    services: InjectedServices, caller: InjectedCaller, limit: Annotated[int, Query(ge=1, le=1000)] = 1000
) -> KeyList:
    """Every key that the caller may manage, revoked and expired ones too."""
    with services.database.work() as work:
        return KeyList(keys=[_out(key) for key in key_store.list_keys(work, caller, limit)])


@router.post(
    "",
    status_code=201,
    summary="Create a key",
    responses=problems.documented(413, 415, 422),
    openapi_extra=bodies.documented_as(KeyIn),
)
def create(
    body: Annotated[KeyIn, bodies.of(KeyIn)], services: InjectedServices, caller: InjectedCaller, response: Response
) -> NewKeyOut:
    """Create a key. The answer has it, once: only its hash is stored. Nobody gives a key more than they have."""
    new = NewKey.by(caller, body.name, body.namespace, body.scopes, body.expires_in)
    key_id, secret = ids.new_text(keys.ID_CHARACTERS, lower_case=True), ids.new_text(keys.SECRET_CHARACTERS)
    with services.database.work() as work:
        made = key_store.create(work, caller, new, key_id, secret)
    response.headers.update({**_NO_STORE, "Location": f"/v1/keys/{key_id}"})
    return _new(made, secret)


@router.get("/{key_id}", summary="One key", responses=problems.documented(404, 422))
def get(key_id: _Id, services: InjectedServices, caller: InjectedCaller) -> KeyOut:
    """A key, without its secret."""
    with services.database.work() as work:
        return _out(key_store.get(work, caller, key_id))


@router.post(
    "/{key_id}/rotate",
    summary="Rotate a key",
    responses=problems.documented(404, 409, 413, 415, 422),
    openapi_extra=bodies.documented_as(RotationIn),
)
def rotate(
    key_id: _Id,
    body: Annotated[RotationIn, bodies.of(RotationIn)],
    services: InjectedServices,
    caller: InjectedCaller,
    request: Request,
    response: Response,
) -> NewKeyOut:
    """
    Give a key a new secret; id, scopes, namespace and expiry stay.

    The old secret works for `overlap`. A secret from before an earlier rotation ends at once.
    """
    secret = ids.new_text(keys.SECRET_CHARACTERS)
    with services.database.work() as work:
        made = key_store.rotate(work, caller, key_id, secret, body.overlap)
    _forget(request, key_id)
    response.headers.update(_NO_STORE)
    return _new(made, secret)


@router.post("/{key_id}/revoke", summary="Revoke a key", responses=problems.documented(404, 422))
def revoke(key_id: _Id, services: InjectedServices, caller: InjectedCaller, request: Request) -> KeyOut:
    """
    End a key, for good. This API refuses it at once, others within five seconds.

    Runs that were submitted with it continue.
    """
    with services.database.work() as work:
        ended = key_store.revoke(work, caller, key_id)
    _forget(request, key_id)
    return _out(ended)


def _forget(request: Request, key_id: str) -> None:
    keyring: Keyring = request.app.state.keyring
    keyring.forget(key_id)


def _out(key: ApiKey) -> KeyOut:
    return KeyOut(**_values(key))


def _new(key: ApiKey, secret: str) -> NewKeyOut:
    return NewKeyOut(**_values(key), key=keys.compose(key.id, secret))


def _values(key: ApiKey) -> dict[str, object]:
    return {**{name: getattr(key, name) for name in KeyOut.model_fields}, "scopes": sorted(key.scopes)}
