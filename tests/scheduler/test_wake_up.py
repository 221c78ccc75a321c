"""Calls of agents through a real broker."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import redis

from app.scheduler.wake_up import AgentCalls


def until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    assert any(condition() or pause.wait(0.05) for _ in range(1200))


class Listener:
    """An agent that counts its calls."""

    def __init__(self, redis_url: str, host: str) -> None:
        self.calls = 0
        self.stopping = False
        self._calls = AgentCalls(redis_url)
        arguments = (host, self._count, lambda: self.stopping)
        threading.Thread(target=self._calls.listen, args=arguments, daemon=True).start()

    def _count(self) -> None:
        self.calls += 1


@pytest.fixture
def listen(redis_url: str) -> Iterator[Callable[[str], Listener]]:
    made: list[Listener] = []

    def start(host: str) -> Listener:
        made.append(Listener(redis_url, host))
        until(lambda: made[-1].calls > 0)
        return made[-1]

    yield start
    for one in made:
        one.stopping = True


def test_only_the_agents_of_the_named_hosts_are_called(redis_url: str, listen: Callable[[str], Listener]) -> None:
    called, other = listen("a"), listen("b")
    before = called.calls, other.calls
    sender = AgentCalls(redis_url)
    sender.send(["a"])
    until(lambda: called.calls == before[0] + 1)
    sender.send(["b"])
    until(lambda: other.calls == before[1] + 1)
    assert called.calls == before[0] + 1
    sender.close()


def test_an_agent_listens_again_after_its_connection_was_lost(
    redis_url: str, listen: Callable[[str], Listener]
) -> None:
    """What was sent meanwhile is lost, so it counts as called when it listens again."""
    called = listen("c")
    before = called.calls
    with redis.Redis.from_url(redis_url, protocol=2) as client:
        client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    until(lambda: called.calls > before)
    sender, before = AgentCalls(redis_url), called.calls
    sender.send(["c"])
    until(lambda: called.calls > before)
    sender.close()


def test_a_broker_that_is_unavailable_stops_no_pass() -> None:
    sender = AgentCalls("redis://127.0.0.1:1/0")
    sender.send(["a", "b"])
    sender.close()
