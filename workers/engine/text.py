"""
Text as it is written: bytes of tokens in, whole characters out, up to the first stop text.

A character is given out when all its bytes are there; bytes that never become a character are given as U+FFFD,
and a character that is still unfinished when the text ends is left out.
What may be the beginning of a stop text is held back until that is known; a stop text is never given out.
Calls of tools are kept apart: they are no text, and no stop text ends them.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from workers.engine.calls import ToolCallWatch


class TextStream:
    """One text under way."""

    __slots__ = ("_decoder", "_held", "_parts", "_stops", "_watch", "stopped")

    def __init__(self, stops: Sequence[str] = (), watch: ToolCallWatch | None = None) -> None:
        self._watch = watch
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = tuple(stop for stop in stops if stop)
        self._parts: list[str] = []
        self._held = ""
        #: A stop text came: what follows does not count.
        self.stopped = False

    def feed(self, piece: bytes) -> str:
        """Take the bytes of one token and give what can be shown now."""
        new = self._decoder.decode(piece)
        return self._show(new if self._watch is None else self._watch.feed(new))

    def _show(self, new: str) -> str:
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
            shown = text[:end]
        else:
            keep = self._undecided(text)
            shown, self._held = text[: len(text) - keep], text[len(text) - keep :]
        if shown:
            self._parts.append(shown)
        return shown

    def finish(self) -> str:
        """The text ends here: give what was held back."""
        late = "" if self._watch is None or self.stopped else self._show(self._watch.finish())
        held, self._held = self._held, ""
        if held:
            self._parts.append(held)
        return late + held

    @property
    def text(self) -> str:
        """All that was given out."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    @property
    def calls(self) -> str:
        """The calls of tools, as they were written; none after a stop text."""
        return "" if self._watch is None or self.stopped else self._watch.calls or ""

    def _undecided(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop text."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return longest
