"""
The schedule document: a workflow, its inputs, and a trigger.

The types here validate the shape; `app.workflows.schedules.timetable` computes the fires. Whether the workflow exists
and accepts the inputs is checked when the schedule is stored, and again at each fire, because workflows change.
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

#: The pattern of schedule names, which are part of URLs.
_NAME = r"^[a-z][a-z0-9]*(-[a-z0-9]+)*$"
#: Zone names that are rejected, because they differ between hosts or count leap seconds.
EXCLUDED_ZONES = ("localtime", "Factory", "posixrules", "posix/", "right/")

#: The minimum catch-up window. A fire is a little late after a failover and must not be missed for that.
MIN_CATCH_UP = timedelta(seconds=10)
MIN_INTERVAL = timedelta(seconds=1)

ScheduleText = Annotated[str, StringConstraints(min_length=1, max_length=255)]


class Overlap(StrEnum):
    """What happens to a fire while the run of an earlier fire is active."""

    #: The fire is skipped.
    SKIP = "skip"
    #: The fire waits, and its run starts after the earlier run has ended.
    QUEUE = "queue"
    #: The earlier run is cancelled; the new run starts after the earlier run has ended.
    CANCEL_RUNNING = "cancel_running"
    #: Its run starts in parallel.
    ALLOW = "allow"


class SchedulePart(BaseModel):
    """A mapping of the document. Unknown fields are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class CatchUp(SchedulePart):
    """What happens to fires that became due while no scheduler was running."""

    #: Fires that are later than this are missed.
    within: Duration = Field(default=timedelta(hours=1), ge=MIN_CATCH_UP)
    #: Whether the latest of the other fires is started, or all of them.
    runs: Literal["latest", "all"] = "latest"
    #: With `all`: the maximum number of started fires; the latest ones are started.
    limit: int = Field(default=100, ge=1, le=1000)

    @property
    def max_fires(self) -> int:
        """The maximum number of late fires that are started."""
        return self.limit if self.runs == "all" else 1


class Schedule(SchedulePart):
    """A schedule document."""

    schedule: str = Field(pattern=_NAME, max_length=100, description="its name: lower-case words joined by hyphens")
    description: str = ""
    workflow: str = Field(min_length=1, max_length=100, description="the name of a workflow")
    version: int | None = Field(default=None, ge=0, description="of the workflow; by default the newest at each fire")
    inputs: Mapping[str, Any] = Field(
        default={}, description="strings are templates over `fire.at`, `fire.date`, `fire.time` and `schedule.name`"
    )
    priority: PriorityName | None = Field(default=None, description="instead of the workflow's own")
    labels: Mapping[ScheduleText, ScheduleText] = Field(default={}, max_length=64)
    cron: str | None = Field(default=None, description=cron.ACCEPTED, examples=["30 2 * * 1-5"])
    every: Duration | None = Field(default=None, description="counted from `start`, by default from 1970-01-01T00:00Z")
    timezone: str = Field(default="UTC", description="of `cron`, `start` and `end`; a name of the IANA database")
    overlap: Overlap = Overlap.SKIP
    catch_up: CatchUp = CatchUp()
    jitter: Duration = Field(
        default=timedelta(0), description="each fire is delayed by a part of this, never beyond the next fire"
    )
    start: str | None = Field(default=None, description="no fire before it; ISO 8601; without an offset in `timezone`")
    end: str | None = Field(default=None, description="no fire at it or after it")

    @field_validator("cron")
    @classmethod
    def _check_cron(cls, value: str | None) -> str | None:
        if value is not None:
            cron.parse(value)
        return value

    @field_validator("every")
    @classmethod
    def _check_whole_seconds(cls, value: timedelta | None) -> timedelta | None:
        if value is not None and (value < MIN_INTERVAL or value.microseconds):
            raise ValueError("an interval must be a whole number of seconds, at least one")
        return value

    @field_validator("timezone")
    @classmethod
    def _check_zone(cls, value: str) -> str:
        try:
            # A name can also be the path of a folder, or a path outside of the database.
            ZoneInfo("" if value.startswith(EXCLUDED_ZONES) else value)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError("the time zone is unknown") from None
        return value

    @field_validator("start", "end")
    @classmethod
    def _check_instant(cls, value: str | None) -> str | None:
        try:
            found = None if value is None else datetime.fromisoformat(value)
        except ValueError:
            raise ValueError("this is not an instant such as 2026-11-21T02:30 or 2026-11-21T02:30:00+01:00") from None
        if found is not None and found.microsecond:
            raise ValueError("an instant must be in whole seconds")
        return value

    @field_validator("catch_up", mode="before")
    @classmethod
    def _expand_short_form(cls, value: Any) -> Any:
        return {"within": value} if isinstance(value, str | int | float | timedelta) else value

    @model_validator(mode="after")
    def _check_trigger(self) -> Schedule:
        if (self.cron is None) == (self.every is None):
            raise ValueError("a schedule needs either 'cron' or 'every'")
        try:
            _ = self.starts, self.ends
        except OverflowError:
            raise ValueError("'start' and 'end' must be in the years 1 to 9999 in UTC") from None
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
        """The first instant at which it no longer fires."""
        return self._instant(self.end)

    @property
    def trigger(self) -> tuple[Any, ...]:
        """The values that determine when it fires."""
        return (self.cron, self.every, self.timezone, self.starts, self.ends, self.jitter)

    def document(self) -> dict[str, Any]:
        """Return the schedule as plain data, as it is stored and shown: without the fields that were not set."""
        return self.model_dump(mode="json", exclude_unset=True)

    def _instant(self, text: str | None) -> datetime | None:
        if text is None:
            return None
        found = datetime.fromisoformat(text)
        return (found if found.tzinfo else found.replace(tzinfo=self.zone)).astimezone(UTC)
