"""
A pool: one process that holds one model on its device, and does the steps that need it.

The device was pinned in the environment before this process began, so that no import of llama.cpp sees another.
Nothing is taken from the queue before the model is loaded.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from app.fleet import files, header
from app.fleet.model import Model
from app.kernel import log
from app.kernel.broker import model_queue
from app.kernel.settings import Settings
from workers.application import Application
from workers.engine import Engine
from workers.engine.sequential import SequentialEngine

_log = log.get(__name__)


def run(settings: Settings, name: str, device: str) -> int:
    """
    Load the model and serve its queue until SIGTERM; gives the exit code.

    Raises NotFound, ModelFileMissing, ModelFileDamaged, DatabaseBehind, DatabaseUnreachable.
    """
    model = files.read_catalog(settings.catalog.files).get(name)
    path = files.locate(model, settings.data_dir)
    header.read(path)
    application = Application(settings)
    engine = _load(settings, model, path, device)
    return application.serve(f"pool.{model.slug}", [model_queue(model.slug)], engine.slots, engine)


def _load(settings: Settings, model: Model, path: Path, device: str) -> Engine:
    threads = settings.pools.threads or len(os.sched_getaffinity(0))
    begun = time.monotonic()
    _log.info("model_loading", model=model.name, path=str(path), device=device, threads=threads)
    engine = SequentialEngine(path, context=model.context, threads=threads, gpu_layers=0 if device == "cpu" else -1)
    _log.info("model_loaded", model=model.name, seconds=round(time.monotonic() - begun, 3), slots=engine.slots)
    return engine
