"""
The application of the HTTP API. `STATUSES` is the table from errors to HTTP statuses; only middleware, which refuses a
request before it reaches an endpoint, has statuses of its own (`guard.py`, `limits.py`).

Endpoints that need the database are synchronous: they run on threads (`app/api/threads.py`), so a slow database delays
no other request. A database that does not answer is given up after `ANSWER_TIMEOUT`.
"""

from __future__ import annotations

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
from app.access import operator_key
from app.access.callers import NotAllowed, NotAuthenticated
from app.access.limits.limits import LimitReached
from app.api import (
    callers,
    compression,
    dead_letters,
    documentation,
    health,
    mcp,
    problems,
    prompt_hooks,
    schemas,
    threads,
)
from app.api.access import documented, keys
from app.api.access.keyring import Keyring
from app.api.activity import ActivityMiddleware
from app.api.admin import audit, call_limits
from app.api.admin import settings as settings_resource
from app.api.admission import CallGate, LoadShed, policy_headers, refusal_headers
from app.api.auditing import AuditMiddleware
from app.api.bodies import UnsupportedMediaType
from app.api.cache import endpoints as cache
from app.api.cache.answers import Answers
from app.api.cors import CorsMiddleware
from app.api.error_forms import ErrorForms
from app.api.fleet import devices, explanations, fleet, footprints, hosts, invitations, models, namespaces, pools
from app.api.fleet.join_attempts import TooManyJoins
from app.api.governance import actions as action_resource
from app.api.governance import alerts, budgets, channels, consolidations, jobs, probes, rules, scaler, signals, silences
from app.api.governance import costs as cost_resource
from app.api.guard import GuardMiddleware
from app.api.handoffs import handoffs, hooks, mailbox, records
from app.api.limits import BodyLimit
from app.api.mcp import McpEndpoint
from app.api.memory import (
    block_templates,
    blocks,
    conversations,
    deletion,
    extraction,
    memories,
    messages,
    recall,
    retention,
    search,
)
from app.api.memory import context as personal_context
from app.api.memory.documents import ConversationForkIn, ConversationPatch, ItemsIn, MessagesIn, NewConversationIn
from app.api.ollama import endpoints as ollama_endpoints
from app.api.ollama import models as ollama_models
from app.api.ollama.requests import OllamaChatIn, OllamaEmbeddingsIn, OllamaEmbedIn, OllamaGenerateIn, OllamaShowIn
from app.api.openai import batches, endpoints, files, responses, road, selection
from app.api.openai import models as served_models
from app.api.openai.road import Road
from app.api.openai.token_reader import TokenReader
from app.api.openai.uploads import OVERHEAD_BYTES
from app.api.openai.wait_estimates import WaitEstimates
from app.api.proxies import ProxyMiddleware
from app.api.routers import FIRST
from app.api.services import Services
from app.api.telemetry import exported
from app.api.telemetry import models as model_metrics
from app.api.telemetry.requests import RequestMetricsMiddleware
from app.api.telemetry.tracing import TracingMiddleware
from app.api.trials import shadows, splits
from app.api.ui import errors as ui_errors
from app.api.ui import routes as ui
from app.api.workflows import events, payloads, prompts, run_control, runs, schedules, scores, tokens, workflows
from app.catalog.served import live_catalog
from app.devices.inventory import Devices
from app.governance.rules.rule import Rule
from app.handoffs.definition import Handoff
from app.inference.openai.chat import ChatRequest
from app.inference.openai.completion import CompletionRequest
from app.inference.openai.embedding import EmbeddingsRequest
from app.inference.openai.reranking import RerankingRequest
from app.inference.openai.responses.request import ResponsesRequest
from app.inference.routing.definitions import ModelRouter
from app.inference.routing.fleet import FleetReader
from app.inference.shadows.definition import ShadowDefinition
from app.inference.splits.definition import SplitDefinition
from app.kernel import addresses, broker, ids, log
from app.kernel import database as databases
from app.kernel.activity import Activity
from app.kernel.broker import CeleryPublisher
from app.kernel.errors import (
    ArrieroError,
    BodyTooLarge,
    BudgetUsedUp,
    Conflict,
    InvalidInput,
    ModelFileUnusable,
    NotFound,
    PayloadTooLarge,
    Problem,
    Unavailable,
)
from app.kernel.live.notices import ChangeListener, ChangeTopic
from app.kernel.security.request_guard import STATUS as FORBIDDEN
from app.kernel.security.request_guard import ForbiddenRequest, guard_of
from app.kernel.settings import Settings
from app.memory.recall.query_vectors import QueryEmbedder
from app.memory.recall.service import Recall
from app.scheduler.operator_commands import OperatorCommands
from app.scheduler.wake_up import WakingPublisher, wake_reconciler
from app.workflows.language.definition import Definition
from app.workflows.runs.changes.transactions import RunPolicy
from app.workflows.runs.service import Runs
from app.workflows.schedules.schedule import Schedule

