"""
A pool: one process that holds one model on its devices, and does the steps that need it.

Its agent has reserved the bytes and pinned the devices in the environment before this process began, so that no import
of llama.cpp sees another. It finds out what it needs, has its reservation adjusted or refuses, loads, writes a first
token, and only then takes from the queue. Without a reservation it touches nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import timedelta

from app.fleet import files, header, needs
from app.fleet.holder import Grant, Holder
from app.fleet.model import Model
from app.fleet.pool import Stage
from app.inference.requests import GenerateRequest, Sampling
from app.kernel import addresses, log
from app.kernel import database as databases
from app.kernel.broker import model_queue
from app.kernel.errors import ArrieroError, Conflict, LeaseLost, MemoryNotEnough
from app.kernel.settings import Settings
from workers.application import Application
from workers.engine import Engine
from workers.engine.engine import LlamaEngine
from workers.engine.options import EngineOptions, Profile
from workers.engine.simulated import SimulatedEngine
from workers.heart import LET_GO, Heart

_log = log.get(__name__)

#: Seconds for which a thread may keep the others from running, once they want to; Python's own is ten times that.
_SWITCH_SECONDS = 0.0005
#: How the catalogue's words for flash attention read here.
_FLASH = {"auto": None, "on": True, "off": False}
#: Exit codes of a pool that cannot have the bytes that it needs, and of one that cannot serve.
REFUSED, FAILED = 8, 9
#: Tokens of the text that warms a model up.
_WARM = 2
#: Seconds that it may take.
_WARM_SECONDS = 120.0


def run(settings: Settings, id_: str, epoch: int) -> int:
    """
    Load what was granted and serve its queue until SIGTERM; gives the exit code.

    Raises LeaseLost when nothing is granted, NotFound, ModelFileUnusable, DatabaseBehind, DatabaseUnreachable.
    """
    database = databases.at_head(addresses.of(settings).database_url, pool_size=2)
    try:
        holder = Holder(database, settings.fleet.lease)
        grant = holder.take(id_, epoch)
        heart = Heart(holder, grant, worker_of(grant), settings.fleet.heartbeat)
        heart.start()
        try:
            return _serve(settings, holder, grant, heart)
        finally:
            heart.stop()
    finally:
        database.close()


def worker_of(grant: Grant) -> str:
    """What Celery and Flower call the pool: its model, the end of its id, and whether there is nothing behind it."""
    slug = grant.configuration.rpartition(".")[0]
    return f"{'simulated-' if grant.simulated else ''}pool.{slug}.{grant.id[-6:]}"


def _serve(settings: Settings, holder: Holder, grant: Grant, heart: Heart) -> int:
    began = time.monotonic()
    try:
        model = files.read_catalog(settings.catalog.files).get(grant.model)
        if needs.configuration_id(model) != grant.configuration:
            raise Conflict(f"the entry of {model.name} on this host is not the one that was planned with")
        engine = _loaded(settings, grant, model, heart)
        heart.tell(Stage.WARMING, progress=1.0)
        pace = _warmed(engine, model)
    except MemoryNotEnough as error:
        heart.tell(Stage.REFUSED, str(error))
        _log.error("pool_refused", model=grant.model, reason=str(error))
        return REFUSED
    except LeaseLost as error:
        _log.error("pool_lost_its_claim", model=grant.model, reason=str(error))
        return LET_GO
    except ArrieroError as error:
        heart.tell(Stage.FAILED, str(error))
        _log.error("pool_failed", model=grant.model, reason=str(error))
        return FAILED
    load = timedelta(seconds=time.monotonic() - began)
    _log.info(
        "pool_loaded", model=grant.model, seconds=round(load.total_seconds(), 2), tokens_per_second=round(pace, 1)
    )
    if not grant.simulated:
        holder.note_load(grant, load, pace)
    application = Application(settings)
    return application.serve(worker_of(grant), [model_queue(model.slug)], engine.slots, engine, heart)


def _loaded(settings: Settings, grant: Grant, model: Model, heart: Heart) -> Engine:
    def progress(done: float) -> None:
        heart.tell(Stage.LOADING, progress=done)

    if grant.simulated:
        _log.warning("pool_is_simulated", model=model.name, devices=[part.name for part in grant.parts])
        return _stand_in(grant, model, progress)
    path = files.locate(model, settings.data_dir)
    header.read(path)
    # The engine's thread waits for no other thread of Python for longer than this.
    sys.setswitchinterval(_SWITCH_SECONDS)
    heart.tell(Stage.MEASURING)
    _log.info("model_loading", model=model.name, path=str(path), devices=[part.name for part in grant.parts])
    return LlamaEngine(path, options_of(model, grant), on_progress=progress)


def _stand_in(grant: Grant, model: Model, progress: Callable[[float], None]) -> Engine:
    part = grant.parts[0]
    pace = float(model.simulated.tokens_per_second) * part.speed
    return SimulatedEngine(grant.slots, pace, needs.simulated_load(model, part.bandwidth or 1), progress)


def _warmed(engine: Engine, model: Model) -> float:
    """Write a first text; gives tokens a second."""
    if model.embeds:
        return 0.0
    began = time.monotonic()
    request = GenerateRequest(prompt="Hello", max_tokens=_WARM, sampling=Sampling(temperature=0, ignore_end=True))
    engine.generate(request).result(_WARM_SECONDS)
    return _WARM / max(time.monotonic() - began, 1e-6)


def options_of(model: Model, grant: Grant) -> EngineOptions:
    """How an engine loads the model: its entry of the catalogue, and what was granted."""
    profile = model.prompt
    return EngineOptions(
        slots=model.slots,
        context=model.slots * model.context,
        threads=grant.threads,
        kv_type_k=model.kv.k,
        kv_type_v=model.kv.v,
        flash_attention=_FLASH[model.flash_attention],
        gpu_layers=0 if grant.type == needs.CPU else -1,
        profile=Profile(
            chat_template=profile.chat_template,
            system_as_user=profile.system == "user",
            stop=profile.stop,
            variables=profile.arguments,
        ),
    )
