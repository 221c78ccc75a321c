"""
A schedule: which workflow is run, with what, and when.

The shape is held here; when it fires is in `app.workflows.schedules.timetable`. Whether its workflow exists and takes
these inputs is seen when it is stored, and again at each fire: workflows change.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, tzinfo
from enum import StrEnum
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from app.kernel.units.durations import Duration
from app.workflows.language.definition import PriorityName
from app.workflows.schedules import cron

#: Names of schedules, as they stand in URLs.
_NAME = r"^[a-z][a-z0-9]*(-[a-z0-9]+)*$"
#: Names that mean another zone on another host, or count leap seconds.
NO_ZONES = ("localtime", "Factory", "posixrules", "posix/", "right/")

#: A fire is a little late when a stand-by takes over; nobody wants that one missed.
LEAST_CATCH_UP = timedelta(seconds=10)
LEAST_INTERVAL = timedelta(seconds=1)

ScheduleText = Annotated[str, StringConstraints(min_length=1, max_length=255)]


class Overlap(StrEnum):
    """What becomes of a fire while a run of an earlier one still goes on."""

    #: It is dropped.
    SKIP = "skip"
    #: It waits, and its run begins when the earlier one has ended.
    QUEUE = "queue"
    #: The earlier run is cancelled; the new one begins when that has ended.
    CANCEL_RUNNING = "cancel_running"
    #: Its run begins beside the other.
    ALLOW = "allow"


class SchedulePart(BaseModel):
    """A mapping of the document. Fields that it does not know are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class CatchUp(SchedulePart):
    """What becomes of fires that came due while nothing was there to fire them."""

    #: Those later than this are missed.
    within: Duration = Field(default=timedelta(hours=1), ge=LEAST_CATCH_UP)
    #: Of those that are not too late, the latest is made up, or all.
    runs: Literal["latest", "all"] = "latest"
    #: With `all`: at most so many, the latest ones.
    limit: int = Field(default=100, ge=1, le=1000)

    @property
    def most(self) -> int:
        """How many fires may begin at once."""
        return self.limit if self.runs == "all" else 1


class Schedule(SchedulePart):
    """A schedule."""

    schedule: str = Field(pattern=_NAME, max_length=100, description="its name: lower-case words joined by hyphens")
    description: str = ""
    workflow: str = Field(min_length=1, max_length=100, description="the name of a workflow")
    version: int | None = Field(default=None, ge=0, description="of the workflow; the newest of its time without it")
    inputs: Mapping[str, Any] = Field(
        default={}, description="texts are templates over `fire.at`, `fire.date`, `fire.time` and `schedule.name`"
    )
    priority: PriorityName | None = Field(default=None, description="instead of the workflow's own")
    labels: Mapping[ScheduleText, ScheduleText] = Field(default={}, max_length=64)
    cron: str | None = Field(default=None, description=cron.ACCEPTED, examples=["30 2 * * 1-5"])
    every: Duration | None = Field(default=None, description="counted from `start`, else from 1970-01-01T00:00Z")
    timezone: str = Field(default="UTC", description="of `cron`, `start` and `end`; a name of the IANA database")
    overlap: Overlap = Overlap.SKIP
    catch_up: CatchUp = CatchUp()
    jitter: Duration = Field(
        default=timedelta(0), description="each fire is late by a part of this, never beyond the one after it"
    )
    start: str | None = Field(default=None, description="no fire before it; ISO 8601, in `timezone` without an offset")
    end: str | None = Field(default=None, description="no fire at it or after it")

    @field_validator("cron")
    @classmethod
    def _is_cron(cls, value: str | None) -> str | None:
        if value is not None:
            cron.parse(value)
        return value

    @field_validator("every")
    @classmethod
    def _is_whole_seconds(cls, value: timedelta | None) -> timedelta | None:
        if value is not None and (value < LEAST_INTERVAL or value.microseconds):
            raise ValueError("an interval is of whole seconds, at least one")
        return value

    @field_validator("timezone")
    @classmethod
    def _is_a_zone(cls, value: str) -> str:
        try:
            # A name may also lead to a folder, or out of the database.
            ZoneInfo("" if value.startswith(NO_ZONES) else value)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError("there is no such time zone") from None
        return value

    @field_validator("start", "end")
    @classmethod
    def _is_an_instant(cls, value: str | None) -> str | None:
        try:
            found = None if value is None else datetime.fromisoformat(value)
        except ValueError:
            raise ValueError("this is no instant such as 2026-11-21T02:30 or 2026-11-21T02:30:00+01:00") from None
        if found is not None and found.microsecond:
            raise ValueError("an instant is of whole seconds")
        return value

    @field_validator("catch_up", mode="before")
    @classmethod
    def _may_be_short(cls, value: Any) -> Any:
        return {"within": value} if isinstance(value, str | int | float | timedelta) else value

    @model_validator(mode="after")
    def _is_triggered(self) -> Schedule:
        if (self.cron is None) == (self.every is None):
            raise ValueError("a schedule has either 'cron' or 'every'")
        try:
            _ = self.starts, self.ends
        except OverflowError:
            raise ValueError("in UTC, 'start' and 'end' lie within the years 1 to 9999") from None
        return self

    @property
    def zone(self) -> tzinfo:
        """The time zone."""
        return UTC if self.timezone == "UTC" else ZoneInfo(self.timezone)

    @property
    def starts(self) -> datetime | None:
        """The first instant at which it may fire."""
        return self._instant(self.start)

    @property
    def ends(self) -> datetime | None:
        """The first instant at which it may fire no more."""
        return self._instant(self.end)

    @property
    def trigger(self) -> tuple[Any, ...]:
        """What decides when it fires."""
        return (self.cron, self.every, self.timezone, self.starts, self.ends, self.jitter)

    def document(self) -> dict[str, Any]:
        """The schedule as plain data, as it is stored and shown: what was not written is not there."""
        return self.model_dump(mode="json", exclude_unset=True)

    def _instant(self, text: str | None) -> datetime | None:
        if text is None:
            return None
        found = datetime.fromisoformat(text)
        return (found if found.tzinfo else found.replace(tzinfo=self.zone)).astimezone(UTC)
