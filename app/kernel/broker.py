r"""
The broker: the Celery application, the names of queues, and messages that follow a commit.

A message is a hint: it contains a task and a few ids, and losing it loses no work.
Messages are acknowledged when they are received and never prefetched. No results and no delays are stored here.
Callers never wait long for the broker: what cannot be sent within seconds is sent later by the sweep.

Redis keys. Celery and RedBeat create all but those of `arriero:`:
    control, io, model.<slug>   lists: waiting messages of priority 0, which is served first
    <queue>\x06\x16<n>            lists: waiting messages of priority n
    unacked*                    messages that are delivered and not yet acknowledged
    redbeat:*                   the schedule and the lock of beat
    arriero:activity*           whether anything happens (`app/kernel/activity.py`)
    arriero:dead-letters*       unreadable messages (`app/kernel/dead_letters.py`)
    arriero:direct*             requests that go directly to a pool (`app/inference/direct.py`)
    arriero:probe*              requests that show whether a pool works (`app/inference/direct.py`)
    arriero:tokens*             texts while they are written (`app/inference/token_stream.py`)
    arriero:cache:*             the response cache (`app/inference/cache/store.py`)
    arriero:changes             notices of changed settings, limits and jobs (`app/kernel/live/notices.py`)
    arriero:limits:*            what calls have used of their limits (`app/access/limits/meter.py`)
    arriero:residencies         how long clients want models loaded (`app/scheduler/residencies.py`)
    arriero:conversation:*      the last messages of conversations (`app/memory/conversations/hot.py`)
    arriero:recall:wanted:*     embedding models that queries needed (`app/memory/recall/query_vectors.py`)
    arriero:refinements         counters of refined outputs (`app/inference/refinement_counters.py`)
    arriero:control:*           signs of life of control workers (`app/governance/health/signs.py`)
    arriero:live-tokens:*       tokens of running steps, for views (`app/workflows/runs/live_tokens.py`)
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
from app.kernel.sections.servers import BrokerSettings

_log = log.get(__name__)

#: Scheduled jobs.
CONTROL_QUEUE = "control"
#: Steps that need no model.
IO_QUEUE = "io"

#: Prefix of the names of model queues.
_MODEL_PREFIX = "model."

#: Priorities of messages. Redis has one list per priority; a smaller number is served first.
PRIORITIES: Mapping[str, int] = {"interactive": 0, "standard": 3, "batch": 6}
#: Number of ranks within a priority class.
RANKS = 3
_PRIORITY_STEPS = tuple(range(len(PRIORITIES) * RANKS))
_SEPARATOR = "\x06\x16"

#: Timeout in seconds for sending a message and for reading the depth of a queue.
_ANSWER_TIMEOUT = 2.0
#: Interval of probes while the broker does not answer.
_PROBE_INTERVAL = timedelta(seconds=2)
#: Most connections for sending: more than a process has threads that send.
_MAX_CONNECTIONS = 64
#: Errors that mean that the broker is unreachable.
_UNREACHABLE = (OperationalError, LimitExceeded, redis.RedisError, OSError)


def priority_of(priority: str, rank: int) -> int:
    """Return the priority of a message from its class and its rank within the class, 0 to 2."""
    return PRIORITIES[priority] + rank


def model_queue(slug: str) -> str:
    """Return the name of the queue for steps that need the model."""
    return f"{_MODEL_PREFIX}{slug}"


def is_model_queue(queue: str) -> bool:
    """Whether the queue is for steps that need a model."""
    return queue.startswith(_MODEL_PREFIX)


def is_task_queue(queue: str) -> bool:
    """Whether the queue is for tasks. Celery has other queues for replies to its commands."""
    return queue in (CONTROL_QUEUE, IO_QUEUE) or is_model_queue(queue)


def connect(
    redis_url: str,
    *,
    connect_timeout: float = _ANSWER_TIMEOUT,
    answer_timeout: float = _ANSWER_TIMEOUT,
    health_check_interval: int = 30,
    keepalive: bool = False,
) -> redis.Redis:
    """
    Return a client for keys of our own; times in seconds. It connects when it is used.

    It repeats no command by itself: its callers know which ones may be sent twice, and for how long to try.
    """
    return redis.Redis.from_url(
        redis_url,
        socket_connect_timeout=connect_timeout,
        socket_timeout=answer_timeout,
        socket_keepalive=keepalive,
        health_check_interval=health_check_interval,
        retry=None,
        protocol=2,
    )


def waiting_before(client: redis.Redis, queue: str, priority: str) -> int:
    """Return the number of messages in a queue that are of classes before this one."""
    with client.pipeline(transaction=False) as pipeline:
        for step in range(PRIORITIES[priority]):
            pipeline.llen(f"{queue}{_SEPARATOR}{step}" if step else queue)
        counts = pipeline.execute(raise_on_error=False)
    return sum(count for count in counts if isinstance(count, int))


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
        Send a message. Returns False, and logs it, when the broker is unreachable.

        Flower shows `description` instead of the arguments. The message is dropped when no worker has received it
        after `expires` seconds.
        """

    def depth(self, queue: str) -> int:
        """Return the number of messages waiting in the queue. Raises BrokerUnreachable."""


