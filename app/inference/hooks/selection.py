"""
The selection of hooks: which apply to a request, and in which order.

At `pre_prompt` they are called in their order, at `post_result` in the reverse one: what masks last restores first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from app.kernel.sections.hooks import HookDefinition, HookPoint
from app.kernel.security import regex


@dataclass(frozen=True, slots=True)
class HookTarget:
    """What a request belongs to."""

    model: str
    workflow: str
    namespace: str


def selected(hooks: Iterable[HookDefinition], target: HookTarget) -> tuple[HookDefinition, ...]:
    """Return the hooks for a request, in the order of `pre_prompt`; equal orders as they are written."""
    of = [
        hook
        for hook in hooks
        if _matches(hook.models, target.model)
        and _matches(hook.workflows, target.workflow)
        and _matches(hook.namespaces, target.namespace)
    ]
    return tuple(sorted(of, key=lambda hook: hook.order))


def at(hooks: Sequence[HookDefinition], point: HookPoint) -> list[HookDefinition]:
    """Return the hooks that are called at a point, in their order there."""
    found = [hook for hook in hooks if hook.is_at(point)]
    return found if point is HookPoint.PRE_PROMPT else found[::-1]


def _matches(patterns: Sequence[str], name: str) -> bool:
    return any(pattern == "*" or _pattern(pattern).found_in(name) for pattern in patterns)


@lru_cache(maxsize=512)
def _pattern(glob: str) -> regex.Pattern:
    parts = ("[^\\x00]*" if one == "*" else f"\\x{{{ord(one):x}}}" for one in glob)
    # Each character by its code: nothing of a name is an operator.
    return regex.compiled(f"^(?:{''.join(parts)})$")
