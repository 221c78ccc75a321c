"""
GBNF: the grammar notation of llama.cpp, as terms and rules that always render to valid text.

Text and characters are escaped only here.
Equal rules are stored once, and names are unique.
A rule refers only to rules that were added before it, so no grammar is recursive, and every rule ends.

The notation is specified in llama.cpp's grammars/README.md; the limits are those of its src/llama-grammar.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import TypeAlias

from app.grammar.characters import Ranges

#: Maximum repetitions of one item. llama.cpp 0.5 expands each to a rule and rejects more than 2000; it silently treats
#: a maximum above that as unlimited.
MAX_REPEAT = 1999

#: Maximum characters of a grammar's text.
MAX_TEXT = 400_000
#: Maximum rules after llama.cpp has expanded a grammar: this number costs 15 to 40 ms and 6 MB per request.
MAX_EXPANDED = 50_000
#: Maximum paths to a first character: llama.cpp searches each for left recursion, in 5 to 40 ms for this number.
MAX_PATHS = 200_000
#: Maximum expanded rules of a repeated group; a larger group becomes a rule itself.
MAX_GROUP = 200


@dataclass(frozen=True, slots=True)
class Text:
    """A literal text."""

    text: str


@dataclass(frozen=True, slots=True)
class Chars:
    """One character of a set."""

    ranges: Ranges


@dataclass(frozen=True, slots=True)
class RuleName:
    """A reference to a rule."""

    name: str


@dataclass(frozen=True, slots=True)
class Chain:
    """A sequence of terms. Create it with `chain`."""

    terms: tuple[Term, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the terms. Create it with `choice`."""

    terms: tuple[Term, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """The term, `least` to `most` times. Create it with `Rules.repeat` or `optional`."""

    term: Term
    least: int
    most: int


Term: TypeAlias = Text | Chars | RuleName | Chain | Choice | Repeat

EMPTY = Text("")


def chain(*terms: Term) -> Term:
    """Returns the sequence of the terms; adjacent texts are joined."""
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
    """Returns a choice between the terms, without duplicates."""
    flat = dict.fromkeys(part for term in terms for part in (term.terms if isinstance(term, Choice) else (term,)))
    return next(iter(flat)) if len(flat) == 1 else Choice(tuple(flat))


def optional(term: Term) -> Term:
    """Returns the term or nothing."""
    return term if term == EMPTY else Repeat(term, 0, 1)


def literals(texts: Iterable[str]) -> Term:
    """Returns one of the texts. Common prefixes are written once, so that llama.cpp keeps few stacks open."""
    ordered = list(dict.fromkeys(texts))
    options: list[Term] = [EMPTY] if "" in ordered else []
    heads = dict.fromkeys(text[0] for text in ordered if text)
    for head in heads:
        tails = [text for text in ordered if text.startswith(head)]
        prefix = _common_prefix(tails)
        options.append(chain(Text(prefix), literals(text[len(prefix) :] for text in tails)))
    return choice(*options)


class Rules:
    """The rules of a grammar that is being built."""

    def __init__(self) -> None:
        self._terms: dict[str, Term] = {}
        self._names: dict[Term, RuleName] = {}
        self._counts: dict[str, int] = {}

    def add(self, hint: str, term: Term) -> RuleName:
        """Returns the name of the rule for the term, added if it is new. The term refers only to existing rules."""
        if isinstance(term, RuleName):
            return term
        known = self._names.get(term)
        if known is None:
            known = self._names[term] = RuleName(self._unique_name(hint))
            self._terms[known.name] = term
        return known

    def _unique_name(self, hint: str) -> str:
        stem = name = re.sub(r"[^a-z0-9]+", "-", hint.lower()).strip("-")[:32] or "value"
        while name in self._terms or name == "root":
            self._counts[stem] = self._counts.get(stem, 1) + 1
            name = f"{stem}-{self._counts[stem]}"
        return name

    def repeat(self, term: Term, least: int, most: int, hint: str = "item") -> Term:
        """Returns the term `least` to `most` times. A compound term becomes a rule: llama.cpp then expands its name."""
        if most == 0 or term == EMPTY:
            return EMPTY
        if least == most == 1:
            return term
        if most > 1 and not isinstance(term, Text | Chars | RuleName):
            term = self.add(hint, term)
        return Repeat(term, least, most)

    def reachable(self, root: Term) -> dict[str, Term]:
        """Returns the rules that `root` needs, `root` first, with large repeated groups as rules of their own."""
        needed = {"root": self._with_group_rules(root)}
        waiting = [needed["root"]]
        while waiting:
            for name in _all_names(waiting.pop()):
                if name not in needed:
                    needed[name] = self._with_group_rules(self._terms[name])
                    waiting.append(needed[name])
        return needed

    def _with_group_rules(self, term: Term) -> Term:
        """Replaces large repeated groups by rules: llama.cpp counts the contents of a group for each repetition."""
        if isinstance(term, Chain | Choice):
            return type(term)(tuple(map(self._with_group_rules, term.terms)))
        if not isinstance(term, Repeat):
            return term
        inner = self._with_group_rules(term.term)
        if isinstance(inner, Chain | Choice | Repeat) and _expanded_rules(inner) * term.most > MAX_GROUP:
            inner = self.add("group", inner)
        return Repeat(inner, term.least, term.most)


def count_left_paths(rules: Mapping[str, Term]) -> int:
    """Returns the maximum number of paths from a rule to a first character; llama.cpp follows each of them."""
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


def count_expanded_rules(rules: Mapping[str, Term]) -> int:
    """Returns approximately how many rules llama.cpp has after it has expanded these."""
    return sum(map(_expanded_rules, rules.values()))


def render(rules: Mapping[str, Term]) -> str:
    """Returns the grammar as text, one rule per line."""
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


def _expanded_rules(term: Term) -> int:
    own = term.most if isinstance(term, Repeat) else 1
    return own + sum(_expanded_rules(child) for child in _children(term))


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
    # Only single characters are merged: the rules of a group would count for each repetition.
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
