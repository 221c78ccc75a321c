"""
The caller of a request, and what its route needs.

Every route declares the scope that its caller needs (`requires`, `OPEN`), itself or on its router; its own declaration
counts. A route without a declaration can be called only by callers who may do everything.
`admit` runs before all other dependencies. It stores the caller in `request.state.caller`, and refuses with 401 a
request without a valid key, with 403 one whose key lacks the scope.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Query, Request
from fastapi.params import Depends as Dependency
from fastapi.responses import JSONResponse
from starlette.routing import BaseRoute

from app.access import keyless, keys, namespaces
from app.access.callers import ANYBODY, LOCAL, Caller, KeyScope, NotAllowed, NotAuthenticated
from app.api import threads
from app.api.access import sessions
from app.api.access.keyring import Keyring
from app.api.access.sessions import Session
from app.api.services import Services

R = TypeVar("R", bound=JSONResponse)


@dataclass(frozen=True, slots=True)
class Requirement:
    """What a route needs of its caller. As a dependency it does nothing: `admit` reads it."""

    #: The caller has at least one of these; empty: anybody may call the route.
    any_of: frozenset[KeyScope]
    #: The route concerns all namespaces, so a key of one namespace is refused.
    all_namespaces: bool = False

    async def __call__(self) -> None:
        """Do nothing."""


#: The cookie of the dashboard, with the id of a session.
COOKIE = "arriero_session"
#: The header that a change with that cookie needs, with the token of the session (`sessions.token_of`).
DASHBOARD_HEADER = "X-Arriero-Dashboard"

#: What a route without a declaration needs.
_EVERYTHING = Requirement(frozenset({KeyScope.ADMIN}), all_namespaces=True)


def requires(*any_of: KeyScope, all_namespaces: bool = False) -> Any:
    """Declare, as a dependency of a router or a route, that a caller needs one of these scopes."""
    return Depends(Requirement(frozenset(any_of), all_namespaces))


#: Declares that anybody may call a route, without a key too.
OPEN: Any = requires()


def requirement_of(route: BaseRoute) -> Requirement | None:
    """Return what a route declares; its own declaration replaces that of its router. None: nothing."""
    declared = [one.dependency for one in getattr(route, "dependencies", ()) if isinstance(one, Dependency)]
    return next((one for one in reversed(declared) if isinstance(one, Requirement)), None)


async def admit(request: Request) -> Caller:
    """Return the caller of a request. Raises NotAuthenticated, NotAllowed, Unavailable."""
    requirement = requirement_of(request.scope["route"]) or _EVERYTHING
    caller = ANYBODY
    if requirement.any_of:
        caller = await _authenticated(request)
        _require(caller, requirement)
    request.state.caller = caller
    return caller


#: The type of an endpoint's argument that receives the caller.
InjectedCaller = Annotated[Caller, Depends(admit)]


_Namespace = Annotated[
    str | None, Query(description="by default that of the API key, or else `default`; in lists, all", max_length=63)
]


async def _chosen(caller: InjectedCaller, namespace: _Namespace = None) -> str | None:
    return caller.chosen(namespace)


async def _named(caller: InjectedCaller, namespace: _Namespace = None) -> str:
    return caller.chosen(namespace) or namespaces.DEFAULT


#: The types of arguments of endpoints: the namespace of a list, None for all; and the one in which a name is looked up.
#: A caller without a namespace chooses it with the query parameter `namespace`.
ListedNamespace = Annotated[str | None, Depends(_chosen)]
NamedNamespace = Annotated[str, Depends(_named)]


async def _authenticated(request: Request) -> Caller:
    services: Services = request.app.state.services
    keyring: Keyring = request.app.state.keyring
    peer = None if request.client is None else request.client.host
    values = request.headers.getlist("Authorization")
    if len(values) > 1:
        raise NotAuthenticated("the header Authorization is sent more than once", has_key=True)
    scheme, _, token = values[0].strip().partition(" ") if values else ("", "", "")
    token = token.strip() if scheme.lower() == "bearer" else ""
    session = await _session_of(request, services) if not values else None
    if session is not None:
        caller = await keyring.caller_of_hash(session.key_id, session.key_hash)
    elif token.startswith(keys.PREFIX):
        caller = await keyring.caller_of(token)
    elif keyless.is_local(services.settings, peer, request.scope["headers"]):
        # Many clients always send some token, such as "none" or "sk-…": where no key is needed, it counts as no key.
        caller = LOCAL
    elif token:
        raise NotAuthenticated(
            f"the bearer token is no API key of Arriero, which begins with {keys.PREFIX}", has_key=True
        )
    else:
        raise NotAuthenticated("an API key is needed, in the header Authorization: Bearer arr_…", has_key=False)
    request.state.caller = caller
    return caller


async def _session_of(request: Request, services: Services) -> Session | None:
    """Return the session of a request, if it has one. Raises NotAuthenticated for a change without its token."""
    kept = request.cookies.get(COOKIE)
    session = None if not kept else await threads.run_for_keys(sessions.find, services.publisher, kept)
    if session is None or kept is None:
        return None
    given = request.headers.get(DASHBOARD_HEADER, "")
    is_change = request.method not in ("GET", "HEAD")
    if is_change and not hmac.compare_digest(given.encode(), sessions.token_of(kept).encode()):
        message = f"a change by the dashboard needs the header {DASHBOARD_HEADER} with the token of its page"
        raise NotAuthenticated(f"{message}; load the page again", has_key=False)
    return session


def _require(caller: Caller, requirement: Requirement) -> None:
    if not requirement.any_of & caller.scopes:
        names = " or ".join(f"'{scope}'" for scope in sorted(requirement.any_of))
        has = ", ".join(sorted(caller.scopes))
        raise NotAllowed(f"the API key {caller.name!r} lacks the scope {names}; it has: {has}", requirement.any_of)
    if requirement.all_namespaces and caller.namespace is not None:
        message = (
            f"the API key {caller.name!r} is limited to the namespace {caller.namespace!r}, and this concerns all "
            "namespaces; use a key without a namespace"
        )
        raise NotAllowed(message, requirement.any_of)


def challenge(error: NotAuthenticated | NotAllowed) -> str:
    """Return the header WWW-Authenticate of a refusal (RFC 6750)."""
    if isinstance(error, NotAllowed):
        return f'Bearer realm="arriero", error="insufficient_scope", scope="{" ".join(error.scopes)}"'
    return 'Bearer realm="arriero", error="invalid_token"' if error.has_key else 'Bearer realm="arriero"'


def challenged(answer: R, error: NotAuthenticated | NotAllowed) -> R:
    """Return the answer with the header of a refusal."""
    answer.headers["WWW-Authenticate"] = challenge(error)
    return answer
