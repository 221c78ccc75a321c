"""
Targets: what an action acts on, from its parameters and the labels of a firing.

Two actions of one kind with the same target change the same thing, so their rate is counted together, and the last one
that is taken back restores what the first one found.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from app.governance.actions.action import (
    ActionFields,
    ActionKind,
    CleanUpMemoryAction,
    EvictIdleAction,
    RestartPoolAction,
    RollBackSplitAction,
    ShedLoadAction,
)
from app.governance.actions.outcome import ActionRefused

#: The parameters that are filled in from the labels of the same name.
_FROM_LABELS = ("model", "host", "pool", "workflow")


def filled(action: ActionFields, labels: Mapping[str, str]) -> ActionFields:
    """
    Return the action with the parameters that its rule leaves to the labels of the firing.

    Raises ActionRefused when neither names what it needs.
    """
    missing = {
        name: labels[name]
        for name in _FROM_LABELS
        if name in type(action).model_fields and getattr(action, name) is None and labels.get(name)
    }
    is_named = (isinstance(action, RestartPoolAction) and (action.model or action.pool)) or (
        isinstance(action, RollBackSplitAction) and (action.model or action.split)
    )
    if is_named:
        missing = {}
    try:
        found = type(action).model_validate({**action.model_dump(), **missing})
    except ValidationError as error:
        place = error.errors(include_url=False)[0]["loc"]
        raise ActionRefused(f"the label {'.'.join(map(str, place))} of the firing is not a valid name") from None
    _require_target(found)
    return found


def target_of(action: ActionFields) -> str:
    """Return what an action acts on, as a text such as `model smollm2:135m`."""
    match action:
        case ShedLoadAction():
            return "load"
        case CleanUpMemoryAction(host=host):
            return f"host {host}" if host else "all hosts"
        case EvictIdleAction(model=model, host=host):
            return " on ".join(filter(None, (f"model {model}" if model else "", f"host {host}" if host else ""))) or (
                "all idle pools"
            )
        case RestartPoolAction(pool=str() as pool):
            return f"pool {pool}"
        case RollBackSplitAction(split=str() as split):
            return f"split {split}"
    for name in _FROM_LABELS:
        value = getattr(action, name, None)
        if value:
            return f"{name} {value}"
    return action.kind.value


def _require_target(action: ActionFields) -> None:
    needed: dict[str, Any] = {
        name: getattr(action, name)
        for name in _FROM_LABELS
        if name in type(action).model_fields and action.kind not in (ActionKind.CLEAN_UP_MEMORY, ActionKind.EVICT_IDLE)
    }
    if isinstance(action, RollBackSplitAction):
        needed["split"] = action.split
    if needed and not any(needed.values()):
        names = " or ".join(needed)
        raise ActionRefused(f"neither the action nor the labels of the firing name a {names}")
