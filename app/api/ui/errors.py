"""Errors of pages: a page that says what is wrong, or the login where a key is needed."""

from __future__ import annotations

from urllib.parse import quote

from fastapi import Request
from fastapi.responses import RedirectResponse, Response

from app.access.callers import ANYBODY
from app.api.ui.rendering import render

_TITLES = {403: "Not allowed", 404: "Not found", 422: "Not understood", 503: "Not available now"}


def is_page(request: Request) -> bool:
    """Whether a browser asks for a page of the dashboard. Programs get the errors of the API there too."""
    asks = request.method == "GET" and "text/html" in request.headers.get("accept", "")
    return asks and request.url.path.startswith("/ui/")


def page(request: Request, status: int, message: str) -> Response:
    """Return the page of an error; without a valid key, the way to the login."""
    if status == 401:
        query = f"?{request.url.query}" if request.url.query else ""
        return RedirectResponse(f"/ui/login?next={quote(request.url.path + query, safe='/')}", 303)
    caller = getattr(request.state, "caller", ANYBODY)
    answer = render(
        request, caller, "error.html", title=_TITLES.get(status, "It did not work"), message=message, status=status
    )
    answer.status_code = status
    return answer
