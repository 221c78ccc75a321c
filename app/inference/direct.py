"""
Direct requests: a request that a resident pool takes from Redis at once, without a claim in the database before it.

The pool answers on the token stream of the run, and records the run when the first token is written; from then on it is
a run like any other. A request that no pool takes within `TAKEN_WITHIN` is withdrawn and submitted as a run, so that
the scheduler sees it. So only requests that a pool with a free slot can begin at once are not visible to the scheduler.

Redis keys:
    arriero:direct:<model slug>     list: requests that wait for a pool, oldest first
    arriero:direct-stop:<pool id>   list: ids of runs that the pool must stop
    arriero:probe:<pool id>         list: a request to this pool alone, which shows whether it works
    arriero:direct-alive:<pool id>  present while the pool works on direct requests

Nothing here connects to Redis.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any
from uuid import UUID

from app.kernel import ids, tracing
from app.workflows.language import definition as definitions
from app.workflows.language.definition import ASSIGNED_LABELS, Definition
from app.workflows.runs.submission import Submission, own_labels

#: A request that no pool has taken by then is submitted as a run.
TAKEN_WITHIN = timedelta(milliseconds=250)
#: For how long a pool's sign of life holds, and how often it is renewed while the pool has requests.
ALIVE, ALIVE_INTERVAL = timedelta(seconds=6), timedelta(seconds=2)
#: The one step of such a run.
STEP = "answer"


def requests_key(slug: str) -> str:
    """The list of requests for a model."""
    return f"arriero:direct:{slug}"


def stop_key(pool_id: str) -> str:
    """The list of runs that a pool must stop."""
    return f"arriero:direct-stop:{pool_id}"


def probe_key(pool_id: str) -> str:
    """The list of requests to one pool alone."""
    return f"arriero:probe:{pool_id}"


def alive_key(pool_id: str) -> str:
    """The sign of life of a pool."""
    return f"arriero:direct-alive:{pool_id}"


@dataclass(frozen=True, slots=True)
class DirectRequest:
    """A request, and the run that it becomes."""

    run_id: UUID
    #: The model's name in the catalogue.
    model: str
    #: The body of a request of OpenAI's API: chat completions, completions or embeddings.
    body: Mapping[str, Any]
    priority: str
    labels: Mapping[str, str]
    #: When it was received, in seconds since 1970.
    created: int
    #: Whether it becomes a run. The vector of a query does not: what it is needed for is recorded, if anything is.
    is_recorded: bool = True
    #: The trace that it belongs to, as a `traceparent`.
    trace_parent: str | None = None

    @staticmethod
    def new(
        model: str,
        body: Mapping[str, Any],
        priority: str,
        labels: Mapping[str, str],
        created: int,
        *,
        is_recorded: bool = True,
    ) -> DirectRequest:
        """A request with a new id."""
        trace = tracing.current()
        return DirectRequest(ids.new_id(), model, body, priority, labels, created, is_recorded, trace)

    def encoded(self) -> str:
        """The request as a message."""
        content = {
            "run": str(self.run_id),
            "model": self.model,
            "body": self.body,
            "priority": self.priority,
            "labels": self.labels,
            "created": self.created,
            **({} if self.is_recorded else {"recorded": False}),
            **({} if self.trace_parent is None else {"trace": self.trace_parent}),
        }
        return json.dumps(content, separators=(",", ":"))

    @staticmethod
    def decoded(message: bytes) -> DirectRequest:
        """The request of a message. Raises ValueError for a message of another form."""
        try:
            content = json.loads(message)
            return DirectRequest(
                UUID(content["run"]),
                str(content["model"]),
                dict(content["body"]),
                str(content["priority"]),
                {str(name): str(value) for name, value in content["labels"].items()},
                int(content["created"]),
                content.get("recorded") is not False,
                trace if isinstance(trace := content.get("trace"), str) and tracing.is_valid(trace) else None,
            )
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a direct request: {error}") from None

    def submission(self) -> Submission:
        """The run that it becomes."""
        return Submission(
            definition_of(self.model),
            {"request": self.body, "created": self.created},
            priority=self.priority,
            labels=own_labels(self.labels),
            id=self.run_id,
            is_routed=True,
            trace_parent=self.trace_parent,
            assigned={name: value for name, value in self.labels.items() if name.startswith(ASSIGNED_LABELS)},
        )


@lru_cache(maxsize=1024)
def definition_of(model: str) -> Definition:
    """The workflow of the requests for a model: one step, which is not repeated after a failure."""
    return definitions.from_document(
        {
            "workflow": "openai",
            "inputs": {"request": {"type": "object"}, "created": {"type": "integer"}},
            "priority": "interactive",
            "steps": [
                {
                    "id": STEP,
                    "kind": "openai",
                    "model": model,
                    "request": "inputs.request",
                    "retry": {"max_attempts": 1},
                }
            ],
        }
    )
