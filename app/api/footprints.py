"""Footprints: how much memory a model takes on devices of this host, and where each figure comes from."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from app.api import problems
from app.api.services import Use
from app.catalog import catalog, files, header
from app.catalog.metadata import Header
from app.catalog.model import Model
from app.devices.device import CPU, HardwareKind, Inventory, MeasuredDevice
from app.footprint import configuration, estimate, footprint
from app.footprint.estimate import Estimate
from app.footprint.footprint import HOST, Footprint
from app.kernel.database import Database
from app.kernel.errors import InvalidInput, ModelUnsupported, NotFound, Problem
from app.kernel.settings import Settings, environment_of

router = APIRouter(prefix="/v1/models", tags=["models"])

#: Options that a question may change, and the keys of a catalogue that they stand for.
KEYS: Mapping[str, str] = {
    "context": "context", "slots": "slots", "kv_type_k": "kv.k", "kv_type_v": "kv.v",
    "flash_attention": "flash_attention", "layout": "engine.layout", "kept": "engine.kept", "batch": "engine.batch",
    "ubatch": "engine.ubatch", "swa_full": "engine.swa_full", "gpu_layers": "engine.gpu_layers",
    "split_mode": "engine.split_mode", "park_bytes": "engine.park_bytes",
    "embedding_context": "engine.embedding_context",
}  # fmt: skip


class FootprintQuery(BaseModel):
    """What to reckon with in place of the model's entry. What is left out stays as the entry says."""

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
    devices: str = Field(default=CPU, description="cpu, or GPUs or simulated devices by name, with commas")


class ShareOut(BaseModel):
    """What is taken of one device, in bytes."""

    device: str
    simulated: bool = Field(description="the device is not there")
    weights: int
    cache: int = Field(description="keys, values and states")
    compute: int = Field(description="what llama.cpp computes in")
    output: int = Field(description="logits and vectors")
    process: int = Field(description="interpreter, tokenizer, working memory; on a GPU the driver's context")
    parked: int = Field(description="at the most, for the states of parked requests")
    total: int
    margin: int = Field(description="what is added to be safe")
    reserved: int = Field(description="total and margin")


class FootprintOut(BaseModel):
    """A footprint from one source."""

    source: str = Field(examples=["measured", "dry run", "closed form"])
    chosen: bool = Field(description="this is the one to believe")
    shares: list[ShareOut]
    notes: list[str]


class EstimateOut(BaseModel):
    """All that can be told of a model in a configuration."""

    model: str
    host: str
    configuration: dict[str, Any]
    build: str = Field(description="of llama.cpp")
    footprints: list[FootprintOut] = Field(description="the best first")
    missing: dict[str, str] = Field(description="why a source has nothing to say")


@router.get("/{name}/footprint", summary="Memory that a model takes", responses=problems.documented(404, 409, 422))
def get(name: str, query: Annotated[FootprintQuery, Query()], services: Use) -> EstimateOut:
    """
    The memory that a model takes, by device and source.

    On the CPU a dry run is made the first time that a configuration is asked for. On GPUs it is made by pools alone,
    which hold a reservation.
    """
    model = asked(services.catalog.get(name), query.model_dump(exclude_none=True, exclude={"devices"}))
    chosen = devices_of(query.devices, services.devices.measure())
    found = estimated(model, chosen, services.settings, services.database)
    return shown(model, found)


def asked(model: Model, given: Mapping[str, Any]) -> Model:
    """The model with other values. Raises InvalidInput with every problem, by the names of the options."""
    return catalog.changed(
        model, {KEYS[name]: value for name, value in given.items()}, {key: n for n, key in KEYS.items()}
    )


def devices_of(names: str, inventory: Inventory) -> tuple[MeasuredDevice, ...]:
    """
    GPUs and simulated devices by their names, in that order; none for `cpu`.

    Raises NotFound for a name that no device has, and InvalidInput for devices that one process cannot have together.
    """
    known = {device.name: device for device in inventory.devices}
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in known:
            raise NotFound("device", name, list(known))
    if wanted == [CPU]:
        return ()
    found = tuple(known[name] for name in wanted)
    if problem := _apart(found):
        raise InvalidInput([Problem("devices", f"{names!r}: {problem}", "cpu alone, or GPUs of one host")], "devices")
    return found


def _apart(devices: Sequence[MeasuredDevice]) -> str:
    """Why one process cannot have these devices together; empty when it can."""
    if any(device.kind is HardwareKind.CPU for device in devices):
        return "the host's RAM is a part of every load on GPUs"
    if len({device.name for device in devices}) < len(devices):
        return "a device is named twice"
    if len({device.kind for device in devices}) > 1:
        return "some are simulated and some are not"
    if len(devices) > 1 and any(device.parent for device in devices):
        return "CUDA lets a process see one instance of a divided GPU (MIG) at a time"
    return ""


def estimated(
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
    The estimate for a model on these GPUs of this host. `dry` allows a dry run; None allows it on the CPU alone.

    Raises ModelFileUnusable when the file is not here, or an adapter is of another architecture.
    """
    read = header.read(files.locate(model, settings.data_dir))
    own = [header.read(files.locate_adapter(model, lora, settings.data_dir)) for lora in model.engine.loras]
    for adapter in (*own, *adapters):
        if adapter.architecture != read.architecture:
            raise ModelUnsupported(
                adapter.path, f"it is an adapter of {adapter.architecture}, not of {read.architecture}"
            )
    identity = estimate.identify(
        read,
        configuration.of_model(model, gpus=len(devices)),
        devices,
        adapters=[*own, *adapters],
        projector=projector,
    )
    real = all(device.kind is HardwareKind.GPU for device in devices)
    pinned = environment_of(settings) | {"CUDA_VISIBLE_DEVICES": ",".join(device.uuid for device in devices)}
    allowed = dry if dry is not None else not devices
    return estimate.estimate(identity, database, settings.fleet.host_here, dry=allowed and real, environment=pinned)


def shown(model: Model, found: Estimate) -> EstimateOut:
    """The estimate as the API and the command show it."""
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
