"""
The lines of batches: a worker reads the request of a step from the input file of its batch.

The step has the place of the line. Which file that is, the batch says whose run it is: a workflow of a user with the
same name has no batch, and so no file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from app.inference.batches import store
from app.inference.batches.batch import WORKFLOW
from app.inference.batches.validation import InvalidLine, parse_line
from app.kernel.database import Database
from app.kernel.errors import FailureReason, StepFailure
from app.workflows.runs.claims import Claim


@dataclass(frozen=True, slots=True)
class BatchLine:
    """The request of a line, and the endpoint of its batch."""

    endpoint: str
    body: dict[str, Any]


def find_line(claim: Claim, database: Database) -> BatchLine | None:
    """
    Return the request of a batch's line; None when the step is no line of a batch.

    Raises StepFailure when the file was removed.
    """
    if claim.workflow != WORKFLOW or claim.parent_id is None:
        return None
    item = claim.data["item"]
    if not isinstance(item, list) or len(item) != 4 or not all(isinstance(part, int) for part in item[:3]):
        return None
    with database.work() as work:
        found = store.body_of_line(work, claim.run_id, item[1], item[2])
    if found is None:
        return None
    endpoint, line = found
    if len(line) < item[2]:
        raise StepFailure(FailureReason.INVALID_REQUEST, "the input file of the batch was removed")
    try:
        body = parse_line(line).get("body")
    except InvalidLine as error:
        raise StepFailure(FailureReason.INVALID_REQUEST, str(error)) from None
    if not isinstance(body, dict):
        raise StepFailure(FailureReason.INVALID_REQUEST, "the body is not an object")
    return BatchLine(endpoint, body)
