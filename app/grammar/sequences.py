"""
Sequences: grammar terms for members that are separated by commas, as in arrays and objects.

A selection keeps the order of its members. Permutations write each member at most once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from app.grammar.gbnf import EMPTY, RuleName, Rules, Term, Text, chain, choice, optional


@dataclass(frozen=True, slots=True)
class Member:
    """One position in a selection."""

    term: Term
    required: bool = False


class Sequences:
    """Builds sequences in the rules of one grammar."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._comma = rules.add("comma", chain(Text(","), optional(Text(" "))))

    def all_of(self, terms: Sequence[Term]) -> Term:
        """Returns all the terms, in order."""
        return chain(*(part for i, term in enumerate(terms) for part in ((self._comma, term) if i else (term,))))

    def repeated(self, term: Term, least: int, most: int, *, after: bool = False) -> Term:
        """Returns `least` to `most` of the term. With `after`, other members come first, so it starts with a comma."""
        more = chain(self._comma, term)
        if after:
            return self._rules.repeat(more, least, most, "next")
        if most == 0:
            return EMPTY
        whole = chain(term, self._rules.repeat(more, max(0, least - 1), most - 1, "next"))
        return whole if least else optional(whole)

    def prefixed(self, prefix: Sequence[Term], rest: Term, least: int) -> Term:
        """
        Returns the terms of `prefix` in order, of which at least `least` are written, and `rest` after the last one.

        `rest` starts with a comma, unless `prefix` is empty.
        """
        body = rest
        for i in reversed(range(len(prefix))):
            body = chain(self._comma if i else EMPTY, prefix[i], body)
            body = body if i < least else optional(body)
        return body

    def permutations(self, terms: Sequence[Term], least: int, most: int, used: int = 0) -> Term:
        """Returns `least` to `most` different terms in any order; `used` has a bit for each term that was written."""
        count = used.bit_count()
        options: list[Term] = [EMPTY] if count >= least else []
        for i, term in enumerate(terms):
            if count < most and not used & 1 << i:
                rest = self._named(self.permutations(terms, least, most, used | 1 << i))
                options.append(chain(self._comma if count else EMPTY, term, rest))
        return choice(*options)

    def selection(
        self, members: Sequence[Member], least: int, most: int | None, extra: Term | None = None, max_extras: int = 0
    ) -> Term | None:
        """
        Returns a selection of the members in order, then extras, `least` to `most` in total; None when there is none.

        Without `most`, the total is unlimited. Without `extra`, there are no extras; else at most `max_extras`.

        The states are (members passed, members written). If no limit depends on the count, the second only says
        whether one was written. Extras may repeat a name, so at most one of them counts towards `least`.
        """
        extras = 0 if extra is None else max_extras
        limit = len(members) + extras if most is None else most
        counting = least > sum(member.required for member in members) or limit < len(members) + extras
        table: dict[tuple[int, int], Term | None] = {}
        for written in range(len(members) + 1 if counting else 2):
            missing, room = (max(0, least - written), min(extras, limit - written)) if counting else (0, extras)
            if room < missing or missing > 1:
                table[len(members), written] = None
            else:
                table[len(members), written] = self.repeated(extra or EMPTY, missing, room, after=written > 0)
        for i in reversed(range(len(members))):
            for written in range(i + 1 if counting else 2):
                taken = table[i + 1, written + 1 if counting else 1]
                # Before the first required member, a rest can follow with or without a comma: then it becomes a rule.
                shared = not any(member.required for member in members[:i])
                table[i, written] = self._step(members[i], written, taken, table[i + 1, written], shared=shared)
        return table[0, 0]

    def _step(
        self, member: Member, written: int, taken: Term | None, skipped: Term | None, *, shared: bool
    ) -> Term | None:
        """Returns the member and the rest after it, or for an optional member also the rest without it."""
        here = chain(self._comma if written else EMPTY, member.term)
        if member.required:
            return None if taken is None else chain(here, taken)
        if taken is not None and taken == skipped:
            return chain(optional(here), self._named(taken) if shared else taken)
        options = []
        if taken is not None:
            options.append(chain(here, self._named(taken)))
        if skipped is not None:
            options.append(self._named(skipped))
        return choice(*options) if options else None

    def _named(self, term: Term) -> Term:
        return term if isinstance(term, Text | RuleName) else self._rules.add("rest", term)
