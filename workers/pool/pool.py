"""
A pool: one process that serves one model on its devices, and executes the steps of that model.

Before the process starts, its bytes are reserved, and its environment makes only its devices visible, so that llama.cpp
never sees others.
The pool estimates what it needs, adjusts its reservation or refuses, loads the model, generates a first token, and only
then reads its queue. Without a reservation it uses no device.
"""

from __future__ import annotations

import socket
import sys
import time
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from datetime import timedelta

from app.catalog import files, header
from app.catalog.catalog import Catalog
from app.catalog.model import FLASH_ATTENTION, Model
from app.catalog.serving import servability
from app.fleet.holder import Grant, ReservationHolder
from app.fleet.ledger.reservation import ReservationRefused
from app.fleet.pool import PoolPhase
from app.footprint.footprint import HOST, Footprint
from app.governance.costs import device_shares
from app.inference.requests import GenerateRequest
from app.kernel import addresses, log
from app.kernel.broker import model_queue
from app.kernel.errors import (
    ArrieroError,
    Conflict,
    DatabaseUnreachable,
    LeaseLost,
    MemoryNotEnough,
    ModelFileDamaged,
    StepFailure,
)
from app.kernel.sections.fleet import FleetSettings
from app.kernel.security.secrets import Secrets
from app.kernel.settings import Settings
from app.scheduler import needs
from app.scheduler.planner.cluster import CPU
from workers.application import Application
from workers.engine import Engine
from workers.engine.engine import LlamaEngine
from workers.engine.options import DraftFile, EngineOptions, Lora
from workers.engine.remote.engine import RemoteEngine
from workers.engine.remote.options import RemoteOptions
from workers.engine.simulated import SimulatedEngine
from workers.memory import embeddings
from workers.memory.model_file import LoadedModelFile
from workers.pool import exporter
from workers.pool.direct import DirectRequests
from workers.pool.exporter import Metered, PoolCollector
from workers.pool.heartbeat import RESERVATION_LOST, Heartbeat
from workers.pool.measurement import Measuring
from workers.pool.preemption import Preemption
from workers.pool.progress import Status
from workers.runtime import Resources, Runtime

_log = log.get(__name__)

#: Seconds after which a running Python thread yields to a waiting one; Python's default is ten times longer.
_SWITCH_SECONDS = 0.0005
#: Heartbeats of a pool without steps are so many intervals apart, at most that part of the time until it is silent.
_IDLE, _SILENT = 3, 0.3
#: Exit codes of a pool that cannot reserve the bytes that it needs, and of one that cannot serve.
REFUSED, FAILED = 8, 9


def run(settings: Settings, id_: str, epoch: int) -> int:
    """
    Load the model of a grant and serve its queue until SIGTERM. Returns the exit code.

    Raises LeaseLost when there is no such grant, DatabaseBehind, DatabaseUnreachable.
    """
    began = time.monotonic()
    resources = Resources.open(settings, _connections)
    try:
        holder = ReservationHolder(resources.database, settings.fleet.lease)
        renewed = time.monotonic()
        grant = holder.take(id_, epoch)
        status = Status(grant.model)
        heartbeat = Heartbeat(
            holder, grant, worker_of(grant), status, settings.fleet.heartbeat, renewed, idle_interval(settings.fleet)
        )
        heartbeat.start()
        pool = _Pool(settings, resources, holder, grant, heartbeat, status)
        try:
            return pool.serve(began)
        finally:
            heartbeat.stop()
            pool.close()
    finally:
        resources.close()


def idle_interval(fleet: FleetSettings) -> timedelta:
    """Return the time between two heartbeats of an idle pool: far less than that after which it counts as silent."""
    longest = min(fleet.heartbeat * _IDLE, fleet.heartbeat_timeout * _SILENT, fleet.lease * _SILENT)
    return max(fleet.heartbeat, longest)


def _connections(catalog: Catalog) -> int:
    """Return the most connections that a pool can use at once: a connection is opened when it is needed."""
    # The grant, which names the model, is read from the database: so the model with the most slots counts. The others
    # are those of the leases, the heartbeat, the measurement, and the two that record direct requests.
    return max((model.slots for model in catalog), default=1) + 5


def worker_of(grant: Grant) -> str:
    """Return the pool's name in Celery and Flower: `pool`, its model, the end of its id; `simulated-` before it."""
    slug = grant.configuration.rpartition(".")[0]
    return f"{'simulated-' if grant.simulated else ''}pool.{slug}.{grant.id[-6:]}"


