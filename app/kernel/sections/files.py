"""The sections of uploaded files and of batches."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

from pydantic import Field

from app.kernel.sections.section import Section
from app.kernel.units import durations
from app.kernel.units.durations import Duration


class FileSettings(Section):
    """Uploaded files, and the results of batches. They are stored in Postgres."""

    #: Most bytes of an uploaded file; a larger one is refused with 413.
    max_bytes: int = Field(default=512 * 1024 * 1024, ge=1024, le=8 * 1024**3)
    #: Most bytes of all files of a namespace together.
    max_namespace_bytes: int = Field(default=8 * 1024**3, ge=1024)
    #: Most files of a namespace.
    max_files: int = Field(default=10_000, ge=1, le=1_000_000)
    #: Retention of files of batches, inputs and results, unless the client sets another one.
    keep: Annotated[Duration, durations.at_least("1h")] = timedelta(days=30)


class BatchSettings(Section):
    """Batches: requests of a file that are done while models are idle."""

    #: Most requests of a batch.
    max_lines: int = Field(default=50_000, ge=1, le=100_000)
    #: Most bytes of a line of the input file.
    max_line_bytes: int = Field(default=1024 * 1024, ge=1024, le=16 * 1024 * 1024)
    #: Most batches of a namespace that have not ended.
    max_open: int = Field(default=100, ge=1, le=10_000)
    #: Requests of a batch, for each of its models, that wait for a slot or have one.
    max_parallel: int = Field(default=64, ge=1, le=1000)
    #: Interval of the job that validates batches, expires them and writes their results.
    check_every: Annotated[Duration, durations.at_least("100ms")] = timedelta(seconds=2)
    #: Retention of the runs of ended batches. Their results are in files, which have a retention of their own.
    keep_runs: Duration = timedelta(days=1)
