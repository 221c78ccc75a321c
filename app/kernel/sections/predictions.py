"""The section of predictions."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Literal

from app.kernel.sections.section import CHANGEABLE, Section
from app.kernel.units import durations
from app.kernel.units.durations import Duration


class PredictionSettings(Section):
    """Expected times of steps and runs."""

    #: Interval at which is learned of the runs that have ended.
    learn_every: Annotated[Duration, durations.at_least("1s")] = timedelta(seconds=10)
    #: What happens to a submission whose run will not meet its deadline. `refuse`: it is refused when nine of ten such
    #: runs took longer, and accepted with a warning when half of them did. `warn`: it is always accepted.
    deadlines: Annotated[Literal["refuse", "warn", "ignore"], CHANGEABLE] = "refuse"
