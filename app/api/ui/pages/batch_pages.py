"""The pages of batches: how far each is, and why one failed."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Query, Request
from fastapi.responses import HTMLResponse

from app.access.callers import KeyScope
from app.api.callers import InjectedCaller, requires
from app.api.openai import batches as batches_resource
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.api.ui.rendering import render
from app.inference.batches.endpoints import ENDPOINTS

router = ApiRouter(prefix="/ui", include_in_schema=False, dependencies=[requires(KeyScope.READ)])

#: What happened to a batch, by the field of its instant.
_HAPPENED = {
    "created_at": "created",
    "in_progress_at": "begun",
    "finalizing_at": "results are written",
    "completed_at": "completed",
    "failed_at": "failed",
    "expired_at": "expired",
    "cancelling_at": "cancellation asked for",
    "cancelled_at": "cancelled",
}


@router.get("/batches")
def listed(
    request: Request,
    caller: InjectedCaller,
    services: InjectedServices,
    after: Annotated[str | None, Query(max_length=100)] = None,
) -> HTMLResponse:
    """Batches, the newest first."""
    found = batches_resource.page(services, caller, 50, after)
    return render(
        request,
        caller,
        "batches.html",
        title="Batches",
        batches=found.data,
        next=found.last_id if found.has_more else None,
        endpoints=list(ENDPOINTS),
    )


@router.get("/batches/{batch_id}")
def one(
    request: Request,
    caller: InjectedCaller,
    services: InjectedServices,
    batch_id: Annotated[str, Path(max_length=100)],
) -> HTMLResponse:
    """A batch: its counts, its files, and the lines that are wrong."""
    found = batches_resource.get(batch_id, services, caller)
    times = sorted(
        ((name, at) for key, name in _HAPPENED.items() if (at := getattr(found, key)) is not None),
        key=lambda pair: pair[1],
    )
    return render(request, caller, "batch.html", title="Batch", batch=found, times=times)
