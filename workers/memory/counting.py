"""Tokens of stored messages: counted once by the model of a pool, and remembered while they are used."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from uuid import UUID

from app.inference.requests import ChatMessage, GenerateRequest
from app.kernel.errors import StepFailure
from app.memory.conversations.message import StoredMessage
from workers.engine import Engine

#: Messages whose tokens are remembered.
_REMEMBERED = 100_000
#: Tokens that a chat template adds to a message, where that cannot be measured.
_USUAL_OVERHEAD = 8
_PROBE = "a"


class TokenCounts:
    """The tokens of messages by the model of this process. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[UUID, int] = OrderedDict()
        self._overhead: int | None = None

    def of(self, engine: Engine, messages: Sequence[StoredMessage]) -> list[int]:
        """Return the tokens of each message, with what the chat template adds to it."""
        overhead = self.overhead(engine)
        with self._lock:
            known = {message.id: self._known.get(message.id) for message in messages}
        new = [message for message in messages if known[message.id] is None]
        for message, count in zip(new, engine.count_texts([_text(message) for message in new]), strict=True):
            known[message.id] = count
        with self._lock:
            for id_, own in known.items():
                self._known[id_] = own or 0
                self._known.move_to_end(id_)
            while len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        return [(known[message.id] or 0) + overhead for message in messages]

    def overhead(self, engine: Engine) -> int:
        """Return the tokens that the chat template adds to a message."""
        if self._overhead is None:
            self._overhead = _measured(engine)
        return self._overhead


def _text(message: StoredMessage) -> str:
    calls = [{"name": call.name, "arguments": call.arguments} for call in message.calls]
    return message.content + (json.dumps(calls, ensure_ascii=False) if calls else "")


def _measured(engine: Engine) -> int:
    user, answer = ChatMessage("user", _PROBE), ChatMessage("assistant", _PROBE)
    try:
        one = engine.count(GenerateRequest(messages=(user,)))
        three = engine.count(GenerateRequest(messages=(user, answer, user)))
    except StepFailure:  # a template of its own kind
        return _USUAL_OVERHEAD
    return max(-(-(three - one) // 2) - engine.count_texts([_PROBE])[0], 0)
