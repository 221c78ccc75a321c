"""The target `workflow`: a run of a stored workflow, whose inputs are the payload."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from app.handoffs.connectors.connector import TargetFields


class WorkflowTarget(TargetFields):
    """A workflow."""

    kind: Literal["workflow"]
    workflow: str = Field(min_length=1, max_length=100)
    #: By default the newest when a message is delivered.
    version: int | None = Field(default=None, ge=0)

    def plan(self, retry: Mapping[str, Any], fields: tuple[str, ...]) -> None:
        """Return None: the workflow has its own steps and retries."""
        del retry, fields
