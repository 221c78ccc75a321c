"""
The text stream: turns the bytes of tokens into whole characters, up to the first stop text.

A character is emitted when all its bytes have arrived. Invalid bytes are emitted as U+FFFD. A character that is
incomplete when the text ends is dropped.
Characters that may begin a stop text are held back until that is decided. A stop text is never emitted.
Tool calls are collected separately: they are not part of the text, and no stop text ends them.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from workers.engine.chat.calls import ToolCallDetector


class TextStream:
    """The stream of one text."""

    __slots__ = ("_decoder", "_detector", "_held", "_parts", "_stops", "stopped")

    def __init__(self, stops: Sequence[str] = (), detector: ToolCallDetector | None = None) -> None:
        self._detector = detector
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = tuple(stop for stop in stops if stop)
        self._parts: list[str] = []
        self._held = ""
        #: A stop text was found; all that follows is ignored.
        self.stopped = False

    def feed(self, piece: bytes) -> str:
        """Add the bytes of one token. Returns the text that can be emitted now."""
        new = self._decoder.decode(piece)
        return self._emit(new if self._detector is None else self._detector.feed(new))

    def _emit(self, new: str) -> str:
        if not self._stops:
            if new:
                self._parts.append(new)
            return new
        if self.stopped or not new:
            return ""
        text = self._held + new
        end = min((at for at in map(text.find, self._stops) if at >= 0), default=-1)
        if end >= 0:
            self.stopped, self._held = True, ""
            emitted = text[:end]
        else:
            keep = self._possible_stop(text)
            emitted, self._held = text[: len(text) - keep], text[len(text) - keep :]
        if emitted:
            self._parts.append(emitted)
        return emitted

    def finish(self) -> str:
        """End the text. Returns what was held back."""
        late = "" if self._detector is None or self.stopped else self._emit(self._detector.finish())
        held, self._held = self._held, ""
        if held:
            self._parts.append(held)
        return late + held

    @property
    def text(self) -> str:
        """The text emitted so far."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    @property
    def calls(self) -> str:
        """The tool calls as the model wrote them; empty after a stop text."""
        return "" if self._detector is None or self.stopped else self._detector.calls or ""

    def _possible_stop(self, text: str) -> int:
        """Return the length of the longest suffix of `text` that is a prefix of a stop text."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return longest
