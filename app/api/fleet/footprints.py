"""The resource `footprint` of a model: its memory on devices of this host, by source of the figure."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import Query
from pydantic import BaseModel, ConfigDict, Field

from app.access.callers import KeyScope
from app.api import problems
from app.api.callers import requires
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.catalog import catalog, files, header
from app.catalog.metadata import Header
from app.catalog.model import Model
from app.devices import pinning
from app.devices.device import CPU, HardwareKind, Inventory, MeasuredDevice
from app.footprint import configuration, estimate, footprint
from app.footprint.estimate import Estimate
from app.footprint.footprint import HOST, Footprint
from app.kernel.database import Database
from app.kernel.errors import InvalidInput, ModelServerUnusable, ModelUnsupported, NotFound, Problem
from app.kernel.settings import Settings, environment_of
from app.kernel.units.sizes import rounded
from app.scheduler import needs

router = ApiRouter(prefix="/v1/catalog", tags=["models"], dependencies=[requires(KeyScope.READ, all_namespaces=True)])

#: The options of a query, and the catalogue keys that they replace.
KEYS: Mapping[str, str] = {
    "context": "context", "slots": "slots", "kv_type_k": "kv.k", "kv_type_v": "kv.v",
    "flash_attention": "flash_attention", "layout": "engine.layout", "kept": "engine.kept", "batch": "engine.batch",
    "ubatch": "engine.ubatch", "swa_full": "engine.swa_full", "gpu_layers": "engine.gpu_layers",
    "split_mode": "engine.split_mode", "park_bytes": "engine.park_bytes",
    "embedding_context": "engine.embedding_context",
}  # fmt: skip


class FootprintQuery(BaseModel):
    """Options that replace values of the model's entry."""

    model_config = ConfigDict(extra="forbid")

    context: int | None = Field(default=None, description="tokens of one slot")
    slots: int | None = None
    kv_type_k: str | None = None
    kv_type_v: str | None = None
    flash_attention: str | None = Field(default=None, description="auto, on or off")
    layout: str | None = Field(default=None, description="unified or streams")
    kept: int | None = None
    batch: int | None = None
    ubatch: int | None = None
    swa_full: bool | None = None
    gpu_layers: int | None = Field(default=None, description="-1 for all")
    split_mode: str | None = None
    park_bytes: int | None = None
    embedding_context: int | None = None
    devices: str = Field(default=CPU, description="cpu, or comma-separated names of GPUs or simulated devices")


class ShareOut(BaseModel):
    """The share of one device in a footprint, in bytes."""

    device: str
    simulated: bool = Field(description="the device is simulated")
    weights: int
    cache: int = Field(description="keys, values and recurrent states")
    compute: int = Field(description="llama.cpp's compute buffers")
    output: int = Field(description="logits and vectors")
    process: int = Field(description="interpreter, tokenizer, working memory; on a GPU the driver context")
    parked: int = Field(description="maximum for the states of parked requests")
    total: int
    margin: int = Field(description="safety margin")
    reserved: int = Field(description="total plus margin")


class FootprintOut(BaseModel):
    """A footprint from one source."""

    source: str = Field(examples=["measured", "dry run", "closed form"])
    chosen: bool = Field(description="the best available source")
    shares: list[ShareOut]
    notes: list[str]


class EstimateOut(BaseModel):
    """The footprints of a model in one configuration, from all available sources."""

    model: str
    host: str
    configuration: dict[str, Any]
    build: str = Field(description="of llama.cpp")
    footprints: list[FootprintOut] = Field(description="the best first")
    missing: dict[str, str] = Field(description="unavailable sources, each with its reason")


@router.get("/{name}/footprint", summary="Memory that a model needs", responses=problems.documented(404, 409, 422))
def get(name: str, query: Annotated[FootprintQuery, Query()], services: InjectedServices) -> EstimateOut:
    """
    The memory that a model needs, by device and source.

    On the CPU a dry run is made for the first query of a configuration. On GPUs only pools make dry runs, because they
    hold a reservation.
    """
    model = with_options(services.catalog.get(name), query.model_dump(exclude_none=True, exclude={"devices"}))
    chosen = devices_of(query.devices, services.devices.measure())
    found = estimate_model(model, chosen, services.settings, services.database)
    return answer_of(model, found)


