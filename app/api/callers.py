"""The caller of a request, as a dependency of endpoints."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from app.access.callers import LOCAL, Caller


async def _of_request(request: Request) -> Caller:
    request.state.caller = LOCAL  # for the audit log
    return LOCAL


#: The type of an endpoint's argument that receives the caller.
InjectedCaller = Annotated[Caller, Depends(_of_request)]
