"""The pages of hand-offs: how well each does, what is to be mended, and what came of a message."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated
from uuid import UUID

from fastapi import Query, Request
from fastapi.responses import HTMLResponse

from app.access.callers import KeyScope
from app.api.callers import InjectedCaller, ListedNamespace, requires
from app.api.handoffs import handoffs as handoffs_resource
from app.api.handoffs import mailbox as mailbox_resource
from app.api.handoffs import records
from app.api.handoffs.handoffs import HandoffName, HandoffOut, InjectedHandoffs, ScoreList
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.api.ui.rendering import render
from app.handoffs.record import RESENDABLE, MessageState
from app.handoffs.service import HandoffService

router = ApiRouter(prefix="/ui", include_in_schema=False, dependencies=[requires(KeyScope.READ)])

#: The time of scores on the pages, and the most hand-offs and messages of a page.
_WINDOW, _HANDOFFS, _MESSAGES = timedelta(days=1), 100, 50


@dataclass(frozen=True, slots=True)
class ScoredHandoff:
    """A hand-off in a list."""

    handoff: HandoffOut
    scores: ScoreList


@router.get("/handoffs")
def listed(
    request: Request, caller: InjectedCaller, services: InjectedServices, namespace: ListedNamespace
) -> HTMLResponse:
    """Hand-offs with their scores of a day."""
    found = handoffs_resource.page(services, namespace).handoffs
    scored = [
        ScoredHandoff(
            one, handoffs_resource.scores(one.name, services, HandoffService(services.database, one.namespace), _WINDOW)
        )
        for one in found[:_HANDOFFS]
    ]
    return render(
        request, caller, "handoffs.html", title="Hand-offs", scored=scored, total=len(found), namespace=namespace
    )


@router.get("/handoffs/{name}")
def one(
    request: Request,
    caller: InjectedCaller,
    services: InjectedServices,
    name: HandoffName,
    handoffs: InjectedHandoffs,
    state: MessageState | None = None,
    cursor: Annotated[UUID | None, Query()] = None,
) -> HTMLResponse:
    """A hand-off: its scores by sender, its mailbox, its messages, its document."""
    return render(
        request,
        caller,
        "handoff.html",
        title=name,
        found=handoffs_resource.get(name, handoffs),
        scores=handoffs_resource.scores(name, services, handoffs, _WINDOW),
        page=records.page(name, services, handoffs, state, _MESSAGES, cursor),
        states=list(MessageState),
        state_filter=state,
        mailbox=mailbox_resource.find(name, services, handoffs),
        namespace=handoffs.namespace,
    )


@router.get("/handoffs/{name}/messages/{message_id}")
def message(
    request: Request, caller: InjectedCaller, name: HandoffName, handoffs: InjectedHandoffs, message_id: UUID
) -> HTMLResponse:
    """A message: what it says, what was wrong with it, and what was done."""
    found = records.get(name, handoffs, message_id)
    return render(
        request,
        caller,
        "handoff_message.html",
        title="Message",
        found=found,
        resendable=found.state in RESENDABLE,
        namespace=handoffs.namespace,
    )
