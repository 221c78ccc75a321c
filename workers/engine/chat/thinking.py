"""
The splitter of thinking: divides a text that is being written into what the model thinks and its answer.

A block of thinking can only be at the beginning. The first closing tag ends it, whatever tags are inside; further tags
are text of the answer. A block that never ends stays thinking.
Characters that may be a part of a tag are held back until that is decided. Whitespace around the block is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from app.catalog.profiles.family import ThinkingTags


class AnswerSplitter(Protocol):
    """A splitter of one text."""

    @property
    def is_thinking(self) -> bool:
        """Whether the text is inside the thinking."""

    @property
    def may_begin(self) -> bool:
        """Whether what was written so far may be the beginning of the thinking."""

    def feed(self, new: str) -> tuple[str, str]:
        """Add new text. Returns the thinking and the answer that are decided by it."""

    def finish(self) -> tuple[str, str]:
        """End the text. Returns what was held back, as `feed` does."""

    def copy(self) -> AnswerSplitter:
        """Return a splitter in the same state."""


#: Most characters of whitespace that are held back.
_MAX_WHITE = 64
_WHITE = " \t\r\n"


@dataclass(slots=True)
class ThinkingSplitter:
    """The splitter of one text."""

    tags: ThinkingTags
    #: The text is inside the block: the prompt may have opened it.
    is_thinking: bool = False
    #: A block may begin yet.
    may_begin: bool = True
    #: Only whitespace was written since the block began, or since it ended.
    _at_start: bool = True
    _held: str = ""

    def feed(self, new: str) -> tuple[str, str]:
        """Add new text. Returns the thinking and the answer that are decided by it."""
        if not (self.is_thinking or self.may_begin or self._at_start):
            return "", new
        text, self._held = self._held + new, ""
        reasoning = ""
        if not self.is_thinking and self.may_begin:
            text = self._begin(text)
        if self.is_thinking:
            reasoning, text = self._think(text)
        if self.is_thinking or self.may_begin:
            return reasoning, ""
        if self._at_start:
            text = text.lstrip(_WHITE)
            self._at_start = not text
        return reasoning, text

    def finish(self) -> tuple[str, str]:
        """End the text. Returns what was held back, as `feed` does."""
        held, self._held = self._held, ""
        return (held.rstrip(_WHITE), "") if self.is_thinking else ("", held)

    def copy(self) -> ThinkingSplitter:
        """Return a splitter in the same state."""
        return replace(self)

    def _begin(self, text: str) -> str:
        """Decide whether the text begins with the block. Returns what follows, or an empty text while it is open."""
        rest = text.lstrip(_WHITE)
        if len(text) - len(rest) <= _MAX_WHITE:
            if rest.startswith(self.tags.opening):
                self.is_thinking, self.may_begin = True, False
                return rest[len(self.tags.opening) :]
            if self.tags.opening.startswith(rest):
                self._held = text
                return ""
        self.may_begin = self._at_start = False
        return text

    def _think(self, text: str) -> tuple[str, str]:
        """Return the thinking, and what follows its end."""
        if self._at_start:
            text = text.lstrip(_WHITE)
        self._at_start = not text
        self.may_begin = False
        at = text.find(self.tags.closing)
        if at >= 0:
            self.is_thinking, self._at_start = False, True
            return text[:at].rstrip(_WHITE), text[at + len(self.tags.closing) :]
        keep = _beginning(text, self.tags.closing)
        decided = text[: len(text) - keep]
        white = len(decided) - len(decided.rstrip(_WHITE))
        keep += white if white <= _MAX_WHITE else 0
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], ""


def _beginning(text: str, tag: str) -> int:
    """Return how many characters at the end of the text may begin the tag."""
    return next((size for size in range(min(len(tag) - 1, len(text)), 0, -1) if tag.startswith(text[-size:])), 0)
