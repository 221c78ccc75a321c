"""
The graph of a definition: what follows from it for every run, worked out once.

For each step its rule, and what its templates and expressions read: a worker is given that and nothing else, so that an
item of a map does not carry the whole list.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import cached_property

from app.workflows.language import definition as definitions
from app.workflows.language.definition import Definition
from app.workflows.language.rule import StepRule
from app.workflows.language.steps import MODEL_KINDS, AnyStep, Fallback, JoinStep, MapBody, MapStep, SwitchStep, body_of

_NAMED = re.compile(r"\bsteps\b(?:\s*\.\s*([a-z]\w*)|\s*\[\s*[\"']([a-z]\w*)[\"']\s*\])?")
#: The code in a template; the prose around it names nothing.
_CODE = re.compile(r"\{\{.*?\}\}|\{%.*?%\}", re.DOTALL)
#: In JMESPath: everything that is there.
_WHOLE = re.compile(r"[@*]")


@dataclass(frozen=True, slots=True)
class Reads:
    """What of a run a text may name."""

    inputs: bool
    steps: Set[str]


@dataclass(frozen=True)
class Graph:
    """A definition, and what follows from it."""

    definition: Definition

    @cached_property
    def steps(self) -> Mapping[str, AnyStep]:
        """Every step by id."""
        return {step.id: step for step in self.definition.all_steps()}

    @cached_property
    def before(self) -> Mapping[str, Set[str]]:
        """For each step, those that may have ended when it begins."""
        return definitions.ancestors(self.definition)

    @cached_property
    def rules(self) -> Mapping[str, StepRule]:
        """The rule of each step."""
        late = {step.id for step in self.definition.on_failure}
        return {key: self._rule(step, on_failure=key in late) for key, step in self.steps.items()}

    @cached_property
    def item_rules(self) -> Mapping[str, StepRule]:
        """The rule of each item of a map, by the map's id."""
        return {
            key: StepRule(retry=step.step.retry, models=len(self._models(step.step)), fallback=_fallback(step.step))
            for key, step in self.steps.items()
            if isinstance(step, MapStep)
        }

    @cached_property
    def decision_reads(self) -> Mapping[str, Reads]:
        """What the condition or the cases of each step read."""
        return {
            key: _read([*([step.when] if step.when else []), *_cases(step)], self.before[key])
            for key, step in self.steps.items()
        }

    @cached_property
    def work_reads(self) -> Mapping[str, Reads]:
        """What the work of each step reads; for a map, what finds its items."""
        found = {}
        for key, step in self.steps.items():
            reads = _read(_code(step), self.before[key])
            if isinstance(step, JoinStep) and step.template is None:
                reads = Reads(reads.inputs, frozenset(key for key, _ in definitions.needed(step)))
            found[key] = reads
        return found

    @cached_property
    def item_reads(self) -> Mapping[str, Reads]:
        """What the items of each map read."""
        return {
            key: _read(_code(step.step), self.before[key])
            for key, step in self.steps.items()
            if isinstance(step, MapStep)
        }

    @cached_property
    def output_reads(self) -> Reads:
        """What the run's output reads."""
        if self.definition.outputs:
            expressions = (part.value for part in self.definition.parts().values())
            return _read(expressions, frozenset(step.id for step in self.definition.steps))
        needed = {key for step in self.definition.steps for key, _ in definitions.needed(step)}
        return Reads(inputs=False, steps=frozenset(step.id for step in self.definition.steps) - needed)

    def models(self, key: str) -> tuple[str, ...]:
        """The models that the work of a step asks, one after another; none for one that asks no model."""
        return self._models(body_of(self.steps[key]))

    def _models(self, work: AnyStep | MapBody) -> tuple[str, ...]:
        return self.definition.models_of(work) if isinstance(work, MODEL_KINDS) else ()

    def _rule(self, step: AnyStep, *, on_failure: bool) -> StepRule:
        return StepRule(
            needs=definitions.needed(step),
            join=step.join,
            decided=step.when is not None or isinstance(step, SwitchStep),
            retry=step.retry,
            models=1 if isinstance(step, MapStep) else len(self._models(step)),
            fallback=_fallback(step),
            allow_failure=step.allow_failure,
            on_failure=on_failure,
        )


def _read(texts: Iterable[str], known: Set[str]) -> Reads:
    """Too much rather than too little: a word of prose that looks like a name counts as one."""
    steps: set[str] = set()
    inputs = False
    for text in texts:
        inputs = inputs or "inputs" in text
        for match in _NAMED.finditer(text):
            name = match[1] or match[2]
            if name is None:
                return Reads(True, known)
            steps.add(name)
    return Reads(inputs, frozenset(steps) & known)


def _code(work: AnyStep | MapBody) -> Iterator[str]:
    for _, template in work.templates():
        yield from _CODE.findall(template)
    for where, expression, _ in work.expressions():
        yield "steps, inputs" if where == "jmespath" and _WHOLE.search(expression) else expression


def _cases(step: AnyStep) -> list[str]:
    return list(step.cases.values()) if isinstance(step, SwitchStep) else []


def _fallback(work: AnyStep | MapBody) -> Fallback | None:
    return work.fallback if isinstance(work, MODEL_KINDS) else None
