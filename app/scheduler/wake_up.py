"""
Wake-ups: a message that triggers a reconcile pass, and one that tells agents that their desired pools have changed.

They are hints. Beat sends the first one too, at each tick; an agent finds a change at its next heartbeat.
A process that sends steps to the queue of a model triggers a pass, so that the model is started at once. It does so at
most once in each pause.
Agents listen to the broker and not to Postgres, where each listener would be a process of the server.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import redis

from app.kernel import broker, log
from app.kernel.broker import CONTROL_QUEUE, PRIORITIES, Publisher, is_model_queue
from app.scheduler.tasks import RECONCILE

#: Least seconds between two wake-ups of one process.
_PAUSE = 0.2
#: Seconds after which a message is obsolete: beat has sent its own since.
_EXPIRES = 10.0
#: The channel of the broker on which agents listen; a message is the name of a host.
_AGENTS = "arriero:agents"
#: Seconds of one wait for a message, and until the next attempt to listen.
_LISTEN, _RETRY = 10.0, 1.0

_log = log.get(__name__)


def wake_reconciler(publisher: Publisher) -> bool:
    """Trigger a reconcile pass; returns False when the broker cannot be reached."""
    return publisher.publish(
        RECONCILE, (), queue=CONTROL_QUEUE, priority=PRIORITIES["interactive"], description="wake-up", expires=_EXPIRES
    )


class WakingPublisher:
    """Publishes messages, and a wake-up when one goes to the queue of a model."""

    def __init__(self, publisher: Publisher) -> None:
        """Publishes through another publisher."""
        self._publisher = publisher
        self._lock = threading.Lock()
        self._last = float("-inf")

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
        """Publish a message; returns False when the broker cannot be reached."""
        sent = self._publisher.publish(
            task, args, queue=queue, priority=priority, description=description, expires=expires
        )
        if is_model_queue(queue) and self._is_due():
            wake_reconciler(self._publisher)
        return sent

    def depth(self, queue: str) -> int:
        """The number of messages in the queue. Raises BrokerUnreachable."""
        return self._publisher.depth(queue)

    def _is_due(self) -> bool:
        now = time.monotonic()
        with self._lock:
            due = now - self._last >= _PAUSE
            if due:
                self._last = now
        return due


class AgentCalls:
    """Tells agents that the desired pools of their hosts have changed."""

    def __init__(self, redis_url: str) -> None:
        """Does not connect."""
        self._redis = broker.connect(redis_url, health_check_interval=15, keepalive=True)

    def send(self, hosts: Collection[str]) -> None:
        """Tell the agents of these hosts. A broker that is unavailable is logged."""
        try:
            for host in hosts:
                self._redis.publish(_AGENTS, host)
        except redis.RedisError as error:
            _log.warning("agents_not_told", error=str(error))

    def listen(self, host: str, on_call: Callable[[], object], stopping: Callable[[], bool]) -> None:
        """Call `on_call` for each message for the host, and whenever messages may have been lost, until `stopping`."""
        while not stopping():
            try:
                with self._redis.pubsub(ignore_subscribe_messages=True) as subscription:  # type: ignore[no-untyped-call] # untyped
                    subscription.subscribe(_AGENTS)
                    on_call()
                    while not stopping():
                        message = subscription.get_message(timeout=_LISTEN)
                        if message is not None and message["data"] == host.encode():
                            on_call()
            except redis.RedisError as error:
                _log.warning("agent_cannot_listen", error=str(error))
            except Exception:  # noqa: BLE001 the outermost loop of a thread
                _log.exception("agent_cannot_listen")
            time.sleep(_RETRY)

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()
