"""The section `access` of the settings: who may call the API."""

from __future__ import annotations

from typing import Literal

from app.kernel.sections.section import Section


class AccessSettings(Section):
    """Who may call the API."""

    #: With `auto`, programs on the machine of the API need no key while the API listens on a loopback address only.
    #: With `required`, everybody needs one; this is right behind a proxy.
    keys: Literal["auto", "required"] = "auto"
