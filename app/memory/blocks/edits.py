r"""
Edits of the value of a block, as models ask for them.

An edit is made exactly as it was asked for, or refused with a message that says what to do instead.
Line numbers that a model copied from a listing, such as `Line 3: ` or `3\t`, never get into a value.
"""

from __future__ import annotations

import re

from app.kernel.errors import ArrieroError

#: Line numbers as listings show them: at the beginning of a line.
_NUMBERED = re.compile(r"^(?:[Ll]ine \d{1,6}: ?| *\d{1,6}(?:\t| ?[→|│] ?))", re.MULTILINE)
#: Line numbers that may also be the text of a list.
_LIKE_A_LIST = re.compile(r"^ *\d{1,6}(?:[:.)]|-) ?", re.MULTILINE)
#: Most characters of a value that a message repeats.
_SHOWN = 400


class EditRefused(ArrieroError):
    """An edit was not made; the message says to a model what to do."""


def replaced(label: str, value: str, old: str, new: str) -> str:
    """Return the value with `new` in the place of `old`, which it contains exactly once. Raises EditRefused."""
    if not old:
        raise EditRefused(
            "old_string is empty; give the exact text to replace, or use memory_insert to add text, "
            "or memory_rethink to write the whole block"
        )
    _refuse_numbers("old_string", old, unless=value)
    _refuse_numbers("new_string", new, unless=value)
    count = value.count(old)
    if count == 1:
        return value.replace(old, new, 1)
    if count > 1:
        lines = [str(at) for at, line in enumerate(value.split("\n"), 1) if old in line]
        where = f" (lines {', '.join(lines[:10])})" if lines else ""
        raise EditRefused(
            f"old_string occurs {count} times in the block {label!r}{where}, and must occur exactly once; "
            "give a longer old_string, with the words before or after it"
        )
    raise EditRefused(_not_found(label, value, old))


def inserted(value: str, new: str, line: int) -> str:
    """Return the value with `new` as lines of its own after line `line`: 0 before the first, -1 at the end."""
    if not new:
        raise EditRefused("new_string is empty; give the text to insert")
    _refuse_numbers("new_string", new, unless=value)
    lines = value.split("\n") if value else []
    if not -1 <= line <= len(lines):
        raise EditRefused(
            f"insert_line is {line}, and the block has {len(lines)} line(s); "
            f"use -1 for the end, 0 for the beginning, or 1 to {len(lines)} to insert after that line"
            if lines
            else f"insert_line is {line}, and the block is empty; use -1"
        )
    at = len(lines) if line == -1 else line
    return "\n".join([*lines[:at], *new.split("\n"), *lines[at:]])


def rethought(value: str, new: str) -> str:
    """Return `new`, the whole new value."""
    _refuse_numbers("new_memory", new, unless=value)
    return new


def within(label: str, value: str, limit: int) -> str:
    """Return the value if it fits the limit. Raises EditRefused."""
    if len(value) > limit:
        raise EditRefused(
            f"the block {label!r} would have {len(value)} characters, {len(value) - limit} more than its limit of "
            f"{limit}; shorten the text, remove what is no longer needed with memory_replace, or keep details with "
            "archival_insert"
        )
    return value


def _refuse_numbers(argument: str, text: str, *, unless: str) -> None:
    """Raise EditRefused when each line of a text begins with a line number, and the value has none such."""
    lines = [line for line in text.split("\n") if line.strip()]
    if lines and all(_NUMBERED.match(line) for line in lines) and not _NUMBERED.search(unless):
        raise EditRefused(
            f"{argument} begins with line numbers ({lines[0][:40]!r}), which are not part of the block; "
            "give the text without them"
        )


def _not_found(label: str, value: str, old: str) -> str:
    message = f"old_string does not occur in the block {label!r}"
    bare = _LIKE_A_LIST.sub("", _NUMBERED.sub("", old))
    if not value:
        return f"{message}, which is empty; use memory_insert to write the first text"
    if bare and bare != old and bare in value:
        return f"{message}; without its line numbers it does: give the text without them"
    if old.strip() and old.strip() in value:
        return f"{message}, because of blanks or line breaks at its ends; give {old.strip()[:_SHOWN]!r}"
    folded = value.casefold().find(old.casefold())
    if folded >= 0 and len(value.casefold()) == len(value):
        return f"{message}, but in other case; give {value[folded : folded + len(old)][:_SHOWN]!r}"
    shown = value if len(value) <= _SHOWN else value[:_SHOWN] + "…"
    return f"{message}; copy the text exactly as it stands there. The block now says:\n{shown}"
