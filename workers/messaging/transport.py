"""
The transport of messages from the broker: kombu's for Redis, made to survive any content of the broker.

An invalid message, and a key of the wrong type, become dead letters and are counted; the next message is read at once.
With kombu's own transport each of them ends the worker, and the next one, until it is removed by hand.
A broker that refuses writes, because its disk is full for example, counts as unreachable: the worker keeps its model
and connects again.

Queues of others, such as Flower's reply queues, are not changed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from typing import Any, TypeVar

import redis
from kombu import transport

from app.kernel import broker, clock, ids, log
from app.kernel.dead_letters import DeadLetters, Reason, is_wrong_type
from workers.messaging import messages
from workers.messaging.messages import PoisonMessage
from workers.messaging.rate import RATE

_log = log.get(__name__)
_T = TypeVar("_T")

#: The stubs of this module are incomplete.
_kombu: Any = import_module("kombu.transport.redis")

#: Exchanges in whose binding tables workers, Flower and commands write, in addition to those of the queues.
_EXCHANGES = ("celery.pidbox", "reply.celery.pidbox", "celeryev")


#: The codes of a server that refuses writes for now: its disk or memory is full, or it is a replica.
_REFUSED = re.compile(r"(?:^|: )(?:MISCONF|OOM|READONLY|NOREPLICAS|MASTERDOWN)\b")


def _raise_if_refused(error: redis.ResponseError) -> None:
    """Raise ConnectionError, after which Celery connects again, when the server refuses writes for now."""
    if isinstance(error, redis.OutOfMemoryError | redis.ReadOnlyError) or _REFUSED.search(str(error)):
        raise redis.ConnectionError(f"the broker refuses writes: {error}") from error


class _Client(redis.Redis):
    """A Redis client that validates the replies to BRPOP, which deliver the messages."""

    def __init__(self, channel: Channel, **more: Any) -> None:
        self._channel = channel
        super().__init__(**more)

    def parse_response(self, connection: Any, command_name: Any, **options: Any) -> Any:
        """Return the reply; None for a dead letter, as if there was no message."""
        if command_name != "BRPOP":
            return super().parse_response(connection, command_name, **options)  # type: ignore[no-untyped-call] # untyped library
        try:
            response = super().parse_response(connection, command_name, **options)  # type: ignore[no-untyped-call] # untyped library
        except redis.ResponseError as error:
            _raise_if_refused(error)
            if not is_wrong_type(error):
                raise
            self._channel.repair_keys()
            return None
        return response and self._channel.validated(*response)


class QoS(_kombu.QoS):  # type: ignore[misc] # as above
    """The unacknowledged messages of a channel."""

    channel: Channel

    def can_consume(self) -> bool:
        """Whether a message may be taken now: beyond the rate, messages stay in the queues of steps."""
        is_limited = any(map(broker.is_model_queue, self.channel.active_queues)) and not RATE.allows()
        return not is_limited and bool(super().can_consume())

    def append(self, message: Any, delivery_tag: Any) -> None:
        """As in kombu; a key of the wrong type is repaired."""
        self.channel.with_repair(partial(super().append, message, delivery_tag))

    def ack(self, delivery_tag: Any) -> None:
        """As in kombu; a key of the wrong type is repaired."""
        self.channel.with_repair(partial(super().ack, delivery_tag))

    def reject(self, delivery_tag: Any, requeue: bool = False) -> None:
        """As in kombu; a key of the wrong type is repaired."""
        self.channel.with_repair(partial(super().reject, delivery_tag, requeue))

    def restore_visible(self, *arguments: Any, **more: Any) -> None:
        """Deliver unacknowledged messages again. It runs every few seconds, so it also repairs keys."""
        self.channel.repair_keys()
        self.channel.with_repair(partial(super().restore_visible, *arguments, **more))

    def restore_by_tag(self, tag: Any, client: Any = None, leftmost: bool = False) -> None:
        """Deliver one message again; content that is not a message becomes a dead letter."""
        try:
            super().restore_by_tag(tag, client, leftmost)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            with self.channel.conn_or_acquire(client) as connection:
                raw = connection.hget(self.unacked_key, tag) or b""
            self.channel.store_dead_letter(
                self.unacked_key, Reason.UNREADABLE, f"it cannot be delivered again: {error}", raw
            )
            self._remove_from_indices(tag).execute()


class Channel(_kombu.Channel):  # type: ignore[misc] # as above
    """Reads messages from queues."""

    QoS = QoS

    def validated(self, key: bytes, raw: bytes) -> tuple[bytes, bytes] | None:
        """Return the key and the validated message; None when the message became a dead letter."""
        queue, _, priority = key.decode("utf-8", "replace").partition(self.sep)
        if not broker.is_task_queue(queue):
            return key, raw
        try:
            valid = messages.validated(raw, queue, int(priority or 0), ids.new_secret())
            RATE.take()
            return key, valid
        except PoisonMessage as error:
            self.store_dead_letter(queue, error.reason, error.detail, raw)
            return None

    def store_dead_letter(self, queue: str, reason: Reason, detail: str, raw: bytes) -> None:
        """Store a message that cannot be used, with the reason."""
        with self.conn_or_acquire() as client:
            DeadLetters(client).put(clock.now(), queue, reason, detail, raw)

    def with_repair(self, call: Callable[[], _T], *names: str) -> _T:
        """Return the result of a call. When a key has the wrong type, repair the keys and call once more."""
        try:
            return call()
        except redis.ResponseError as error:
            _raise_if_refused(error)
            if not is_wrong_type(error):
                raise
            self.repair_keys(*names)
            return call()

    def repair_keys(self, *names: str) -> None:
        """
        Make keys of the wrong type dead letters: the keys of the queues that this channel consumes, and of the queues
        and exchanges in `names`.
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
        """As in kombu; a key of the wrong type is repaired."""
        return self.with_repair(partial(super().get_table, exchange), exchange)

    def _size(self, queue: str) -> int:
        size: int = self.with_repair(partial(super()._size, queue), queue)
        return size

    def _queue_bind(self, exchange: str, routing_key: str, pattern: str, queue: str) -> None:
        self.with_repair(partial(super()._queue_bind, exchange, routing_key, pattern, queue), exchange, queue)

    def _get_pool(self, asynchronous: bool = False) -> Any:
        """
        As in kombu, which raises AttributeError for a channel whose connection was lost: a late acknowledgement would
        end the worker. A connection error is logged there, and the message is delivered again.
        """
        if self.connection is None:
            raise redis.ConnectionError("the connection of this message was lost")
        return super()._get_pool(asynchronous)

    def _get_client(self) -> Any:
        super()._get_client()  # it raises for versions of redis-py that kombu does not support
        return partial(_Client, self)

    def _deliver_fanout_message(self, message: Any, exchange: str) -> bool:
        """Process a broadcast to all workers: a command of Flower or `celery inspect`."""
        try:
            super()._deliver_fanout_message(message, exchange)
        except self.connection_errors:
            raise
        except Exception as error:  # noqa: BLE001 the worker continues, whatever the message contains
            self.store_dead_letter(
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
    """Kombu's transport with the channels of this module."""

    Channel = Channel
    #: Seconds of one wait for a message; one that arrives ends it. Kombu's own value wakes each worker every second.
    brpop_timeout = 5


def install() -> None:
    """Use this transport for all later connections of this process, with TLS too."""
    for scheme in ("redis", "rediss"):
        transport.TRANSPORT_ALIASES[scheme] = f"{__name__}:{Transport.__name__}"
        # A pool is a fork of its agent, which has sent messages with kombu's own.
        transport._transport_cache.pop(scheme, None)  # type: ignore[attr-defined] # missing in the stubs
