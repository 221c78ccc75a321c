"""
Removal of structure that carries no words: blanks, empty lines, tags and marks of formatting, indentation of JSON.

Code and quotes stay as they are. A tag is removed only if its attributes are about looks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from app.memory.compression.texts import Place

_COMMENT = re.compile(r"<!--[^<>]{0,2000}-->")
_TAG = re.compile(
    r"</?(?:p|div|span|b|i|u|em|strong|br|hr|ul|ol|li|table|thead|tbody|tr|td|th|h[1-6]|font|section|article|center)"
    r"(?:\s+(?:class|style|align)=\"[^\"<>]{0,200}\"){0,4}\s*/?>",
    re.IGNORECASE,
)
_EMPHASIS = re.compile(r"(\*\*|__)(?=\S)([^*_\n]{1,300})(?<=\S)\1")
_RULE = re.compile(
    r"^[ \t]{0,8}(?:[-=*_~]{3,200}|\|?(?:[ \t]{0,8}:?-{2,100}:?[ \t]{0,8}\|){1,50}[ \t:-]{0,100})[ \t]{0,8}$",
    re.MULTILINE,
)
_HEADING = re.compile(r"^#{1,6} ", re.MULTILINE)
_BLANKS = re.compile(r"[ \t\u00a0\u2000-\u200b\u3000]{2,}")
_LINE_END = re.compile(r"(?<![ \t])[ \t]+\n")
_EMPTY_LINES = re.compile(r"\n{3,}")
#: A text of JSON, or the blanks between them.
_JSON_PART = re.compile(r'"(?:[^"\\]|\\.)*"|\s+')


def stripped(text: str, kept: Sequence[Place]) -> str:
    """Return the text without its structure, except in the places that are kept as they are."""
    if _is_json(text):
        return _JSON_PART.sub(lambda part: part[0] if part[0].startswith('"') else "", text)
    parts: list[str] = []
    at = 0
    for place in kept:
        parts += (_stripped(text[at : place.start]), text[place.start : place.end])
        at = place.end
    parts.append(_stripped(text[at:]))
    return "".join(parts)


def _stripped(text: str) -> str:
    text = _TAG.sub(" ", _COMMENT.sub(" ", text)) if "<" in text else text
    if "**" in text or "__" in text:
        text = _EMPHASIS.sub(r"\2", text)
    text = _HEADING.sub("", _RULE.sub("", text))
    text = _LINE_END.sub("\n", _BLANKS.sub(" ", text))
    return _EMPTY_LINES.sub("\n\n", text)


def _is_json(text: str) -> bool:
    """Whether a text is an indented JSON document, by its look: blanks between its parts have no meaning then."""
    first, last = text.lstrip()[:1], text.rstrip()[-1:]
    if (first, last) not in (("{", "}"), ("[", "]")) or "\n" not in text:
        return False
    outside = _JSON_PART.sub(" ", text)
    return re.fullmatch(r"(?:[\s{}\[\],:]|true|false|null|-?\d[\d.eE+-]*)*", outside) is not None
