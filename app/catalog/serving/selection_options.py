"""
Selection options of one model: other names of it, what selectors weigh, and the models that are tried after it.

They are the keys `aliases` and `rating`, and the table `[models.fallback]`, of an entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Annotated, Any

from pydantic import Field, StrictFloat, StrictInt, StringConstraints, model_validator

from app.catalog.source import CatalogTable
from app.kernel.errors import FailureReason
from app.kernel.units.durations import Duration

#: The beginning of a selector; no name and no alias has it.
SELECTOR_PREFIX = "auto:"
#: Most models that are tried for one request.
MAX_CHAIN = 16

Alias = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]*$", max_length=100)]
ALIAS_ACCEPTED = "letters, digits, '.', '_', '-', ':', '/', '@', '+'; at most 100, not beginning with 'auto:'"
_Part = Annotated[StrictFloat | StrictInt, Field(ge=0, le=1)]


class Rating(CatalogTable):
    """How good and how fast a model is, from 0 to 1. What is not given is derived from the size of its file."""

    quality: _Part | None = Field(default=None, description="a number from 0 to 1")
    speed: _Part | None = Field(default=None, description="a number from 0 to 1")


class FallbackOptions(CatalogTable):
    """The models that are tried after this one, in order, and when."""

    models: tuple[Annotated[str, StringConstraints(min_length=1, max_length=100)], ...] = Field(
        default=(), max_length=MAX_CHAIN, description="a list of names of models"
    )
    #: Failures after which the next model is tried, while no text was sent.
    on: tuple[FailureReason, ...] = Field(
        default=(
            FailureReason.ENGINE_ERROR,
            FailureReason.TIMEOUT,
            FailureReason.HTTP_THROTTLED,
            FailureReason.HTTP_UNREACHABLE,
            FailureReason.HTTP_REFUSED,
            FailureReason.WORKER_LOST,
            FailureReason.INTERNAL,
        ),
        description=f"a list of {', '.join(FailureReason)}",
    )
    #: The next model is tried when the first token is not expected, or has not come, within this time; None: never.
    max_wait: Duration | None = Field(default=None, description="a duration such as '5s'")

    @model_validator(mode="before")
    @classmethod
    def _of_list(cls, given: Any) -> Any:
        """A list alone is that of the models."""
        return {"models": given} if isinstance(given, list | tuple) else given

    @model_validator(mode="after")
    def _has_positive_wait(self) -> FallbackOptions:
        if self.max_wait is not None and self.max_wait <= timedelta(0):
            raise ValueError("max_wait must be greater than 0")
        return self


def loops(fallbacks: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """Yield each loop of fallbacks once, as the names along it; `fallbacks` is by name of a model."""
    done: set[str] = set()
    for start in fallbacks:
        path: list[str] = []
        stack: list[tuple[str, Iterator[str]]] = []
        if start not in done:
            path, stack = [start], [(start, iter(fallbacks[start]))]
        while stack:
            name, rest = stack[-1]
            following = next(rest, None)
            if following is None:
                done.add(name)
                stack.pop()
                path.pop()
            elif following in path:
                yield (*path[path.index(following) :], following)
            elif following not in done:
                path.append(following)
                stack.append((following, iter(fallbacks.get(following, ()))))


def chain(first: str, fallbacks: Callable[[str], tuple[str, ...]]) -> tuple[str, ...]:
    """Return the models that are tried for `first`, in order: itself, then each fallback with its own fallbacks."""
    found: dict[str, None] = {}
    waiting = [first]
    while waiting and len(found) < MAX_CHAIN:
        name = waiting.pop(0)
        if name not in found:
            found[name] = None
            waiting[:0] = fallbacks(name)
    return tuple(found)
