"""The section `splits` of the settings: how often splits are looked at."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

from app.kernel.sections.section import Section
from app.kernel.units import durations
from app.kernel.units.durations import Duration


class SplitSettings(Section):
    """Splits of calls and runs."""

    #: Interval of the job that reads outcomes, ramps up and rolls back.
    check_every: Annotated[Duration, durations.at_least("100ms")] = timedelta(seconds=2)
