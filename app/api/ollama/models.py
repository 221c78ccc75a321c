"""The endpoints of Ollama's API about models: what there is, what is loaded, and refusals of what `arriero` does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Annotated, Any

import redis
from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from app.access.callers import KeyScope
from app.api import bodies
from app.api.callers import requires
from app.api.ollama import descriptions, errors, keep_alive, names
from app.api.ollama.calls import instant
from app.api.ollama.descriptions import ModelDetailsOut
from app.api.ollama.errors import OllamaRoute
from app.api.ollama.requests import OllamaShowIn
from app.api.openai.errors import ModelNotFound
from app.api.routers import ApiRouter
from app.api.services import InjectedServices, Services
from app.catalog.model import Model
from app.devices.device import HardwareKind
from app.fleet import views
from app.fleet.pool import PoolState
from app.fleet.views import PoolView
from app.kernel import clock
from app.kernel.errors import BrokerUnreachable
from app.scheduler import residencies
from app.scheduler.residencies import Residency

router = ApiRouter(
    prefix="/api",
    tags=["ollama"],
    dependencies=[requires(KeyScope.SUBMIT, KeyScope.READ)],
    route_class=OllamaRoute,
)

#: The version of Ollama whose API is served; clients compare it with the one that they need.
VERSION = "0.12.6"
#: When a model that is kept forever is said to be unloaded: as Ollama does, in some centuries.
_FOREVER = timedelta(days=292 * 365)


class LocalModelOut(BaseModel):
    """A model that can be used."""

    name: str
    model: str
    modified_at: str
    size: int = Field(description="bytes of its file; 0 where it is not known")
    digest: str
    details: ModelDetailsOut


class LocalModels(BaseModel):
    """The models that can be used."""

    models: list[LocalModelOut]


class RunningModelOut(BaseModel):
    """A model that is loaded."""

    name: str
    model: str
    size: int = Field(description="bytes that its pools reserve")
    digest: str
    details: ModelDetailsOut
    expires_at: str = Field(description="when it is unloaded if it stays idle and nothing else needs its memory")
    size_vram: int = Field(description="bytes of these on GPUs")
    context_length: int


class RunningModels(BaseModel):
    """The models that are loaded."""

    models: list[RunningModelOut]


class ShownModelOut(BaseModel):
    """A model of the catalogue."""

    license: str
    modelfile: str
    parameters: str
    template: str
    details: ModelDetailsOut
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class OllamaVersionOut(BaseModel):
    """The version of the API."""

    version: str


@router.get("/version", summary="Version, as in Ollama's API")
async def version() -> OllamaVersionOut:
    """The version of Ollama whose API this is."""
    return OllamaVersionOut(version=VERSION)


@router.get("/tags", summary="Models, as in Ollama's API", responses=errors.documented(503))
def tags(services: InjectedServices) -> LocalModels:
    """The models whose file is on this host, or that a pool serves."""
    served = _pools(services)
    found = []
    for model in services.catalog.models:
        path = descriptions.path_of(model, services)
        if path is not None or model.name in served:
            read = None if path is None else descriptions.header_of(path)
            found.append(
                LocalModelOut(
                    name=model.name,
                    model=model.name,
                    modified_at=descriptions.modified_at(path),
                    size=read.file_bytes if read is not None else sum(model.source.size),
                    digest=descriptions.digest(model, read),
                    details=descriptions.details(read),
                )
            )
    return LocalModels(models=found)


@router.get("/ps", summary="Loaded models, as in Ollama's API", responses=errors.documented(503))
def ps(services: InjectedServices) -> RunningModels:
    """The models that are loaded, and until when."""
    gpus = {one.id for host in views.hosts(services.database) for one in host.devices if one.kind == HardwareKind.GPU}
    wanted, kept, now, found = _residencies(services), keep_alive.kept(services), clock.now(), []
    for name, pools in _pools(services).items():
        model = services.catalog.find(name)
        serving = [pool for pool in pools if pool.state is PoolState.SERVING]
        if model is None or not serving:
            continue
        path = descriptions.path_of(model, services)
        read = None if path is None else descriptions.header_of(path)
        ends = now + _FOREVER
        if name not in kept:
            ends = max(_expires_at(pool, model, wanted.get(name), now) for pool in serving)
        sizes = [(id_, size) for pool in serving for id_, size in pool.bytes.items()]
        found.append(
            RunningModelOut(
                name=name,
                model=name,
                size=sum(size for _, size in sizes),
                digest=descriptions.digest(model, read),
                details=descriptions.details(read),
                expires_at=instant(ends),
                size_vram=sum(size for id_, size in sizes if id_ in gpus),
                context_length=model.context,
            )
        )
    return RunningModels(models=found)


@router.post(
    "/show",
    summary="A model, as in Ollama's API",
    responses=errors.documented(400, 404, 413, 415, 503),
    openapi_extra=bodies.documented_as(OllamaShowIn),
)
def show(services: InjectedServices, body: Annotated[OllamaShowIn, bodies.of(OllamaShowIn)]) -> ShownModelOut:
    """What is known of a model."""
    name = names.resolve(services.catalog, body.model)
    model = services.catalog.find(name)
    if model is None:
        raise ModelNotFound("model", body.model, services.catalog.names)
    path = descriptions.path_of(model, services)
    read = None if path is None else descriptions.header_of(path)
    template = descriptions.template(model, read)
    return ShownModelOut(
        license=model.licence or (read.licence if read is not None else "") or "",
        modelfile=f"# Arriero has no modelfiles: see the entry {model.name} of its catalogue\nFROM {model.name}\n",
        parameters=f"num_ctx {model.context}",
        template=template,
        details=descriptions.details(read),
        model_info=descriptions.info(model, read),
        capabilities=descriptions.capabilities_of(model, read),
        modified_at=descriptions.modified_at(path),
    )


#: What Ollama's API can change, by path, with what to do here.
_REFUSED: Mapping[str, str] = {
    "pull": "run `arriero models pull NAME`",
    "create": "run `arriero models pull FILE`, or write an entry of the catalogue (docs/models.md)",
    "copy": "write an entry with another name into the catalogue (docs/models.md)",
    "push": "models are not published from here",
    "delete": "run `arriero models rm NAME`",
    "blobs": "name the path of a file in an entry of the catalogue (docs/models.md)",
}


def _refuse(request: Request) -> Response:
    what = request.url.path.removeprefix("/api/").partition("/")[0]
    return errors.response(400, f"/api/{what} is not supported: {_REFUSED[what]}")


def _refuse_blob(request: Request, digest: str) -> Response:  # noqa: ARG001 the path has it
    return _refuse(request)


_REFUSALS: Sequence[tuple[str, str, Callable[..., Response]]] = (
    *((f"/{name}", "POST", _refuse) for name in ("pull", "create", "copy", "push")),
    ("/delete", "DELETE", _refuse),
    ("/blobs/{digest}", "POST", _refuse_blob),
)
for _at, _method, _endpoint in _REFUSALS:
    router.add_api_route(
        _at,
        _endpoint,
        methods=[_method],
        status_code=400,
        summary="Not supported",
        description="Refused with what to do instead.",
        responses=errors.documented(400),
        operation_id=f"refuse_{_at.split('/')[1]}",
    )


def _pools(services: Services) -> Mapping[str, list[PoolView]]:
    found = defaultdict(list)
    for pool in views.pools(services.database):
        if pool.state is PoolState.SERVING:
            found[pool.model].append(pool)
    return found


def _residencies(services: Services) -> Mapping[str, Residency]:
    try:
        with services.publisher.connection() as client:
            return residencies.read(client)
    except (BrokerUnreachable, redis.RedisError):
        return {}  # the catalogue's values hold then, too


def _expires_at(pool: PoolView, model: Model, residency: Residency | None, now: datetime) -> datetime:
    keep = None if isinstance(model.pools.keep_alive, str) else model.pools.keep_alive
    if residency is not None and pool.id in residency.pools:
        keep = residency.keep
    used = now if pool.busy else pool.last_used_at or pool.serving_at or pool.created_at
    return now + _FOREVER if keep is None or keep > _FOREVER else used + keep