_log = log.get(__name__)

#: The first matching class decides.
STATUSES: Mapping[type[ArrieroError], int] = {
    NotAuthenticated: 401,
    NotAllowed: 403,
    ForbiddenRequest: FORBIDDEN,
    UnsupportedMediaType: 415,
    BodyTooLarge: 413,
    PayloadTooLarge: 413,
    InvalidInput: 422,
    NotFound: 404,
    Conflict: 409,
    ModelFileUnusable: 409,
    Unavailable: 503,
    LimitReached: 429,
    BudgetUsedUp: 402,
    compression.TooManyWaiting: 429,
    TooManyJoins: 429,
    ArrieroError: 500,
}

#: Time to wait for an answer of the database before the request is refused with 503; it is longer for long bodies.
ANSWER_TIMEOUT = timedelta(seconds=5)

#: One router per resource.
ROUTERS = (
    endpoints.router,
    selection.router,
    responses.router,
    compression.router,
    recall.router,
    served_models.router,
    cache.router,
    ollama_endpoints.router,
    ollama_models.router,
    files.router,
    batches.router,
    blocks.router,
    block_templates.router,
    personal_context.router,
    search.router,
    conversations.router,
    messages.router,
    deletion.conversations_router,
    deletion.users_router,
    retention.router,
    runs.router,
    payloads.router,
    events.router,
    prompts.router,
    tokens.router,
    run_control.router,
    workflows.router,
    schedules.router,
    signals.router,
    rules.router,
    rules.firings_router,
    jobs.router,
    probes.router,
    scaler.router,
    prompt_hooks.router,
    schemas.router,
    models.router,
    footprints.router,
    devices.router,
    fleet.router,
    explanations.router,
    pools.router,
    hosts.router,
    invitations.router,
    namespaces.router,
    mcp.router,
    settings_resource.router,
    action_resource.router,
    channels.router,
    handoffs.router,
    records.router,
    mailbox.router,
    hooks.router,
    silences.router,
    alerts.router,
    call_limits.router,
    audit.router,
    dead_letters.router,
    keys.router,
    extraction.router,
    memories.router,
    exported.router,
    model_metrics.router,
    cost_resource.router,
    budgets.router,
    consolidations.router,
    splits.router,
    shadows.router,
    scores.router,
    health.router,
    *ui.ROUTERS,
)

#: Errors that no endpoint answers, in the form of the interface to which their path belongs.
_ERRORS = ErrorForms(ROUTERS)

