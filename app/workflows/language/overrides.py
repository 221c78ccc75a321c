"""
Overrides: other models for the steps of a definition, before it is checked.

The result is a definition like any other: it is checked, stored with its run, and what retries and forks use.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from app.kernel.errors import InvalidInput, Problem
from app.workflows.language.source import SourceDocument

#: In the place of the id of a step: every step that uses a model.
EVERY = "*"
_KINDS = ("generate", "embed", "openai", "agent")


def with_models(document: SourceDocument, models: Mapping[str, str]) -> SourceDocument:
    """
    Returns the document with the models of some steps replaced. `models` is by id of a step, or `EVERY`.

    For a map the model is that of its items. Raises InvalidInput for an id of no step that uses a model.
    """
    data = copy.deepcopy(document.data)
    found: dict[str, dict[str, Any]] = dict(_model_steps(data))
    unknown = [name for name in models if name != EVERY and name not in found]
    if unknown or (models and not found):
        problems = [Problem(f"models.{name}", *_why_not(name, found)) for name in unknown or models]
        raise InvalidInput(problems, "models")
    for name, work in found.items():
        model = models.get(name, models.get(EVERY))
        if model is not None:
            work["model"] = model
    return replace(document, data=data)


def _why_not(name: str, found: Mapping[str, Any]) -> tuple[str, str]:
    if not found:
        return "no step of the workflow uses a model", "no override"
    return f"no step {name!r} uses a model", ", ".join([*found, f"{EVERY} (all of them)"])


def _model_steps(data: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the id of each step that uses a model, and the part with its model. The check rejects invalid parts."""
    if not isinstance(data, dict):
        return
    for part in ("steps", "on_failure"):
        steps = data.get(part)
        for step in steps if isinstance(steps, list) else ():
            if isinstance(step, dict) and isinstance(id_ := step.get("id"), str):
                work = step.get("step") if step.get("kind") == "map" else step
                if isinstance(work, dict) and work.get("kind") in _KINDS:
                    yield id_, work
