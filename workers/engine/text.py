"""
The text stream: turns the bytes of tokens into whole characters, up to the first stop text.

A character is emitted when all its bytes have arrived. Invalid bytes are emitted as U+FFFD. A character that is
incomplete when the text ends is dropped.
Characters that may begin a stop text are held back until that is decided. A stop text is never emitted.
Thinking and tool calls are collected separately: they are not part of the text, and no stop text ends them.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from workers.engine.chat.calls import ToolCallDetector
from workers.engine.chat.thinking import AnswerSplitter


class TextStream:
    """The stream of one text."""

    __slots__ = ("_decoder", "_detector", "_held", "_new", "_parts", "_splitter", "_stops", "_thought", "stopped")

    def __init__(
        self,
        stops: Sequence[str] = (),
        detector: ToolCallDetector | None = None,
        splitter: AnswerSplitter | None = None,
    ) -> None:
        self._detector, self._splitter = detector, splitter
        #: The thinking, and what of it was not taken.
        self._thought: list[str] = []
        self._new = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = tuple(stop for stop in stops if stop)
        self._parts: list[str] = []
        self._held = ""
        #: A stop text was found; all that follows is ignored.
        self.stopped = False

    def feed(self, piece: bytes) -> str:
        """Add the bytes of one token. Returns the text that can be emitted now."""
        new = self._decoder.decode(piece)
        if self._splitter is not None:
            reasoning, new = self._splitter.feed(new)
            self._think(reasoning)
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
        late = ""
        if self._splitter is not None and not self.stopped:
            reasoning, rest = self._splitter.finish()
            self._think(reasoning)
            late = self._emit(rest if self._detector is None else self._detector.feed(rest))
        if self._detector is not None and not self.stopped:
            late += self._emit(self._detector.finish())
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

    def take_reasoning(self) -> str:
        """Return the thinking since the last call."""
        new, self._new = self._new, ""
        return new

    @property
    def reasoning(self) -> str:
        """The thinking so far, without its tags."""
        return "".join(self._thought)

    @property
    def is_thinking(self) -> bool:
        """Whether the text is inside a block of thinking."""
        return self._splitter is not None and self._splitter.is_thinking

    @property
    def is_undecided(self) -> bool:
        """Whether the text so far may be the beginning of a block of thinking."""
        return self._splitter is not None and self._splitter.may_begin

    def _think(self, reasoning: str) -> None:
        if reasoning:
            self._thought.append(reasoning)
            self._new += reasoning

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
