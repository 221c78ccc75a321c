"""
The judge: which of several outputs is kept, and the report of all of them.

A draft is replaced only by one with a higher score, unless the step says otherwise. What was written, what was found in
it, what it cost and why it was kept or not is in the report. So is what the whole gained: whether the first draft
passed and whether the kept one does, the flips between the two, and the tokens after the first draft.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from app.workflows.language.verification import ChainFields, VoteFields
from workers.refinement import outputs
from workers.refinement.verdict import CheckResult, Verdicts, VerifierVerdict
from workers.refinement.verifiers import CandidateOutput

#: What is known of the kept output.
Label = Literal["passed", "failed", "unverified", "critique_only"]


#: Before an output was verified.
NOTHING = Verdicts()


@dataclass(frozen=True, slots=True)
class TokensUsed:
    """The tokens of one or several steps, and the model of the first."""

    model: str | None = None
    read: int = 0
    written: int = 0

    def __add__(self, other: TokensUsed) -> TokensUsed:
        return TokensUsed(self.model or other.model, self.read + other.read, self.written + other.written)


@dataclass(frozen=True, slots=True)
class JudgedCandidate:
    """An output with its verdicts."""

    output: CandidateOutput
    verdicts: Verdicts
    action: str = "draft"
    used: TokensUsed = TokensUsed()
    replaces: Literal["higher", "not_lower", "always"] = "higher"
    #: How much its vote counts.
    weight: float = 1.0

    def round(self, number: int) -> dict[str, Any]:
        """Return what the report says of it."""
        output = self.output
        return {
            "round": number,
            "action": self.action,
            "model": self.used.model,
            "output": output.value if output.exists else None,
            **({"error": output.error, "text": output.text[:2_000]} if not output.exists else {}),
            "score": self.verdicts.score,
            "passed": self.verdicts.passed,
            "checks": self.verdicts.document(),
            "tokens": {"read": self.used.read, "written": self.used.written},
        }


def judge(
    candidates: Sequence[JudgedCandidate],
    earlier: Mapping[str, Any] | None,
    chain: ChainFields,
    vote: VoteFields | None = None,
) -> dict[str, Any]:
    """
    Return the report after these candidates, which continues that of the `earlier` round.

    Its `kept` is None while no output exists.
    """
    rounds: list[dict[str, Any]] = [dict(one) for one in earlier["rounds"]] if earlier else []
    kept: int | None = earlier["kept"] if earlier else None
    why: str = earlier["why"] if earlier else ""
    feedback: str = earlier["feedback"] if earlier else ""
    text: str = earlier["text"] if earlier else ""
    voted: dict[str, Any] | None = None
    if vote is not None:
        candidates, chosen, voted = _vote(candidates, vote)
    for number, one in enumerate(candidates):
        added = one.round(len(rounds))
        rounds.append(added)
        if vote is not None:
            replaced, reason = number == chosen, "it has the most votes" if number == chosen else "it was outvoted"
        else:
            replaced, reason = _replaces(one, rounds[kept] if kept is not None else None)
        added["reason"] = reason
        if replaced:
            kept, why = added["round"], reason
        if replaced or kept is None:
            feedback, text = one.verdicts.feedback or one.output.error, one.output.text
    for added in rounds:
        added["kept"] = added["round"] == kept
    return _report(rounds, kept, why, feedback, text, chain, voted)


def _replaces(one: JudgedCandidate, kept: Mapping[str, Any] | None) -> tuple[bool, str]:
    if not one.output.exists:
        return False, "there is no output"
    if kept is None:
        return True, "it is the first output"
    if one.replaces == "always":
        return True, "the last one is kept"
    score, before = one.verdicts.score, kept["score"]
    if score is None or before is None:
        return one.replaces == "not_lower", "no verifier compares them"
    enough = score >= before if one.replaces == "not_lower" else score > before
    relation = "is not below" if enough and score == before else "is above" if enough else "is not above"
    if one.replaces == "not_lower" and not enough:
        relation = "is below"
    return enough, f"its score {score:g} {relation} {before:g}, that of round {kept['round']}"


def _vote(candidates: Sequence[JudgedCandidate], vote: VoteFields) -> tuple[list[JudgedCandidate], int, dict[str, Any]]:
    """
    Return the candidates, the place of the chosen one, and how they voted; -1 when none has an output.

    Only those with the highest score vote. The agreement is a further check of the chosen one.
    """
    able = [(place, one) for place, one in enumerate(candidates) if one.output.exists]
    best = max((one.verdicts.score or 0.0 for _, one in able), default=0.0)
    groups: dict[str, list[int]] = {}
    for place, one in able:
        if (one.verdicts.score or 0.0) == best:
            groups.setdefault(outputs.key_of(one.output.value, vote.fields), []).append(place)
    weights = {key: sum(candidates[place].weight for place in places) for key, places in groups.items()}
    total = sum(one.weight for one in candidates) or 1.0
    if not groups:
        return list(candidates), -1, {"share": 0.0, "answers": len(candidates), "groups": []}
    winner = max(groups, key=lambda key: (weights[key], -groups[key][0]))
    chosen, share = groups[winner][0], weights[winner] / total
    check = CheckResult("agreement", share >= vote.agree, message=f"only {share:.0%} of the votes agree with it")
    judged = [
        replace(one, verdicts=Verdicts([*one.verdicts.of, VerifierVerdict("vote", [check])]))
        if place == chosen
        else one
        for place, one in enumerate(candidates)
    ]
    listed = sorted(groups, key=lambda key: (-weights[key], groups[key][0]))[:10]
    shown = [{"share": round(weights[key] / total, 4), "rounds": groups[key]} for key in listed]
    return judged, chosen, {"share": round(share, 4), "answers": len(candidates), "groups": shown}


def _report(
    rounds: list[dict[str, Any]],
    kept: int | None,
    why: str,
    feedback: str,
    text: str,
    chain: ChainFields,
    voted: Mapping[str, Any] | None,
) -> dict[str, Any]:
    first, last = rounds[0], rounds[kept] if kept is not None else rounds[0]
    passed = last["passed"]
    label: Label = "unverified" if passed is None else "passed" if passed else "failed"
    if chain.accept == "critic":
        label = "critique_only"
    spent = [one["tokens"]["read"] + one["tokens"]["written"] for one in rounds]
    total = sum(spent)
    wanted = chain.accept == "critic" or passed is False or kept is None
    exhausted = chain.token_budget is not None and total >= chain.token_budget
    mended, broken = _flips(first, last)
    return {
        "output": last["output"],
        "verification": label,
        "score": last["score"],
        "kept": kept,
        "why": why,
        "rounds": rounds,
        "gain": {
            "before": {"passed": first["passed"], "score": first["score"]},
            "after": {"passed": passed, "score": last["score"]},
            "wrong_to_right": int(first["passed"] is False and passed is True),
            "right_to_wrong": int(first["passed"] is True and passed is False),
            "checks_mended": mended,
            "checks_broken": broken,
        },
        "tokens": {
            "read": sum(one["tokens"]["read"] for one in rounds),
            "written": sum(one["tokens"]["written"] for one in rounds),
            "draft": spent[0],
            "after_draft": total - spent[0],
        },
        "vote": dict(voted) if voted is not None else None,
        "feedback": feedback,
        "text": text,
        "open": wanted and not chain.last and not exhausted,
        "ended_by": "token_budget" if wanted and exhausted and not chain.last else None,
    }


def _flips(first: Mapping[str, Any], last: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many checks failed before and pass now, and the reverse; checks of both outputs only."""
    before = {(one["verifier"], one["check"]): one["passed"] for one in first["checks"]}
    after = {(one["verifier"], one["check"]): one["passed"] for one in last["checks"]}
    both = before.keys() & after.keys()
    return sum(after[key] and not before[key] for key in both), sum(before[key] and not after[key] for key in both)
