"""The sections `signals` and `rules` of the settings: what is measured, and what follows from it."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated

from pydantic import Field

from app.kernel.sections.section import CHANGEABLE, Section
from app.kernel.units import durations
from app.kernel.units.durations import Duration


class SignalSettings(Section):
    """What is measured."""

    #: Interval of the job that adds minutes up to hours and days, and series up to groups.
    roll_up_every: Annotated[Duration, durations.at_least("1s")] = timedelta(minutes=1)


class RuleSettings(Section):
    """Rules over signals."""

    #: Interval of the job that reads signals and evaluates rules.
    evaluate_every: Annotated[Duration, durations.at_least("1s")] = timedelta(seconds=15)
    #: Files with rules, read by control workers whenever they change; they must be equal on all of them.
    files: tuple[Path, ...] = ()
    #: Most rules of a namespace.
    max_rules: Annotated[int, Field(ge=1, le=10_000), CHANGEABLE] = 200
    #: Retention of firings that were cleared.
    keep_firings: Annotated[Duration, durations.at_least("1h"), CHANGEABLE] = timedelta(days=90)
