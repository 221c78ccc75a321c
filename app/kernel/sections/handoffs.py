"""The section `handoffs` of the settings."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

from app.kernel.sections.section import CHANGEABLE, Section
from app.kernel.units import durations
from app.kernel.units.durations import Duration


class HandoffSettings(Section):
    """Hand-offs: messages from one protocol to another."""

    #: Interval of the job that sends and confirms messages. A message that comes in starts one in addition.
    check_every: Annotated[Duration, durations.at_least("100ms")] = timedelta(seconds=1)
    #: Retention of messages that were delivered or skipped. A message that comes again later is a new one.
    retention: Annotated[Duration, durations.at_least("1h"), CHANGEABLE] = timedelta(days=30)
    #: Retention of messages that are invalid or failed: the time in which a person can mend them.
    retention_unresolved: Annotated[Duration, durations.at_least("1h"), CHANGEABLE] = timedelta(days=365)
