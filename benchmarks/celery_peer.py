"""
The peer: a plain Celery application of noops, as its worker processes load it.

`PEER_BROKER_URL` says where the broker is. `PEER_SETTINGS` is `same` for the settings of Arriero's own broker, or
`defaults` for Celery's. Only results that somebody waits for, or that a chord needs, are kept. With `PEER_STAMPS`, a
task that has a label adds a stamp of that label to the file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from celery import Celery

from app.kernel import broker
from app.kernel.sections.servers import BrokerSettings
from benchmarks.stamps import Stamps

URL_VARIABLE = "PEER_BROKER_URL"
SETTINGS_VARIABLE = "PEER_SETTINGS"
STAMPS_VARIABLE = "PEER_STAMPS"

#: The queue of the peer's tasks under `same`.
QUEUE = broker.IO_QUEUE


def application(url: str, settings: str) -> Celery:
    """The application, with its three tasks."""
    if settings == "same":
        made = broker.celery_app(url, BrokerSettings())
        made.conf.task_default_queue = QUEUE
    else:
        made = Celery("peer", set_as_current=False, broker=url)
        made.conf.update(broker_connection_retry_on_startup=True)
    made.conf.result_backend = url

    file = os.environ.get(STAMPS_VARIABLE)
    stamps = Stamps(Path(file)) if file else None

    def note(label: str, began: float) -> None:
        if stamps is not None and label:
            stamps.add(label, began, time.time())

    @made.task(shared=False, name="peer.noop", ignore_result=True)
    def noop(label: str = "") -> None:
        """Do nothing."""
        note(label, time.time())

    @made.task(shared=False, name="peer.kept", ignore_result=False)
    def kept(label: str = "") -> None:
        """Do nothing, and keep the result."""
        note(label, time.time())

    @made.task(shared=False, name="peer.join", ignore_result=False)
    def join(results: Sequence[object], label: str = "") -> Mapping[str, object]:
        began = time.time()
        joined = {str(n): result for n, result in enumerate(results)}
        note(label, began)
        return joined

    return made


if URL_VARIABLE in os.environ:
    app = application(os.environ[URL_VARIABLE], os.environ[SETTINGS_VARIABLE])
