"""The resource `dead-letters`: messages that workers could not read."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from fastapi import Query
from pydantic import BaseModel, Field

from app.access.callers import KeyScope
from app.api import problems
from app.api.callers import requires
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.kernel.dead_letters import KEPT

router = ApiRouter(tags=["dead letters"], dependencies=[requires(KeyScope.READ, all_namespaces=True)])


class DeadLetterOut(BaseModel):
    """A message that could not be read, or a key of a wrong type."""

    at: datetime
    queue: str = Field(description="the queue or key where it was found")
    reason: str = Field(examples=["unreadable", "too_large", "unknown_task", "wrong_arguments", "wrong_type"])
    detail: str = Field(description="what was wrong with it")
    bytes: int = Field(description="its length in bytes")
    message: str = Field(description="its beginning")


class DeadLetterList(BaseModel):
    """The newest dead letters."""

    dead_letters: list[DeadLetterOut]
    kept: int = Field(description=f"number of dead letters that are kept, at most the last {KEPT}")
    counts: dict[str, dict[str, int]] = Field(description="number of all dead letters so far, by queue and reason")


class Cleared(BaseModel):
    """The result of a removal."""

    removed: int


@router.get("/v1/dead-letters", summary="List dead letters", responses=problems.documented(422))
def page(services: InjectedServices, limit: Annotated[int, Query(ge=1, le=KEPT)] = 50) -> DeadLetterList:
    """Messages that workers could not read, the newest first. Their steps run nevertheless."""
    letters = services.publisher.dead_letters()
    counts: dict[str, dict[str, int]] = {}
    for (queue, reason), count in letters.counts().items():
        counts.setdefault(queue, {})[reason] = count
    found = [
        DeadLetterOut(
            at=one.at, queue=one.queue, reason=one.reason, detail=one.detail, bytes=one.bytes, message=one.message
        )
        for one in letters.newest(limit)
    ]
    return DeadLetterList(dead_letters=found, kept=letters.kept(), counts=counts)


@router.delete(
    "/v1/dead-letters",
    dependencies=[requires(KeyScope.OPERATE, all_namespaces=True)],
    summary="Remove dead letters",
    responses=problems.documented(),
)
def clear(services: InjectedServices) -> Cleared:
    """Remove all dead letters and the kept values of keys with a wrong type. The counts stay."""
    return Cleared(removed=services.publisher.dead_letters().clear())
