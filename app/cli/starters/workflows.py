"""
Starters: small commented workflows, one for each common kind of work, under a name of the user's choice.

Each is a complete workflow that is checked and runs as it is on a small model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

from app.catalog.catalog import Catalog
from app.cli.starters.files import SCHEMA_LINE
from app.kernel.errors import InvalidInput, Problem
from app.workflows.language.step_work import NAME

#: The model of a starter as it is stored.
_MODEL = "smollm2:135m"


class StarterKind(StrEnum):
    """A kind of starter."""

    GENERATE = "generate"
    MAP = "map"
    EXTRACT = "extract"
    APPROVE = "approve"
    REFINE = "refine"
    AGENT = "agent"


def text(kind: StarterKind, name: str, model: str = _MODEL) -> str:
    """Return the text of a starter under a name, for a model. Raises InvalidInput when the name is not accepted."""
    if not re.fullmatch(NAME, name) or len(name) > 100:
        accepted = "lower-case words of letters and digits, joined by hyphens, up to 100 characters: invoice-check"
        raise InvalidInput([Problem("NAME", f"{name!r} is not a name of a workflow", accepted)], "workflow")
    stored = (Path(__file__).parent / f"{kind}.yaml").read_text(encoding="utf-8")
    written = stored.replace(f"workflow: {kind}\n", f"workflow: {name}\n", 1).replace(_MODEL, model)
    return f"{SCHEMA_LINE}\n{written.replace(f'{kind}.yaml', f'{name}.yaml')}"


def model_for(models: Sequence[str], catalog: Catalog) -> str:
    """Return the first of these models that follows instructions; without one, the model of the starters."""
    found = (entry for name in models if (entry := catalog.find(name)) is not None)
    return next((entry.name for entry in found if not {"chat", "extract"}.isdisjoint(entry.use_cases)), _MODEL)
