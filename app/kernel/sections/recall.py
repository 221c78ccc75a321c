"""The section `recall` of the settings: how texts are found by their words and by their meaning."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

from pydantic import Field

from app.kernel.sections.section import CHANGEABLE, Section
from app.kernel.units import durations
from app.kernel.units.durations import Duration


class RecallSettings(Section):
    """Recall. It must be equal for all processes."""

    #: The embedding model of the catalogue that makes the vectors. When it changes, all passages are embedded anew, and
    #: the vectors of both models are searched meanwhile. Empty: passages are found by their words alone.
    embedding_model: Annotated[str, CHANGEABLE] = Field(default="all-minilm:l6-v2", max_length=200)
    #: Most time for the vector of a query. Without one, passages are found by their words, and the answer says so.
    query_timeout: Annotated[Duration, durations.at_least("50ms"), CHANGEABLE] = timedelta(seconds=1)
    #: Interval of the job that has vectors made.
    check_every: Annotated[Duration, durations.at_least("100ms")] = timedelta(seconds=2)
