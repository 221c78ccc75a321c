"""The section `catalog` of the settings: the catalogue of models and the sources of their files."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr

from app.kernel.sections.section import Section


class CatalogSettings(Section):
    """The catalogue of models and the sources of their files."""

    #: Catalogue files, read after the shipped one; an entry replaces an earlier entry of the same name.
    files: tuple[Path, ...] = ()
    #: Folders that `arriero models scan` searches for GGUF files.
    folders: tuple[Path, ...] = ()
    #: The Hugging Face hub, or a mirror with the same paths.
    hub: str = Field(default="https://huggingface.co", pattern=r"^https?://.+$")
    #: A token of the hub, for gated and private models. It is sent to the hub only, and never shown.
    hub_token: SecretStr | None = None
