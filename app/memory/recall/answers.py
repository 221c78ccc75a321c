"""The answer of recall as a document: of the API, of the step, and of the tools of agents."""

from __future__ import annotations

from typing import Any

from app.memory.recall.query import Recalled, RecalledPassage, SearchLeg


def document(recalled: Recalled) -> dict[str, Any]:
    """Return an answer as JSON values."""
    return {
        "object": "recall",
        "passages": [_passage(one) for one in recalled.passages],
        "lexical": _leg(recalled.lexical),
        "dense": _leg(recalled.dense),
    }


def why(passage: RecalledPassage) -> str:
    """Return in words why a passage was found."""
    reasons = []
    if passage.matched:
        reasons.append(f"has the words {', '.join(passage.matched)}")
    if passage.scores.dense is not None:
        reasons.append(f"means something similar ({passage.scores.dense:.2f})")
    if passage.scores.neighbours > 0:
        reasons.append("stands beside one that was found")
    return "; ".join(reasons)


def _passage(one: RecalledPassage) -> dict[str, Any]:
    return {
        "id": one.id,
        "source": one.source,
        "source_id": one.source_id,
        "part": one.part,
        "text": one.text,
        "user": one.user,
        "conversation": one.conversation,
        "position": one.position,
        "role": one.role,
        "speaker": one.speaker,
        "kind": one.kind,
        "at": one.at.isoformat(),
        "score": round(one.score, 4),
        "scores": {
            "lexical": None if one.scores.lexical is None else round(one.scores.lexical, 4),
            "dense": None if one.scores.dense is None else round(one.scores.dense, 4),
            "neighbours": round(one.scores.neighbours, 4),
            "decay": round(one.scores.decay, 4),
        },
        "matched": list(one.matched),
        "why": why(one),
    }


def _leg(leg: SearchLeg) -> dict[str, Any]:
    found: dict[str, Any] = {"used": leg.used, "reason": leg.reason}
    if leg.used:
        found |= {"method": leg.method, "candidates": leg.candidates}
    if leg.models:
        found["models"] = list(leg.models)
    return found
