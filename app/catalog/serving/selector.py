"""
Selectors: what a request needs of a model, in the place of the name of one: `auto:chat?prefer=speed&context=16k`.

A selector is `auto:` with a use case, and conditions after `?`. Unknown conditions and values are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from app.catalog.model import Model
from app.catalog.serving.selection_options import SELECTOR_PREFIX
from app.kernel.errors import InvalidInput, Problem

#: Most characters of a selector.
_LONGEST = 200
_MAX_CONTEXT = 16_777_216
_USE_CASE = re.compile(r"[a-z][a-z0-9-]{0,31}")
_TOKENS = re.compile(r"(\d{1,9})(k?)", re.IGNORECASE)
_NUMBER = re.compile(r"\d{1,9}(\.\d{1,9})?")
#: The accepted form, for error messages.
ACCEPTED = (
    "auto:USE_CASE, with any of prefer, context, max_cost and remote, such as 'auto:chat?prefer=speed&context=16k'"
)


class Preference(StrEnum):
    """What the choice among suitable models weighs most."""

    BALANCED = "balanced"
    SPEED = "speed"
    QUALITY = "quality"
    #: A model that answers at once.
    RESIDENT = "resident"


class RemoteUse(StrEnum):
    """Whether models of servers may be chosen."""

    NO = "no"
    YES = "yes"
    ONLY = "only"


@dataclass(frozen=True, slots=True)
class Selector:
    """What a request needs of a model."""

    use_case: str
    prefer: Preference = Preference.BALANCED
    #: Tokens that prompt and answer need together.
    context: int = 0
    #: The highest price of a million tokens, read or written; None: any.
    max_cost: float | None = None
    remote: RemoteUse = RemoteUse.NO

    def suitable(self, model: Model, context: int = 0) -> str | None:
        """Return why the model does not suit, or None when it does. `context` are further needed tokens."""
        needed = max(self.context, context)
        if self.use_case not in model.use_cases:
            return f"its use cases are {', '.join(model.use_cases)}"
        if model.context < needed:
            return f"its context has {model.context} tokens, {needed} are needed"
        if model.remote is None:
            return "it has a file, and the selector says remote=only" if self.remote is RemoteUse.ONLY else None
        if self.remote is RemoteUse.NO:
            return "a server serves it, and the selector does not say remote=yes"
        price = max(model.remote.cost_in, model.remote.cost_out)
        if self.max_cost is not None and price > self.max_cost:
            return f"a million tokens cost {price:g}, the selector says at most {self.max_cost:g}"
        return None


def is_selector(text: str) -> bool:
    """Whether a text in the place of a model's name is a selector."""
    return text.startswith(SELECTOR_PREFIX)


def parse(text: str, where: str = "model") -> Selector:
    """Return the selector of a text. Raises InvalidInput with every problem; `where` names the field."""
    use_case, mark, conditions = text[:_LONGEST].removeprefix(SELECTOR_PREFIX).partition("?")
    problems = []
    if (
        len(text) > _LONGEST
        or not is_selector(text)
        or not _USE_CASE.fullmatch(use_case)
        or bool(mark) > bool(conditions)
    ):
        problems.append(f"{text[:60]!r} is not a selector")
    found: dict[str, str] = {}
    for condition in conditions.split("&") if conditions and not problems else ():
        name, _, value = condition.partition("=")
        if name in found:
            problems.append(f"{name!r} is given twice")
        found[name] = value
    problems += [] if problems else _wrong(found)
    if problems:
        raise InvalidInput([Problem(where, problem, ACCEPTED) for problem in problems], "request")
    return Selector(
        use_case,
        Preference(found.get("prefer", Preference.BALANCED)),
        _tokens(found.get("context", "0")) or 0,
        float(found["max_cost"]) if "max_cost" in found else None,
        RemoteUse(found.get("remote", RemoteUse.NO)),
    )


def require_possible(selector: Selector, models: Iterable[Model], where: str = "model", context: int = 0) -> None:
    """Raises InvalidInput when no model of the catalogue suits, whatever its state, with the reason of each."""
    models = tuple(models)
    reasons = {model.name: selector.suitable(model, context) for model in models}
    if all(reasons.values()):
        near = [f"{name}: {why}" for name, why in reasons.items() if selector.use_case in _use_cases(models, name)]
        known = ", ".join(sorted({use for model in models for use in model.use_cases}))
        why = "; ".join(near) if near else f"no model has the use case {selector.use_case!r}; there are: {known}"
        raise InvalidInput([Problem(where, f"no model suits: {why}", ACCEPTED)], "request")


def _use_cases(models: Iterable[Model], name: str) -> tuple[str, ...]:
    return next(model.use_cases for model in models if model.name == name)


def _wrong(found: dict[str, str]) -> Iterator[str]:
    for name, value in found.items():
        match name:
            case "prefer" if value not in tuple(Preference):
                yield f"prefer is {value[:40]!r}; there are {', '.join(Preference)}"
            case "remote" if value not in tuple(RemoteUse):
                yield f"remote is {value[:40]!r}; there are {', '.join(RemoteUse)}"
            case "context" if not 0 < (_tokens(value) or 0) <= _MAX_CONTEXT:
                yield f"context is {value[:40]!r}; it is a number of tokens, such as 16k or 16384"
            case "max_cost" if not _NUMBER.fullmatch(value):
                yield f"max_cost is {value[:40]!r}; it is a price of a million tokens, such as 2.5"
            case "prefer" | "remote" | "context" | "max_cost":
                continue
            case _:
                yield f"there is no condition {name[:40]!r}"


def _tokens(text: str) -> int | None:
    found = _TOKENS.fullmatch(text)
    return None if found is None else int(found[1]) * (1024 if found[2] else 1)
