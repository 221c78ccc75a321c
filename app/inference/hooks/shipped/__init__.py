"""
The hooks that are part of Arriero, by kind.

They are pure, run in the process of the pool, and look at the clock that they are given between two windows of text.
All patterns run on RE2, in time that grows with the length of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from app.inference.hooks.combination import CombineOptions
from app.inference.hooks.exchange import HookAnswer, HookText
from app.inference.hooks.shipped import injection, language, pii, secret_formats, words
from app.inference.hooks.shipped.scanning import TimeLimit
from app.kernel.errors import InvalidSettings, Problem
from app.kernel.sections.hooks import HookDefinition, HookPoint

#: The call of a shipped hook: the point, the texts, its options, its state and its limit.
_Call = Callable[[HookPoint, list[HookText], Any, Any, TimeLimit], HookAnswer]

#: By kind: the type of its options, and its call.
_SHIPPED: Mapping[str, tuple[type[BaseModel], _Call]] = {
    "pii": (pii.PiiOptions, pii.call),
    "secrets": (secret_formats.SecretOptions, secret_formats.call),
    "words": (words.WordOptions, words.call),
    "language": (language.LanguageOptions, language.call),
    "injection": (injection.InjectionOptions, injection.call),
}


def options_of(hook: HookDefinition) -> BaseModel:
    """Return the options of a shipped hook, or of one that combines. Raises ValueError with each problem."""
    options = CombineOptions if hook.kind == "combine" else _SHIPPED[hook.kind][0]
    try:
        return options.model_validate(dict(hook.options))
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False)[:5]
        problems = "; ".join(f"options.{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in wrong)
        accepted = ", ".join(options.model_fields)
        raise ValueError(f"hook {hook.name}: {problems} (options: {accepted})") from None


def require_options(hooks: Sequence[HookDefinition]) -> None:
    """Raises InvalidSettings for options of shipped hooks that do not exist or have a wrong value."""
    problems: list[Problem] = []
    for index, hook in enumerate(hooks):
        if hook.is_shipped or hook.kind == "combine":
            try:
                options_of(hook)
            except ValueError as error:
                problems.append(Problem(f"hooks[{index}]", str(error)))
    if problems:
        raise InvalidSettings(problems)


def call(hook: HookDefinition, point: HookPoint, texts: list[HookText], state: Any, limit: TimeLimit) -> HookAnswer:
    """Call a shipped hook. Raises HookLate, ValueError for its options."""
    _, of_kind = _SHIPPED[hook.kind]
    return of_kind(point, texts, options_of(hook), state, limit)
