"""
The compression of a conversation or a text to a number of tokens.

What fits already is returned as it is. Otherwise each method is applied in turn, the least harmful first, until the
result fits: structure, duplicates, then selection and pruning together. Tokens are counted by the caller's function,
which is the target model's tokenizer. A result that is over its budget says so; a kept sentence has all of its
protected spans.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from app.memory.compression import conversation as conversations
from app.memory.compression import deduplication, pruning, relevance
from app.memory.compression.conversation import Protection, SplitConversation, Turn
from app.memory.compression.report import Compressed, MethodFigures
from app.memory.compression.selection import Selection

#: Returns the number of tokens of each text.
CountTokens = Callable[[Sequence[str]], Sequence[int]]

#: Most counts of a whole result, to meet the budget.
_MAX_ROUNDS = 8
#: The least part of the budget that a result should use.
_USED = 0.97


class ReductionMethod(StrEnum):
    """A way to make a conversation shorter."""

    STRUCTURE = "structure"
    DEDUPLICATE = "deduplicate"
    SELECT = "select"
    PRUNE = "prune"


ALL_METHODS = frozenset(ReductionMethod)


@dataclass(frozen=True, slots=True)
class Target:
    """What is to be reached, and how."""

    #: Tokens before for one token after; or else `max_tokens`.
    ratio: float | None = None
    max_tokens: int | None = None
    methods: frozenset[ReductionMethod] = ALL_METHODS
    protection: Protection = field(default_factory=Protection)
    query: str = ""
    #: Tokens that a summary of what was left out will have.
    reserved: int = 0


class SpanLost(AssertionError):
    """A kept sentence lacks a protected span: a defect of this package."""


def compress(
    turns: Sequence[Turn],
    target: Target,
    count: CountTokens,
    *,
    dense: Sequence[float] | None = None,
    check: Callable[[], None] = lambda: None,
) -> Compressed:
    """
    Compress the turns of a conversation; a text is a single turn.

    `dense` has the similarity of the query to each passage (`relevance.passages`, of the conversation of `split`).
    `check` is called between the stages, and may raise to stop. Raises ValueError for a conversation or a pattern
    beyond the limits.
    """
    before = sum(count([turn.content for turn in turns])) if turns else 0
    budget = target.max_tokens if target.max_tokens is not None else math.floor(before / (target.ratio or 1.0))
    check()
    if before <= budget:
        untouched = conversations.of_turns(turns, target.protection, strip=False)
        return Compressed([turn.content for turn in turns], untouched, before, before, budget, ())
    work = _Work(split(turns, target), count, budget - target.reserved, before)
    check()
    if ReductionMethod.STRUCTURE in target.methods:
        work.note(ReductionMethod.STRUCTURE)
    if ReductionMethod.DEDUPLICATE in target.methods and work.tokens > work.budget:
        deduplication.drop_duplicates(work.conversation.sentences, turns)
        work.note(ReductionMethod.DEDUPLICATE)
    check()
    if work.tokens > work.budget and target.methods & {ReductionMethod.SELECT, ReductionMethod.PRUNE}:
        _select(work, target, dense, check)
    _verify(work.conversation)
    missed = _missed(work, target)
    left_out = [one for one in work.conversation.sentences if one.dropped and one.same_as is None]
    return Compressed(
        work.contents, work.conversation, before, work.tokens, budget, work.figures, missed, left_out=left_out
    )


def split(turns: Sequence[Turn], target: Target) -> SplitConversation:
    """Return the conversation that `compress` works on."""
    return conversations.of_turns(turns, target.protection, strip=ReductionMethod.STRUCTURE in target.methods)


class _Work:
    """A conversation under compression, with its exact tokens."""

    def __init__(self, conversation: SplitConversation, count: CountTokens, budget: int, before: int) -> None:
        self.conversation, self._count, self.budget = conversation, count, budget
        self.figures: list[MethodFigures] = []
        self._noted, self._dropped, self._pruned = before, 0, 0
        self.contents: list[str] = []
        self.tokens = 0
        self._counted: dict[str, int] = {}
        self.recount()

    def recount(self) -> None:
        """Count the tokens of what is left."""
        self.contents = self.conversation.contents()
        new = [text for text in dict.fromkeys(self.contents) if text and text not in self._counted]
        self._counted.update(zip(new, self._count(new), strict=True) if new else ())
        self.tokens = sum(self._counted[text] for text in self.contents if text)

    def note(self, method: str) -> None:
        """Add the figures of a method that was applied."""
        self.recount()
        sentences = self.conversation.sentences
        dropped = sum(bool(one.dropped) for one in sentences)
        pruned = sum(not one.dropped and one.pruned is not None for one in sentences)
        figures = MethodFigures(method, self._noted, self.tokens, dropped - self._dropped, pruned - self._pruned)
        self.figures.append(figures)
        self._noted, self._dropped, self._pruned = self.tokens, dropped, pruned

    def count_parts(self) -> dict[str, int]:
        """Return the tokens of each word with a blank before it."""
        parts = pruning.part_texts(self.conversation)
        return dict(zip(parts, self._count([f" {part}" for part in parts]), strict=True))


def _select(work: _Work, target: Target, dense: Sequence[float] | None, check: Callable[[], None]) -> None:
    conversation = work.conversation
    weights = pruning.word_weights(conversation, relevance.document_frequencies(conversation.sentences))
    if target.query:
        scores = relevance.relevance(conversation, target.query, dense)
        known = relevance.information(conversation, weights)
        top = max(known, default=0.0) or 1.0
        # What has nothing to do with the query is ordered by what it says.
        scores = [score + 0.05 * own / top for score, own in zip(scores, known, strict=True)]
    else:
        scores = relevance.information(conversation, weights)
    check()
    tokens = work.count_parts()
    selection = Selection(
        conversation,
        scores,
        pruning.part_weights(list(tokens), weights),
        tokens,
        has_query=bool(target.query),
        selects=ReductionMethod.SELECT in target.methods,
        prunes=ReductionMethod.PRUNE in target.methods,
    )
    room, fits = float(work.budget), -1.0
    for turn in range(_MAX_ROUNDS):
        check()
        selection.apply(room)
        work.recount()
        over = work.tokens - work.budget
        if over <= 0:
            if work.tokens >= _USED * work.budget or turn >= _MAX_ROUNDS // 2:
                break
            fits, room = room, room + 0.8 * -over
        elif fits >= 0 and turn >= _MAX_ROUNDS // 2:
            room = fits
        else:
            room = max(0.0, room - over * (1.05 + 0.3 * turn) - 1)
    if work.tokens > work.budget and fits >= 0:
        selection.apply(fits)
    work.note("+".join(one.value for one in (ReductionMethod.SELECT, ReductionMethod.PRUNE) if one in target.methods))


def _missed(work: _Work, target: Target) -> str:
    """Return why the target was not met; empty if it was."""
    if work.tokens <= work.budget:
        return ""
    pinned = [one for one in work.conversation.sentences if one.pinned]
    if pinned and ReductionMethod.SELECT in target.methods:
        why = "(system messages, keep_recent, protect)"
        return f"{work.tokens} tokens are left: {len(pinned)} sentences are kept as they are {why}"
    if ReductionMethod.SELECT in target.methods:
        return f"the one sentence that is left has {work.tokens} tokens, {work.budget} were asked for"
    missing = [one.value for one in ReductionMethod if one not in target.methods]
    more = f"; {', '.join(missing)} is not among the methods" if missing else ""
    return f"{work.tokens} tokens are left, {work.budget} were asked for{more}"


def _verify(conversation: SplitConversation) -> None:
    """Raises SpanLost if a kept sentence lacks a protected span."""
    for sentence in conversation.sentences:
        if sentence.dropped or sentence.pruned is None:
            continue
        at = 0
        for span in sentence.spans:
            text = sentence.text[span.start : span.end]
            found = sentence.pruned.find(text.strip(), at)
            if found < 0:
                raise SpanLost(f"{text[:100]!r} ({span.kind})")
            at = found + len(text.strip())
