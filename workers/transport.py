"""
The way from the broker to a worker: kombu's for Redis, which goes on whatever the broker holds.

A message that cannot be taken, and a key of a wrong type, are put aside and counted; the next message is taken at once.
Without this, each of them ends the worker, and the one that follows it, until somebody removes it by hand.

Queues that are not ours, of replies to Flower for one, are left as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from typing import Any, TypeVar

import redis
from kombu import transport

from app.kernel import broker, clock, ids, log
from app.kernel.dead_letters import DeadLetters, Reason, is_wrong_type
from workers import messages
from workers.messages import Poison

_log = log.get(__name__)
_T = TypeVar("_T")

#: Its type hints know too little of what a transport is made of.
_kombu: Any = import_module("kombu.transport.redis")

#: Exchanges whose tables of bindings workers, Flower and commands write besides those of queues.
_EXCHANGES = ("celery.pidbox", "reply.celery.pidbox", "celeryev")


class _Client(redis.Redis):
    """Reads the answers to BRPOP, which is how messages come."""

    def __init__(self, channel: Channel, **more: Any) -> None:
        self._channel = channel
        super().__init__(**more)

    def parse_response(self, connection: Any, command_name: Any, **options: Any) -> Any:
        """What came; None, as when nothing did, for what was put aside."""
        if command_name != "BRPOP":
            return super().parse_response(connection, command_name, **options)  # type: ignore[no-untyped-call] # theirs
        try:
            response = super().parse_response(connection, command_name, **options)  # type: ignore[no-untyped-call] # theirs
        except redis.ResponseError as error:
            if not is_wrong_type(error):
                raise
            self._channel.mend()
            return None
        return response and self._channel.checked(*response)


class QoS(_kombu.QoS):  # type: ignore[misc] # as above
    """Remembers messages that are not yet acknowledged."""

    channel: Channel

    def append(self, message: Any, delivery_tag: Any) -> None:
        """As the class that it is one of."""
        self.channel.mended(partial(super().append, message, delivery_tag))

    def ack(self, delivery_tag: Any) -> None:
        """As the class that it is one of."""
        self.channel.mended(partial(super().ack, delivery_tag))

    def reject(self, delivery_tag: Any, requeue: bool = False) -> None:
        """As the class that it is one of."""
        self.channel.mended(partial(super().reject, delivery_tag, requeue))

    def restore_visible(self, *arguments: Any, **more: Any) -> None:
        """Send again what nobody acknowledged; called every few seconds, so that keys are looked at here too."""
        self.channel.mend()
        self.channel.mended(partial(super().restore_visible, *arguments, **more))

    def restore_by_tag(self, tag: Any, client: Any = None, leftmost: bool = False) -> None:
        """Send one again; what is no message is put aside."""
        try:
            super().restore_by_tag(tag, client, leftmost)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            with self.channel.conn_or_acquire(client) as connection:
                raw = connection.hget(self.unacked_key, tag) or b""
            self.channel.put_aside(self.unacked_key, Reason.UNREADABLE, f"it cannot be sent again: {error}", raw)
            self._remove_from_indices(tag).execute()


class Channel(_kombu.Channel):  # type: ignore[misc] # as above
    """Takes messages from queues."""

    QoS = QoS

    def checked(self, key: bytes, raw: bytes) -> tuple[bytes, bytes] | None:
        """A message as it can be taken, None when it was put aside."""
        queue, _, priority = key.decode("utf-8", "replace").partition(self.sep)
        if not broker.is_task_queue(queue):
            return key, raw
        try:
            return key, messages.taken(raw, queue, int(priority or 0), ids.new_secret())
        except Poison as error:
            self.put_aside(queue, error.reason, error.detail, raw)
            return None

    def put_aside(self, queue: str, reason: Reason, detail: str, raw: bytes) -> None:
        """Keep what cannot be used."""
        with self.conn_or_acquire() as client:
            DeadLetters(client).put(clock.now(), queue, reason, detail, raw)

    def mended(self, call: Callable[[], _T], *names: str) -> _T:
        """What a call gives; once more when a key was of a wrong type, which is out of the way then."""
        try:
            return call()
        except redis.ResponseError as error:
            if not is_wrong_type(error):
                raise
            self.mend(*names)
            return call()

    def mend(self, *names: str) -> None:
        """
        Put keys aside that hold another type of value than they have to: those of what this channel consumes, and of
        other queues and exchanges by name.
        """
        known = {*self.active_queues, *names}
        queues = [queue for queue in known if broker.is_task_queue(queue)]
        expected = {self._q_for_pri(queue, step): "list" for queue in queues for step in self.priority_steps}
        expected |= {self.unacked_key: "hash", self.unacked_index_key: "zset", self.unacked_mutex_key: "string"}
        for prefix in (self.keyprefix_queue, self.keyprefix_binding_permanent):
            expected |= {prefix % exchange: "set" for exchange in {*known, *_EXCHANGES}}
        with self.conn_or_acquire() as client:
            for name, found in self._types(client, expected):
                if found not in (expected[name], "none"):
                    DeadLetters(client).put_key(clock.now(), name, found, expected[name])

    def get_table(self, exchange: str) -> Any:
        """As the class that it is one of."""
        return self.mended(partial(super().get_table, exchange), exchange)

    def _size(self, queue: str) -> int:
        size: int = self.mended(partial(super()._size, queue), queue)
        return size

    def _queue_bind(self, exchange: str, routing_key: str, pattern: str, queue: str) -> None:
        self.mended(partial(super()._queue_bind, exchange, routing_key, pattern, queue), exchange, queue)

    def _get_client(self) -> Any:
        super()._get_client()  # it refuses a redis-py that it does not know
        return partial(_Client, self)

    def _deliver_fanout_message(self, message: Any, exchange: str) -> bool:
        """Hand over what was sent to every worker: commands of Flower and `celery inspect`."""
        try:
            super()._deliver_fanout_message(message, exchange)
        except self.connection_errors:
            raise
        except Exception as error:  # noqa: BLE001 whatever it holds: the worker goes on
            self.put_aside(
                exchange, Reason.UNREADABLE, f"{type(error).__name__}: {error}", repr(message)[:4096].encode()
            )
        return True

    @staticmethod
    def _types(client: redis.Redis, names: Iterable[str]) -> list[tuple[str, str]]:
        names = list(names)
        with client.pipeline(transaction=False) as pipeline:
            for name in names:
                pipeline.type(name)
            return [(name, found.decode()) for name, found in zip(names, pipeline.execute(), strict=True)]


class Transport(_kombu.Transport):  # type: ignore[misc] # as above
    """Kombu's transport with channels of ours."""

    Channel = Channel


def install() -> None:
    """Let each connection of this process go this way, encrypted ones too. Called before the first one is made."""
    for scheme in ("redis", "rediss"):
        transport.TRANSPORT_ALIASES[scheme] = f"{__name__}:{Transport.__name__}"
