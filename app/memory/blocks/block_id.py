"""Ids of blocks in the database and in the API: a prefix and the hexadecimal digits of the UUID."""

from __future__ import annotations

import re
from uuid import UUID

from app.kernel.errors import NotFound
from app.memory.blocks.block import PREFIX

_DIGITS = re.compile(r"[0-9a-f]{32}", re.ASCII)


def shown_id(id_: UUID) -> str:
    """Return the id of a block as the API shows it."""
    return f"{PREFIX}{id_.hex}"


def parsed_id(shown: str) -> UUID:
    """Return the id that a text shows. Raises NotFound: a text that is no id is the id of nothing."""
    digits = shown.removeprefix(PREFIX)
    if not shown.startswith(PREFIX) or not _DIGITS.fullmatch(digits):
        raise NotFound("block", shown)
    return UUID(digits)
