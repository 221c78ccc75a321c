"""
The HTTP interface, put together. `STATUSES` is the one table from errors to HTTP statuses.

Endpoints that need the database are synchronous: they run on threads (`app/api/threads.py`), and a slow database makes
no other request wait. One that does not answer at all is given up after `ANSWER_TIMEOUT`.
"""

from __future__ import annotations

import reprlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import psycopg
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from app import __version__
from app.api import (
    dead_letters,
    devices,
    events,
    explanations,
    fleet,
    footprints,
    health,
    hosts,
    models,
    namespaces,
    payloads,
    pools,
    problems,
    run_control,
    runs,
    schedules,
    schemas,
    threads,
    workflows,
)
from app.api.bodies import UnsupportedMediaType
from app.api.guard import GuardMiddleware
from app.api.limits import BodyLimit
from app.api.services import Services
from app.catalog import files
from app.devices.inventory import Devices
from app.kernel import addresses, broker, log
from app.kernel import database as databases
from app.kernel.broker import CeleryPublisher
from app.kernel.errors import (
    ArrieroError,
    BodyTooLarge,
    Conflict,
    InvalidInput,
    ModelFileUnusable,
    NotFound,
    PayloadTooLarge,
    Problem,
    Unavailable,
)
from app.kernel.request_guard import STATUS as FORBIDDEN
from app.kernel.request_guard import ForbiddenRequest, guard_of
from app.kernel.settings import Settings
from app.scheduler.operator_commands import OperatorCommands
from app.scheduler.wake_up import WakingPublisher, wake_reconciler
from app.workflows.language.definition import Definition
from app.workflows.runs.changes.transactions import RunPolicy
from app.workflows.runs.service import Runs
from app.workflows.schedules.schedule import Schedule

_log = log.get(__name__)

#: The first class that an error belongs to counts.
STATUSES: Mapping[type[ArrieroError], int] = {
    ForbiddenRequest: FORBIDDEN,
    UnsupportedMediaType: 415,
    BodyTooLarge: 413,
    PayloadTooLarge: 413,
    InvalidInput: 422,
    NotFound: 404,
    Conflict: 409,
    ModelFileUnusable: 409,
    Unavailable: 503,
    ArrieroError: 500,
}

#: How long a request waits for one answer of the database before it is refused with 503; longer for long bodies.
ANSWER_TIMEOUT = timedelta(seconds=5)

#: One for each resource.
ROUTERS = (
    runs.router,
    payloads.router,
    events.router,
    run_control.router,
    workflows.router,
    schedules.router,
    schemas.router,
    models.router,
    footprints.router,
    devices.router,
    fleet.router,
    explanations.router,
    pools.router,
    hosts.router,
    namespaces.router,
    dead_letters.router,
    health.router,
)

#: Types that FastAPI does not find in the signatures of endpoints.
_BODIES: tuple[type[BaseModel], ...] = (
    *(runs.RunIn, Definition, Schedule, problems.ProblemOut, events.EventIn, run_control.ForkIn, run_control.FilterIn),
    *(pools.StartIn, pools.StopIn, hosts.MarkIn, namespaces.LimitsIn),
)

_DESCRIPTION = """
Arriero runs workflows on local language models.

A run is written to the database before the answer is given, and goes on whatever process dies.
Errors are problem details (RFC 9457); each problem of an input names its path, its line and what would be accepted.
"""


def create_app(settings: Settings) -> FastAPI:
    """
    The application, with its connections made.

    Raises DatabaseBehind, DatabaseUnreachable: nothing is served from a schema that this version does not know.
    """
    servers = addresses.of(settings)
    database = databases.at_head(
        servers.database_url, pool_size=(threads.CONNECTIONS + 1) // 2, answer_timeout=ANSWER_TIMEOUT
    )
    publisher = CeleryPublisher(broker.celery_app(servers.redis_url, settings.broker), servers.redis_url)
    service = Runs(database, WakingPublisher(publisher), RunPolicy.of(settings.runs))
    catalog = files.read_catalog(settings.catalog.files)
    orders = OperatorCommands(database, lambda: wake_reconciler(publisher))
    return serve(Services(settings, database, publisher, service, catalog, Devices(settings.fleet), orders))


def serve(services: Services) -> FastAPI:
    """The application over services that are there."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        threads.limit_requests()
        yield
        services.database.close()
        services.devices.close()

    app = FastAPI(
        title="Arriero",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        license_info={"name": "Apache-2.0"},
        redoc_url=None,
    )
    app.state.services = services
    for router in ROUTERS:
        app.include_router(router)
    app.add_exception_handler(ArrieroError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    # What no field's own check has caught: a number, a name or a character that the database cannot hold.
    app.add_exception_handler(psycopg.DataError, _on_unstorable)
    app.add_exception_handler(UnicodeEncodeError, _on_unstorable)
    app.add_exception_handler(Exception, _on_defect)
    settings = services.settings
    app.add_middleware(BodyLimit, limit=settings.api.max_body_bytes)
    # The last one that is added stands before all others.
    app.add_middleware(GuardMiddleware, guard=guard_of(settings.api.host, settings.trusted_hosts, settings.api.url))
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign] # FastAPI's own way of changing the document
    return app


def status_of(error: ArrieroError) -> int:
    """The HTTP status of an error."""
    return next(status for kind, status in STATUSES.items() if isinstance(error, kind))


def _on_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ArrieroError)
    return problems.of_error(status_of(error), error)


def _on_invalid_request(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    found = []
    for item in error.errors()[: problems.MOST]:
        place = ".".join(str(part) for part in item["loc"])
        given = "" if item["type"] == "missing" else reprlib.repr(item.get("input"))
        message = item["msg"].removeprefix("Value error, ")
        found.append(Problem(place, message if message.startswith(given) else f"{given}: {message}"))
    return problems.of_error(422, InvalidInput(found, "request"))


def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    detail = f"{request.method} {request.url.path}: {error.detail}"
    answer = problems.response(error.status_code, "http", str(error.detail), detail)
    answer.headers.update(error.headers or {})
    return answer


def _on_unstorable(request: Request, error: Exception) -> JSONResponse:
    message = str(error) if isinstance(error, UnicodeEncodeError) else str(error).partition("\n")[0]
    _log.warning("value_unstorable", method=request.method, path=request.url.path, error=message)
    problem = Problem("", f"a value of the request cannot be stored or looked up: {message}")
    return problems.of_error(422, InvalidInput([problem], "request"))


def _on_disconnect(_: Request, __: Exception) -> Response:
    # The client went away within its body: nobody reads this answer, and nothing is wrong here.
    return Response(status_code=400)


def _on_defect(request: Request, error: Exception) -> JSONResponse:
    # The outermost shell of a request: Starlette hands over what nobody expected, and raises it again for the log.
    _log.error("request_broke", method=request.method, path=request.url.path, error=type(error).__name__)
    return problems.response(500, "defect", "internal error", "a defect of Arriero; its log has the traceback")


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The document, with the schemas of bodies that FastAPI does not parse itself."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            routes=app.routes,
            license_info=app.license_info,
        )
        schemas = document["components"]["schemas"]
        for body in _BODIES:
            schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(schema.pop("$defs", {}))
            schemas[body.__name__] = schema
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        for path in document["paths"].values():
            for operation in path.values():
                answer = operation["responses"].get("422")
                if answer is not None and "application/json" in answer.get("content", {}):
                    operation["responses"]["422"] = problems.documented(422)[422]
        app.openapi_schema = document
    return app.openapi_schema
