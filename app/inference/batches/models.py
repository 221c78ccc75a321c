"""
The models of a batch: what its lines name, and the models that answer them.

A line names a model, an alias or a selector. A selector is decided once for a batch, when its whole file is checked,
for the longest of the requests that name it. Fallbacks are not used: a batch has time to wait for its model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from app.catalog.catalog import Catalog
from app.catalog.model import Model
from app.catalog.serving import selector as selectors
from app.inference.batches.validation import KeptLine
from app.inference.routing import choice
from app.inference.routing.availability import NOTHING_KNOWN, FleetAvailability
from app.kernel.errors import InvalidInput, NotFound


@dataclass(slots=True)
class ModelLines:
    """The requests that one model answers."""

    lines: list[KeptLine] = field(default_factory=list)
    #: What they name, unless that is the model's name.
    asked: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def choice(self, model: str) -> dict[str, Any]:
        """How the model was chosen, for the history of the run."""
        return {"asked": ", ".join(self.asked), "models": [model], "reasons": self.reasons}


def problem_of_model(catalog: Catalog, asked: str, endpoint: str) -> str | None:
    """Return why a model, an alias or a selector cannot serve an endpoint, or None."""
    try:
        model = choice.choose(asked, catalog, NOTHING_KNOWN).model
    except NotFound:
        return f"there is no model {asked!r}; there are: {', '.join(catalog.names)}"
    except InvalidInput as error:
        return "; ".join(problem.message for problem in error.problems)
    return _problem_of(model, endpoint)


def chosen_lines(
    lines: Mapping[str, list[KeptLine]], contexts: Mapping[str, int], catalog: Catalog, fleet: FleetAvailability
) -> dict[str, ModelLines]:
    """
    Return the requests of each model. `contexts` are the tokens that the longest request of each selector needs.

    Raises NotFound, InvalidInput, NoModelAvailable.
    """
    found: dict[str, ModelLines] = {}
    for asked, kept in lines.items():
        chosen = choice.choose(asked, catalog, fleet, contexts.get(asked, 0), is_estimate=True)
        of_model = found.setdefault(chosen.model.name, ModelLines())
        of_model.lines += kept
        if chosen.reason:
            of_model.asked.append(asked)
            of_model.reasons.append(chosen.reason)
    return found


def has_selectors(lines: Mapping[str, Any]) -> bool:
    """Whether one of these names is a selector."""
    return any(map(selectors.is_selector, lines))


def _problem_of(model: Model, endpoint: str) -> str | None:
    if endpoint == "/v1/embeddings" and not model.serves_embeddings:
        return f"the model {model.name!r} serves no embeddings"
    if endpoint == "/v1/rerank" and "rerank" not in model.use_cases:
        return f"the model {model.name!r} is no reranking model: its use_cases do not have rerank"
    return None
