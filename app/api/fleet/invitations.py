"""The resource `hosts/invitations`, and the exchange of a token for the configuration of an agent."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated

from fastapi import Path as InPath
from fastapi import Request, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.engine import URL, make_url

from app.access.agents import invitation, invitations, passwords
from app.access.agents.invitation import Invitation
from app.access.audit import log as audit_log
from app.access.callers import ANYBODY, KeyScope, NotAuthenticated
from app.access.keyless import is_loopback
from app.api import auditing, bodies, problems
from app.api.callers import OPEN, InjectedCaller, requires
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.kernel import addresses, ids, log
from app.kernel.errors import Conflict, InvalidSettings, Problem
from app.kernel.security import server_tls
from app.kernel.settings import Settings
from app.kernel.units.durations import Duration

_log = log.get(__name__)

router = ApiRouter(prefix="/v1/hosts", tags=["fleet"], dependencies=[requires(KeyScope.ADMIN, all_namespaces=True)])

#: Most bytes of the certificates that a host gets.
_MAX_CERTIFICATES = 256 * 1024
_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----[A-Za-z0-9+/=\s]+-----END CERTIFICATE-----")
#: Options of an address of Postgres that have neither secrets nor paths of the API's machine.
_PUBLIC_OPTIONS = frozenset({"host", "port", "sslmode", "channel_binding", "target_session_attrs"})
_NO_STORE = {"Cache-Control": "no-store"}


class InvitationIn(BaseModel):
    """A new invitation."""

    model_config = ConfigDict(extra="forbid")

    host: str | None = Field(
        default=None,
        pattern=invitation.HOST,
        description="the only host that may use it, which may have joined before; by default any new one",
        examples=["gpu-1"],
    )
    expires_in: Duration = Field(
        default=invitation.LIFETIME,
        ge=timedelta(minutes=1),
        le=invitation.MAX_LIFETIME,
        description="the time until it expires",
    )


class InvitationOut(BaseModel):
    """An invitation, without its token."""

    id: str = Field(description="the public part of the token: it begins with `join_<id>_`")
    host: str | None = Field(description="the only host that may use it; null: any new one")
    created_at: datetime
    created_by: str
    expires_at: datetime
    used_at: datetime | None
    used_by: str | None = Field(description="the host that used it")


class NewInvitationOut(InvitationOut):
    """An invitation with its token, which is shown only in this answer."""

    token: str = Field(description="the token itself; it cannot be shown again")
    warnings: list[str] = Field(description="what a host would get that it should not")


class InvitationList(BaseModel):
    """Invitations, the oldest first."""

    invitations: list[InvitationOut]


class JoinIn(BaseModel):
    """The exchange of a token."""

    model_config = ConfigDict(extra="forbid")

    token: str = Field(max_length=200, description="of the invitation")
    host: str = Field(pattern=invitation.HOST, description="the name of the host", examples=["gpu-1"])
    verifier: str = Field(
        max_length=400,
        pattern=rf"^{passwords.FORM.pattern}$",
        description="the SCRAM-SHA-256 verifier of the password that the host has chosen for its role of Postgres",
    )


class JoinedOut(BaseModel):
    """The configuration of the agent of a host."""

    host: str
    role: str = Field(description="the role of Postgres of this host")
    database_url: str = Field(description="with the role, and without its password, which only the host knows")
    redis_url: str
    certificates: str = Field(description="certificates (PEM) to trust; may be empty")


@router.get("/invitations", summary="List invitations of hosts", responses=problems.documented())
def page(services: InjectedServices) -> InvitationList:
    """Invitations, used and expired ones too, without their tokens."""
    with services.database.work() as work:
        return InvitationList(invitations=[_out(one) for one in invitations.listed(work)])


@router.post(
    "/invitations",
    status_code=201,
    summary="Invite a host",
    responses=problems.documented(409, 413, 415, 422),
    openapi_extra=bodies.documented_as(InvitationIn),
)
def invite(
    body: Annotated[InvitationIn, bodies.of(InvitationIn)],
    services: InjectedServices,
    caller: InjectedCaller,
    response: Response,
) -> NewInvitationOut:
    """Make a token with which one host joins, once. The answer has it, once: only its hash is stored."""
    warnings = _warnings(services.settings)
    id_ = ids.new_text(invitation.ID_CHARACTERS, lower_case=True)
    secret = ids.new_text(invitation.SECRET_CHARACTERS)
    with services.database.work() as work:
        made = invitations.create(work, id_, secret, body.host, body.expires_in, caller.name)
    response.headers.update(_NO_STORE)
    return NewInvitationOut(**_out(made).model_dump(), token=invitation.compose(id_, secret), warnings=warnings)


@router.delete(
    "/invitations/{invitation_id}",
    status_code=204,
    summary="Withdraw an invitation",
    responses=problems.documented(404, 422),
)
def withdraw(
    services: InjectedServices,
    invitation_id: Annotated[str, InPath(description="the public part of its token", max_length=16)],
) -> None:
    """Remove an invitation. A host that has joined by it stays."""
    with services.database.work() as work:
        invitations.withdraw(work, invitation_id)


@router.post(
    "/join",
    dependencies=[OPEN],
    summary="Join as a host",
    responses=problems.documented(409, 413, 415, 422, 429, others={401: {"description": "The token is not valid"}}),
    openapi_extra=bodies.documented_as(JoinIn),
)
def join(
    body: Annotated[JoinIn, bodies.of(JoinIn)], services: InjectedServices, request: Request, response: Response
) -> JoinedOut:
    """
    Exchange the token of an invitation for the configuration of an agent. It can be done once.

    Over plain HTTP only on the machine of the API. The host chooses the password of its role, and sends a verifier.
    """
    request.state.audited = True  # the body has the token; the entry below does not
    peer = "" if request.client is None else request.client.host
    is_near = is_loopback(peer)
    if request.scope["scheme"] != "https" and not is_near:
        raise Conflict("a host joins over https only: a token must not be readable on the network")
    services.join_attempts.count(peer)
    given = _addresses(services.settings)
    if not is_near and (local := [name for name, url in given.items() if server_tls.is_local(url)]):
        raise Conflict(f"this host would get a loopback address: set {' and '.join(f'agents.{one}' for one in local)}")
    weak = [found for name, url in given.items() if (found := server_tls.find_weakness(f"agents.{name}", url))]
    if weak:
        raise Conflict(f"this host would get an address without TLS that is verified: {weak[0]}")
    certificates = _certificates(services.settings.agents.ca_file)
    content = {"host": body.host, "invitation": invitation.id_of(body.token)}
    try:
        with services.database.work() as work:
            role = invitations.exchange(work, body.token, body.host, body.verifier).role
            audit_log.add(work, auditing.record_of(request, ANYBODY, content | {"role": role}))
    except (NotAuthenticated, Conflict) as error:
        _log.warning("host_not_joined", address=peer, reason=str(error), **content)
        raise
    _log.info("host_invited", host=body.host, role=role, address=peer)
    response.headers.update(_NO_STORE)
    return JoinedOut(
        host=body.host,
        role=role,
        database_url=_for_role(given["database_url"], role),
        redis_url=given["redis_url"],
        certificates=certificates,
    )


def _addresses(settings: Settings) -> dict[str, str]:
    """The addresses of the servers for agents, by the names of their settings. Raises Unavailable."""
    own, agents = addresses.of(settings), settings.agents
    redis_url = own.redis_url if agents.redis_url is None else agents.redis_url.get_secret_value()
    return {"database_url": agents.database_url or own.database_url, "redis_url": redis_url}


def _for_role(url: str, role: str) -> str:
    """Return an address of Postgres for a role, without the password, and without other options that have secrets."""
    own = make_url(url)
    query = {key: value for key, value in own.query.items() if key in _PUBLIC_OPTIONS}
    # Not `set`: it leaves a password as it is when it gets None.
    return URL.create(own.drivername, role, None, own.host, own.port, own.database, query).render_as_string()


def _warnings(settings: Settings) -> list[str]:
    found = []
    if settings.agents.redis_url is None:
        found.append("agents get the API's own user of the broker, which may do everything there: set agents.redis_url")
    weak = [server_tls.find_weakness(f"agents.{name}", url) for name, url in _addresses(settings).items()]
    found += [f"no host can join: {problem}" for problem in weak if problem is not None]
    local = [f"agents.{name}" for name, url in _addresses(settings).items() if server_tls.is_local(url)]
    if local:
        found.append(f"only a host on this machine can join: set {' and '.join(local)} to addresses that others reach")
    return found


def _certificates(path: Path | None) -> str:
    """Return the certificates of a file, and nothing else that it has. Raises InvalidSettings."""
    if path is None:
        return ""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_CERTIFICATES + 1)
    except OSError as error:
        raise _no_certificates(path, f"cannot be read: {error.strerror}") from None
    found = _CERTIFICATE.findall(content)
    if not found or len(content) > _MAX_CERTIFICATES:
        raise _no_certificates(path, f"has no certificates, or more than {_MAX_CERTIFICATES} bytes")
    return b"\n".join(found).decode("ascii") + "\n"


def _no_certificates(path: Path, message: str) -> InvalidSettings:
    return InvalidSettings([Problem("agents.ca_file", f"{path} {message}", "a PEM file with certificates")])


def _out(one: Invitation) -> InvitationOut:
    return InvitationOut.model_validate(one, from_attributes=True)
