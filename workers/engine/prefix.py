"""
The prefix index: finds the sequence of the KV cache that shares the longest prefix with a prompt.

It is a radix tree over the tokens of all sequences: running ones and those kept after their end.
The tokens of a node belong to each sequence that passes it. A sequence may be indexed before it is computed; `computed`
is the number of its tokens in the cache.
A match reports computed tokens, which can be reused now, and separately tokens that are still to be computed.
Kept sequences are evicted in the order of their last use, the least recently used first.

This module does not know cells, slots, llama.cpp or clocks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

#: Tokens, as the index stores them.
Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Match:
    """The longest prefixes of a prompt in the index."""

    #: Tokens that can be reused now, and the sequence that has them.
    length: int = 0
    source: int | None = None
    #: Tokens that can be reused once the sequence `pending_source` is computed, when they are more than `length`.
    pending_length: int = 0
    pending_source: int | None = None

    @property
    def is_awaited(self) -> bool:
        """Whether the request is better admitted later, because its prefix is being read from a file."""
        return False


class _Node:
    __slots__ = ("children", "holders", "parent", "tokens")

    def __init__(self, tokens: Tokens, parent: _Node | None, holders: set[int]) -> None:
        self.tokens = tokens
        self.parent = parent
        self.holders = holders
        self.children: dict[int, _Node] = {}


def common_length(left: Sequence[int], right: Sequence[int]) -> int:
    """Return the length of the common prefix of two sequences of the same type."""
    size = min(len(left), len(right))
    if left[:size] == right[:size]:
        return size
    low, high = 0, size - 1
    while low < high:  # slices are compared in C, so a bisection is faster than a loop over tokens
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class PrefixIndex:
    """The prefix index of one context."""

    def __init__(self) -> None:
        self._root = _Node((), None, set())
        self._tokens: dict[int, Tokens] = {}
        self._computed: dict[int, int] = {}
        #: Kept sequences, the least recently used first.
        self._kept: dict[int, None] = {}

    def __contains__(self, sequence: int) -> bool:
        return sequence in self._tokens

    @property
    def kept(self) -> Collection[int]:
        """Kept sequences, the least recently used first."""
        return self._kept.keys()

    def tokens(self, sequence: int) -> Tokens:
        """The tokens under which the sequence is indexed."""
        return self._tokens[sequence]

    def insert(self, sequence: int, tokens: Tokens, computed: int) -> None:
        """Index a running sequence that will hold `tokens`; the first `computed` of them are in the cache."""
        self.remove(sequence)
        self._tokens[sequence], self._computed[sequence] = tokens, computed
        node, at = self._root, 0
        while at < len(tokens):
            child = node.children.get(tokens[at])
            if child is None:
                node.children[tokens[at]] = _Node(tokens[at:], node, {sequence})
                return
            shared = common_length(child.tokens, tokens[at : at + len(child.tokens)])
            if shared < len(child.tokens):
                child = self._split(child, shared)
            child.holders.add(sequence)
            node, at = child, at + shared

    def advance(self, sequence: int, computed: int) -> None:
        """Record that the first `computed` tokens of the sequence are in the cache."""
        self._computed[sequence] = computed

    def keep(self, sequence: int, tokens: Tokens) -> bool:
        """
        Keep a finished sequence that holds exactly `tokens`. Returns whether it is worth its cells.

        It is not when another sequence holds, or will hold, all of `tokens`. It is then removed from the index.
        """
        self.insert(sequence, tokens, len(tokens))
        leaf = self._leaf(tokens)
        if leaf is None or len(leaf.holders) > 1:
            self.remove(sequence)
            return False
        self._kept[sequence] = None
        return True

    def touch(self, sequence: int) -> None:
        """Record a use of a kept sequence."""
        if sequence in self._kept:
            del self._kept[sequence]
            self._kept[sequence] = None

    def activate(self, sequence: int) -> None:
        """Make a kept sequence a running one, so that it is not evicted."""
        self._kept.pop(sequence, None)

    def remove(self, sequence: int) -> None:
        """Remove the sequence from the index. Does nothing when it is not indexed."""
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
        """Remove all sequences."""
        self.__init__()  # type: ignore[misc] # a cleared object is a new one

    def find(self, tokens: Tokens, usable: Callable[[int, int], int] | None = None) -> Match:
        """
        Return the longest prefix of `tokens` in the cache, and a longer one that is being computed.

        `usable(sequence, length)` returns how much of that prefix can be reused. Among equal matches kept sequences are
        preferred, then the shortest sequence.
        """
        path = self._path(tokens)
        best, source, pending_length, pending_source = 0, None, 0, None
        seen: set[int] = set()
        for node, depth in reversed(path):
            if depth <= best and depth <= pending_length:
                break
            for sequence in node.holders - seen:
                computed = self._computed[sequence]
                if depth > pending_length and computed < len(self._tokens[sequence]) and depth > computed:
                    pending_length, pending_source = depth, sequence
                usable_length = min(depth, computed)
                if usable is not None and usable_length > best:
                    usable_length = usable(sequence, usable_length)
                if usable_length > best or (usable_length == best > 0 and self._is_preferred(sequence, source)):
                    best, source = usable_length, sequence
            seen |= node.holders
        return Match(best, source, pending_length, pending_source) if pending_length > best else Match(best, source)

    def _is_preferred(self, sequence: int, than: int | None) -> bool:
        if than is None:
            return True
        if (sequence in self._kept) != (than in self._kept):
            return sequence in self._kept
        return len(self._tokens[sequence]) < len(self._tokens[than])

    def _path(self, tokens: Tokens) -> list[tuple[_Node, int]]:
        """Return the nodes on the path of `tokens`, each with the length of the common prefix at its end."""
        path, node, at = [], self._root, 0
        while at < len(tokens) and (child := node.children.get(tokens[at])) is not None:
            shared = common_length(child.tokens, tokens[at : at + len(child.tokens)])
            at += shared
            path.append((child, at))
            if shared < len(child.tokens):
                break
            node = child
        return path

    def _leaf(self, tokens: Tokens) -> _Node | None:
        path = self._path(tokens)
        return path[-1][0] if path and path[-1][1] == len(tokens) else None

    def _split(self, node: _Node, length: int) -> _Node:
        """Split a node after `length` tokens; the rest becomes a child. Returns the new front node."""
        assert node.parent is not None
        front = _Node(node.tokens[:length], node.parent, set(node.holders))
        node.parent.children[front.tokens[0]] = front
        node.tokens, node.parent = node.tokens[length:], front
        front.children[node.tokens[0]] = node
        return front