#: Types for the OpenAPI document that are not in the signatures of endpoints.
_BODIES: tuple[type[BaseModel], ...] = (
    *(runs.RunIn, Definition, Schedule, problems.ProblemOut, events.EventIn, run_control.ForkIn, run_control.FilterIn),
    *(ChatRequest, CompletionRequest, EmbeddingsRequest, RerankingRequest, ResponsesRequest, batches.BatchIn),
    *(OllamaChatIn, OllamaGenerateIn, OllamaEmbedIn, OllamaEmbeddingsIn, OllamaShowIn, compression.CompressIn),
    *(recall.RecallIn,),
    *(pools.StartIn, pools.StopIn, hosts.MarkIn, namespaces.LimitsIn, keys.KeyIn, keys.RotationIn),
    *(invitations.InvitationIn, invitations.JoinIn),
    *(blocks.BlockIn, blocks.BlockPatch, blocks.BlockRollback, blocks.TargetIO),
    *(block_templates.TemplateIn, block_templates.ApplyIn, personal_context.ContextIn, personal_context.RelevantIn),
    *(NewConversationIn, ConversationPatch, ConversationForkIn, ItemsIn, MessagesIn, retention.RetentionIn),
    *(Rule,),
    *(action_resource.ActionIn, channels.ChannelIn, silences.SilenceIn, alerts.AcknowledgementIn, alerts.SilenceOneIn),
    *(settings_resource.SettingsPatch, settings_resource.RevertIn, call_limits.CallLimitsIn),
    jobs.TriggerIn,
    budgets.BudgetIn,
    *(Handoff, records.MendIn, handoffs.SampleIn),
    *(SplitDefinition, ShadowDefinition, splits.ShareIn, splits.NeededIn, scores.ScoreIn),
)

_DESCRIPTION = """
Arriero runs workflows on local language models.

A run is stored in the database before it is acknowledged, and continues when any process dies.
Errors are problem details (RFC 9457); each problem of an input has its path, its line and what would be accepted.
"""


def create_app(settings: Settings, instance: str | None = None) -> FastAPI:
    """
    Return the application with its connections. `instance` is the id of its start, by default a new one.

    Raises DatabaseBehind, DatabaseUnreachable: a schema of another revision is not served.
    """
    servers = addresses.of(settings)
    database = databases.open_at_head(
        servers.database_url, pool_size=(threads.CONNECTIONS + 1) // 2, answer_timeout=ANSWER_TIMEOUT
    )
    publisher = CeleryPublisher(broker.celery_app(servers.redis_url, settings.broker), servers.redis_url)
    catalog = live_catalog(settings)
    router = ModelRouter(catalog.current, FleetReader(database).current)
    service = Runs(database, WakingPublisher(publisher), RunPolicy.of(settings.runs), route=router)
    operator_commands = OperatorCommands(database, lambda: wake_reconciler(publisher))
    devices, instance = Devices(settings.fleet), instance or str(ids.new_id())
    services = Services(settings, database, publisher, service, catalog, devices, operator_commands, instance)
    services.live.refresh(database)
    services.call_limits.refresh(database)
    services.splits.refresh()
    app = serve(services)
    app.add_middleware(ActivityMiddleware, activity=Activity(servers.redis_url))
    return app


