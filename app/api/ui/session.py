"""
Login with an API key, for browsers.

A session is kept in a cookie that no script can read and that no other site causes to be sent (`access/sessions.py`).
A page of another site cannot send a request in the user's name: the guard refuses it by Origin and Sec-Fetch-Site, and
a change needs a header with a token that only pages of the dashboard know.
"""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import Query, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from pydantic import BaseModel, ConfigDict, Field

from app.access.callers import ANYBODY
from app.api import bodies, threads
from app.api.access import sessions
from app.api.access.keyring import Keyring
from app.api.callers import COOKIE, OPEN
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.api.ui.rendering import render

router = ApiRouter(prefix="/ui", include_in_schema=False, dependencies=[OPEN])

#: The first page.
_FIRST = "/ui/overview"


class LoginIn(BaseModel):
    """A login."""

    model_config = ConfigDict(extra="forbid")

    key: str = Field(min_length=1, max_length=200)


@router.get("")
def begin() -> Response:
    """The first page."""
    return RedirectResponse(_FIRST, 303)


@router.get("/login")
def login_page(request: Request, after: Annotated[str, Query(alias="next", max_length=500)] = _FIRST) -> HTMLResponse:
    """The form that asks for an API key. It leads to the page `next`, if that is one of the dashboard."""
    then = after if re.fullmatch(r"/ui/[\w./:~%?=&+,-]*", after, re.ASCII) else _FIRST
    return render(request, ANYBODY, "login.html", title="Log in", then=then)


@router.post("/login")
async def login(
    request: Request, body: Annotated[LoginIn, bodies.of(LoginIn)], services: InjectedServices
) -> JSONResponse:
    """Start a session with a key. Raises NotAuthenticated when it is none."""
    keyring: Keyring = request.app.state.keyring
    caller = request.state.caller = await keyring.caller_of(body.key.strip())
    session = await threads.run_for_keys(sessions.start, services.publisher, body.key.strip())
    answer = JSONResponse({"name": caller.name})
    answer.set_cookie(
        COOKIE,
        session,
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
        path="/",
    )
    return answer


@router.post("/logout")
def logout(request: Request, services: InjectedServices) -> Response:
    """End the session."""
    sessions.end(services.publisher, request.cookies.get(COOKIE, ""))
    answer = Response(status_code=204)
    answer.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
    return answer
