"""
Notices of changes: each process learns within moments that run-time settings, limits of calls or splits have changed.

A notice says only what kind of thing has changed; the receiver reads it from Postgres. A process that could not listen
for a while reads everything again once it can, so a lost notice delays a change and loses none.
Processes listen to the broker and not to Postgres, where each listener would be a process of the server.

Redis keys:
    arriero:changes          the channel of the notices; a message is a topic
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from enum import StrEnum

import redis

from app.kernel import broker, log
from app.kernel.broker import CeleryPublisher
from app.kernel.errors import BrokerUnreachable

_log = log.get(__name__)

_CHANNEL = "arriero:changes"
#: Seconds of one wait for a notice. A dead connection is found after about this time.
_LISTEN = 30.0
#: Seconds until the next attempt to listen, or to send.
_RETRY = 1.0
#: Attempts to send a notice: for about a minute.
_ATTEMPTS = 60


class ChangeTopic(StrEnum):
    """What has changed."""

    SETTINGS = "settings"
    LIMITS = "limits"
    JOBS = "jobs"
    SPLITS = "splits"


def send(publisher: CeleryPublisher, topic: ChangeTopic) -> None:
    """Send a notice. While the broker is unavailable, a thread tries again, for about a minute."""
    if not _sent(publisher, topic):
        threading.Thread(target=_send_later, args=(publisher, topic), name="notices", daemon=True).start()


def _send_later(publisher: CeleryPublisher, topic: ChangeTopic) -> None:
    for _ in range(_ATTEMPTS):
        time.sleep(_RETRY)
        if _sent(publisher, topic):
            return


def _sent(publisher: CeleryPublisher, topic: ChangeTopic) -> bool:
    try:
        with publisher.connection() as client:
            client.publish(_CHANNEL, topic)
    except BrokerUnreachable as error:
        _log.warning("notice_not_sent", topic=topic, error=str(error))
        return False
    return True


class ChangeListener:
    """Listens to notices of changes, on a thread of its own."""

    def __init__(self, redis_url: str, actions: Mapping[ChangeTopic, Callable[[], object]]) -> None:
        """Does not connect. The action of a topic is called for each notice, and all when some may have been lost."""
        self._redis = broker.connect(redis_url, health_check_interval=15, keepalive=True)
        self._actions = dict(actions)
        self._closed = threading.Event()

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._listen, name="changes", daemon=True).start()

    def close(self) -> None:
        """Stop listening, and close the connections."""
        self._closed.set()
        self._redis.close()

    def _listen(self) -> None:
        while not self._closed.is_set():
            try:
                with self._redis.pubsub(ignore_subscribe_messages=True) as subscription:  # type: ignore[no-untyped-call] # untyped
                    subscription.subscribe(_CHANNEL)
                    for action in self._actions.values():
                        action()
                    while not self._closed.is_set():
                        message = subscription.get_message(timeout=_LISTEN)
                        found = None if message is None else self._action_of(message["data"])
                        if found is not None:
                            found()
            except redis.RedisError as error:
                if not self._closed.is_set():
                    _log.warning("changes_not_heard", error=str(error))
            except Exception:  # noqa: BLE001 the outermost loop of a thread
                if not self._closed.is_set():
                    _log.exception("change_not_applied")
            self._closed.wait(_RETRY)

    def _action_of(self, data: bytes) -> Callable[[], object] | None:
        """Return the action for a message; None for one that is no topic, or that this process does not follow."""
        return next((action for topic, action in self._actions.items() if topic.encode() == data), None)