def options_of(model: Model, settings: Settings, *, gpus: bool, threads: int) -> EngineOptions:
    """
    Return the options of the model's engine, from its entry in the catalogue and its share of the host.

    Raises ModelFileMissing when an adapter, the projector or the draft model is not on this host.
    """
    entry, draft = model.engine, files.locate_draft(model, settings.data_dir)
    given = {key: getattr(entry, key) for key in type(entry).model_fields} | {
        "slots": model.slots,
        "context": model.cells,
        "kv_type_k": model.kv.k,
        "kv_type_v": model.kv.v,
        "flash_attention": FLASH_ATTENTION[model.flash_attention],
        "vectors": model.serves_embeddings,
        "profile": model.prompt,
        "most_threads": threads,
        "store_folder": files.state_folder(model, settings.data_dir),
        "store_key": settings.pools.store_key,
        "projector": files.locate_projector(model, settings.data_dir),
        "image_tokens": None if model.mmproj is None else model.mmproj.image_tokens,
        "loras": [
            Lora(name=lora.name, scale=lora.scale, path=files.locate_adapter(model, lora, settings.data_dir))
            for lora in entry.loras
        ],
        "draft": None if draft is None or entry.draft is None else DraftFile(path=draft, most=entry.draft.most),
    }
    if not gpus:
        given["gpu_layers"] = 0
    return EngineOptions(**given)


