"""
The scanner of tool calls that are being written: their names and the characters of their arguments, as they come.

It expects what the grammar of tool calls allows: objects whose first key is `name`. It never parses a value of the
arguments; the finished text is parsed and checked as a whole.
"""

from __future__ import annotations

import json
import re
from typing import Protocol

from app.inference.requests import ToolCallPiece


class CallScanner(Protocol):
    """A scanner of one text."""

    def feed(self, calls: str) -> tuple[ToolCallPiece, ...]:
        """Return what is new in the calls of the text, which are given whole each time."""


class ToolCallScanner:
    """The scanner of one text. Its cost is that of its characters."""

    __slots__ = (
        "_arguments",
        "_at",
        "_depth",
        "_escaped",
        "_in_arguments",
        "_in_string",
        "_key",
        "_name",
        "_place",
        "_string",
        "_value",
    )

    def __init__(self, arguments: str) -> None:
        """`arguments` is the key of the arguments in a call."""
        self._arguments = arguments
        #: Characters of the text that were scanned, and the place of the call that they belong to.
        self._at, self._place = 0, -1
        #: Open brackets; the object of a call is the first.
        self._depth = 0
        self._in_string = self._escaped = False
        #: The characters of the string at the first level, without its quotes.
        self._string: list[str] = []
        #: The last key at the first level, and whether its value comes next.
        self._key, self._value = "", False
        self._in_arguments = False
        self._name: str | None = None

    def feed(self, calls: str) -> tuple[ToolCallPiece, ...]:
        """Return what is new in the calls of the text, which are given whole each time."""
        found: list[ToolCallPiece] = []
        new: list[str] = []
        for character in calls[self._at :]:
            was_inside = self._in_arguments
            self._step(character)
            if was_inside or self._in_arguments:
                new.append(character)
            if self._name is not None:
                found.append(ToolCallPiece(self._place, self._name))
                self._name = None
            if was_inside and not self._in_arguments:
                found.append(ToolCallPiece(self._place, None, "".join(new)))
                new = []
        self._at = max(self._at, len(calls))
        if new:
            found.append(ToolCallPiece(self._place, None, "".join(new)))
        return tuple(found)

    def all_arguments(self, calls: str) -> dict[int, str]:
        """The arguments of all calls of a text, by the place of the call, as they are written."""
        found: dict[int, str] = {}
        for part in self.feed(calls):
            found[part.place] = found.get(part.place, "") + part.arguments
        return found

    def _step(self, character: str) -> None:
        if self._in_string:
            self._in_text(character)
        elif character == '"':
            self._in_string = self._depth > 0
            self._string.clear()
        elif character in "{[":
            if not self._depth and character == "[":
                return  # the list of the calls
            self._depth += 1
            if self._depth == 1:
                self._place += 1
                self._key, self._value = "", False
            self._in_arguments = self._in_arguments or (self._depth == 2 and self._key == self._arguments)
        elif character in "}]":
            self._depth = max(0, self._depth - 1)
            self._in_arguments = self._in_arguments and self._depth > 1
        elif self._depth == 1 and character in ":,":
            self._value = character == ":"

    def _in_text(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._in_string = False
            if self._depth == 1:
                self._ended(json.loads(f'"{"".join(self._string)}"', strict=False))
            return
        if self._depth == 1:
            self._string.append(character)

    def _ended(self, text: str) -> None:
        """A string at the first level has ended."""
        if not self._value:
            self._key = text
        elif self._key == "name":
            self._name = text


class NamedCallScanner:
    """The scanner of calls whose name stands before the arguments."""

    __slots__ = ("_at", "_depth", "_escaped", "_in_string", "_name_end", "_opening", "_place", "_reads_name")

    def __init__(self, opening: str, name_end: re.Pattern[str]) -> None:
        """`opening` comes before the name, and `name_end` between it and the arguments."""
        self._opening, self._name_end = opening, name_end
        self._at, self._place, self._depth = 0, -1, 0
        self._reads_name = True
        self._in_string = self._escaped = False

    def feed(self, calls: str) -> tuple[ToolCallPiece, ...]:
        """Return what is new in the calls of the text, which are given whole each time."""
        found: list[ToolCallPiece] = []
        while self._at < len(calls):
            if self._reads_name:
                begins = calls.find(self._opening, self._at)
                ends = None if begins < 0 else self._name_end.search(calls, begins + len(self._opening))
                if ends is None:
                    break
                self._place, self._at, self._reads_name = self._place + 1, ends.end(), False
                name = calls[begins + len(self._opening) : ends.start()].strip()
                found.append(ToolCallPiece(self._place, name))
                self._depth = 0
            elif new := self._arguments(calls):
                found.append(ToolCallPiece(self._place, None, new))
        return tuple(found)

    def _arguments(self, calls: str) -> str:
        """Scan the arguments as far as they are written. Returns them."""
        first = self._at
        for character in calls[first:]:
            self._at += 1
            if self._in_string:
                self._in_string = self._escaped or character != '"'
                self._escaped = character == "\\" and not self._escaped
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self._reads_name = True
                    break
            elif not self._depth:
                first = self._at  # whitespace before the arguments
        return calls[first : self._at]


def arguments_of(call: str, key: str) -> str:
    """The arguments of one call, as they are written in its text."""
    return "".join(part.arguments for part in ToolCallScanner(key).feed(call))
