"""
The peer: a plain Celery application of noops, as its worker processes load it.

`PEER_BROKER_URL` says where the broker is. `PEER_SETTINGS` is `same` for the settings of Arriero's own broker, or
`defaults` for Celery's. Only results that somebody waits for, or that a chord needs, are kept.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from celery import Celery

from app.kernel import broker
from app.kernel.settings import BrokerSettings

URL_VARIABLE = "PEER_BROKER_URL"
SETTINGS_VARIABLE = "PEER_SETTINGS"

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

    @made.task(shared=False, name="peer.noop", ignore_result=True)
    def noop() -> None:
        """Do nothing."""

    @made.task(shared=False, name="peer.kept", ignore_result=False)
    def kept() -> None:
        """Do nothing, and keep the result."""

    @made.task(shared=False, name="peer.join", ignore_result=False)
    def join(results: Sequence[object]) -> Mapping[str, object]:
        return {str(n): result for n, result in enumerate(results)}

    return made


if URL_VARIABLE in os.environ:
    app = application(os.environ[URL_VARIABLE], os.environ[SETTINGS_VARIABLE])
