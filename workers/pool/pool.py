"""
A pool: one process that holds one model on its devices, and does the steps that need it.

Its agent has reserved the bytes and pinned the devices in the environment before this process began, so that no import
of llama.cpp sees another. It finds out what it needs, has its reservation adjusted or refuses, loads, writes a first
token, and only then takes from the queue. Without a reservation it touches nothing.
"""

from __future__ import annotations

import socket
import sys
import time
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from datetime import timedelta

from app.catalog import files, header
from app.catalog.model import FLASH_ATTENTION, Model
from app.fleet.holder import Grant, ReservationHolder
from app.fleet.ledger.reservation import ReservationRefused
from app.fleet.pool import PoolPhase
from app.footprint.footprint import HOST, Footprint
from app.inference.requests import GenerateRequest
from app.kernel import addresses, log
from app.kernel import database as databases
from app.kernel.broker import model_queue
from app.kernel.errors import ArrieroError, Conflict, DatabaseUnreachable, LeaseLost, MemoryNotEnough
from app.kernel.settings import Settings
from app.scheduler import needs
from workers.application import Application
from workers.engine.engine import LlamaEngine
from workers.engine.options import EngineOptions, Lora
from workers.engine.simulated import SimulatedEngine
from workers.pool import exporter
from workers.pool.exporter import Metered, PoolCollector
from workers.pool.heartbeat import LET_GO, Heartbeat
from workers.pool.measurement import Measuring
from workers.pool.progress import Status

_log = log.get(__name__)

#: Seconds for which a thread may keep the others from running, once they want to; Python's own is ten times that.
_SWITCH_SECONDS = 0.0005
#: Exit codes of a pool that cannot have the bytes that it needs, and of one that cannot serve.
REFUSED, FAILED = 8, 9


def run(settings: Settings, id_: str, epoch: int) -> int:
    """
    Load what was granted and serve its queue until SIGTERM; gives the exit code.

    Raises LeaseLost when nothing is granted, DatabaseBehind, DatabaseUnreachable.
    """
    began = time.monotonic()
    database = databases.open_at_head(addresses.of(settings).database_url, pool_size=2)
    try:
        holder = ReservationHolder(database, settings.fleet.lease)
        taking = time.monotonic()
        grant = holder.take(id_, epoch)
        status = Status(grant.model)
        heart = Heartbeat(holder, grant, worker_of(grant), status, settings.fleet.heartbeat, taking)
        heart.start()
        pool = _Pool(settings, holder, grant, heart, status)
        try:
            return pool.serve(began)
        finally:
            heart.stop()
            pool.close()
    finally:
        database.close()


def worker_of(grant: Grant) -> str:
    """What Celery and Flower call the pool: its model, the end of its id, and whether there is nothing behind it."""
    slug = grant.configuration.rpartition(".")[0]
    return f"{'simulated-' if grant.simulated else ''}pool.{slug}.{grant.id[-6:]}"


def options_of(model: Model, settings: Settings, *, gpus: bool, threads: int) -> EngineOptions:
    """
    How an engine loads the model: its entry of the catalogue, and its part of the host.

    Raises ModelFileMissing for an adapter that is not here.
    """
    entry = model.engine
    given = {key: getattr(entry, key) for key in type(entry).model_fields} | {
        "slots": model.slots,
        "context": model.cells,
        "kv_type_k": model.kv.k,
        "kv_type_v": model.kv.v,
        "flash_attention": FLASH_ATTENTION[model.flash_attention],
        "vectors": model.serves_embeddings,
        "profile": model.prompt,
        "threads": entry.threads or threads,
        "loras": [
            Lora(name=lora.name, scale=lora.scale, path=files.locate_adapter(model, lora, settings.data_dir))
            for lora in entry.loras
        ],
    }
    if not gpus:
        given["gpu_layers"] = 0
    return EngineOptions(**given)


