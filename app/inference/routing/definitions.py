"""
The models of a workflow, chosen as its run is submitted: aliases and selectors become names, and the fallbacks of the
catalogue follow those of a step.

A run keeps what was chosen: its steps name models of the catalogue, so that demand, queues and retries see those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from app.catalog.catalog import Catalog
from app.catalog.serving import selector as selectors
from app.catalog.serving.selection_options import MAX_CHAIN
from app.inference.routing import choice
from app.inference.routing.availability import FleetAvailability
from app.kernel.errors import InvalidInput, NotFound, Problem
from app.workflows.language import definition as definitions
from app.workflows.language.agent import AgentFields
from app.workflows.language.definition import Definition, RoutedDefinition
from app.workflows.language.generate_fields import GenerateFields
from app.workflows.language.step_work import Fallback
from app.workflows.language.steps import MODEL_KINDS, ModelWork, work_of


@dataclass(frozen=True, slots=True)
class ModelRouter:
    """Chooses the models of the steps of a definition."""

    catalog: Callable[[], Catalog]
    #: Reads the availability of the models; called only where it decides.
    fleet: Callable[[Catalog], FleetAvailability]

    def __call__(self, definition: Definition) -> RoutedDefinition:
        """
        Return the definition with the chosen models, and for each step that was changed why.

        Raises InvalidInput for a selector that no model suits, NoModelAvailable, DatabaseUnreachable.
        """
        catalog = self.catalog()
        works = [(step.id, work_of(step)) for step in definition.all_steps()]
        uses = [(key, work) for key, work in works if isinstance(work, MODEL_KINDS)]
        if not any(_is_open(definition.models_of(work), catalog) for _, work in uses):
            return RoutedDefinition(definition)
        fleet = self.fleet(catalog)
        document = definition.document()
        parts = dict(_parts(document))
        chosen: dict[str, Any] = {}
        for key, work in uses:
            names = definition.models_of(work)
            if _is_open(names, catalog):
                routed, reasons = _routed(key, work, names, catalog, fleet)
                parts[key].update(routed)
                chosen[key] = {"asked": names[0], "models": [routed["model"], *_others(routed)], "reasons": reasons}
        return RoutedDefinition(definitions.from_document(document), chosen)


def _is_open(names: tuple[str, ...], catalog: Catalog) -> bool:
    """Whether a model is no plain name, or the first has fallbacks in the catalogue. Unknown names stay as they are."""
    if any(catalog.find(name) is None and (selectors.is_selector(name) or catalog.resolve(name)) for name in names):
        return True
    first = catalog.find(names[0])
    return first is not None and catalog.is_rerouted(first.name)


def _routed(
    key: str, work: ModelWork, names: tuple[str, ...], catalog: Catalog, fleet: FleetAvailability
) -> tuple[dict[str, Any], list[str]]:
    """The fields of a step's work that are replaced, and the reasons."""
    reasons: list[str] = []
    context = (work.max_tokens or 0) + 1 if isinstance(work, GenerateFields | AgentFields) else 0
    found: dict[str, None] = {}
    for name in names:
        try:
            chosen = choice.choose(name, catalog, fleet, context)
        except NotFound:  # it was removed from the catalogue: the step waits for it, as for any model without a file
            found[name] = None
            continue
        except InvalidInput as error:
            raise InvalidInput(
                [Problem(f"steps.{key}.model", one.message, one.accepted) for one in error.problems], "run"
            ) from None
        reasons += [chosen.reason] if chosen.reason else []
        found[chosen.model.name] = None
    first = catalog.find(next(iter(found)))
    if first is not None:
        plan = choice.plan(first, catalog, fleet)
        reasons += [one.reason for one in plan.passed_over]
        own = [] if work.fallback is None else list(found)
        # A step with fallbacks of its own begins with the model that it names.
        found = dict.fromkeys([*own, *(one.name for one in plan.tried), *(one.model.name for one in plan.passed_over)])
    model, *others = list(found)[:MAX_CHAIN]
    fields: dict[str, Any] = {"model": model}
    if others:
        named = work.fallback or (first.fallback if first is not None else Fallback(models=(model,)))
        on = named.on
        fields["fallback"] = {"models": others, "on": [str(one) for one in on]}
    return fields, reasons


def _others(fields: Mapping[str, Any]) -> list[str]:
    return list(fields.get("fallback", {}).get("models", ()))


def _parts(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The part of each step that has the fields of its work."""
    for part in ("steps", "on_failure"):
        for step in document.get(part, ()):
            yield step["id"], step["step"] if step["kind"] == "map" else step
