"""
A pool: one process that holds one model on its device, and does the steps that need it.

The device was pinned in the environment before this process began, so that no import of llama.cpp sees another.
Nothing is taken from the queue before the model is loaded.
"""

from __future__ import annotations

import os
import socket
import sys

from app.fleet import files, header
from app.fleet.model import FLASH_ATTENTION, Model
from app.kernel import log
from app.kernel.broker import model_queue
from app.kernel.settings import Settings
from workers import exporter
from workers.application import Application
from workers.engine.engine import LlamaEngine
from workers.engine.options import EngineOptions, Lora
from workers.stage import Stage, Status

_log = log.get(__name__)

#: Seconds for which a thread may keep the others from running, once they want to; Python's own is ten times that.
_SWITCH_SECONDS = 0.0005


def run(settings: Settings, name: str, device: str) -> int:
    """
    Load the model and serve its queue until SIGTERM; gives the exit code.

    Raises NotFound, ModelFileUnusable, MemoryNotEnough, ServerNotStarted, DatabaseBehind, DatabaseUnreachable.
    """
    model = files.read_catalog(settings.catalog.files).get(name)
    path = files.locate(model, settings.data_dir)
    header.read(path)
    application = Application(settings)
    # The engine's thread waits for no other thread of Python for longer than this.
    sys.setswitchinterval(_SWITCH_SECONDS)
    name, status = f"pool.{model.slug}", Status(model.name)
    labels = {"model": model.name, "device": device, "worker": f"{name}@{socket.gethostname()}"}
    pools = settings.pools
    with exporter.serving(
        name, status, labels, host=pools.metrics_host, port=pools.metrics_port, data_dir=settings.data_dir
    ) as exported:
        _log.info("model_loading", model=model.name, path=str(path), device=device)
        engine = LlamaEngine(path, options_of(model, settings, device), on_progress=status.note_progress)
        exported.engine = engine
        status.enter(Stage.SERVING)
        return application.serve(name, [model_queue(model.slug)], engine.slots, engine, status)


def options_of(model: Model, settings: Settings, device: str) -> EngineOptions:
    """
    How an engine loads the model: its entry of the catalogue, and the share of this host.

    Raises ModelFileMissing for an adapter that is not here.
    """
    entry = model.engine
    given = {key: getattr(entry, key) for key in type(entry).model_fields} | {
        "slots": model.slots,
        "context": model.cells,
        "kv_type_k": model.kv.k,
        "kv_type_v": model.kv.v,
        "flash_attention": FLASH_ATTENTION[model.flash_attention],
        "profile": model.prompt,
        "threads": entry.threads or settings.pools.threads or max(len(os.sched_getaffinity(0)) - 1, 1),
        "loras": [
            Lora(name=lora.name, scale=lora.scale, path=files.locate_adapter(model, lora, settings.data_dir))
            for lora in entry.loras
        ],
    }
    if device == "cpu":
        given["gpu_layers"] = 0
    return EngineOptions(**given)
