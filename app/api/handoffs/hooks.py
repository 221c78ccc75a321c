"""
The addresses at which messages of other systems arrive. They have no API keys: the source of a hand-off authenticates.

A message is stored before it is acknowledged. A sender that gets no 2xx sends it again, and it is known by its key.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Query, Request
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel

from app.access.callers import NotAuthenticated
from app.api import problems
from app.api.bodies import RawBody
from app.api.callers import OPEN
from app.api.handoffs.handoffs import HandoffName
from app.api.handoffs.records import AcceptedMessageOut, wake
from app.api.routers import ApiRouter
from app.api.services import InjectedServices, Services
from app.handoffs.connectors.connector import AddressQuestion, NotGenuine, ReceivedRequest, RevealSecret
from app.handoffs.service import HandoffService
from app.kernel import clock, log
from app.kernel.errors import StepFailure, Unavailable
from app.kernel.security.secrets import Secrets

router = ApiRouter(prefix="/v1/hooks", tags=["hand-offs"], dependencies=[OPEN])

_log = log.get(__name__)
_Namespace = Annotated[str, Path(description="the namespace of the hand-off", max_length=63, examples=["default"])]
#: What messages are: JSON, or mail.
_CONTENT = {"application/json": {"schema": {"type": "object"}}, "message/rfc822": {"schema": {"type": "string"}}}


class HookOut(BaseModel):
    """The messages of a request."""

    messages: list[AcceptedMessageOut]


@router.post(
    "/{namespace}/{name}",
    status_code=202,
    summary="A message of another system",
    responses=problems.documented(404, 413, 422, others={401: {"description": "The message is not genuine"}}),
    openapi_extra={"requestBody": {"required": True, "content": _CONTENT}},
)
def receive(
    request: Request, services: InjectedServices, namespace: _Namespace, name: HandoffName, raw: RawBody
) -> HookOut:
    """Authenticate a message as the source of the hand-off says, and store it; 202 means that it is not lost."""
    received = ReceivedRequest(dict(request.headers), raw)
    try:
        files, keep = services.settings.files, services.settings.mail.keep_files
        handoffs = HandoffService(services.database, namespace, files, keep)
        accepted = handoffs.receive(name, received, _reveal(services, namespace, name), clock.now())
    except NotGenuine as error:
        _log.warning("handoff_message_refused", namespace=namespace, handoff=name, reason=str(error))
        raise NotAuthenticated(f"the message is refused: {error}", has_key=True) from None
    wake(services)
    return HookOut(messages=[AcceptedMessageOut.model_validate(one, from_attributes=True) for one in accepted])


@router.get(
    "/{namespace}/{name}",
    summary="The verification of an address",
    response_class=PlainTextResponse,
    responses=problems.documented(404, 422, others={401: {"description": "The question is not genuine"}}),
)
def verify(
    services: InjectedServices,
    namespace: _Namespace,
    name: HandoffName,
    mode: Annotated[str, Query(alias="hub.mode", max_length=100)] = "",
    token: Annotated[str, Query(alias="hub.verify_token", max_length=1_000)] = "",
    challenge: Annotated[str, Query(alias="hub.challenge", max_length=1_000)] = "",
) -> PlainTextResponse:
    """Answer the question of a sender whether the address belongs to who has the token, such as Meta asks it."""
    try:
        handoffs = HandoffService(services.database, namespace)
        question = AddressQuestion(mode, token, challenge)
        answer = handoffs.challenge(name, question, _reveal(services, namespace, name))
    except NotGenuine as error:
        raise NotAuthenticated(f"the question is refused: {error}", has_key=True) from None
    return PlainTextResponse(answer, headers={"X-Content-Type-Options": "nosniff"})


def _reveal(services: Services, namespace: str, name: str) -> RevealSecret:
    secrets = Secrets(services.settings.secrets_dir)

    def value(secret: str) -> str:
        try:
            return secrets.reveal([secret])[secret]
        except StepFailure as failure:
            # Names of secrets and paths are for operators, and not for whoever sends messages.
            _log.error("handoff_secret_missing", namespace=namespace, handoff=name, error=failure.message)
            raise Unavailable("the hand-off has no secret by which messages are authenticated") from None

    return value
