"""What holds for the whole installation is not changed by a caller of one namespace."""

from __future__ import annotations

from app.access.callers import Caller
from app.kernel.errors import Problem
from app.kernel.security.request_guard import ForbiddenRequest


def require(caller: Caller, what: str) -> None:
    """Raises ForbiddenRequest for a caller that acts for one namespace only."""
    if caller.namespace is not None:
        message = f"{what}: the API key {caller.name!r} is one of the namespace {caller.namespace!r}"
        raise ForbiddenRequest([Problem("Authorization", message, "a key without a namespace")])
