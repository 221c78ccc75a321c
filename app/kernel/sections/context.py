"""The section of the personal context."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from app.kernel.sections.section import Section
from app.kernel.units import durations
from app.kernel.units.durations import Duration


class ContextSettings(Section):
    """The personal context: documents of users that prompts contain."""

    #: Most bytes of a document.
    max_document_bytes: int = Field(default=256 * 1024, ge=1024, le=1024 * 1024)
    #: Most documents of a user.
    max_documents: int = Field(default=1_000, ge=1, le=100_000)
    #: A folder whose files, `<namespace>/<user>/<kind>/<name>.md` or `.json`, are imported and watched.
    folder: Path | None = None
    #: How often the folder is read.
    check_every: Annotated[Duration, durations.at_least("1s")] = timedelta(seconds=15)
    #: Most files of the folder; further ones are not read.
    max_files: int = Field(default=10_000, ge=1, le=1_000_000)

    @field_validator("folder")
    @classmethod
    def _made_absolute(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser().absolute()
