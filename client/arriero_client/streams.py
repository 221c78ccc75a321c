"""Streams of server-sent events, and how they go on after a lost connection."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from arriero_client import exchange
from arriero_client.effects import ConnectionLost, Emit, Operation, Read, Reply, Request, Sleep
from arriero_client.errors import ConnectionFailed, InvalidAnswer
from arriero_client.exchange import Retries

#: Most bytes of one event.
_MAX_EVENT = 64 * 1024 * 1024
#: Seconds without a byte after which a stream is taken for lost: servers send comments more often.
SILENCE = 45.0


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """A server-sent event."""

    id: str
    kind: str
    data: str

    def json(self) -> Any:
        """Return its data. Raises InvalidAnswer."""
        try:
            return json.loads(self.data)
        except (ValueError, RecursionError):
            raise InvalidAnswer("an event of the stream is not JSON", self.data[:500]) from None


class EventParser:
    """Makes events of bytes as they come. Comments are left out."""

    def __init__(self) -> None:
        self._rest = b""
        self._id, self._kind, self._data = "", "", list[str]()

    def feed(self, content: bytes) -> Iterator[StreamEvent]:
        """Yield the events that these bytes complete. Raises InvalidAnswer for an event that is too long."""
        *lines, self._rest = (self._rest + content).split(b"\n")
        if len(self._rest) > _MAX_EVENT:
            raise InvalidAnswer(f"an event of the stream has more than {_MAX_EVENT} bytes")
        for line in lines:
            text = line.removesuffix(b"\r").decode("utf-8", "replace")
            if not text:
                if self._data:
                    yield StreamEvent(self._id, self._kind or "message", "\n".join(self._data))
                self._kind, self._data = "", []
                continue
            name, _, value = text.partition(":")
            value = value.removeprefix(" ")
            match name:
                case "id":
                    self._id = value
                case "event":
                    self._kind = value
                case "data":
                    self._data.append(value)


#: What a consumer of events says: whether the stream is complete, and a value for the caller if there is one.
Consume = Callable[[StreamEvent], tuple[bool, Any]]


def resumed(
    request: Request, retries: Retries, consume: Consume, last: str, ended: Callable[[], Operation[bool]]
) -> Operation[None]:
    """
    Emit what `consume` makes of the events of a stream, in one piece over lost connections.

    The stream is opened again with the id of the last event, until `consume` says that it is complete, or it ends and
    `ended` says that there will be no more. Whatever comes starts the count of attempts anew.
    Raises ConnectionFailed, and what `send` raises.
    """
    attempt = 0
    while True:
        attempt += 1
        # Without the header `Last-Event-ID` a stream starts at its beginning.
        headers = {**request.headers, "Accept": "text/event-stream", **({"Last-Event-ID": last} if last else {})}
        lost: ConnectionLost | None = None
        yield from exchange.open_stream(replace(request, headers=headers), retries)
        parser = EventParser()
        try:
            while (content := (yield Read())) is not None:
                attempt = 0
                for event in parser.feed(content):
                    last = event.id or last
                    complete, value = consume(event)
                    if value is not None:
                        yield Emit(value)
                    if complete:
                        return
        except ConnectionLost as error:
            lost = error
        if lost is None and (yield from ended()):
            return
        pause = retries.pause(max(attempt, 1), None)
        if pause is None:
            raise ConnectionFailed(f"the stream broke off {attempt} times before anything came: {lost or 'it ended'}")
        yield Sleep(pause)


def plain(request: Request, retries: Retries) -> Operation[Reply]:
    """Open a stream that cannot be resumed. Raises what `send` raises."""
    headers: Mapping[str, str] = {**request.headers, "Accept": "text/event-stream"}
    reply = yield from exchange.open_stream(replace(request, headers=headers), retries)
    return reply