class _Pool:
    """A pool from its grant to its end."""

    def __init__(
        self, settings: Settings, holder: ReservationHolder, grant: Grant, heart: Heartbeat, status: Status
    ) -> None:
        self.settings, self.holder, self.grant = settings, holder, grant
        self.heart, self.status = heart, status
        self._measuring: Measuring | None = None

    def close(self) -> None:
        """Let go of what watches its memory."""
        if self._measuring is not None:
            self._measuring.close()

    def serve(self, began: float) -> int:
        """Load, then serve until the end. `began` is when the process did, by the monotonic clock."""
        name, worker = self.grant.model, worker_of(self.grant)
        try:
            with self._exported(worker) as exported:
                model = files.read_catalog(self.settings.catalog.files).get(name)
                if needs.configuration_id(model) != self.grant.configuration:
                    raise Conflict(f"the entry of {name} on this host is not the one that was planned with")
                engine = self._stand_in(model) if self.grant.simulated else self._load(model, began)
                _log.info("pool_loaded", model=name, seconds=round(time.monotonic() - began, 2))
                exported.engine = engine
                queues = [model_queue(model.slug)]
                code = Application(self.settings).serve(
                    worker, queues, engine.slots, engine, self.status, self.heart, self.grant.id
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
            _log.error("pool_lost_its_claim", model=name, reason=str(error))
            return LET_GO
        except ArrieroError as error:
            self.status.enter(PoolPhase.FAILED, str(error))
            _log.error("pool_failed", model=name, reason=str(error))
            return FAILED

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

    def _load(self, model: Model, began: float) -> Metered:
        path = files.locate(model, self.settings.data_dir)
        uuids = [gpu.uuid for gpu in self.grant.gpus]
        options = options_of(model, self.settings, gpus=bool(uuids), threads=self.grant.threads)
        # The engine's thread waits for no other thread of Python for longer than this.
        sys.setswitchinterval(_SWITCH_SECONDS)
        device = ",".join(uuids) or needs.CPU
        measuring = self._measuring = Measuring(self.settings, header.read(path), options, device)
        self.status.enter(PoolPhase.MEASURING)
        self._claim(measuring.expect())
        _log.info("model_loading", model=model.name, path=str(path), device=device)
        self.status.enter(PoolPhase.LOADING)
        with measuring.loading():
            engine = LlamaEngine(path, options, on_progress=self.status.note_progress)
        self.status.enter(PoolPhase.WARMING)
        measured = measuring.keep(engine)
        if measured is not None:
            self._claim(measured)
        self.heart.on_beat(self._mind_the_memory)
        if model.engine.threads is None:
            self.heart.on_threads(engine.use_threads)
        self.holder.store_load_time(self.grant, timedelta(seconds=time.monotonic() - began))
        return engine

    def _claim(self, needed: Footprint) -> None:
        """Have the reservation adjusted to what is needed. Raises MemoryNotEnough with what there is."""
        reserved = needed.reserved()
        wanted = {part.id: reserved[HOST] for part in self.grant.parts if not part.uuid}
        wanted |= {part.id: reserved[place] for place, part in enumerate(self.grant.gpus)}
        self.holder.store_layout(self.grant, wanted, needed.source.value)
        adjusted = self.holder.adjust(self.grant, wanted)
        if isinstance(adjusted, ReservationRefused):
            raise MemoryNotEnough(f"{self.grant.model} ({needed.source.value}): {adjusted.reason}; it", None, None)
        self.grant = replace(self.grant, revision=adjusted)

    def _mind_the_memory(self) -> None:
        """Claim what the process has grown by. A refusal is reported: the next pool of the model requests that much."""
        assert self._measuring is not None, "it has loaded"
        if (grown := self._measuring.grown()) is None:
            return
        try:
            self._claim(grown)
        except MemoryNotEnough as error:
            _log.error("pool_outgrew_its_claim", model=self.grant.model, reason=str(error))

    def _stand_in(self, model: Model) -> Metered:
        part = self.grant.parts[0]
        _log.warning("pool_is_simulated", model=model.name, devices=[part.name for part in self.grant.parts])
        self.status.enter(PoolPhase.LOADING)
        pace = float(model.simulated.tokens_per_second) * part.speed
        load = needs.simulated_load(model, part.bandwidth or 1)
        engine = SimulatedEngine(self.grant.slots, pace, load, self.status.note_progress)
        self.status.enter(PoolPhase.WARMING)
        engine.generate(GenerateRequest(prompt="Hello", max_tokens=1)).result()
        return engine
