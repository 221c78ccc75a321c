"""
The Celery application, for `celery -A workers.main`.

Celery's command needs it at import; everything else is created when a worker starts.
Such a worker needs CELERY_CUSTOM_WORKER_POOL=workers.messaging.thread_pool:TaskPool and `--pool custom`.
"""

from __future__ import annotations

from typing import Any

from celery.signals import worker_init, worker_shutdown

from app.kernel import settings
from workers.application import Application
from workers.runtime import Resources

application = Application(settings.load().settings)
app = application.celery


@worker_init.connect
def _start(sender: Any, **_: Any) -> None:
    name, threads = sender.hostname.partition("@")[0], sender.concurrency
    resources = Resources.open(application.settings, lambda _: threads + 1)
    worker_shutdown.connect(lambda **_: resources.close(), weak=False)
    application.start(name, resources)


@worker_shutdown.connect
def _stop(**_: Any) -> None:
    application.stop()
