"""
Verdicts: what verifiers found in an output, and the score that follows.

The score is the weighted mean of the verifiers' shares of passed checks; 1 means that all passed. It says how much of
what was checked is right, and nothing about what was not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

#: Most checks that are reported of one output, and characters of one message.
MAX_REPORTED, MAX_MESSAGE = 200, 300
#: Most failed checks, and characters, of what a model is told.
_MAX_TOLD, _MAX_WORDS = 20, 4_000


@dataclass(frozen=True, slots=True)
class CheckResult:
    """A check, and whether the output passed it."""

    name: str
    passed: bool
    weight: float = 1.0
    #: What is wrong, for a model and for people.
    message: str = ""


@dataclass(frozen=True, slots=True)
class VerifierVerdict:
    """The checks of one verifier."""

    verifier: str
    checks: Sequence[CheckResult]
    weight: float = 1.0

    @property
    def share(self) -> float:
        """The weighted share of passed checks; 1 when there was nothing to check."""
        total = sum(check.weight for check in self.checks)
        return sum(check.weight for check in self.checks if check.passed) / total if total else 1.0


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What all verifiers found in one output."""

    of: Sequence[VerifierVerdict] = field(default_factory=tuple)

    @property
    def score(self) -> float | None:
        """The score, from 0 to 1; None when there is no verifier."""
        total = sum(verdict.weight for verdict in self.of)
        return round(sum(one.weight * one.share for one in self.of) / total, 6) if total else None

    @property
    def passed(self) -> bool | None:
        """Whether all checks passed; None when there is no verifier."""
        return all(check.passed for verdict in self.of for check in verdict.checks) if self.of else None

    @property
    def feedback(self) -> str:
        """What is wrong, a line for each failed check."""
        failed = [check.message or check.name for one in self.of for check in one.checks if not check.passed]
        lines = [f"- {message[:MAX_MESSAGE]}" for message in dict.fromkeys(failed)]
        more = [f"- and {len(lines) - _MAX_TOLD} more"] if len(lines) > _MAX_TOLD else []
        return "\n".join([*lines[:_MAX_TOLD], *more])[:_MAX_WORDS]

    def document(self) -> list[dict[str, Any]]:
        """Return the checks as plain data, failed ones first where there are too many."""
        every = [(verdict.verifier, check) for verdict in self.of for check in verdict.checks]
        if len(every) > MAX_REPORTED:
            every = sorted(every, key=lambda pair: pair[1].passed)[:MAX_REPORTED]
        return [
            {
                "verifier": verifier,
                "check": check.name,
                "passed": check.passed,
                "weight": check.weight,
                **({} if check.passed else {"message": check.message[:MAX_MESSAGE]}),
            }
            for verifier, check in every
        ]
