r"""
The broker: the Celery application, the names of queues, and messages that follow a commit.

A message is a hint: it names a task and a few ids, and losing it loses nothing.
Messages are acknowledged when taken and never prefetched; results are never kept; delays never live here.
Nobody waits long for the broker: what cannot be sent within a moment is left to the sweep.

Redis keys, but for the last made by Celery and RedBeat:
    control, io, model.<slug>   lists: the waiting messages of priority 0, the first served
    <queue>\x06\x16<n>            lists: those of priority n
    unacked*                    messages between the broker's hand and the worker's
    redbeat:*                   the schedule and the lock of beat
    arriero:dead-letters*       what workers could not read (`app/kernel/dead_letters.py`)
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

import redis
from celery import Celery
from kombu.exceptions import LimitExceeded, OperationalError
from kombu.pools import ProducerPool

from app.kernel import log
from app.kernel.dead_letters import DeadLetters, is_wrong_type
from app.kernel.errors import BrokerUnreachable
from app.kernel.postgres.breaker import Breaker
from app.kernel.settings import BrokerSettings

_log = log.get(__name__)

#: Scheduled jobs.
CONTROL_QUEUE = "control"
#: Steps that need no model.
IO_QUEUE = "io"

#: Begins the names of the queues of models.
_MODEL = "model."

#: Priorities of messages; Redis keeps a list for each, and smaller goes first.
PRIORITIES: Mapping[str, int] = {"interactive": 0, "standard": 3, "batch": 6}
#: Places within a class.
RANKS = 3
_PRIORITY_STEPS = tuple(range(len(PRIORITIES) * RANKS))
_SEPARATOR = "\x06\x16"

#: Seconds for which whoever sends a message, or asks how many wait, waits for the broker.
_ANSWER = 2.0
#: While the broker is silent, it is asked this often.
_PROBE_EVERY = timedelta(seconds=2)
#: Connections for sending, at the most: more than a process has threads that send.
_SENDING = 64
#: What says that the broker is not there.
_UNREACHABLE = (OperationalError, LimitExceeded, redis.RedisError, OSError)


def priority_of(priority: str, rank: int) -> int:
    """The priority of a message by its class and the place within it, 0 to 2."""
    return PRIORITIES[priority] + rank


def model_queue(slug: str) -> str:
    """The queue of the steps that need the model."""
    return f"{_MODEL}{slug}"


def is_model_queue(queue: str) -> bool:
    """Whether the steps of the queue need a model."""
    return queue.startswith(_MODEL)


def is_ours(queue: str) -> bool:
    """Whether the queue holds tasks; Celery has others, for replies to commands."""
    return queue in (CONTROL_QUEUE, IO_QUEUE) or is_model_queue(queue)


class Publisher(Protocol):
    """Sends messages."""

    def publish(
        self,
        task: str,
        args: Sequence[Any],
        *,
        queue: str,
        priority: int = PRIORITIES["standard"],
        description: str = "",
        expires: float | None = None,
    ) -> bool:
        """
        Send a message; False, and a line in the log, when the broker cannot be reached.

        `description` is what Flower shows instead of the arguments. Nobody does it after `expires` seconds.
        """

    def depth(self, queue: str) -> int:
        """Messages that wait in the queue. Raises BrokerUnreachable."""


class CeleryPublisher:
    """Sends through a Celery application."""

    def __init__(self, app: Celery, redis_url: str) -> None:
        self._app = app
        # Not the application's own producers: a worker waits for messages for longer than anybody waits to send one.
        timeouts = {"socket_timeout": _ANSWER, "socket_connect_timeout": _ANSWER, "max_retries": 0}
        connection = app.connection_for_write(connect_timeout=_ANSWER, transport_options=timeouts)
        self._producers = ProducerPool(connection.Pool(_SENDING), limit=_SENDING, Producer=app.amqp.Producer)
        self._redis = redis.Redis.from_url(
            redis_url,
            socket_connect_timeout=_ANSWER,
            socket_timeout=_ANSWER,
            health_check_interval=30,
            retry=None,
            protocol=2,
        )
        self._breaker = Breaker(_PROBE_EVERY)

    def publish(
        self,
        task: str,
        args: Sequence[Any],
        *,
        queue: str,
        priority: int = PRIORITIES["standard"],
        description: str = "",
        expires: float | None = None,
    ) -> bool:
        """
        Send a message; False, and a line in the log, when the broker cannot be reached, or does not answer at once.

        `description` is what Flower shows instead of the arguments. Nobody does it after `expires` seconds.
        """

        def send() -> None:
            with self._producers.acquire(block=True, timeout=_ANSWER) as producer:
                self._app.send_task(
                    task,
                    args=args,
                    queue=queue,
                    priority=priority,
                    ignore_result=True,
                    expires=expires,
                    argsrepr=description or repr(tuple(args)),
                    kwargsrepr="",
                    producer=producer,
                    retry=False,
                )

        try:
            with self._asked() as late:
                try:
                    send()
                except _UNREACHABLE:
                    # A connection that the broker has dropped since it was used is seen at the next use.
                    if late():
                        raise
                    send()
        except BrokerUnreachable as error:
            _log.warning("message_not_sent", task=task, queue=queue, error=str(error))
            return False
        return True

    def depth(self, queue: str) -> int:
        """Messages that wait in the queue. Raises BrokerUnreachable."""
        with self._asked(), self._redis.pipeline(transaction=False) as pipeline:
            for step in _PRIORITY_STEPS:
                pipeline.llen(f"{queue}{_SEPARATOR}{step}" if step else queue)
            counts = pipeline.execute(raise_on_error=False)
        # A key of a wrong type holds no message; the worker that serves the queue puts it aside.
        refused = [error for error in counts if isinstance(error, Exception) and not is_wrong_type(error)]
        if refused:
            raise BrokerUnreachable(f"the broker cannot be reached: {refused[0]}")
        return sum(count for count in counts if isinstance(count, int))

    def dead_letters(self) -> DeadLetters:
        """What workers could not read."""
        return DeadLetters(self._redis)

    def close(self) -> None:
        """Close the connections."""
        self._producers.connections.force_close_all()
        self._redis.close()
        self._app.close()

    def ping(self) -> None:
        """Raises BrokerUnreachable unless the broker answers."""
        with self._asked():
            self._redis.ping()

    @contextmanager
    def _asked(self) -> Iterator[Callable[[], bool]]:
        """
        The broker is asked within the block, which learns whether it has been silent for too long.

        Raises BrokerUnreachable; at once, when it was silent just now.
        """
        if not self._breaker.admits():
            raise BrokerUnreachable("the broker does not answer")
        limit = time.monotonic() + _ANSWER

        def late() -> bool:
            return time.monotonic() >= limit

        try:
            yield late
        except _UNREACHABLE as error:
            if late():
                self._breaker.timed_out(_ANSWER)
            raise BrokerUnreachable(f"the broker cannot be reached: {error}") from error
        self._breaker.answered()


def celery_app(redis_url: str, settings: BrokerSettings, schedule: Mapping[str, Any] | None = None) -> Celery:
    """
    The Celery application, with the settings that were measured to lose least (app/decisions.md, 4).

    `redis_url` may be any address that redis-py reads. `schedule` is what beat sends, for the program of beat.
    """
    app = Celery("arriero", set_as_current=False)
    app.conf.update(
        broker_url=_kombu_url(redis_url),
        broker_use_ssl=_verified(redis_url) or False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "visibility_timeout": settings.visibility_timeout.total_seconds(),
            # The sweep for unacknowledged messages runs each 5 s, not each 100 s.
            "unacked_restore_interval": 5,
            "unacked_restore_throttle": 1,
            "priority_steps": list(_PRIORITY_STEPS),
            "queue_order_strategy": "priority",
            "sep": _SEPARATOR,
            "socket_keepalive": True,
            "socket_timeout": settings.socket_timeout.total_seconds(),
            "socket_connect_timeout": 5,
            "health_check_interval": 15,
        },
        broker_heartbeat=0,
        task_acks_late=False,
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        result_backend=None,
        worker_disable_prefetch=True,
        worker_prefetch_multiplier=1,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        # A good part of a worker's time for short steps. Flower switches them on, every 5 s, as long as it runs.
        worker_send_task_events=False,
        task_send_sent_event=False,
        task_track_started=False,
        task_create_missing_queues=True,
        task_default_queue=CONTROL_QUEUE,
        task_default_priority=PRIORITIES["standard"],
        task_publish_retry=True,
        task_publish_retry_policy={"max_retries": 1, "interval_start": 0, "interval_step": 0.2, "interval_max": 0.2},
        task_serializer="json",
        accept_content=["json"],
        timezone="UTC",
        enable_utc=True,
        beat_schedule=dict(schedule or {}),
        beat_scheduler="redbeat.RedBeatScheduler",
        beat_max_loop_interval=1,
        redbeat_redis_url=_kombu_url(redis_url),
        redbeat_redis_options={"protocol": 2, "socket_connect_timeout": 5, "socket_timeout": 10},
        redbeat_lock_timeout=timedelta(seconds=10).seconds,
    )
    return app


def _kombu_url(url: str) -> str:
    """Kombu knows the address of Valkey by Redis' name."""
    for ours, theirs in (("valkeys://", "rediss://"), ("valkey://", "redis://")):
        if url.startswith(ours):
            return theirs + url.removeprefix(ours)
    return url


def _verified(url: str) -> dict[str, Any] | None:
    """How kombu encrypts: the server proves who it is, unless the address says otherwise. Kombu alone would not ask."""
    encrypted = url.startswith(("rediss://", "valkeys://"))
    return {"ssl_cert_reqs": ssl.CERT_REQUIRED} if encrypted and "ssl_" not in url.partition("?")[2] else None
