"""
GBNF: the grammar notation of llama.cpp, as terms that cannot be written wrongly.

Text and characters are escaped here and nowhere else.
Equal rules are stored once, and names are unique.
A rule refers only to rules that were there before it: no grammar recurs, and every rule of it can end.

The notation is the one of llama.cpp's grammars/README.md; the limits are those of its src/llama-grammar.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import TypeAlias

from app.grammar.characters import Ranges

#: Most repetitions of one item. llama.cpp 0.5 writes each out as a rule and refuses more than 2000; a maximum above
#: that it takes, silently, as no maximum at all.
MAX_REPEAT = 1999

#: Most characters of a grammar's text.
MAX_TEXT = 400_000
#: Most rules that llama.cpp makes of a grammar: so many take it 15 to 40 ms and 6 MB per request.
MAX_EXPANDED = 50_000
#: Most ways to a first character: llama.cpp looks for left recursion along each, which takes it 5 to 40 ms for so many.
MAX_PATHS = 200_000
#: Most rules that a group under a repetition may hold before it becomes a rule itself.
MAX_GROUP = 200


@dataclass(frozen=True, slots=True)
class Text:
    """These characters, in this order."""

    text: str


@dataclass(frozen=True, slots=True)
class Chars:
    """One character out of a set."""

    ranges: Ranges


@dataclass(frozen=True, slots=True)
class RuleName:
    """What the rule of that name describes."""

    name: str


@dataclass(frozen=True, slots=True)
class Chain:
    """One term after the other. Build it with `chain`."""

    terms: tuple[Term, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the terms. Build it with `choice`."""

    terms: tuple[Term, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """The term, `least` to `most` times. Build it with `Rules.repeat` or `optional`."""

    term: Term
    least: int
    most: int


Term: TypeAlias = Text | Chars | RuleName | Chain | Choice | Repeat

EMPTY = Text("")


def chain(*terms: Term) -> Term:
    """The terms one after the other; neighbouring texts become one."""
    flat: list[Term] = []
    for term in terms:
        for part in term.terms if isinstance(term, Chain) else (term,):
            last = flat[-1] if flat else None
            if isinstance(part, Text) and isinstance(last, Text):
                flat[-1] = Text(last.text + part.text)
            elif part != EMPTY:
                flat.append(part)
    return flat[0] if len(flat) == 1 else Chain(tuple(flat)) if flat else EMPTY


def choice(*terms: Term) -> Term:
    """Any one of the terms; each is written once."""
    flat = dict.fromkeys(part for term in terms for part in (term.terms if isinstance(term, Choice) else (term,)))
    return next(iter(flat)) if len(flat) == 1 else Choice(tuple(flat))


def optional(term: Term) -> Term:
    """The term or nothing."""
    return term if term == EMPTY else Repeat(term, 0, 1)


def literals(texts: Iterable[str]) -> Term:
    """One of the texts. Shared beginnings are written once, so that few stacks of llama.cpp stay open."""
    ordered = list(dict.fromkeys(texts))
    options: list[Term] = [EMPTY] if "" in ordered else []
    heads = dict.fromkeys(text[0] for text in ordered if text)
    for head in heads:
        tails = [text for text in ordered if text.startswith(head)]
        prefix = _common_prefix(tails)
        options.append(chain(Text(prefix), literals(text[len(prefix) :] for text in tails)))
    return choice(*options)


class Rules:
    """The rules of one grammar while it is built."""

    def __init__(self) -> None:
        self._terms: dict[str, Term] = {}
        self._names: dict[Term, RuleName] = {}
        self._counts: dict[str, int] = {}

    def add(self, hint: str, term: Term) -> RuleName:
        """The rule with that term; an old one where there is one. It refers to older rules only."""
        if isinstance(term, RuleName):
            return term
        known = self._names.get(term)
        if known is None:
            known = self._names[term] = RuleName(self._unused(hint))
            self._terms[known.name] = term
        return known

    def _unused(self, hint: str) -> str:
        stem = name = re.sub(r"[^a-z0-9]+", "-", hint.lower()).strip("-")[:32] or "value"
        while name in self._terms or name == "root":
            self._counts[stem] = self._counts.get(stem, 1) + 1
            name = f"{stem}-{self._counts[stem]}"
        return name

    def repeat(self, term: Term, least: int, most: int, hint: str = "item") -> Term:
        """The term, `least` to `most` times. A compound term becomes a rule, which keeps llama.cpp's count at one."""
        if most == 0 or term == EMPTY:
            return EMPTY
        if least == most == 1:
            return term
        if most > 1 and not isinstance(term, Text | Chars | RuleName):
            term = self.add(hint, term)
        return Repeat(term, least, most)

    def reached(self, root: Term) -> dict[str, Term]:
        """The rules that a text of `root` can need, `root` first, cut so that llama.cpp takes each repetition."""
        needed = {"root": self._cut(root)}
        waiting = [needed["root"]]
        while waiting:
            for name in _all_names(waiting.pop()):
                if name not in needed:
                    needed[name] = self._cut(self._terms[name])
                    waiting.append(needed[name])
        return needed

    def _cut(self, term: Term) -> Term:
        """The same, with large groups under a repetition made rules: llama.cpp counts what a group holds again."""
        if isinstance(term, Chain | Choice):
            return type(term)(tuple(map(self._cut, term.terms)))
        if not isinstance(term, Repeat):
            return term
        inner = self._cut(term.term)
        if isinstance(inner, Chain | Choice | Repeat) and _expanded(inner) * term.most > MAX_GROUP:
            inner = self.add("group", inner)
        return Repeat(inner, term.least, term.most)


def left_paths(rules: Mapping[str, Term]) -> int:
    """How many ways lead from a rule to a first character; llama.cpp walks each of them."""
    nullable: dict[str, bool] = {}
    paths: dict[str, int] = {}

    def may_be_empty(term: Term) -> bool:
        if isinstance(term, RuleName):
            if term.name not in nullable:
                nullable[term.name] = may_be_empty(rules[term.name])
            return nullable[term.name]
        if isinstance(term, Repeat) and term.least == 0:
            return True
        if isinstance(term, Choice):
            return any(map(may_be_empty, term.terms))
        return term == EMPTY or (isinstance(term, Chain | Repeat) and all(map(may_be_empty, _children(term))))

    def count(term: Term) -> int:
        if isinstance(term, RuleName):
            if term.name not in paths:
                paths[term.name] = 1 + count(rules[term.name])
            return paths[term.name]
        total = 0
        for child in _children(term):
            total += count(child)
            if isinstance(term, Chain) and not may_be_empty(child):
                break
        return total

    return max(map(count, rules.values()))


def expanded(rules: Mapping[str, Term]) -> int:
    """About how many rules llama.cpp makes of these."""
    return sum(map(_expanded, rules.values()))


def render(rules: Mapping[str, Term]) -> str:
    """The grammar as text, one rule a line."""
    return "".join(f"{name} ::= {_render(term, nested=False)}\n" for name, term in rules.items())


def _common_prefix(texts: list[str]) -> str:
    low, high = min(texts), max(texts)
    length = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    return low[:length]


def _children(term: Term) -> tuple[Term, ...]:
    if isinstance(term, Chain | Choice):
        return term.terms
    return (term.term,) if isinstance(term, Repeat) else ()


def _all_names(term: Term) -> Iterator[str]:
    if isinstance(term, RuleName):
        yield term.name
    for child in _children(term):
        yield from _all_names(child)


def _expanded(term: Term) -> int:
    own = term.most if isinstance(term, Repeat) else 1
    return own + sum(_expanded(child) for child in _children(term))


def _render(term: Term, *, nested: bool) -> str:
    if isinstance(term, Text):
        return '"' + "".join(map(_escaped_in_text, term.text)) + '"'
    if isinstance(term, Chars):
        return "[" + "".join(_in_class(low, high) for low, high in term.ranges) + "]"
    if isinstance(term, RuleName):
        return term.name
    if isinstance(term, Repeat):
        if isinstance(term.term, Repeat):
            return f"({_render(term.term, nested=False)}){_times(term)}"
        return _render(term.term, nested=True) + _times(term)
    if isinstance(term, Choice):
        text = " | ".join(_render(part, nested=isinstance(part, Choice)) for part in term.terms)
    else:
        text = " ".join(_run(part, len(list(run))) for part, run in groupby(term.terms))
    return f"({text})" if nested else text


def _run(term: Term, count: int) -> str:
    text = _render(term, nested=not isinstance(term, Repeat))
    # Only one character may be drawn together: a group may hold many rules, and those count times the repetition.
    return f"{text}{{{count}}}" if count > 1 and isinstance(term, Chars) else " ".join([text] * count)


def _times(repeat: Repeat) -> str:
    least, most = repeat.least, repeat.most
    if (least, most) == (0, 1):
        return "?"
    return f"{{{least}}}" if least == most else f"{{{least},{most}}}"


def _escaped_in_text(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    return character if " " <= character <= "~" else _escape(ord(character))


def _in_class(low: int, high: int) -> str:
    return _escaped_in_class(low) if low == high else f"{_escaped_in_class(low)}-{_escaped_in_class(high)}"


def _escaped_in_class(code: int) -> str:
    return chr(code) if code < 128 and (chr(code).isalnum() or chr(code) in " !#$%&'*+,./:;=?@_{}~") else _escape(code)


def _escape(code: int) -> str:
    return f"\\x{code:02X}" if code < 0x100 else f"\\u{code:04X}" if code < 0x10000 else f"\\U{code:08X}"
