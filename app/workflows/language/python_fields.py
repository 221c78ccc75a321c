"""The fields of `python` steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from pydantic import Field

from app.workflows.expressions.result_type import ResultType
from app.workflows.language.step_work import Expression, StepWork

#: The name of an argument of a function.
_Argument = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,62}$")]


class PythonFields(StepWork):
    """
    Calls a function in Python that is shipped or installed, in a process of its own. Its output is what it returns.

    Only functions of the installation can be named; a document cannot bring code.
    """

    kind: Literal["python"]
    #: The name of a shipped function, or of an entry point of the group `arriero.tools`.
    tool: str = Field(min_length=1, max_length=200)
    #: Argument to an expression. Those that are left out have the defaults of the function.
    arguments: Annotated[Mapping[_Argument, Expression], Field(max_length=64)] = {}
    #: Most mebibytes of address space of the process.
    memory_mb: int = Field(default=2_048, ge=256, le=65_536)

    def expressions(self) -> Iterator[tuple[str, str, ResultType]]:
        yield from ((f"arguments.{name}", value, "any") for name, value in self.arguments.items())
