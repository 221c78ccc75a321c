"""
The plan of what stays: which sentences stay whole, which are pruned, and which go, for a number of tokens.

With a query, a quarter of what is left beside pinned sentences goes to the most relevant sentences, whole; the others
share the rest, pruned, as far as they fit. The tokens here are sums over words: near the truth, so the caller counts
the result.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from app.memory.compression import pruning
from app.memory.compression.conversation import SplitConversation
from app.memory.compression.pruning import Part

#: Share of the tokens for whole sentences, with a query.
WHOLE = 0.25
#: Share of the words that can be pruned, by their weights.
_PRUNABLE = 0.5
#: Why a sentence is gone.
LEAST_RELEVANT = "least_relevant"
PRUNED = "pruned"


class Selection:
    """The sentences of a conversation, with the costs of their forms."""

    def __init__(
        self,
        conversation: SplitConversation,
        scores: Sequence[float],
        weights: Mapping[str, float],
        tokens: Mapping[str, int],
        *,
        has_query: bool,
        selects: bool,
        prunes: bool,
    ) -> None:
        self._sentences = conversation.sentences
        self._has_query, self._selects, self._prunes = has_query, selects, prunes
        self._left = [number for number, one in enumerate(self._sentences) if not one.dropped]
        self._parts: dict[int, list[Part]] = {
            number: pruning.parts(self._sentences[number], weights, tokens) for number in self._left
        }
        self._whole = {number: sum(part.tokens for part in parts) for number, parts in self._parts.items()}
        self._free = [number for number in self._left if not self._sentences[number].pinned]
        #: Groups of sentences that stay or go together, the most relevant first.
        self._ranked = self._groups(scores)
        found = sorted(p.weight for n in self._free for p in self._parts[n] if p.weight is not None)
        #: The steps of pruning, from stop words to more.
        self._levels = [0.0, *dict.fromkeys(w for w in found[: int(len(found) * _PRUNABLE)] if w > 0)]

    def apply(self, budget: float) -> None:
        """Set what is left of each sentence, so that the sum of their tokens is at most `budget`, if this can be."""
        for number in self._free:
            self._sentences[number].pruned, self._sentences[number].dropped = None, ""
        room = budget - sum(self._whole[number] for number in self._left if self._sentences[number].pinned)
        whole = self._take_whole(room)
        room -= sum(self._whole[number] for number in whole)
        rest = [number for group in self._ranked for number in group if number not in whole]
        if sum(self._whole[number] for number in rest) <= room:
            return
        if not self._prunes:
            self._take_ranked(whole, room, None)
            return
        low, high = 0, len(self._levels) - 1
        if self._cost(rest, self._levels[high]) > room:
            self._take_ranked(whole, room, self._levels[high])
            return
        while low < high:
            middle = (low + high) // 2
            if self._cost(rest, self._levels[middle]) <= room:
                high = middle
            else:
                low = middle + 1
        self._prune_to_fit(whole, room, self._levels[low])

    def _prune_to_fit(self, whole: set[int], room: float, level: float) -> None:
        """Prune the sentences that are not whole, except the best of them, for which there is room."""
        costs = {n: self._cost([n], level) for group in self._ranked for n in group if n not in whole}
        room -= sum(costs.values())
        for group in self._ranked:
            rest = [number for number in group if number in costs]
            more = sum(self._whole[number] - costs[number] for number in rest)
            if more <= room:
                room -= more
                continue
            for number in rest:
                self._prune(number, level)

    def _take_whole(self, room: float) -> set[int]:
        """Return the most relevant sentences, for their share of the tokens."""
        if not self._has_query or not self._prunes:
            return set()
        taken: set[int] = set()
        share = WHOLE * max(room, 0.0)
        for group in self._ranked:
            cost = sum(self._whole[number] for number in group)
            if cost > share:
                break
            taken.update(group)
            share -= cost
        return taken

    def _take_ranked(self, whole: set[int], room: float, level: float | None) -> None:
        """
        Keep the best of the sentences that are not whole, and drop the others if this is allowed.

        If nothing else stays, the best is kept although there is no room: nobody is served by an empty result.
        """
        is_empty = not whole and not any(self._sentences[number].pinned for number in self._left)
        for group in self._ranked:
            rest = [number for number in group if number not in whole]
            if not rest:
                continue
            cost = sum(self._whole[n] if level is None else self._cost([n], level) for n in rest)
            if cost > room and self._selects and not is_empty:
                for number in rest:
                    self._sentences[number].dropped = LEAST_RELEVANT
                continue
            room -= cost
            is_empty = False
            if level is not None:
                for number in rest:
                    self._prune(number, level)

    def _cost(self, numbers: Sequence[int], level: float) -> int:
        return sum(
            part.tokens
            for number in numbers
            for part in self._parts[number]
            if part.weight is None or part.weight > level or self._sentences[number].bundle is not None
        )

    def _prune(self, number: int, level: float) -> None:
        sentence = self._sentences[number]
        if sentence.bundle is not None:
            return
        shorter = pruning.pruned(sentence, self._parts[number], level)
        sentence.pruned = shorter
        if not shorter:
            sentence.dropped = PRUNED

    def _groups(self, scores: Sequence[float]) -> list[list[int]]:
        groups: dict[object, list[int]] = defaultdict(list)
        for number in self._free:
            bundle = self._sentences[number].bundle
            groups[("bundle", bundle) if bundle is not None else number].append(number)
        return sorted(groups.values(), key=lambda group: (-max(scores[n] for n in group), -group[0]))
