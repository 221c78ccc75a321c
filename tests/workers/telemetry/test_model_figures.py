"""Figures of a process: they reach the database, also after an outage, and once."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from app.inference.model_metrics import store
from app.inference.model_metrics.metric import MetricKey, Operation, OperationOutcome, OperationSample
from app.kernel.database import Database
from app.kernel.errors import FailureReason, Unavailable
from app.workflows.state_machine.outcomes import Failure, Success, TokenUsage
from workers.telemetry import operations
from workers.telemetry.model_figures import ModelFigures

NOW = datetime(2026, 5, 20, 12, 3, tzinfo=UTC)
KEY = MetricKey("research", "m:1", Operation.REASONING)
SAMPLE = OperationSample(KEY, OperationOutcome.SUCCEEDED, 1.0, 0.5, 10, 5)


def stored(database: Database) -> int:
    with database.work() as work:
        found = store.read(work, NOW - timedelta(hours=1), NOW, namespace="research")
    return sum(metric.operations for metric in found.values())


def test_the_rest_is_stored_when_the_process_ends(database: Database) -> None:
    figures = ModelFigures(lambda: NOW, interval=3600)
    figures.start(database)
    for _ in range(3):
        figures.count(SAMPLE)
    figures.close()

    assert stored(database) == 3
    assert figures.totals()[KEY._replace(namespace="")].succeeded == 3


def test_what_the_database_did_not_take_is_stored_later_and_once(database: Database) -> None:
    figures = ModelFigures(lambda: NOW, interval=0.01)
    away = Database("postgresql://nobody@127.0.0.1:1/none")
    figures._database = away
    figures.count(SAMPLE)
    with pytest.raises(Unavailable):
        figures.add()
    figures.count(SAMPLE)
    figures._database = database
    figures.add()
    figures.add()
    away.close()

    assert stored(database) == 2


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (Success({"object": "chat.completion"}, TokenUsage(5, 3)), (Operation.REASONING, "succeeded", 5, 3)),
        (Success({"object": "list", "data": []}, TokenUsage(5)), (Operation.EMBEDDING, "succeeded", 5, 0)),
        (Success({"results": []}, TokenUsage(5)), (Operation.RERANKING, "succeeded", 5, 0)),
        (Failure(FailureReason.TIMEOUT, "late"), (Operation.EMBEDDING, "failed", 0, 0)),
        (Failure(FailureReason.CANCELLED, "no"), (Operation.EMBEDDING, "cancelled", 0, 0)),
        (Failure(FailureReason.WORKER_STOPPED, "requeued"), None),
    ],
)
def test_a_request_is_counted_by_what_it_was(outcome: Success | Failure, expected: tuple[object, ...] | None) -> None:
    sample = operations.of_request({"input": "a"}, "default", "m:1", outcome, 1.0)

    found = None if sample is None else (sample.key.operation, sample.outcome, sample.tokens_in, sample.tokens_out)
    assert found == expected
