"""
The splitter of channels: divides an answer in OpenAI's harmony format into thinking, text and tool calls.

An answer is a sequence of messages, each with a header that names its channel. `analysis` is thinking; a message to a
function is a call, which is left in the text in one form of its header; all others are text.
A header that never becomes one is text: nothing that a model writes is lost but the markers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

#: The markers, which are control tokens of the vocabulary. `<|return|>` and `<|call|>` end an answer.
MARKERS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")
#: Those that end a message or begin the next one.
_ENDS = ("<|end|>", "<|start|>", "<|channel|>", "<|return|>", "<|call|>")
_CALL = "<|channel|>commentary to=functions."
_RECIPIENT = "to=functions."
#: Most characters of a header.
_MAX_HEADER = 300
_LONGEST = max(map(len, MARKERS))


@dataclass(slots=True)
class ChannelSplitter:
    """The splitter of one text."""

    #: What is being read: a `header`, `thinking`, a `text`, or a `call`.
    part: str = "header"
    #: A message of this kind was read, so the next one begins on a line of its own.
    _has_text: bool = False
    _has_thinking: bool = False
    #: Written before the next text or thinking.
    _gap: str = ""
    _held: str = ""

    @property
    def is_thinking(self) -> bool:
        """Whether the text is inside the thinking, or a header."""
        return self.part in ("header", "thinking")

    @property
    def may_begin(self) -> bool:
        """Whether what was written is undecided; a header never is, because it is no text."""
        return False

    def feed(self, new: str) -> tuple[str, str]:
        """Add new text. Returns the thinking and the answer that are decided by it."""
        text, self._held = self._held + new, ""
        thought: list[str] = []
        said: list[str] = []
        while text:
            before = self.part
            text = self._header(text, said) if self.part == "header" else self._body(text, thought, said)
            if not text or (self.part == before == "header"):
                break
        return "".join(thought), "".join(said)

    def finish(self) -> tuple[str, str]:
        """End the text. Returns what was held back, as `feed` does."""
        held, self._held = self._held, ""
        if self.part == "header":
            return "", "" if any(marker in held for marker in MARKERS) else held
        return (held, "") if self.part == "thinking" else ("", held)

    def copy(self) -> ChannelSplitter:
        """Return a splitter in the same state."""
        return replace(self)

    def _header(self, text: str, said: list[str]) -> str:
        """Read a header. Returns the text after it; what is not decided is held back."""
        if not _may_be_header(text):
            self.part, self._gap = "text", ""
            return text
        ends = text.find("<|message|>", 0, _MAX_HEADER)
        called = text.find(_RECIPIENT, 0, ends if ends >= 0 else _MAX_HEADER)
        if called >= 0:
            self.part = "call"
            said.append(_CALL)
            return text[called + len(_RECIPIENT) :]
        if ends >= 0:
            name = re.search(r"<\|channel\|>\s*(\w*)", text[:ends])
            self.part = "thinking" if name is not None and name[1] == "analysis" else "text"
            has = self._has_thinking if self.part == "thinking" else self._has_text
            self._gap = "\n\n" if has else ""
            return text[ends + len("<|message|>") :]
        if len(text) >= _MAX_HEADER:
            self.part, self._gap, self._has_text = "text", "", True
            said.append(text[:_MAX_HEADER])
            return text[_MAX_HEADER:]
        self._held = text
        return ""

    def _body(self, text: str, thought: list[str], said: list[str]) -> str:
        """Read a message. Returns what follows it."""
        # A call has its own header up to its arguments.
        markers = tuple(one for one in _ENDS if self.part != "call" or one != "<|channel|>")
        found = [(at, marker) for marker in markers if (at := text.find(marker)) >= 0]
        if found:
            at, marker = min(found)
            self._write(text[:at], thought, said)
            self.part = "header"
            return text[at + (0 if marker == "<|channel|>" else len(marker)) :]
        keep = next(
            (
                size
                for size in range(min(_LONGEST - 1, len(text)), 0, -1)
                if any(marker.startswith(text[-size:]) for marker in markers)
            ),
            0,
        )
        self._write(text[: len(text) - keep], thought, said)
        self._held = text[len(text) - keep :]
        return ""

    def _write(self, text: str, thought: list[str], said: list[str]) -> None:
        if not text:
            return
        if self.part == "thinking":
            thought.append(self._gap + text)
            self._has_thinking = True
        else:
            said.append(text if self.part == "call" else self._gap + text)
            self._has_text = True
        self._gap = ""


def _may_be_header(text: str) -> bool:
    """Whether a text can be the beginning of a header: a marker, a role, or the name of who is addressed."""
    rest = text.lstrip()
    begins = ("<|start|>", "<|channel|>", "<|message|>", "assistant", "to=")
    return any(rest.startswith(one) or one.startswith(rest) for one in begins)
