"""
Prefixes: which sequence of the KV cache begins like a prompt, and which of them may go.

A radix tree over the tokens of all sequences, those under way and those that are kept after their end.
A node's tokens are held by each sequence that passes it; a sequence may be indexed before it is computed, and
`computed` says how much of it is there.
What a sequence holds is given out only up to what is computed; what will be there soon is told apart.
Kept sequences go in the order of their last use, the longest unused first.

Nothing here knows cells, slots or llama.cpp; time is a count of uses.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

#: Tokens, as the index holds them.
Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Match:
    """What the sequences hold of a prompt."""

    #: Tokens that can be taken over now, and the sequence that has them.
    length: int = 0
    source: int | None = None
    #: Tokens that will be there when the sequence `awaited` is computed.
    soon: int = 0
    awaited: int | None = None


class _Node:
    __slots__ = ("children", "holders", "parent", "tokens")

    def __init__(self, tokens: Tokens, parent: _Node | None, holders: set[int]) -> None:
        self.tokens = tokens
        self.parent = parent
        self.holders = holders
        self.children: dict[int, _Node] = {}


def common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two sequences of the same type have in common at their beginning."""
    size = min(len(left), len(right))
    if left[:size] == right[:size]:
        return size
    low, high = 0, size - 1
    while low < high:  # slices compare in C: a bisection beats a loop over tokens
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class PrefixIndex:
    """The prefixes of one context."""

    def __init__(self) -> None:
        self._root = _Node((), None, set())
        self._tokens: dict[int, Tokens] = {}
        self._computed: dict[int, int] = {}
        #: Kept sequences, the longest unused first.
        self._kept: dict[int, None] = {}

    def __contains__(self, sequence: int) -> bool:
        return sequence in self._tokens

    @property
    def kept(self) -> Collection[int]:
        """Sequences that nobody works on, the longest unused first."""
        return self._kept.keys()

    def tokens(self, sequence: int) -> Tokens:
        """What the sequence is indexed as."""
        return self._tokens[sequence]

    def insert(self, sequence: int, tokens: Tokens, computed: int) -> None:
        """A sequence under way will hold `tokens`; the first `computed` are there."""
        self.remove(sequence)
        self._tokens[sequence], self._computed[sequence] = tokens, computed
        node, at = self._root, 0
        while at < len(tokens):
            child = node.children.get(tokens[at])
            if child is None:
                node.children[tokens[at]] = _Node(tokens[at:], node, {sequence})
                return
            shared = common(child.tokens, tokens[at : at + len(child.tokens)])
            if shared < len(child.tokens):
                child = self._divide(child, shared)
            child.holders.add(sequence)
            node, at = child, at + shared

    def advance(self, sequence: int, computed: int) -> None:
        """More of the sequence is there now."""
        self._computed[sequence] = computed

    def keep(self, sequence: int, tokens: Tokens) -> bool:
        """
        The sequence is done and holds exactly `tokens`. Say whether it is worth its cells.

        It is not when another sequence holds, or will hold, all of it: then it is not indexed any more.
        """
        self.insert(sequence, tokens, len(tokens))
        leaf = self._leaf(tokens)
        if leaf is None or len(leaf.holders) > 1:
            self.remove(sequence)
            return False
        self._kept[sequence] = None
        return True

    def touch(self, sequence: int) -> None:
        """A kept sequence was of use."""
        if sequence in self._kept:
            del self._kept[sequence]
            self._kept[sequence] = None

    def take(self, sequence: int) -> None:
        """Somebody works on the kept sequence again: it may not be evicted."""
        self._kept.pop(sequence, None)

    def remove(self, sequence: int) -> None:
        """The sequence holds nothing any more. One that is not indexed is let be."""
        tokens = self._tokens.pop(sequence, None)
        self._computed.pop(sequence, None)
        self._kept.pop(sequence, None)
        if tokens is None:
            return
        node, at = self._root, 0
        while at < len(tokens):
            child = node.children[tokens[at]]
            at += len(child.tokens)
            child.holders.discard(sequence)
            if not child.holders:
                del node.children[child.tokens[0]]
                return
            node = child

    def clear(self) -> None:
        """No sequence holds anything."""
        self.__init__()  # type: ignore[misc]

    def find(self, tokens: Tokens, usable: Callable[[int, int], int] | None = None) -> Match:
        """
        What of `tokens` is there, and what is on its way.

        `usable(sequence, length)` may shorten what can be taken over of a sequence. Of several sequences that hold
        the same, the kept ones are preferred, and among them those that hold nothing beyond it.
        """
        path = self._path(tokens)
        best, source, soon, awaited = 0, None, 0, None
        seen: set[int] = set()
        for node, depth in reversed(path):
            if depth <= best and depth <= soon:
                break
            for sequence in node.holders - seen:
                computed = self._computed[sequence]
                if depth > soon and computed < len(self._tokens[sequence]) and depth > computed:
                    soon, awaited = depth, sequence
                there = min(depth, computed)
                if usable is not None and there > best:
                    there = usable(sequence, there)
                if there > best or (there == best > 0 and self._nicer(sequence, source)):
                    best, source = there, sequence
            seen |= node.holders
        return Match(best, source, soon, awaited) if soon > best else Match(best, source)

    def _nicer(self, sequence: int, than: int | None) -> bool:
        if than is None:
            return True
        if (sequence in self._kept) != (than in self._kept):
            return sequence in self._kept
        return len(self._tokens[sequence]) < len(self._tokens[than])

    def _path(self, tokens: Tokens) -> list[tuple[_Node, int]]:
        """The nodes that `tokens` runs through, with the tokens in common at the end of each."""
        path, node, at = [], self._root, 0
        while at < len(tokens) and (child := node.children.get(tokens[at])) is not None:
            shared = common(child.tokens, tokens[at : at + len(child.tokens)])
            at += shared
            path.append((child, at))
            if shared < len(child.tokens):
                break
            node = child
        return path

    def _leaf(self, tokens: Tokens) -> _Node | None:
        path = self._path(tokens)
        return path[-1][0] if path and path[-1][1] == len(tokens) else None

    def _divide(self, node: _Node, length: int) -> _Node:
        """Let a node end after `length` tokens; what follows becomes its child. Gives the front part."""
        assert node.parent is not None
        front = _Node(node.tokens[:length], node.parent, set(node.holders))
        node.parent.children[front.tokens[0]] = front
        node.tokens, node.parent = node.tokens[length:], front
        front.children[node.tokens[0]] = node
        return front
