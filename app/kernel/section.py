"""A section of the settings: a table of `arriero.toml`, validated when it is created."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A table of `arriero.toml`."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
