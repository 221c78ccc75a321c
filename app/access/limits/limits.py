"""
Limits on calls: requests and tokens in a minute, calls at a time, and calls that wait.

They hold for a key, and for a namespace, which counts all its keys together. A request must keep both. Each value comes
from what was set for this key or namespace, or else from the settings; 0 means no limit.
Requests and tokens come back evenly: of 60 requests in a minute, one each second. A request is refused while the tokens
of earlier ones have used up the minute, because its own are known at its end only.

Nothing here reads a clock or a counter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum

from app.kernel.errors import ArrieroError
from app.kernel.sections.access import LimitSettings


class SubjectKind(StrEnum):
    """What has limits."""

    KEY = "key"
    NAMESPACE = "namespace"


@dataclass(frozen=True, slots=True)
class LimitSubject:
    """A key or a namespace that has limits."""

    kind: SubjectKind
    #: The id of a key, or the name of a namespace.
    id: str

    def __str__(self) -> str:
        return f"{self.kind} {self.id!r}"


@dataclass(frozen=True, slots=True)
class CallLimits:
    """The limits of one key or namespace; 0 means no limit."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    concurrent_calls: int = 0
    waiting_interactive: int = 0
    waiting_batch: int = 0

    @property
    def is_unlimited(self) -> bool:
        """Whether nothing is limited."""
        return not any(getattr(self, name) for name in NAMES)


@dataclass(frozen=True, slots=True)
class LimitOverride:
    """What was set for one key or namespace; None means the value of the settings."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_calls: int | None = None
    waiting_interactive: int | None = None
    waiting_batch: int | None = None


#: The names of the limits.
NAMES = tuple(field.name for field in fields(CallLimits))


def effective(kind: SubjectKind, defaults: LimitSettings, override: LimitOverride | None) -> CallLimits:
    """Return the limits that hold."""
    values: dict[str, int] = {}
    for name in NAMES:
        own = None if override is None else getattr(override, name)
        values[name] = getattr(defaults, f"{kind}_{name}") if own is None else own
    return CallLimits(**values)


class LimitName(StrEnum):
    """A limit, as the counters know it."""

    REQUESTS = "requests"
    TOKENS = "tokens"
    CONCURRENT = "concurrent"
    WAITING = "waiting"


@dataclass(frozen=True, slots=True)
class LimitStanding:
    """A limit, and what is left of it."""

    subject: LimitSubject
    name: LimitName
    limit: int
    #: What is left after this request.
    remaining: int
    #: Seconds until all of it is there again; 0 for limits on calls at a time.
    reset: float
    #: Seconds after which a request is accepted; 0 when this one was.
    retry_after: float = 0.0


class LimitReached(ArrieroError):
    """A request exceeds a limit of its key or namespace. Nothing was done."""

    def __init__(self, standings: tuple[LimitStanding, ...]) -> None:
        self.standings = standings
        #: The limit that keeps the request waiting longest.
        self.standing = max(standings, key=lambda one: one.retry_after)
        what, unit = _WORDS[self.standing.name]
        limit = f"{self.standing.limit} {what}{unit}"
        super().__init__(
            f"the limit of the {self.standing.subject} is reached: {limit}; "
            f"send the request again in {max(self.standing.retry_after, 0.1):.1f} s"
        )


_WORDS: Mapping[LimitName, tuple[str, str]] = {
    LimitName.REQUESTS: ("requests", " per minute"),
    LimitName.TOKENS: ("tokens", " per minute"),
    LimitName.CONCURRENT: ("calls at a time", ""),
    LimitName.WAITING: ("waiting calls of this class", ""),
}


def tightest(standings: tuple[LimitStanding, ...], name: LimitName) -> LimitStanding | None:
    """Return the limit of this name of which least is left, relative to none: that with the smallest remainder."""
    found = [one for one in standings if one.name is name]
    return min(found, key=lambda one: one.remaining, default=None)