class CeleryPublisher:
    """Sends messages through a Celery application."""

    def __init__(self, app: Celery, redis_url: str) -> None:
        self._app = app
        # Separate from the application's own producers: their socket timeout, for receiving, is too long for sending.
        timeouts = {"socket_timeout": _ANSWER_TIMEOUT, "socket_connect_timeout": _ANSWER_TIMEOUT, "max_retries": 0}
        connection = app.connection_for_write(connect_timeout=_ANSWER_TIMEOUT, transport_options=timeouts)
        connections = connection.Pool(_MAX_CONNECTIONS)
        self._producers = ProducerPool(connections, limit=_MAX_CONNECTIONS, Producer=app.amqp.Producer)
        self._redis = connect(redis_url)
        self._breaker = Breaker(_PROBE_INTERVAL)

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
        Send a message. Returns False, and logs it, when the broker is unreachable or does not answer in time.

        Flower shows `description` instead of the arguments. The message is dropped when no worker has received it
        after `expires` seconds.
        """

        def send() -> None:
            with self._producers.acquire(block=True, timeout=_ANSWER_TIMEOUT) as producer:
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
            with self._guarded() as late:
                try:
                    send()
                except _UNREACHABLE:
                    # A connection that the broker has dropped fails at its next use; a second attempt gets a new one.
                    if late():
                        raise
                    send()
        except BrokerUnreachable as error:
            _log.warning("message_not_sent", task=task, queue=queue, error=str(error))
            return False
        return True

    def depth(self, queue: str) -> int:
        """Return the number of messages waiting in the queue. Raises BrokerUnreachable."""
        return self.depths([queue])[queue]

    def depths(self, queues: Sequence[str]) -> dict[str, int]:
        """Return the number of messages waiting in each queue, by one question. Raises BrokerUnreachable."""
        with self._guarded(), self._redis.pipeline(transaction=False) as pipeline:
            for queue in queues:
                for step in _PRIORITY_STEPS:
                    pipeline.llen(f"{queue}{_SEPARATOR}{step}" if step else queue)
            counts = pipeline.execute(raise_on_error=False)
        # A key of a wrong type contains no message; the worker of the queue moves it to the dead letters.
        errors = [error for error in counts if isinstance(error, Exception) and not is_wrong_type(error)]
        if errors:
            raise BrokerUnreachable(f"the broker is unreachable: {errors[0]}")
        found = [count if isinstance(count, int) else 0 for count in counts]
        lists = len(_PRIORITY_STEPS)
        return {queue: sum(found[place * lists : (place + 1) * lists]) for place, queue in enumerate(queues)}

    def dead_letters(self) -> DeadLetters:
        """Return the dead letters: messages that workers could not read."""
        return DeadLetters(self._redis)

    @contextmanager
    def connection(self) -> Iterator[redis.Redis]:
        """Yield the connections for keys of our own. Raises BrokerUnreachable, at once while it does not answer."""
        with self._guarded():
            yield self._redis

    def close(self) -> None:
        """Close the connections."""
        self._producers.connections.force_close_all()
        self._redis.close()
        self._app.close()

    def ping(self) -> None:
        """Raise BrokerUnreachable unless the broker answers."""
        with self._guarded():
            self._redis.ping()

    @contextmanager
    def _guarded(self) -> Iterator[Callable[[], bool]]:
        """
        Guard the calls of a block with the circuit breaker and translate their errors.

        Yields a function that says whether the time for an answer is over. Raises BrokerUnreachable, and does so at
        once while the breaker is open.
        """
        if not self._breaker.admits():
            raise BrokerUnreachable("the broker does not answer")
        limit = time.monotonic() + _ANSWER_TIMEOUT

        def late() -> bool:
            return time.monotonic() >= limit

        try:
            yield late
        except _UNREACHABLE as error:
            if late():
                self._breaker.timed_out(_ANSWER_TIMEOUT)
            raise BrokerUnreachable(f"the broker is unreachable: {error}") from error
        self._breaker.answered()


def celery_app(redis_url: str, settings: BrokerSettings, schedule: Mapping[str, Any] | None = None) -> Celery:
    """
    Return the Celery application, with the settings that lost the fewest messages in measurements.

    See app/decisions.md, 4. `redis_url` may be any URL that redis-py supports. `schedule` is the schedule of beat, for
    the beat program only.
    """
    app = Celery("arriero", set_as_current=False)
    app.conf.update(
        broker_url=_kombu_url(redis_url),
        broker_use_ssl=_tls_options(redis_url) or False,
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
        # Events cost much of a worker's time when steps are short. Flower enables them every 5 s while it runs.
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
    """Return the URL with a scheme that kombu supports: it knows Valkey's schemes only under the names of Redis."""
    for valkey, redis_ in (("valkeys://", "rediss://"), ("valkey://", "redis://")):
        if url.startswith(valkey):
            return redis_ + url.removeprefix(valkey)
    return url


def _tls_options(url: str) -> dict[str, Any] | None:
    """
    Return kombu's TLS options: the server's certificate is verified, unless the URL says otherwise.

    Kombu's own default does not verify it.
    """
    encrypted = url.startswith(("rediss://", "valkeys://"))
    return {"ssl_cert_reqs": ssl.CERT_REQUIRED} if encrypted and "ssl_" not in url.partition("?")[2] else None
