"""
Automata: convert a pattern to the grammar term of a JSON string's body.

The term describes exactly the language of the pattern within the length limits. It is deterministic, so that llama.cpp
keeps few stacks open.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import TypeAlias

from app.grammar import characters
from app.grammar.characters import Ranges
from app.grammar.gbnf import EMPTY, MAX_REPEAT, Chars, Rules, Term, Text, chain, choice
from app.grammar.patterns import Alternation, CharacterSet, Concatenation, PatternNode, PatternRejected, Repetition

#: Maximum states of the automata of one pattern, and maximum pairs of a state and a length.
MAX_STATES = 4000

#: Maximum pairs of a state and a length for a pattern without maxLength.
MAX_OPEN_PAIRS = 2048

#: Maximum states of an automaton that is minimised: the time is quadratic.
MAX_MINIMIZED = 200

_NO_LENGTH = "no text of the pattern has a length within minLength and maxLength"


def body(rules: Rules, part: PatternNode, least: int, most: int | None, open_most: int) -> Term:
    """
    Returns the body of a JSON string that matches `part` and has `least` to `most` characters.

    Without `most`, the maximum is `open_most`, or less for a complex pattern.
    Raises PatternRejected when the pattern is too large, or matches no text of such a length.
    """
    plain = _single_characters(rules, part, least, most, open_most)
    return plain if plain is not None else _automaton_body(rules, _automaton(part), least, most, open_most)


@cache
def json_character(ranges: Ranges) -> Term:
    """Returns one character of the set, escaped where a JSON string requires it."""
    plain = characters.intersection(ranges, characters.PLAIN)
    options: list[Term] = []
    if plain:
        low, high = plain[0]
        options.append(Text(chr(low)) if len(plain) == 1 and low == high else Chars(plain))
    for low, high in characters.difference(ranges, characters.PLAIN):
        codes = range(low, high + 1)
        options += [Text("\\" + characters.SHORT.get(code, f"u{code:04x}")) for code in codes]
    return choice(*options)


def _single_characters(rules: Rules, part: PatternNode, least: int, most: int | None, open_most: int) -> Term | None:
    """
    Returns the body for a sequence of character sets of which at most one has a variable number of repetitions.

    Returns None for any other pattern. Raises PatternRejected when no text has a length within the limits.
    """
    row = [
        item if isinstance(item, Repetition) else Repetition(item, 1, 1)
        for item in (part.parts if isinstance(part, Concatenation) else (part,))
    ]
    varying = [item for item in row if item.least != item.most]
    if len(varying) > 1 or any(not isinstance(item.part, CharacterSet) for item in row):
        return None
    fixed = sum(item.least for item in row if item not in varying)
    if not varying and not least <= fixed <= (fixed if most is None else most):
        raise PatternRejected(_NO_LENGTH)
    terms = []
    for item in row:
        assert isinstance(item.part, CharacterSet)
        low, high = item.least, item.most
        if item in varying:
            room = (max(open_most, least) if most is None else most) - fixed
            low, high = max(low, least - fixed), room if high is None else min(high, room)
        assert high is not None
        if low > high:
            raise PatternRejected(_NO_LENGTH)
        if high > MAX_REPEAT:
            raise PatternRejected(f"the pattern repeats a character {high} times; llama.cpp supports {MAX_REPEAT}")
        terms.append(rules.repeat(json_character(item.part.ranges), low, high, "character"))
    return chain(*terms)


@dataclass(slots=True)
class _Nfa:
    #: For each state: the states that are reached without a character, and the labelled edges.
    silent: list[list[int]] = field(default_factory=list)
    edges: list[list[tuple[Ranges, int]]] = field(default_factory=list)

    def state(self) -> int:
        if len(self.edges) >= MAX_STATES:
            raise PatternRejected(f"the pattern needs more than {MAX_STATES} states")
        self.silent.append([])
        self.edges.append([])
        return len(self.edges) - 1

    def add(self, part: PatternNode, start: int) -> int:
        """Adds the states of the part after `start`; returns the state in which it ends."""
        if isinstance(part, CharacterSet):
            end = self.state()
            self.edges[start].append((part.ranges, end))
            return end
        if isinstance(part, Concatenation):
            for item in part.parts:
                start = self.add(item, start)
            return start
        end = self.state()
        if isinstance(part, Alternation):
            for item in part.parts:
                begin = self.state()
                self.silent[start].append(begin)
                self.silent[self.add(item, begin)].append(end)
            return end
        for _ in range(part.least):
            start = self.add(part.part, start)
        if part.most is None:
            loop = self.state()
            self.silent[start].append(loop)
            self.silent[self.add(part.part, loop)].append(loop)
            self.silent[loop].append(end)
            return end
        for _ in range(part.most - part.least):
            self.silent[start].append(end)
            begin = self.state()
            self.silent[start].append(begin)
            start = self.add(part.part, begin)
        self.silent[start].append(end)
        return end

    def closure(self, states: set[int]) -> frozenset[int]:
        seen, waiting = set(states), list(states)
        while waiting:
            for state in self.silent[waiting.pop()]:
                if state not in seen:
                    seen.add(state)
                    waiting.append(state)
        return frozenset(seen)


_Edges: TypeAlias = tuple[tuple[Ranges, int], ...]


@dataclass(frozen=True, slots=True)
class _Dfa:
    #: For each state the edges, whose sets are disjoint. The first state is the start.
    edges: list[list[tuple[Ranges, int]]]
    accepting: frozenset[int]


def _automaton(part: PatternNode) -> _Dfa:
    nfa = _Nfa()
    start = nfa.state()
    end = nfa.add(part, start)
    sets = {nfa.closure({start}): 0}
    edges: list[list[tuple[Ranges, int]]] = []
    waiting = list(sets)
    for states in waiting:
        targets: dict[frozenset[int], list[tuple[int, int]]] = {}
        labelled = [edge for state in states for edge in nfa.edges[state]]
        cuts = sorted({cut for ranges, _ in labelled for low, high in ranges for cut in (low, high + 1)})
        for low, after in pairwise(cuts):
            reached = {to for ranges, to in labelled if any(a <= low <= b for a, b in ranges)}
            if reached:
                targets.setdefault(nfa.closure(reached), []).append((low, after - 1))
        for target in targets:
            if target not in sets:
                sets[target] = len(sets)
                waiting.append(target)
        if len(sets) > MAX_STATES:
            raise PatternRejected(f"the pattern needs more than {MAX_STATES} states")
        edges.append([(characters.union(ranges), sets[target]) for target, ranges in targets.items()])
    return _Dfa(edges, frozenset(number for states, number in sets.items() if end in states))


def _minimal(dfa: _Dfa) -> _Dfa:
    """Returns an automaton of the same language with the fewest states: equivalent states are merged."""
    block = [int(state in dfa.accepting) for state in range(len(dfa.edges))]
    while True:
        edges = [_edges_to_blocks(found, block) for found in dfa.edges]
        names: dict[tuple[int, _Edges], int] = {}
        refined = [names.setdefault((block[state], edges[state]), len(names)) for state in range(len(block))]
        if len(names) == len(set(block)):
            break
        block = refined
    # The start is the first state, so its block has the first name.
    kept = {refined[state]: _edges_to_blocks(dfa.edges[state], refined) for state in range(len(refined))}
    return _Dfa([list(kept[name]) for name in range(len(kept))], frozenset(refined[state] for state in dfa.accepting))


def _edges_to_blocks(edges: list[tuple[Ranges, int]], block: list[int]) -> _Edges:
    merged: dict[int, list[tuple[int, int]]] = {}
    for ranges, to in edges:
        merged.setdefault(block[to], []).extend(ranges)
    return tuple(sorted((characters.union(ranges), to) for to, ranges in merged.items()))


#: A state of the automaton, and the characters read so far; 0 when they are not counted.
_Pair: TypeAlias = tuple[int, int]
_Steps: TypeAlias = Callable[[_Pair], list[tuple[Ranges, _Pair]]]


def _automaton_body(rules: Rules, dfa: _Dfa, least: int, most: int | None, open_most: int) -> Term:
    if len(dfa.edges) <= MAX_MINIMIZED:
        dfa = _minimal(dfa)
    lengths = _lengths(dfa)
    counted = lengths is None or lengths[0] < least or lengths[1] > (MAX_REPEAT if most is None else most)
    limit = MAX_STATES if most is not None else MAX_OPEN_PAIRS
    longest = open_most if most is None else most
    if counted:
        longest = min(longest, max(limit // len(dfa.edges), _shortest(dfa), least))
        if longest * len(dfa.edges) > 4 * MAX_STATES:
            raise PatternRejected(f"the pattern with texts of {longest} characters needs more than {MAX_STATES} states")

    def accepts(pair: _Pair) -> bool:
        return pair[0] in dfa.accepting and (not counted or least <= pair[1] <= longest)

    def steps(pair: _Pair) -> list[tuple[Ranges, _Pair]]:
        if counted and pair[1] == longest:
            return []
        return [(ranges, (to, pair[1] + 1 if counted else 0)) for ranges, to in dfa.edges[pair[0]]]

    order = _successors_first(steps)
    uses = Counter(to for pair in order for _, to in steps(pair))
    terms: dict[_Pair, Term | None] = {}
    for pair in order:
        options: list[Term] = []
        for ranges, to in steps(pair):
            rest = terms[to]
            if rest is not None:
                options.append(chain(json_character(ranges), rest))
        if accepts(pair):
            options.append(EMPTY)
        term = choice(*options) if options else None
        if term is not None and term != EMPTY and pair != (0, 0) and (len(options) > 1 or uses[pair] > 1):
            term = rules.add("part", term)
        terms[pair] = term
    whole = terms[0, 0]
    if whole is None:
        raise PatternRejected(_NO_LENGTH)
    return whole


def _successors_first(steps: _Steps) -> list[_Pair]:
    """Returns all pairs that are reachable from the first one, each after its successors."""
    order: list[_Pair] = []
    seen: set[_Pair] = set()
    waiting: list[tuple[_Pair, bool]] = [((0, 0), False)]
    while waiting:
        pair, done = waiting.pop()
        if done:
            order.append(pair)
        elif pair not in seen:
            seen.add(pair)
            waiting.append((pair, True))
            waiting += [(to, False) for _, to in steps(pair) if to not in seen]
    return order


def _shortest(dfa: _Dfa) -> int:
    reached, frontier, length = {0}, {0}, 0
    while not frontier & dfa.accepting:
        frontier = {to for state in frontier for _, to in dfa.edges[state]} - reached
        if not frontier:
            raise PatternRejected("no text matches the pattern")
        reached |= frontier
        length += 1
    return length


def _lengths(dfa: _Dfa) -> tuple[int, int] | None:
    """Returns the shortest and the longest length; None when the length is unlimited."""
    frontier, length, longest = {0}, 0, 0
    while frontier:
        if length > len(dfa.edges):
            return None
        if frontier & dfa.accepting:
            longest = length
        frontier = {to for state in frontier for _, to in dfa.edges[state]}
        length += 1
    return _shortest(dfa), longest
