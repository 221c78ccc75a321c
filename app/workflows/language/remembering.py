"""The fields of `remember` steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from app.workflows.language.step_work import StepWork, Template


class RememberFields(StepWork):
    """
    Remembers a statement, for a user or for the namespace of the run.

    Its output has the `id`, `text` and `kind` of the memory, and whether it was `created`: one that says the same is
    not written twice.
    """

    kind: Literal["remember"]
    #: The statement.
    text: Template
    #: What it states.
    memory: Literal["fact", "preference", "decision", "breakthrough", "pattern"] = "fact"
    #: Whose it is; without it, or empty, the namespace's.
    user: Template | None = None
    #: How much it matters.
    importance: float = Field(default=0.5, ge=0, le=1)
    #: The id of a memory that no longer holds, and whose place this takes; empty for none.
    supersedes: Template | None = None

    def templates(self) -> Iterator[tuple[str, str]]:
        named = (("text", self.text), ("user", self.user), ("supersedes", self.supersedes))
        yield from ((name, template) for name, template in named if template is not None)
