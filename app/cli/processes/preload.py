"""
The modules that the programs of the process tree import, loaded once in their parent.

The programs are forks of `arriero up`, so that they start without importing anything and share this memory. Nothing
here opens a file or a connection, or starts a thread that stays: otherwise the parent could not be forked.
Modules with threads of their own, llama.cpp and what only one program needs are not here.
"""

from __future__ import annotations

import gc
import importlib
import threading
from collections.abc import Sequence

from app.kernel.processes import forking

#: By name, because `app` never imports `workers`.
MODULES = (
    "app.api.main",
    "app.cli.processes.api",
    "app.cli.processes.requeue",
    "celery.apps.beat",
    "celery.apps.worker",
    "celery.worker.autoscale",
    "celery.worker.components",
    "celery.worker.consumer",
    "celery.worker.strategy",
    "kombu.transport.redis",
    "uvicorn.lifespan.on",
    "uvicorn.loops.asyncio",
    "uvicorn.protocols.http.h11_impl",
    "workers.agent.agent",
    "workers.application",
    "workers.messaging.beat",
    "workers.messaging.consumer",
    "workers.messaging.thread_pool",
    "workers.programs",
)


class Preload:
    """Imports modules on a thread, while the parent starts the servers."""

    def __init__(self, modules: Sequence[str] = MODULES) -> None:
        self._modules = modules
        self._thread = threading.Thread(target=self._run, name="preload", daemon=True)

    def start(self) -> None:
        """Begin. Garbage is not collected meanwhile: there is none, and looking for it takes a sixth of the time."""
        gc.disable()
        self._thread.start()

    def finish(self) -> None:
        """Wait until all are imported. What is loaded now is shared by the forks."""
        self._thread.join()
        forking.freeze()
        gc.enable()

    def _run(self) -> None:
        # A module that cannot be imported ends the thread with its traceback; the program that needs it says so too.
        for module in self._modules:
            importlib.import_module(module)
