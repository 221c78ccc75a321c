"""
The choice of a model for one request: from a name, an alias or a selector, and the models that are tried after it.

A model is passed over when it is unavailable, or when its first token is not expected within its `max_wait`, as long as
another one of its fallbacks is better off. If all are passed over, all are tried in order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.catalog.catalog import Catalog
from app.catalog.model import Model
from app.catalog.serving import selector as selectors
from app.inference.routing import ranking
from app.inference.routing.availability import FleetAvailability, expected_wait
from app.kernel.errors import FailureReason, NotFound, Unavailable

#: Bytes of UTF-8 of one token, on average.
_TOKEN_BYTES = 3.5
#: Deepest nesting, and most texts, of a request that are counted.
_DEEPEST = 8


class NoModelAvailable(Unavailable):
    """Every model that suits is unavailable."""


@dataclass(frozen=True, slots=True)
class ChosenModel:
    """The model that was chosen for a name, an alias or a selector."""

    model: Model
    #: Why; empty for a name.
    reason: str = ""


@dataclass(frozen=True, slots=True)
class PassedOver:
    """A model that is not tried, and why."""

    model: Model
    reason: str


@dataclass(frozen=True, slots=True)
class RoutePlan:
    """The models that are tried for a request, in order, and those that were passed over."""

    tried: Sequence[Model]
    passed_over: Sequence[PassedOver] = ()


def choose(
    asked: str, catalog: Catalog, fleet: FleetAvailability, context: int = 0, *, is_estimate: bool = False
) -> ChosenModel:
    """
    Return the model for a name, an alias or a selector. `context` are the tokens that the request needs. An estimate of
    them excludes no model with the largest context: the model itself counts them exactly.

    Raises NotFound for an unknown name, InvalidInput for a selector that no model suits, NoModelAvailable.
    """
    if not selectors.is_selector(asked):
        model = catalog.resolve(asked)
        if model is None:
            raise NotFound("model", asked, catalog.names)
        return ChosenModel(model, "" if model.name == asked else f"{asked} is an alias of {model.name}")
    selector = selectors.parse(asked)
    if is_estimate:
        largest = (model.context for model in catalog.models if selector.suitable(model) is None)
        context = min(context, max(largest, default=0))
    selectors.require_possible(selector, catalog.models, context=context)
    served = [model for model in catalog.models if not is_set_aside(model, catalog)]
    found = ranking.rank(selector, served, fleet, context)
    if not found.ranked:
        suitable = [model.name for model in catalog.models if selector.suitable(model, context) is None]
        why = "; ".join(f"{name}: {found.excluded.get(name, 'it is paused or diverted')}" for name in suitable)
        raise NoModelAvailable(f"no model is available for {asked}: {why}")
    best = found.ranked[0]
    return ChosenModel(best.model, f"{asked}: {best.reason}")


def plan(first: Model, catalog: Catalog, fleet: FleetAvailability) -> RoutePlan:
    """Return the models to try for a request to `first`. Raises NoModelAvailable when all of them are paused."""
    whole = catalog.chain(first.name)
    chain = [model for model in whole if model.name not in catalog.paused]
    paused = [PassedOver(model, f"{model.name} is paused") for model in whole if model.name in catalog.paused]
    if not chain:
        raise NoModelAvailable("; ".join(one.reason for one in paused))
    found = _plan(chain, fleet)
    return RoutePlan(found.tried, (*paused, *found.passed_over))


def is_set_aside(model: Model, catalog: Catalog) -> bool:
    """Whether a model is paused, or its requests go to others."""
    return model.name in catalog.paused or model.name in catalog.diverted


def _plan(chain: Sequence[Model], fleet: FleetAvailability) -> RoutePlan:
    tried: list[Model] = []
    passed: list[PassedOver] = []
    for number, model in enumerate(chain):
        reason = _why_not_now(model, fleet)
        if reason is not None and (tried or number < len(chain) - 1):
            passed.append(PassedOver(model, reason))
        else:
            tried.append(model)
    if tried and all(_why_not_now(model, fleet) for model in tried):
        return RoutePlan(chain)
    return RoutePlan(tried or chain, passed if tried else ())


def goes_on(model: Model, reason: str) -> bool:
    """Whether the next model is tried after this one has failed with that reason, before any text."""
    return reason in set(map(str, model.fallback.on))


def as_reason(failure: str) -> FailureReason | None:
    """Return the failure reason of that name; None for any other text."""
    return FailureReason(failure) if failure in set(FailureReason) else None


def _why_not_now(model: Model, fleet: FleetAvailability) -> str | None:
    of = fleet.of(model.name)
    wait = expected_wait(of)
    if wait is None:
        return f"{model.name} is unavailable: {of.problem}"
    limit = model.fallback.max_wait
    if limit is not None and wait > limit.total_seconds():
        return f"the first token of {model.name} is expected in {wait:.1f} s, max_wait is {limit.total_seconds():g} s"
    return None


def needed_context(body: Mapping[str, Any]) -> int:
    """Return about how many tokens a request in the form of OpenAI's API needs: its texts, and what it may write."""
    limits = (body.get("max_completion_tokens"), body.get("max_tokens"))
    written = next((limit for limit in limits if isinstance(limit, int)), 0)
    texts = (body.get(part) for part in ("messages", "prompt", "query", "tools"))
    size = sum(_bytes(part, _DEEPEST) for part in texts) + sum(
        map(_longest, (body.get("input"), body.get("documents")))
    )
    return round(size / _TOKEN_BYTES) + written


def _longest(value: Any) -> int:
    """The bytes of the longest of several texts that a model reads one by one."""
    several = value if isinstance(value, list | tuple) else [value]
    return max((_bytes(one, _DEEPEST) for one in several), default=0)


def _bytes(value: Any, depth: int) -> int:
    if isinstance(value, str):
        return len(value.encode(errors="replace"))
    if depth and isinstance(value, Mapping):
        return sum(_bytes(inner, depth - 1) for inner in value.values())
    if depth and isinstance(value, list | tuple):
        return sum(_bytes(inner, depth - 1) for inner in value)
    return 0
