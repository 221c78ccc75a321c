"""
The graph of a definition: the derived data that all runs of the definition share, computed once.

It holds the rule of each step, and which inputs and outputs its templates and expressions read. A worker receives only
the data that its step reads, so that an item of a map does not carry the whole list.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import cached_property

from app.kernel.errors import FailureReason
from app.workflows.language import definition as definitions
from app.workflows.language.agent import TURN, AgentFields
from app.workflows.language.definition import Definition
from app.workflows.language.rule import StepRule
from app.workflows.language.step_work import Fallback, Retry
from app.workflows.language.steps import (
    FANNED_KINDS,
    MODEL_KINDS,
    AgentStep,
    AnyStep,
    JoinStep,
    MapBody,
    MapStep,
    SwitchStep,
    work_of,
)

_STEP_REFERENCE = re.compile(r"\bsteps\b(?:\s*\.\s*([a-z]\w*)|\s*\[\s*[\"']([a-z]\w*)[\"']\s*\])?")
#: Matches the code in a template; names in the text around it do not count.
_CODE = re.compile(r"\{\{.*?\}\}|\{%.*?%\}", re.DOTALL)
#: Matches JMESPath that may read the whole document.
_WHOLE_DOCUMENT = re.compile(r"[@*]")


@dataclass(frozen=True, slots=True)
class Reads:
    """The data of a run that a template or expression may read: the inputs, and the outputs of these steps."""

    inputs: bool
    steps: Set[str]


@dataclass(frozen=True)
class Graph:
    """A definition with the data derived from it."""

    definition: Definition

    @cached_property
    def steps(self) -> Mapping[str, AnyStep]:
        """All steps by id."""
        return {step.id: step for step in self.definition.all_steps()}

    @cached_property
    def ancestors(self) -> Mapping[str, Set[str]]:
        """The ancestors of each step: the steps that may have ended when it starts."""
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

    def item_rule(self, key: str, kind: str) -> StepRule:
        """Return the rule of an item of that kind, of a map or of an agent."""
        step = self.steps[key]
        if not isinstance(step, AgentStep):
            return self.item_rules[key]
        if kind != TURN:
            return StepRule(retry=step.tool_retry)
        return StepRule(retry=step.retry, models=len(self._models(step)), fallback=step.fallback)

    @cached_property
    def decision_reads(self) -> Mapping[str, Reads]:
        """The data that the condition or the cases of each step read."""
        return {
            key: _reads_of([*([step.when] if step.when else []), *_cases(step)], self.ancestors[key])
            for key, step in self.steps.items()
        }

    @cached_property
    def work_reads(self) -> Mapping[str, Reads]:
        """The data that the work of each step reads; for a map, the data that its `over` reads."""
        found = {}
        for key, step in self.steps.items():
            reads = _reads_of(_expressions_of(step), self.ancestors[key])
            if isinstance(step, JoinStep) and step.template is None:
                reads = Reads(reads.inputs, frozenset(key for key, _ in definitions.needs_of(step)))
            found[key] = reads
        return found

    @cached_property
    def item_reads(self) -> Mapping[str, Reads]:
        """The data that the items of each map, and the calls of each agent, read."""
        maps = {
            key: _reads_of(_expressions_of(step.step), self.ancestors[key])
            for key, step in self.steps.items()
            if isinstance(step, MapStep)
        }
        agents = {
            key: _reads_of([code for _, text in step.tool_templates() for code in _CODE.findall(text)], before)
            for key, step in self.steps.items()
            if isinstance(step, AgentStep) and (before := self.ancestors[key]) is not None
        }
        return maps | agents

    @cached_property
    def output_reads(self) -> Reads:
        """The data that the run's output reads."""
        if self.definition.outputs:
            expressions = (part.value for part in self.definition.output_parts().values())
            return _reads_of(expressions, frozenset(step.id for step in self.definition.steps))
        needed = {key for step in self.definition.steps for key, _ in definitions.needs_of(step)}
        return Reads(inputs=False, steps=frozenset(step.id for step in self.definition.steps) - needed)

    @cached_property
    def read_outputs(self) -> Set[str]:
        """The steps whose outputs some expression or template, or the run's output, reads."""
        parts = (self.decision_reads, self.work_reads, self.item_reads)
        found = {key for part in parts for reads in part.values() for key in reads.steps}
        return found | set(self.output_reads.steps)

    def models(self, key: str) -> tuple[str, ...]:
        """Return the models of a step in the order in which they are tried; empty for a step that uses no model."""
        return self._models(work_of(self.steps[key]))

    def _models(self, work: AnyStep | MapBody) -> tuple[str, ...]:
        return self.definition.models_of(work) if isinstance(work, MODEL_KINDS) else ()

    def _rule(self, step: AnyStep, *, on_failure: bool) -> StepRule:
        return StepRule(
            needs=definitions.needs_of(step),
            join=step.join,
            decided=step.when is not None or isinstance(step, SwitchStep),
            retry=_own_retry(step) if isinstance(step, AgentStep) else step.retry,
            models=1 if isinstance(step, FANNED_KINDS) else len(self._models(step)),
            fallback=None if isinstance(step, AgentFields) else _fallback(step),
            allow_failure=step.allow_failure,
            on_failure=on_failure,
        )


def _reads_of(texts: Iterable[str], known: Set[str]) -> Reads:
    """Return the data that texts may read. It overestimates: a word that looks like a reference counts as one."""
    steps: set[str] = set()
    inputs = False
    for text in texts:
        inputs = inputs or "inputs" in text
        for match in _STEP_REFERENCE.finditer(text):
            name = match[1] or match[2]
            if name is None:
                return Reads(True, known)
            steps.add(name)
    return Reads(inputs, frozenset(steps) & known)


def _expressions_of(work: AnyStep | MapBody) -> Iterator[str]:
    for _, template in work.templates():
        yield from _CODE.findall(template)
    for where, expression, _ in work.expressions():
        yield "steps, inputs" if where == "jmespath" and _WHOLE_DOCUMENT.search(expression) else expression


def _own_retry(step: AgentStep) -> Retry:
    """The retry rule of an agent itself: a turn that has failed for good was tried often enough."""
    retry, failed = step.retry, FailureReason.CHILD_FAILED
    if retry.on is not None:
        return retry.model_copy(update={"on": tuple(reason for reason in retry.on if reason is not failed)})
    return retry.model_copy(update={"non_retryable": (*retry.non_retryable, failed)})


def _cases(step: AnyStep) -> list[str]:
    return list(step.cases.values()) if isinstance(step, SwitchStep) else []


def _fallback(work: AnyStep | MapBody) -> Fallback | None:
    return work.fallback if isinstance(work, MODEL_KINDS) else None
