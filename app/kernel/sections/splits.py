"""The section `splits` of the settings: how often splits and shadows are looked at."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

from app.kernel.sections.section import Section
from app.kernel.units import durations
from app.kernel.units.durations import Duration


class SplitSettings(Section):
    """Splits and shadows of calls and runs."""

    #: Interval of the jobs that read outcomes, ramp up and roll back, and do again what shadows sample.
    check_every: Annotated[Duration, durations.at_least("100ms")] = timedelta(seconds=2)
