"""
The check of a text by its facts: every number, comparable and direction that it states is one of the facts.

A fact is a line. One that begins with `[ID]` is about that comparable: a sentence that cites it may state only its
numbers, beside those of the lines about no comparable. So two right facts that were combined wrongly are found too.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from app.real_estate import languages
from app.real_estate.languages import LanguageCode

_CITED = re.compile(r"\[([^\[\]\n]{1,60})\]")
_NUMBER = re.compile(r"\d+(?:[.,'\u2019\u00a0\u202f ]\d{3})+(?:[.,]\d+)?(?![\d])|\d+(?:[.,]\d+)?")
#: Three digits after a mark are thousands, as prices are written: `0.465` is none.
_GROUPED = re.compile(r"[1-9]\d{0,2}(?:[.,'\u2019\u00a0\u202f ]\d{3})+")
_SENTENCES = re.compile(r"(?<=[.!?।])\s+|\n+")
_LINK = re.compile(r"https?://|www\.|[\w.+-]{1,64}@[\w-]{1,64}\.[a-z]{2,}", re.IGNORECASE)
_UP = frozenset(
    [
        "rose",
        "rise",
        "rises",
        "rising",
        "risen",
        "increase",
        "increased",
        "increases",
        "increasing",
        "grew",
        "grow",
        "growing",
        "growth",
        "up",
        "higher",
        "climbed",
    ]
)
_DOWN = frozenset(
    [
        "fell",
        "fall",
        "falls",
        "falling",
        "fallen",
        "decrease",
        "decreased",
        "decreases",
        "decreasing",
        "declined",
        "decline",
        "declining",
        "dropped",
        "drop",
        "down",
        "lower",
    ]
)
_FLAT = frozenset(["stable", "flat", "unchanged", "steady"])
_DIRECTIONS = {"rising": (_UP, _DOWN | _FLAT), "falling": (_DOWN, _UP | _FLAT), "flat": (_FLAT, _UP | _DOWN)}
#: Most problems of one text.
_MOST = 20

Texts = Annotated[list[Annotated[str, Field(max_length=2_000)]], Field(max_length=200)]


def check_text(
    text: Annotated[str, Field(max_length=20_000)],
    facts: Texts,
    cite: Texts | None = None,
    citations: Annotated[int, Field(ge=0, le=20)] = 0,
    direction: Literal["", "rising", "falling", "flat"] = "",
    language: LanguageCode | Literal[""] = "",
    tone: Literal["", "formal", "friendly", "brief"] = "",
    never: Texts | None = None,
    least: Annotated[int, Field(ge=0, le=5_000)] = 20,
    most: Annotated[int, Field(ge=1, le=20_000)] = 2_000,
) -> dict[str, Any]:
    """
    Return whether a text states only facts (`passed`), and what is wrong with it (`problems`).

    It has to cite at least `citations` of the comparables of `cite`, and no other one; no text of `never` occurs in it.
    A statement without a number, a link or a name of those is found only if it is about availability.
    """
    text = text.strip()
    problems: list[str] = []
    if not least <= len(text) <= most:
        problems.append(f"it has {len(text)} characters, not {least} to {most}")
    cited = list(dict.fromkeys(_CITED.findall(text)))
    known = set(cite or ())
    problems += [f"[{one}] is no comparable" for one in cited if one not in known]
    if len(known.intersection(cited)) < citations:
        problems.append(f"it cites {len(known.intersection(cited))} comparables, not {citations}")
    problems += _wrong_numbers(text, facts, known)
    if _LINK.search(text) and not all(link.lower() in "\n".join(facts).lower() for link in _links(text)):
        problems.append("it has a link or an address that is no fact")
    problems += [f"it has {one!r}, which is no fact" for one in never or () if one and one.lower() in text.lower()]
    if direction:
        problems += _wrong_direction(text, direction)
    if language:
        problems += _wrong_language(text, language, formal=tone == "formal")
        claims = [one for one in languages.AVAILABLE[language] if languages.contains(text, one, language)]
        known_words = "\n".join(facts).lower()
        problems += [f"that it is {one} is no fact" for one in claims if one not in known_words]
    if tone == "brief" and len(text) > 400:
        problems.append("it is not brief: more than 400 characters")
    return {"passed": not problems, "problems": problems[:_MOST]}


def choose_text(
    texts: Annotated[list[Annotated[str, Field(max_length=18_000)]], Field(max_length=16)],
    otherwise: Annotated[str, Field(max_length=20_000)],
    facts: Texts,
    cite: Texts | None = None,
    citations: Annotated[int, Field(ge=0, le=20)] = 0,
    direction: Literal["", "rising", "falling", "flat"] = "",
    language: LanguageCode | Literal[""] = "",
    tone: Literal["", "formal", "friendly", "brief"] = "",
    never: Texts | None = None,
    prefix: Annotated[str, Field(max_length=2_000)] = "",
) -> dict[str, Any]:
    """
    Return the first text of a model that passes `check_text` (`by: model`), else the one that code wrote (`by: code`).

    `drafts` has the texts of the model with their problems; each continues `prefix`.
    """
    drafts = []
    for text in texts:
        whole = (prefix + text).strip()
        checked = check_text(whole, facts, cite, citations, direction, language, tone, never)
        drafts.append({"text": whole, **checked})
    chosen = next((one["text"] for one in drafts if one["passed"]), None)
    return {
        "text": otherwise if chosen is None else chosen,
        "by": "code" if chosen is None else "model",
        "drafts": drafts,
    }


def numbers_in(text: str) -> list[tuple[str, frozenset[float]]]:
    """Return each number of a text as it stands there, and what it means: `568.700` and `568,700.00` are 568700."""
    found = []
    for match in _NUMBER.finditer(_decimal(text)):
        shown = match[0]
        meanings: set[float] = set()
        if _GROUPED.fullmatch(shown):
            meanings.add(float(re.sub(r"\D", "", shown)))
        else:
            whole = re.fullmatch(r"(.*)[.,](\d{1,2}|\d{4,})", shown)
            if whole and _GROUPED.fullmatch(whole[1]):
                meanings.add(float(re.sub(r"\D", "", whole[1]) + "." + whole[2]))
        if not meanings and re.fullmatch(r"\d+(?:[.,]\d+)?", shown):
            meanings.add(float(shown.replace(",", ".")))
        found.append((shown, frozenset(meanings or {float(re.sub(r"\D", "", shown))})))
    return found


def _decimal(text: str) -> str:
    """Return a text with the digits of all scripts as those of ASCII."""
    return "".join(str(unicodedata.decimal(one)) if one.isdecimal() else one for one in text)


def _wrong_numbers(text: str, facts: Sequence[str], known: set[str]) -> list[str]:
    general: set[float] = set()
    own: dict[str, set[float]] = {}
    for fact in facts:
        match = _CITED.match(fact)
        stated = {one for _, some in numbers_in(_CITED.sub(" ", fact)) for one in some}
        if match and match[1] in known:
            own.setdefault(match[1], set()).update(stated)
        else:
            general |= stated
    every = general.union(*own.values())
    problems = []
    for sentence in _SENTENCES.split(text):
        cited = [one for one in _CITED.findall(sentence) if one in known]
        allowed = general.union(*(own.get(one, set()) for one in cited)) if cited else every
        for shown, meanings in numbers_in(_CITED.sub(" ", sentence)):
            if not meanings & every:
                problems.append(f"{shown} is in no fact")
            elif not meanings & allowed:
                problems.append(f"{shown} is no fact of {', '.join(cited)}")
    return list(dict.fromkeys(problems))


def _wrong_direction(text: str, direction: str) -> list[str]:
    expected, others = _DIRECTIONS[direction]
    words = languages.words_of(text)
    wrong = [word for word in words if word in others]
    if wrong:
        return [f"it says {wrong[0]!r}, but prices are {direction}"]
    return [] if expected.intersection(words) else [f"it does not say that prices are {direction}"]


def _wrong_language(text: str, language: LanguageCode, *, formal: bool) -> list[str]:
    found = languages.detect(text)
    problems = [] if found == language else [f"it is not in {languages.LANGUAGES[language]}"]
    promised = [one for one in languages.PROMISES[language] if languages.contains(text, one, language)]
    problems += [f"it promises: {one}" for one in promised]
    if formal:
        familiar = [one for one in languages.FAMILIAR[language] if languages.contains(text, one, language)]
        problems += [f"it is not formal: {one}" for one in familiar]
    return problems


def _links(text: str) -> list[str]:
    return re.findall(r"(?:https?://|www\.)[^\s,;)]{1,300}|[\w.+-]{1,64}@[\w-]{1,64}(?:\.[\w-]{2,63})+", text)
