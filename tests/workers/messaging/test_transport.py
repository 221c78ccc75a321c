"""The transport of workers, in place of kombu's own."""

from __future__ import annotations

import kombu
import kombu.transport
import pytest
import redis
from kombu.transport import redis as kombu_redis

from workers.messaging import transport
from workers.messaging.rate import RATE


@pytest.mark.parametrize("scheme", ["redis", "rediss"])
def test_it_is_used_also_after_a_connection_with_kombus_own(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool is a fork of its agent, which has sent messages before."""
    monkeypatch.setitem(kombu.transport.TRANSPORT_ALIASES, scheme, "kombu.transport.redis:Transport")
    monkeypatch.setitem(kombu.transport._transport_cache, scheme, kombu_redis.Transport)
    transport.install()

    assert kombu.transport.get_transport_cls(scheme) is transport.Transport


def test_a_rate_limit_holds_back_steps_and_no_commands(redis_url: str) -> None:
    transport.install()
    try:
        with kombu.Connection(redis_url) as connection:
            steps, commands = connection.channel(), connection.channel()
            steps._active_queues.append("model.a")
            commands._active_queues.append("w@h.celery.pidbox")
            RATE.set(0.001)
            RATE.take()
            assert (steps.qos.can_consume(), commands.qos.can_consume()) == (False, True)
            RATE.set(0)
            assert steps.qos.can_consume()
    finally:
        RATE.set(0)


def test_a_message_of_a_lost_connection_is_not_acknowledged(redis_url: str) -> None:
    """The step ended while the broker was away. A connection error is logged; any other error would end the worker."""
    transport.install()
    with kombu.Connection(redis_url) as connection:
        queue = connection.SimpleQueue("late", no_ack=False)
        queue.put({"step": 1})
        message = queue.get(timeout=5)
        queue.channel.do_restore = False
        errors = connection.connection_errors
    assert message.channel.connection is None

    with pytest.raises(errors):
        message.ack()
    with pytest.raises(errors):
        message.reject()


@pytest.mark.parametrize(
    "refusal",
    ["MISCONF Errors writing to the AOF file: No space left on device", "OOM command not allowed", "READONLY replica"],
)
def test_a_broker_that_refuses_writes_counts_as_unreachable(redis_url: str, refusal: str) -> None:
    """Its disk is full, for example. Any other error would end the worker, with its model."""
    transport.install()
    with kombu.Connection(redis_url) as connection:
        errors, channel = connection.connection_errors, connection.channel()

        def refuse() -> None:
            with channel.client.pipeline() as pipe:
                pipe.eval(f"return redis.error_reply('{refusal}')", 0)
                pipe.execute()

        with pytest.raises(errors, match="refuses writes"):
            channel.with_repair(refuse)
        with pytest.raises(redis.ResponseError, match="other"):
            channel.with_repair(lambda: channel.client.eval("return redis.error_reply('ERR other')", 0))
