"""
The hook `words`: profanity, and other words of the installation, are masked, refused or counted.

A word is compared as a whole, in its compatible form without case (NFKC): full-width letters are found, `Scunthorpe` is
not. Words with other signs between their letters are not found.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.inference.hooks.exchange import HookAnswer, HookText, changed
from app.inference.hooks.shipped import scanning
from app.inference.hooks.shipped.scanning import TimeLimit
from app.kernel.sections.hooks import HookPoint

#: A short English list; other languages and stricter houses write their own.
PROFANITY = frozenset(
    [
        "arsehole",
        "asshole",
        "bastard",
        "bitch",
        "bollocks",
        "bullshit",
        "cock",
        "cunt",
        "damn",
        "dick",
        "dickhead",
        "fuck",
        "fucked",
        "fucker",
        "fucking",
        "motherfucker",
        "piss",
        "prick",
        "pussy",
        "shit",
        "shitty",
        "slut",
        "twat",
        "wanker",
        "whore",
    ]
)
_WORD = re.compile(r"\w+")  # one class, repeated: linear


class WordOptions(BaseModel):
    """Which words, and what happens to them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    action: Literal["mask", "refuse", "annotate"] = "mask"
    #: Further words.
    words: tuple[str, ...] = Field(default=(), max_length=100_000)
    #: Whether the shipped English list counts.
    profanity: bool = True


def call(_: HookPoint, texts: list[HookText], options: WordOptions, __: Any, limit: TimeLimit) -> HookAnswer:
    """Mask, refuse or count. Raises HookLate."""
    listed = frozenset(map(_plain, options.words)) | (PROFANITY if options.profanity else frozenset())
    count = 0

    def masked(text: str) -> str:
        nonlocal count
        spans = []
        for index, word in enumerate(_WORD.finditer(text)):
            if not index % 4096:
                limit.check()
            if len(word[0]) <= 100 and _plain(word[0]) in listed:
                spans.append((*word.span(), "*" * len(word[0])))
        count += len(spans)
        return scanning.replaced(text, spans)

    without = changed(texts, masked)
    if not count:
        return HookAnswer()
    if options.action == "refuse":
        return HookAnswer(refuse="the text contains a word that is not allowed", annotations={"words": count})
    return HookAnswer(texts=without if options.action == "mask" else None, annotations={"words": count})


def _plain(word: str) -> str:
    return unicodedata.normalize("NFKC", word).casefold()
