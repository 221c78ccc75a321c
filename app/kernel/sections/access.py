"""The sections `access`, `limits` and `audit` of the settings: who may call the API, how often, and what is noted."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Literal

from pydantic import Field

from app.kernel.sections.section import CHANGEABLE, Section
from app.kernel.units import durations
from app.kernel.units.durations import Duration

#: A number of calls or tokens; 0 means no limit.
Limit = Annotated[int, Field(ge=0, le=1_000_000_000), CHANGEABLE]


class AccessSettings(Section):
    """Who may call the API."""

    #: With `auto`, programs on the machine of the API need no key while the API listens on a loopback address only.
    #: With `required`, everybody needs one; this is right behind a proxy.
    keys: Literal["auto", "required"] = "auto"


class LimitSettings(Section):
    """
    Limits on calls of models and on submissions of runs, 0 for none.

    Those of a namespace hold for all its keys together. `arriero limits` sets others for one key or one namespace.
    """

    #: Most requests of one key in a minute.
    key_requests_per_minute: Limit = 0
    #: Most tokens of one key in a minute, of prompts and answers together.
    key_tokens_per_minute: Limit = 0
    #: Most calls of one key that are being answered.
    key_concurrent_calls: Limit = 0
    #: Most interactive calls of one key that no pool has begun.
    key_waiting_interactive: Limit = 0
    #: Most calls of one key in the class `batch` that no pool has begun.
    key_waiting_batch: Limit = 0
    #: Most requests of one namespace in a minute.
    namespace_requests_per_minute: Limit = 0
    #: Most tokens of one namespace in a minute, of prompts and answers together.
    namespace_tokens_per_minute: Limit = 0
    #: Most calls of one namespace that are being answered.
    namespace_concurrent_calls: Limit = 0
    #: Most interactive calls of one namespace that no pool has begun.
    namespace_waiting_interactive: Limit = 0
    #: Most calls of one namespace in the class `batch` that no pool has begun.
    namespace_waiting_batch: Limit = 0


class AuditSettings(Section):
    """The audit log."""

    #: Retention of its entries.
    retention: Annotated[Duration, durations.at_least("1h"), CHANGEABLE] = timedelta(days=365)
