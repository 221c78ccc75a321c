"""The id of a run in a path: the whole id, or enough of its first or last characters."""

from __future__ import annotations

import re
from typing import Annotated
from uuid import UUID

from fastapi import Depends, Path
from starlette.concurrency import run_in_threadpool

from app.api.callers import InjectedCaller
from app.api.services import InjectedServices
from app.kernel.errors import InvalidInput, Problem
from app.workflows.runs import views

_WHOLE = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_PART = re.compile(rf"(?:-?[0-9a-fA-F]){{{views.LEAST_OF_ID},32}}-?")


async def _resolved(
    services: InjectedServices,
    caller: InjectedCaller,
    run_id: Annotated[str, Path(description="the id of the run, or at least four of its first or last characters")],
) -> UUID:
    if _WHOLE.fullmatch(run_id):
        found = UUID(run_id)
        if caller.namespace is not None:
            await run_in_threadpool(views.require, services.database, found, caller.namespace)
        return found
    if not _PART.fullmatch(run_id):
        accepted = f"a UUID, or at least {views.LEAST_OF_ID} of its first or last characters"
        raise InvalidInput([Problem("path.run_id", f"{run_id!r} is not the id of a run", accepted)], "request")
    return await run_in_threadpool(views.find, services.database, run_id, caller.namespace)


#: The type of an endpoint's argument: the id of a run that the caller may see.
#: Raises InvalidInput, NotFound, and Conflict when several runs match.
ResolvedRunId = Annotated[UUID, Depends(_resolved)]