class _Pool:
    """A pool from its grant to its end."""

    def __init__(
        self,
        settings: Settings,
        resources: Resources,
        holder: ReservationHolder,
        grant: Grant,
        heartbeat: Heartbeat,
        status: Status,
    ) -> None:
        self.settings, self.resources, self.holder, self.grant = settings, resources, holder, grant
        self.heartbeat, self.status = heartbeat, status
        self._measuring: Measuring | None = None
        self._file: LoadedModelFile | None = None
        self._direct: DirectRequests | None = None
        self._preemption: Preemption | None = None

    def close(self) -> None:
        """Close the measurement of its memory, and what preempts steps."""
        if self._preemption is not None:
            self._preemption.close()
        if self._measuring is not None:
            self._measuring.close()

    def serve(self, began: float) -> int:
        """Load, then serve until the end. `began` is the start of the process, by the monotonic clock."""
        name, worker = self.grant.model, worker_of(self.grant)
        try:
            with self._exported(worker) as exported:
                model = self.resources.catalog.get(name)
                if needs.configuration_id(model) != self.grant.configuration:
                    raise Conflict(f"the catalogue entry of {name} on this host differs from the entry of the plan")
                engine = self._engine_of(model, began)
                _log.info("pool_loaded", model=name, seconds=round(time.monotonic() - began, 2))
                exported.engine = engine
                code = Application(self.settings).serve(
                    worker,
                    [model_queue(model.slug)],
                    engine.slots,
                    self.resources,
                    engine,
                    self.grant.id,
                    on_start=lambda runtime: self._begin(runtime, engine, model, exported),
                    on_phase=self._on_phase,
                )
                if self._measuring is not None and not code:
                    with suppress(DatabaseUnreachable):
                        self._measuring.end()
                return code
        except MemoryNotEnough as error:
            self.status.enter(PoolPhase.REFUSED, str(error))
            _log.error("pool_refused", model=name, reason=str(error))
            return REFUSED
        except LeaseLost as error:
            _log.error("pool_lost_its_reservation", model=name, reason=str(error))
            return RESERVATION_LOST
        except ArrieroError as error:
            reason = str(error)
            if isinstance(error, ModelFileDamaged):
                reason += f"; {self.resources.catalog.get(name).source.replacement(name)}"
            self.status.enter(PoolPhase.FAILED, reason)
            _log.error("pool_failed", model=name, reason=reason)
            return FAILED

    def _begin(self, runtime: Runtime, engine: Engine, model: Model, exported: PoolCollector) -> None:
        assert runtime.tokens is not None, "it has an engine"
        exported.work.figures = runtime.figures
        self.heartbeat.serve(runtime.leases, engine.stalled_for)
        url = addresses.of(self.settings).redis_url
        runtime.model_file = self._file
        if self._file is not None and model.serves_embeddings:
            embeddings.note_file(runtime.runs.database, model.name, self._file)
        runtime.charges.devices = device_shares.of_reservation(runtime.runs.database, self.grant.id)
        self._direct = DirectRequests(runtime, runtime.tokens, url, model.slug, self.grant.id)
        self._preemption = Preemption(runtime.leases, url, model_queue(model.slug))

    def _on_phase(self, phase: PoolPhase) -> None:
        self.status.enter(phase)
        if self._direct is not None:
            self._direct.on_phase(phase)
        if self._preemption is not None:
            self._preemption.on_phase(phase)

    def _exported(self, worker: str) -> AbstractContextManager[PoolCollector]:
        devices = ",".join(part.name for part in self.grant.computing)
        labels = {"model": self.grant.model, "device": devices, "worker": f"{worker}@{socket.gethostname()}"}
        pools, folder = self.settings.pools, self.settings.data_dir
        trusted = self.settings.trusted_hosts
        return exporter.serving(
            worker,
            self.status,
            labels,
            host=pools.metrics_host,
            port=pools.metrics_port,
            data_dir=folder,
            trusted_hosts=trusted,
        )

    def _engine_of(self, model: Model, began: float) -> Metered:
        if self.grant.simulated:
            return self._simulate(model)
        if model.remote is not None:
            return self._connect(model)
        return self._load(model, began)

    def _connect(self, model: Model) -> Metered:
        """The engine of a model that a server serves. A server that is down is no reason not to start."""
        servability.check(model, self.settings)
        options = RemoteOptions.of(model, self.settings.http.ca_file, Secrets(self.settings.secrets_dir))
        self.status.enter(PoolPhase.WARMING)
        engine = RemoteEngine(options, self.status.note_problem)
        with suppress(StepFailure):  # it is noted, and shown with the model
            engine.probe()
        return engine

    def _load(self, model: Model, began: float) -> Metered:
        path = files.locate(model, self.settings.data_dir)
        uuids = [gpu.uuid for gpu in self.grant.gpus]
        options = options_of(model, self.settings, gpus=bool(uuids), threads=self.grant.threads)
        # So the engine's thread never waits longer than this for other Python threads.
        sys.setswitchinterval(_SWITCH_SECONDS)
        device = ",".join(uuids) or CPU
        measuring = self._measuring = Measuring(
            self.settings, self.resources.database, header.read(path), options, device
        )
        self.status.enter(PoolPhase.MEASURING)
        self._adjust(measuring.expect())
        _log.info("model_loading", model=model.name, path=str(path), device=device)
        self.status.enter(PoolPhase.LOADING)
        self._file = LoadedModelFile(path)
        with measuring.loading():
            engine = LlamaEngine(path, options, on_progress=self.status.note_progress)
        self.status.enter(PoolPhase.WARMING)
        measured = measuring.keep(engine)
        if measured is not None:
            self._adjust(measured)
        self.heartbeat.on_renewed(self._adjust_to_growth)
        if model.engine.threads is None:
            self.heartbeat.on_threads(engine.use_threads)
        self.holder.store_load_time(self.grant, timedelta(seconds=time.monotonic() - began))
        return engine

    def _adjust(self, needed: Footprint) -> None:
        """Adjust the reservation to the needed bytes. Raises MemoryNotEnough when they are not available."""
        reserved = needed.reserved()
        needed_bytes = {part.id: reserved[HOST] for part in self.grant.parts if not part.uuid}
        needed_bytes |= {part.id: reserved[place] for place, part in enumerate(self.grant.gpus)}
        self.holder.store_layout(self.grant, needed_bytes, needed.source.value)
        adjusted = self.holder.adjust(self.grant, needed_bytes)
        if isinstance(adjusted, ReservationRefused):
            raise MemoryNotEnough(f"{self.grant.model} ({needed.source.value}): {adjusted.reason}; it", None, None)
        self.grant = replace(self.grant, revision=adjusted)

    def _adjust_to_growth(self) -> None:
        """Reserve what the process has grown by. A refusal is logged; the next pool of the model reserves it."""
        assert self._measuring is not None, "it has loaded"
        if (grown := self._measuring.grown()) is None:
            return
        try:
            self._adjust(grown)
        except MemoryNotEnough as error:
            _log.error("pool_exceeds_its_reservation", model=self.grant.model, reason=str(error))

    def _simulate(self, model: Model) -> Metered:
        part = self.grant.parts[0]
        _log.warning("pool_is_simulated", model=model.name, devices=[part.name for part in self.grant.parts])
        self.status.enter(PoolPhase.LOADING)
        tokens_per_second = float(model.simulated.tokens_per_second) * part.speed
        load = needs.simulated_load(model, part.bandwidth or 1)
        engine = SimulatedEngine(
            self.grant.slots, tokens_per_second, load, self.status.note_progress, context=model.context
        )
        self.status.enter(PoolPhase.WARMING)
        engine.generate(GenerateRequest(prompt="Hello", max_tokens=1)).result()
        return engine
