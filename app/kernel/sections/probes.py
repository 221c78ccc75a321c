"""The section `probes` of the settings: whether pools that serve can still write a token."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

from pydantic import Field

from app.kernel.sections.section import CHANGEABLE, Section
from app.kernel.units import durations
from app.kernel.units.durations import Duration


class ProbeSettings(Section):
    """Probes of pools. It must be equal for all control workers."""

    #: Each pool that serves writes a token so often, whether it is used or idle.
    every: Annotated[Duration, durations.at_least("1s"), CHANGEABLE] = timedelta(minutes=5)
    #: Time for the token. A pool that works on other requests meanwhile is slow; an idle one that does not answer, or
    #: a busy one without progress for `fleet.progress_timeout`, is hung, which counts as a failure.
    timeout: Annotated[Duration, durations.at_least("100ms"), CHANGEABLE] = timedelta(seconds=30)
    #: Failures in a row after which a pool is drained and another one is started; 0: never.
    restart_after: Annotated[int, CHANGEABLE] = Field(default=2, ge=0, le=100)
    #: Most restarts of the pools of a model within an hour, so that a model that never works does not load for ever.
    max_restarts: Annotated[int, CHANGEABLE] = Field(default=3, ge=0, le=100)
    #: Probe models of remote servers too, which may cost money.
    remote: Annotated[bool, CHANGEABLE] = False
    #: Interval of the job. A pool whose last probe failed is probed again at its next pass.
    check_every: Annotated[Duration, durations.at_least("1s")] = timedelta(seconds=15)
