"""
Batches: their states, and the names of their parts.

A batch is a run of the class `batch` with the same id: a map for each model, an item for each line of the input file.
The batch says what the file was, how it ended, and where the results are; everything else is the run's.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

#: The prefix of the ids of batches, and of those of their lines.
PREFIX, LINE_PREFIX = "batch_", "batch_req_"
#: The name of the workflow whose runs batches are.
WORKFLOW = "openai-batch"


class BatchState(StrEnum):
    """The state of a batch, as in OpenAI's API."""

    #: Its file is read and checked.
    VALIDATING = "validating"
    #: A line of its file is invalid, and nothing was done.
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    #: Its results are written; before that, its last requests end.
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    #: Its completion window was over before its last request was done.
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


#: The states of a batch that has not ended.
OPEN_BATCHES = frozenset({BatchState.VALIDATING, BatchState.IN_PROGRESS, BatchState.FINALIZING, BatchState.CANCELLING})


@dataclass(frozen=True, slots=True)
class RequestCounts:
    """The requests of a batch, counted."""

    total: int = 0
    completed: int = 0
    failed: int = 0
