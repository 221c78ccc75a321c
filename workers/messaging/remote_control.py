"""
The commands that Flower and `celery control` send to workers, made to do no harm.

A command that would leave a queue without its reader, or let a pool read the steps of another model, is refused with
what to do instead. A stop is that of a service manager: the steps are finished or requeued.
Inspections are Celery's own.
"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from typing import Any

from celery.utils.time import rate
from celery.worker import control

from app.kernel import log
from app.kernel.broker import is_model_queue
from app.workflows.runs.messages import RUN_STEP
from workers.messaging.rate import RATE

_log = log.get(__name__)

_SLOTS = "a worker has as many threads as its model has slots (`slots` in the catalogue; control.concurrency)"
_QUEUES = "a worker reads the queues of what it serves; see: arriero pools start | stop, arriero hosts cordon"
#: By command, why it is refused.
REFUSED = {
    "add_consumer": _QUEUES,
    "cancel_consumer": _QUEUES,
    "pool_grow": _SLOTS,
    "pool_shrink": _SLOTS,
    "autoscale": _SLOTS,
    "pool_restart": "restart the process instead: arriero restart, or shut this worker down; its parent starts another",
    "time_limit": "a step has its own time: `timeout` in its workflow",
    "revoke": "a message is only a hint: cancel the run instead, with: arriero runs cancel RUN",
    "terminate": "a message is only a hint: cancel the run instead, with: arriero runs cancel RUN",
    "revoke_by_stamped_headers": "messages have no stamped headers",
}
#: The highest rate, in steps per second.
_HIGHEST = 10_000.0


def install() -> None:
    """Replace Celery's commands in this process."""
    for name, why in REFUSED.items():
        control.Panel.data[name] = _refusing(name, why)
    control.Panel.data["rate_limit"] = limit_rate
    control.Panel.data["shutdown"] = shut_down


def limit_rate(state: Any, task_name: str = "", rate_limit: Any = None, **_: Any) -> dict[str, str]:
    """Limit the rate at which a pool takes steps: `10/m`, `2/s`; 0 removes the limit."""
    if task_name != RUN_STEP:
        return {"error": f"only {RUN_STEP} has a rate; scheduled jobs have intervals in the settings"}
    consumer = state.consumer.task_consumer
    queues = [queue.name for queue in consumer.queues] if consumer else []
    if not queues or not all(map(is_model_queue, queues)):
        return {"error": "this worker runs the scheduled jobs too, so its rate is not limited; only that of pools is"}
    try:
        per_second = float(rate(rate_limit) or 0)
    except (ValueError, TypeError, KeyError, ArithmeticError):
        return {"error": f"{str(rate_limit)[:50]!r} is no rate; for example 10/m, 2/s, or 0 for no limit"}
    if not math.isfinite(per_second) or not 0 <= per_second <= _HIGHEST:
        return {"error": f"a rate is from 0 to {_HIGHEST:g} steps per second"}
    RATE.set(per_second)
    # What `inspect registered` shows.
    state.app.tasks[RUN_STEP].rate_limit = str(rate_limit) if per_second else None
    _log.warning("rate_limited", steps_per_second=per_second)
    return {"ok": "new rate limit set successfully" if per_second else "rate limits disabled successfully"}


def shut_down(state: Any, **_: Any) -> dict[str, str]:
    """Stop this worker as SIGTERM does. Its parent starts another one, if it is still wanted."""
    _log.warning("shutdown_requested", worker=state.hostname)
    os.kill(os.getpid(), signal.SIGTERM)
    return {"ok": "stopping"}


def _refusing(name: str, why: str) -> Callable[..., dict[str, str]]:
    def refuse(_: Any, *__: Any, **___: Any) -> dict[str, str]:
        _log.info("command_refused", command=name)
        return {"error": why}

    return refuse
