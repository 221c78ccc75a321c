"""The section of consolidation: patterns of what users say again and again."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

from pydantic import Field

from app.kernel.sections.section import CHANGEABLE, Section
from app.kernel.units import durations
from app.kernel.units.durations import Duration


class ConsolidationSettings(Section):
    """Consolidation: new turns of a namespace are clustered, and each cluster is read for a pattern."""

    #: The model that states patterns, or a selector, where neither the request nor the namespace names one.
    model: Annotated[str, Field(min_length=1, max_length=200), CHANGEABLE] = "auto:extract"
    #: The model of the second pass. Empty: the same one, with another prompt.
    review_model: Annotated[str, Field(max_length=200), CHANGEABLE] = ""
    #: Interval of the job that starts and advances consolidations.
    check_every: Annotated[Duration, durations.at_least("100ms")] = timedelta(seconds=5)
    #: Most turns that one consolidation reads. Clustering needs time in the square of their number.
    max_turns: int = Field(default=2_000, ge=10, le=10_000)
    #: Most clusters of one consolidation, the largest first: each costs two requests.
    max_clusters: int = Field(default=100, ge=1, le=500)
    #: Fewest turns of a pattern.
    min_turns: int = Field(default=4, ge=2, le=50)
    #: Requests of a consolidation that are in progress at the same time.
    max_parallel: int = Field(default=4, ge=1, le=100)
    #: Patterns with less confidence are not written.
    min_confidence: Annotated[float, Field(ge=0, le=1), CHANGEABLE] = 0.5
    #: How often a turn that was in no cluster is read again with newer ones.
    max_rounds: int = Field(default=5, ge=0, le=100)
    #: A consolidation that has not ended within this time fails; its turns are read by the next one.
    timeout: Annotated[Duration, durations.at_least("1s")] = timedelta(days=1)
    #: Time limit for the process that clusters.
    cluster_timeout: Annotated[Duration, durations.at_least("1s")] = timedelta(minutes=5)