def with_options(model: Model, given: Mapping[str, Any]) -> Model:
    """Return the model with the given values. Raises InvalidInput with every problem, by the names of the options."""
    return catalog.with_values(
        model, {KEYS[name]: value for name, value in given.items()}, {key: n for n, key in KEYS.items()}
    )


def devices_of(names: str, inventory: Inventory) -> tuple[MeasuredDevice, ...]:
    """
    Return GPUs and simulated devices by their comma-separated names, in that order; none for `cpu`.

    Raises NotFound for an unknown name, and InvalidInput for devices that one process cannot use together.
    """
    known = {device.name: device for device in inventory.devices}
    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in known:
            raise NotFound("device", name, list(known))
    if chosen == [CPU]:
        return ()
    found = tuple(known[name] for name in chosen)
    if problem := _conflict(found):
        raise InvalidInput([Problem("devices", f"{names!r}: {problem}", "cpu alone, or GPUs of one host")], "devices")
    return found


def _conflict(devices: Sequence[MeasuredDevice]) -> str:
    """Return why one process cannot use these devices together; empty when it can."""
    if any(device.kind is HardwareKind.CPU for device in devices):
        return "cpu cannot be combined with GPUs; the host's RAM is part of every load on GPUs"
    if len({device.name for device in devices}) < len(devices):
        return "a device is named twice"
    if len({device.kind for device in devices}) > 1:
        return "real and simulated devices are mixed"
    if len(devices) > 1 and any(device.parent for device in devices):
        return "a process can use only one MIG instance at a time"
    return ""


def estimate_model(
    model: Model,
    devices: Sequence[MeasuredDevice],
    settings: Settings,
    database: Database | None,
    *,
    dry: bool | None = None,
    adapters: Sequence[Header] = (),
    projector: Header | None = None,
) -> Estimate:
    """
    Estimate a model on these devices of this host. `dry` allows a dry run; None allows it only on the CPU.

    Raises ModelFileUnusable when the file is not here, or an adapter is of another architecture.
    """
    if model.remote is not None:
        ram = rounded(needs.SERVER_POOL_BYTES)
        raise ModelServerUnusable(
            f"{model.name} is served by {model.remote.url}: it uses no device, and its pool reserves {ram} of RAM"
        )
    read = header.read(files.locate(model, settings.data_dir))
    own = [header.read(files.locate_adapter(model, lora, settings.data_dir)) for lora in model.engine.loras]
    for adapter in (*own, *adapters):
        if adapter.architecture != read.architecture:
            raise ModelUnsupported(
                adapter.path, f"it is an adapter of {adapter.architecture}, not of {read.architecture}"
            )
    found = files.locate_projector(model, settings.data_dir)
    if projector is None and found is not None:
        projector = header.read(found)
    draft = files.locate_draft(model, settings.data_dir)
    identity = estimate.identify(
        read,
        configuration.of_model(model, gpus=len(devices)),
        devices,
        adapters=[*own, *adapters],
        projector=projector,
        draft=None if draft is None else header.read(draft),
    )
    real = all(device.kind is HardwareKind.GPU for device in devices)
    pinned = environment_of(settings) | pinning.environment(devices)
    allowed = dry if dry is not None else not devices
    return estimate.estimate(
        identity, database, settings.fleet.host_here, allow_dry_run=allowed and real, environment=pinned
    )


def answer_of(model: Model, found: Estimate) -> EstimateOut:
    """Return the answer for an estimate, which the API and the command share."""
    return EstimateOut(
        model=model.name,
        host=socket.gethostname(),
        configuration=found.identity.configuration.as_json(),
        build=found.identity.build,
        footprints=[_out(one, found.identity.devices, chosen=one is found.best) for one in found.footprints],
        missing={source.value: reason for source, reason in found.missing.items()},
    )


def _out(one: Footprint, devices: Sequence[MeasuredDevice], *, chosen: bool) -> FootprintOut:
    reserved = one.reserved()
    names = {HOST: CPU} | {place: device.name for place, device in enumerate(devices)}
    simulated = {place for place, device in enumerate(devices) if device.kind is HardwareKind.SIMULATED}
    shares = [
        ShareOut(
            device=names[share.place],
            simulated=share.place in simulated,
            total=share.total,
            margin=reserved[share.place] - share.total,
            reserved=reserved[share.place],
            **{part: getattr(share, part) for part in footprint.PARTS},
        )
        for share in one.shares
    ]
    return FootprintOut(source=one.source.value, chosen=chosen, shares=shares, notes=list(one.notes))
