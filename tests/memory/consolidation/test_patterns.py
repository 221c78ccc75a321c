"""How sure a pattern is, and which known one says the same."""

from __future__ import annotations

from typing import Any

import pytest

from app.memory.consolidation import patterns, prompt
from app.memory.consolidation.patterns import PatternReason

TURNS = ["the backup failed again", "backup failed at night", "why did the backup of Oslo fail?"]


def said(pattern: str | None) -> dict[str, Any]:
    return {"pattern": pattern}


def test_disagreement_lowers_the_confidence() -> None:
    first, second = said("The backup fails."), said("Backups fail.")
    confidences = [patterns.judge(first, second, near, TURNS, 0.0).confidence for near in (1.0, 0.8, 0.5, 0.1)]
    assert confidences == sorted(confidences, reverse=True)
    assert (confidences[0], confidences[-1]) == (patterns.HIGHEST_AT_FIRST, 0.0)
    assert patterns.judge(first, said(None), 1.0, TURNS, 0.1).reason is PatternReason.LOW_CONFIDENCE


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (None, PatternReason.UNANSWERED),
        (said(None), PatternReason.NO_PATTERN),
        (said("Does the backup fail?"), PatternReason.FORM),
        (said("The backup of Bergen fails."), PatternReason.NOT_GROUNDED),
        (said("The backup fails 7 times."), PatternReason.NOT_GROUNDED),
        (said("The weather ruins pancakes."), PatternReason.NOT_GROUNDED),
    ],
)
def test_what_is_refused(first: Any, reason: PatternReason) -> None:
    assert patterns.judge(first, said("The backup fails."), 1.0, TURNS, 0.0).reason is reason


def test_vectors_alone_do_not_make_two_patterns_one() -> None:
    assert patterns.says_the_same("The user's backup fails at night.", "At night the backup of the user fails.", 0.9)
    assert not patterns.says_the_same("The user buys tea each Monday.", "The user buys tea each Tuesday.", 0.99)
    assert not patterns.says_the_same("The user eats meat at home.", "The user does not eat meat at home.", 0.99)
    assert not patterns.says_the_same("The backup fails at night.", "The user orders coffee beans.", 0.99)


def test_passes_see_other_turns_where_there_are_enough() -> None:
    many, few = [f"turn number {number}." for number in range(20)], ["one", "two", "three"]
    given = prompt.inputs_of([many, few])
    seen = [{text for text in many if text in given[step][0]} for step in (prompt.FIRST, prompt.SECOND)]
    assert [len(one) for one in seen] == [prompt.SHOWN_TURNS] * 2
    assert seen[0].isdisjoint(seen[1])
    assert all(text in given[step][1] for text in few for step in (prompt.FIRST, prompt.SECOND))


def test_finding_it_again_makes_it_surer_and_never_certain() -> None:
    once = patterns.reinforced(0.6, 0.8)
    assert 0.6 < once < patterns.reinforced(once, 0.8) < 1
