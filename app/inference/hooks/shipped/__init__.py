"""
The hooks that are part of Arriero, by kind.

They are pure, run in the process of the pool, and look at the clock that they are given between two windows of text.
All patterns run on RE2, in time that grows with the length of the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pydantic import BaseModel, ValidationError

from app.inference.hooks.exchange import HookAnswer, HookText
from app.inference.hooks.shipped import injection, language, pii, secret_formats, words
from app.inference.hooks.shipped.scanning import Clock
from app.kernel.errors import InvalidSettings, Problem
from app.kernel.sections.hooks import HookDefinition, HookPoint


class Shipped(Protocol):
    """A shipped hook: a module."""

    Options: type[BaseModel]

    def call(self, point: HookPoint, texts: list[HookText], options: Any, state: Any, clock: Clock) -> HookAnswer:
        """Answer. Raises HookLate."""


SHIPPED: Mapping[str, Any] = {
    "pii": pii,
    "secrets": secret_formats,
    "words": words,
    "language": language,
    "injection": injection,
}


def options_of(hook: HookDefinition) -> BaseModel:
    """Return the options of a shipped hook. Raises ValueError with each problem."""
    module: Shipped = SHIPPED[hook.kind]
    try:
        return module.Options.model_validate(dict(hook.options))
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False)[:5]
        problems = "; ".join(f"options.{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in wrong)
        accepted = ", ".join(module.Options.model_fields)
        raise ValueError(f"hook {hook.name}: {problems} (options: {accepted})") from None


def require_options(hooks: Sequence[HookDefinition]) -> None:
    """Raises InvalidSettings for options of shipped hooks that do not exist or have a wrong value."""
    problems: list[Problem] = []
    for index, hook in enumerate(hooks):
        if hook.is_shipped:
            try:
                options_of(hook)
            except ValueError as error:
                problems.append(Problem(f"hooks[{index}]", str(error)))
    if problems:
        raise InvalidSettings(problems)


def call(hook: HookDefinition, point: HookPoint, texts: list[HookText], state: Any, clock: Clock) -> HookAnswer:
    """Call a shipped hook. Raises HookLate, ValueError for its options."""
    module: Shipped = SHIPPED[hook.kind]
    return module.call(point, texts, options_of(hook), state, clock)
