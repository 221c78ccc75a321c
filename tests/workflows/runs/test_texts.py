"""Texts that Postgres cannot store: refused in requests, replaced in messages."""

from __future__ import annotations

import pytest

from app.kernel.errors import InvalidInput
from app.workflows.language import check
from app.workflows.runs.service import Runs
from app.workflows.runs.submission import Submission

KEYS = """
workflow: keys
inputs: {x: {type: string}}
concurrency: {key: "k-{{ inputs.x }}", limit: 2}
steps: [{id: a, kind: noop}]
"""
PLAIN = "workflow: plain\nsteps: [{id: a, kind: noop}]\n"


@pytest.mark.parametrize("bad", ["a\0b", "half \ud83e"])
def test_a_label_or_key_that_cannot_be_stored_is_refused(runs: Runs, bad: str) -> None:
    plain = check.parse(PLAIN)
    with pytest.raises(InvalidInput, match=r"labels.team: 'a?.*' holds NUL, or half a character"):
        runs.submit(Submission(plain, {}, labels={"team": bad}))
    with pytest.raises(InvalidInput, match=r"idempotency_key: .* holds NUL"):
        runs.submit(Submission(plain, {}, idempotency_key=bad))


def test_a_key_of_a_workflow_that_cannot_be_stored_is_refused(runs: Runs) -> None:
    with pytest.raises(InvalidInput, match=r"concurrency.key: .* holds NUL"):
        runs.submit(Submission(check.parse(KEYS), {"x": "a\0b"}))
