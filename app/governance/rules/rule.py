"""
A rule: conditions over signals, and what a firing of it is.

The types here validate the shape; `app.governance.rules.check` finds what is wrong beyond it, and
`app.governance.rules.evaluation` decides when a rule fires.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from enum import StrEnum
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from app.governance.signals.names import LABELS, Statistic
from app.kernel.units.durations import Duration

#: The pattern of the names of rules, which are part of URLs.
RULE_NAME = r"^[a-z][a-z0-9]*(-[a-z0-9]+)*$"
#: Most conditions and actions of a rule.
MAX_CONDITIONS, MAX_ACTIONS = 10, 10
#: The shortest and the longest window of a condition.
MIN_WINDOW, MAX_RULE_WINDOW = timedelta(minutes=1), timedelta(days=1)

LabelName = Literal["model", "pool", "host", "device", "namespace", "priority"]
_Label = Annotated[str, StringConstraints(min_length=1, max_length=200)]
assert set(LabelName.__args__) == set(LABELS)  # type: ignore[attr-defined] # of a Literal


class Category(StrEnum):
    """What a rule protects."""

    SAFETY = "safety"
    QUALITY = "quality"
    PERFORMANCE = "performance"
    COLLABORATION = "collaboration"
    RESOURCES = "resources"


class Severity(StrEnum):
    """How bad a firing is, the mildest first."""

    INFO = "info"
    WARNING = "warning"
    CRITICAL = "critical"


class RulePart(BaseModel):
    """A mapping of the document. Unknown fields are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SignalCondition(RulePart):
    """A statistic of a signal in a window, compared with a threshold; or that nothing was observed."""

    signal: str = Field(min_length=1, max_length=64)
    statistic: Statistic | None = Field(default=None, description="by default the first one of the signal")
    operator: Literal[">", ">=", "<", "<=", "==", "!="] | None = None
    threshold: float | None = Field(default=None, allow_inf_nan=False)
    clear: float | None = Field(
        default=None, allow_inf_nan=False, description="once it holds, it holds until this value is passed too"
    )
    window: Duration = Field(default=timedelta(minutes=5), ge=MIN_WINDOW, le=MAX_RULE_WINDOW)
    for_: Duration = Field(
        default=timedelta(0), alias="for", le=MAX_RULE_WINDOW, description="how long it must hold without a break"
    )
    scope: Mapping[LabelName, _Label] = Field(default={}, description="only observations with these labels")
    at_least: int = Field(default=1, ge=1, le=1_000_000_000, description="observations without which it does not hold")
    absent: bool = Field(default=False, description="it holds while nothing is observed in the window")


class ExpressionCondition(RulePart):
    """A CEL expression over signals."""

    expression: str = Field(min_length=1, max_length=2_000)
    window: Duration = Field(default=timedelta(minutes=5), ge=MIN_WINDOW, le=MAX_RULE_WINDOW)
    for_: Duration = Field(default=timedelta(0), alias="for", le=MAX_RULE_WINDOW)
    scope: Mapping[LabelName, _Label] = {}


RuleCondition = SignalCondition | ExpressionCondition


class ActiveHours(RulePart):
    """When a rule is evaluated: on these days, between these hours."""

    days: tuple[Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"], ...] = Field(default=(), max_length=7)
    hours: str | None = Field(
        default=None, pattern=r"^([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d$", examples=["08:00-18:00"]
    )
    timezone: str = Field(default="UTC", max_length=100)

    @property
    def zone(self) -> ZoneInfo:
        """The time zone, which was checked."""
        return ZoneInfo(self.timezone)


class RuleAction(RulePart):
    """What a firing does: the name of an action and its options, which `app/governance/actions` checks."""

    action: str = Field(min_length=1, max_length=64, pattern=r"^[a-z][a-z0-9_]*$")
    options: Mapping[str, Any] = Field(default={}, alias="with", max_length=20)


class Rule(RulePart):
    """A rule document."""

    rule: str = Field(pattern=RULE_NAME, max_length=100, description="its name: lower-case words joined by hyphens")
    description: str = Field(default="", max_length=1_000)
    category: Category
    severity: Severity = Severity.WARNING
    priority: int = Field(default=50, ge=0, le=100, description="rules of a higher priority are evaluated first")
    all: tuple[RuleCondition, ...] = Field(default=(), max_length=MAX_CONDITIONS)
    any: tuple[RuleCondition, ...] = Field(default=(), max_length=MAX_CONDITIONS)
    by: LabelName | None = Field(default=None, description="a firing for each value of this label; else one for all")
    for_: Duration = Field(
        default=timedelta(0), alias="for", le=MAX_RULE_WINDOW, description="how long the conditions must hold together"
    )
    clear_for: Duration = Field(
        default=timedelta(0), le=MAX_RULE_WINDOW, description="how long they must not hold until a firing clears"
    )
    cooldown: Duration = Field(
        default=timedelta(minutes=5), le=timedelta(days=7), description="after a firing began, no other one begins"
    )
    schedule: ActiveHours | None = None
    dry_run: bool = Field(default=False, description="firings are recorded, and nothing is done")
    actions: tuple[RuleAction, ...] = Field(default=(), max_length=MAX_ACTIONS)

    @property
    def conditions(self) -> tuple[RuleCondition, ...]:
        """Its conditions, in their order."""
        return self.all or self.any

    def document(self) -> dict[str, Any]:
        """Return the rule as plain data, as it is stored and shown: without the fields that were not set."""
        return self.model_dump(mode="json", exclude_unset=True, by_alias=True)