def serve(services: Services) -> FastAPI:
    """Return the application with the given services."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        threads.limit_requests()
        redis_url = addresses.of(services.settings).redis_url
        listener = ChangeListener(
            redis_url,
            {
                ChangeTopic.SETTINGS: lambda: services.live.refresh(services.database),
                ChangeTopic.LIMITS: lambda: services.call_limits.refresh(services.database),
                ChangeTopic.SPLITS: services.splits.refresh,
            },
        )
        listener.start()
        client = road.connect(redis_url)
        reader = TokenReader(client)
        reader.start()
        embed = QueryEmbedder(redis_url, lambda: services.catalog, lambda: services.settings.recall)
        services.recall = Recall(services.database, embed)
        estimates, gate = WaitEstimates(services.database), CallGate(client, services.call_limits)
        app.state.road = Road(services.runs, client, reader, estimates, gate)
        app.state.answers = Answers(client, app.state.road, services.settings, lambda name: services.catalog.find(name))
        yield
        await app.state.mcp.close()
        await app.state.answers.close()
        await app.state.road.close()
        await app.state.keyring.close()
        await reader.close()
        services.recall.close()
        await client.aclose()
        listener.close()
        services.database.close()
        services.devices.close()

    app = FastAPI(
        title="Arriero",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        license_info={"name": "Apache-2.0"},
        dependencies=list(FIRST),
        docs_url=None,
        redoc_url=None,
    )
    app.state.services = services
    app.state.keyring = Keyring(services.database, operator_key.read(services.settings.data_dir))
    app.state.compressions = compression.WaitingCalls()
    app.state.mcp = McpEndpoint(app)
    documentation.add(app)
    ui.add_files(app)
    for router in ROUTERS:
        app.router.routes.extend(router.routes)
    app.add_exception_handler(ArrieroError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    # Values that passed all checks of fields, but that the database cannot store or compare.
    app.add_exception_handler(psycopg.DataError, _on_unstorable)
    app.add_exception_handler(UnicodeEncodeError, _on_unstorable)
    app.add_exception_handler(Exception, _on_defect)
    settings = services.settings
    app.add_middleware(AuditMiddleware, services=services)
    uploads = {files.PATH: (settings.files.max_bytes + OVERHEAD_BYTES, "files.max_bytes")}
    app.add_middleware(BodyLimit, errors=_ERRORS, limit=lambda: services.settings.api.max_body_bytes, longer=uploads)
    # The middleware that is added last runs first.
    guard = guard_of(settings.api.host, settings.trusted_hosts, settings.api.url)
    app.add_middleware(CorsMiddleware, origins=lambda: services.settings.api.cors_origins)
    app.add_middleware(
        GuardMiddleware,
        guard=guard,
        errors=_ERRORS,
        origins=lambda: services.settings.api.cors_origins,
        forms=frozenset({files.PATH}),
    )
    app.add_middleware(ProxyMiddleware, proxies=settings.api.trusted_proxies)
    app.add_middleware(TracingMiddleware)
    app.add_middleware(RequestMetricsMiddleware, metrics=services.request_metrics)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign] # the documented way to change the document
    return app


def status_of(error: ArrieroError) -> int:
    """Return the HTTP status of an error."""
    return next(status for kind, status in STATUSES.items() if isinstance(error, kind))


def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ArrieroError)
    if ui_errors.is_page(request):
        return ui_errors.page(request, status_of(error), str(error))
    answer = _ERRORS.of_error(request.url.path, status_of(error), error)
    if isinstance(error, LimitReached):
        answer.headers.update({**policy_headers(error.standings), **refusal_headers(error)})
    if isinstance(error, LoadShed):
        answer.headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, NotAuthenticated | NotAllowed):
        callers.challenged(answer, error)
        if request.url.path == mcp.PATH:
            answer.headers["WWW-Authenticate"] += f', resource_metadata="{mcp.metadata_url(request)}"'
    return answer


def _on_invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    if ui_errors.is_page(request):
        return ui_errors.page(request, 422, str(InvalidInput(problems.of_request(error), "request")))
    return _ERRORS.of_error(request.url.path, 422, InvalidInput(problems.of_request(error), "request"))


def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if ui_errors.is_page(request):
        return ui_errors.page(request, error.status_code, "There is no such page.")
    detail = f"{request.method} {request.url.path}: {error.detail}"
    answer = _ERRORS.response(request.url.path, error.status_code, "http", str(error.detail), detail)
    answer.headers.update(error.headers or {})
    return answer


def _on_unstorable(request: Request, error: Exception) -> JSONResponse:
    message = str(error) if isinstance(error, UnicodeEncodeError) else str(error).partition("\n")[0]
    _log.warning("value_unstorable", method=request.method, path=request.url.path, error=message)
    problem = Problem("", f"a value of the request cannot be stored or looked up: {message}")
    return _ERRORS.of_error(request.url.path, 422, InvalidInput([problem], "request"))


def _on_disconnect(_: Request, __: Exception) -> Response:
    # The client disconnected while it sent its body, so the answer is not read. This is no server error.
    return Response(status_code=400)


def _on_defect(request: Request, error: Exception) -> JSONResponse:
    # The last handler of a request: Starlette calls it for unexpected exceptions, and re-raises them for the log.
    _log.error("request_failed", method=request.method, path=request.url.path, error=type(error).__name__)
    detail = "a defect of Arriero; the log of the API has the traceback"
    return _ERRORS.response(request.url.path, 500, "defect", "internal error", detail)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI document, with the schemas of bodies that FastAPI does not parse itself."""
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
        documented.describe(app, document)
        app.openapi_schema = document
    return app.openapi_schema
