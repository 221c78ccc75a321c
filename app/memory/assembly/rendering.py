"""
The prompt of a plan: its parts as messages for a chat template.

What stays the same from turn to turn stands first: one system message with blocks and summary, and the recent messages.
What was chosen for the last message stands in front of its text, so that everything before it has the same tokens as
in the prompt before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from app.inference.requests import ChatMessage
from app.memory.assembly.parts import Candidate

#: Around all memory blocks, as their own rendering has it.
BLOCKS_OPEN, BLOCKS_CLOSE = "<memory_blocks>\n", "\n</memory_blocks>"
_SUMMARY = "Summary of the conversation so far:"
_PERSONAL = "About the user:"
_RECALLED = "From earlier:"
_OPEN, _CLOSE = "<context>", "</context>"


def system_text(given: Sequence[str], blocks: Sequence[Candidate], summary: Candidate | None) -> str:
    """Return the one system message; empty without one."""
    found = [text for text in given if text]
    if blocks:
        found.append(BLOCKS_OPEN + "\n".join(one.text for one in blocks) + BLOCKS_CLOSE)
    if summary is not None:
        found.append(f"{_SUMMARY}\n{summary.text}")
    return "\n\n".join(found)


def context_text(personal: Sequence[Candidate], recalled: Sequence[Candidate]) -> str:
    """Return what is put in front of the last message of the user; empty without anything."""
    found: list[str] = []
    for title, candidates in ((_PERSONAL, personal), (_RECALLED, recalled)):
        if candidates:
            found += [title, *(_contained(one.text) for one in candidates)]
    return "\n".join([_OPEN, *found, _CLOSE]) + "\n\n" if found else ""


def messages(
    system: str, recent: Sequence[ChatMessage], request: Sequence[ChatMessage], context: str
) -> list[ChatMessage]:
    """Return the messages of a prompt. The context goes in front of the last message of the user."""
    found = [*([ChatMessage("system", system)] if system else []), *recent, *request]
    if not context:
        return found
    place = max((at for at, one in enumerate(found) if one.role == "user"), default=None)
    if place is None:
        return found
    found[place] = replace(found[place], content=context + found[place].content)
    return found


def _contained(text: str) -> str:
    """A text that cannot end the context."""
    return "- " + text.replace(_CLOSE, "</ context>").replace("\n", "\n  ")
