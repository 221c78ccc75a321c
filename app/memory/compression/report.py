"""
The report of a compression: tokens, what became of turns, sentences and protected spans, and what was left out and why.

Lists are cut: their counts are exact, their entries are examples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from app.memory.compression.conversation import Sentence, SplitConversation

#: Most entries of a list, and most characters of a text in it.
MAX_ENTRIES, _MAX_TEXT = 50, 200


@dataclass(frozen=True, slots=True)
class MethodFigures:
    """What one method did."""

    method: str
    tokens_before: int
    tokens_after: int
    #: Sentences that it dropped, and that it shortened.
    dropped: int = 0
    shortened: int = 0


@dataclass(frozen=True, slots=True)
class Compressed:
    """A compressed conversation."""

    #: What is left of each turn; empty for one that was dropped.
    contents: Sequence[str]
    conversation: SplitConversation
    tokens_before: int
    tokens_after: int
    budget: int
    methods: Sequence[MethodFigures]
    #: Why the target was not met; empty if it was.
    missed: str = ""
    warnings: Sequence[str] = ()
    #: The text in place of what was left out.
    summary: str = ""
    #: Sentences that go into a summary: those that were left out, in order.
    left_out: Sequence[Sentence] = field(default=())

    def document(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        sentences = self.conversation.sentences
        turns = [number for number, turn in enumerate(self.conversation.turns) if turn.content]
        return {
            "tokens": {"before": self.tokens_before, "after": self.tokens_after, "budget": self.budget},
            "ratio": round(self.tokens_before / max(1, self.tokens_after), 3),
            "target_met": not self.missed,
            "reason": self.missed or None,
            "turns": {"before": len(turns), "after": sum(bool(self.contents[number]) for number in turns)},
            "sentences": {
                "before": len(sentences),
                "whole": sum(not one.dropped and one.pruned is None for one in sentences),
                "pruned": sum(not one.dropped and one.pruned is not None for one in sentences),
                "dropped": sum(bool(one.dropped) for one in sentences),
            },
            "protected": _protected(sentences),
            "dropped": _dropped(sentences),
            "methods": [
                {
                    "method": one.method,
                    "tokens_before": one.tokens_before,
                    "tokens_after": one.tokens_after,
                    "sentences_dropped": one.dropped,
                    "sentences_shortened": one.shortened,
                }
                for one in self.methods
            ],
            "warnings": list(self.warnings),
        }


def _protected(sentences: Sequence[Sentence]) -> Mapping[str, Any]:
    """Return the protected spans: none is ever cut; some went with their sentences."""
    kept: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    examples: list[dict[str, Any]] = []
    for sentence in sentences:
        for span in sentence.spans:
            if not sentence.dropped:
                kept[span.kind.value] += 1
                continue
            lost[span.kind.value] += 1
            if len(examples) < MAX_ENTRIES:
                text = shown(sentence.text[span.start : span.end])
                examples.append({"kind": span.kind.value, "text": text, "turn": sentence.turn})
    return {
        "kept": kept.total(),
        "dropped": lost.total(),
        "by_kind": {kind: {"kept": kept[kind], "dropped": lost[kind]} for kind in sorted({*kept, *lost})},
        "examples": examples,
    }


def _dropped(sentences: Sequence[Sentence]) -> Mapping[str, Any]:
    gone = [one for one in sentences if one.dropped]
    examples = []
    for sentence in gone[:MAX_ENTRIES]:
        entry: dict[str, Any] = {
            "turn": sentence.turn,
            "reason": sentence.dropped,
            "text": shown(sentence.text.strip()),
        }
        if sentence.same_as is not None:
            entry["same_as_turn"] = sentences[sentence.same_as].turn
        examples.append(entry)
    return {"count": len(gone), "by_reason": dict(Counter(one.dropped for one in gone)), "examples": examples}


def shown(text: str) -> str:
    """Return a text, cut for a report."""
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 1] + "…"
