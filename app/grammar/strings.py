"""
Strings: grammar terms for the characters of JSON strings, and for property names.

NUL and lone surrogates are never written.
"""

from __future__ import annotations

from collections.abc import Sequence

from app.grammar.characters import PLAIN, difference
from app.grammar.gbnf import EMPTY, Chars, Repeat, RuleName, Rules, Term, Text, chain, choice

#: Maximum characters of a property name that additionalProperties allows.
MAX_NAME = 64


def character(rules: Rules) -> RuleName:
    """Returns one character of a string, as itself or as an escape sequence."""

    def hexes(*ranges: str) -> Chars:
        return Chars(tuple((ord(pair[0]), ord(pair[-1])) for pair in ranges))

    digit = hexes("09", "AF", "af")
    leading = hexes("19", "AC", "EF", "ac", "ef")
    basic_plane = choice(
        chain(leading, digit, digit, digit),
        chain(hexes("DD", "dd"), hexes("07"), digit, digit),
        chain(Text("0"), hexes("19", "AF", "af"), digit, digit),
        chain(Text("00"), hexes("19", "AF", "af"), digit),
        chain(Text("000"), hexes("19", "AF", "af")),
    )
    surrogate_pair = chain(
        hexes("DD", "dd"), hexes("89", "AB", "ab"), digit, digit, Text("\\u"), hexes("DD", "dd"), hexes("CF", "cf")
    )
    code = rules.add("code", choice(basic_plane, chain(surrogate_pair, digit, digit)))
    short = Chars(tuple((ord(mark), ord(mark)) for mark in '"/\\bfnrt'))
    return rules.add("character", choice(Chars(PLAIN), chain(Text("\\"), choice(short, chain(Text("u"), code)))))


def other_name(rules: Rules, names: Sequence[str], longest: int) -> RuleName:
    """
    Returns a property name that is none of `names`, as a JSON string without escapes.

    It continues for at most `longest` characters after the first one that differs from all names.
    """
    any_more = rules.add("key-end", Repeat(Chars(PLAIN), 0, longest))

    def after(prefix: str) -> Term:
        longer = {name[len(prefix)] for name in names if name.startswith(prefix) and len(name) > len(prefix)}
        followed = sorted(mark for mark in longer if any(low <= ord(mark) <= high for low, high in PLAIN))
        others = difference(PLAIN, tuple((ord(mark), ord(mark)) for mark in followed))
        options: list[Term] = [chain(Chars(others), any_more)]
        options += [chain(Text(mark), after(prefix + mark)) for mark in followed if len(prefix) < MAX_NAME]
        return choice(*options, *([EMPTY] if prefix and prefix not in names else []))

    return rules.add("key", chain(Text('"'), after(""), Text('"')))
