"""
Files: what is known of one beside its content, and the form of ids.

An id in an API is a prefix and the hexadecimal digits of the UUID. A text that is no id is the id of nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from uuid import UUID

#: The prefix of the ids of files.
PREFIX = "file-"
_DIGITS = re.compile(r"[0-9a-f]{32}", re.ASCII)


class FilePurpose(StrEnum):
    """What a file is for."""

    #: The requests of a batch.
    BATCH = "batch"
    #: The results of a batch; only batches write them.
    BATCH_OUTPUT = "batch_output"
    #: Images in requests.
    VISION = "vision"
    #: Anything else of a user.
    USER_DATA = "user_data"


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file, without its content."""

    id: UUID
    namespace: str
    filename: str
    purpose: str
    bytes: int
    #: Of its content, in hexadecimal digits.
    sha256: str
    created_at: datetime
    #: It is removed after this instant; None for never.
    expires_at: datetime | None


def shown_id(id_: UUID, prefix: str = PREFIX) -> str:
    """Return an id as the API shows it."""
    return f"{prefix}{id_.hex}"


def parsed_id(text: str, prefix: str = PREFIX) -> UUID | None:
    """Return the id that a text shows, or None."""
    digits = text.removeprefix(prefix)
    return UUID(digits) if text.startswith(prefix) and _DIGITS.fullmatch(digits) else None
