"""
The definition of a workflow: its inputs, its steps and their acyclic dependency graph.

The types here validate the shape of the document; `app.workflows.language.check` checks how its parts fit together.
A definition is immutable: a run keeps the definition that it started with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, StrictBool, Tag

from app.kernel.units.durations import Duration
from app.workflows.language import ancestry
from app.workflows.language.step_work import NAME, DocumentPart, Expression, PositiveDuration, Template
from app.workflows.language.steps import DRAFT_KINDS, MODEL_KINDS, AnyStep, DiscriminatedStep, ModelWork, work_of

#: The pattern of label names.
LABEL = r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,62}$"
#: How the labels begin that say how a run was assigned; nobody else sets them.
ASSIGNED_LABELS = "split."
#: The value of a label.
LabelValue = Annotated[str, Field(max_length=500)]
PriorityName = Literal["interactive", "standard", "batch"]


class Rank(DocumentPart):
    """A priority class with a rank within it."""

    class_: PriorityName = Field(alias="class")
    #: A lower rank runs first.
    rank: int = Field(default=1, ge=0, le=2)


#: A priority class, or a class with a rank.
AnyPriority = Annotated[
    Annotated[PriorityName, Tag("priority_class")] | Annotated[Rank, Tag("priority_rank")],
    Discriminator(lambda value: "priority_rank" if isinstance(value, dict | Rank) else "priority_class"),
]


class Concurrency(DocumentPart):
    """Limits how many runs with the same key are active at a time."""

    #: A template over the inputs. By default all runs of the workflow share one key.
    key: Template = "all"
    limit: int = Field(default=1, ge=1, le=10_000)
    #: What happens to a run beyond the limit: it waits, it cancels the oldest active runs, or it is rejected.
    policy: Literal["queue", "cancel_running", "reject"] = "queue"


class Deduplicate(DocumentPart):
    """Submissions with the same key within a window return the same run. Calls by workflows and forks are exempt."""

    #: A template over the inputs.
    key: Template
    window: PositiveDuration


class Defaults(DocumentPart):
    """Default values for the fields of steps."""

    model: str | None = Field(default=None, min_length=1)


class Output(DocumentPart):
    """One named part of a run's output."""

    value: Expression
    #: A JSON Schema for the value. The run fails when the value does not conform.
    schema_: Mapping[str, Any] = Field(default={}, alias="schema")


#: An expression, or an expression with the schema of its value.
AnyOutput = Annotated[
    Annotated[Expression, Tag("output_expression")] | Annotated[Output, Tag("output_part")],
    Discriminator(lambda value: "output_part" if isinstance(value, dict | Output) else "output_expression"),
]


class Definition(DocumentPart):
    """A workflow."""

    workflow: str = Field(pattern=NAME, max_length=100, description="lower-case words joined by hyphens")
    description: str = ""
    #: Clients of the MCP server see it as a tool of its own, with these inputs and this description.
    tool: StrictBool = False
    #: Name to JSON Schema. An input with a `default` may be left out by the client.
    inputs: Mapping[str, Mapping[str, Any]] = {}
    defaults: Defaults = Defaults()
    priority: AnyPriority = "standard"
    labels: Mapping[Annotated[str, Field(pattern=LABEL)], LabelValue] = Field(default={}, max_length=32)
    #: The time limit for the whole run, from its submission.
    deadline: PositiveDuration | None = None
    concurrency: Concurrency | None = None
    deduplicate: Deduplicate | None = None
    #: How long a finished run is kept. The default is the setting runs.retention.
    retention: Duration | None = None
    steps: tuple[DiscriminatedStep, ...] = Field(min_length=1, max_length=10_000)
    #: Steps that run after the run has failed or was cancelled.
    on_failure: tuple[DiscriminatedStep, ...] = Field(default=(), max_length=1_000)
    #: Name to an expression, or to `value` and `schema`: the output of the run. By default, the outputs of the steps
    #: that no other step needs.
    outputs: Mapping[str, AnyOutput] = {}

    def all_steps(self) -> tuple[AnyStep, ...]:
        """Return all steps; those of `on_failure` are last."""
        return (*self.steps, *self.on_failure)

    def step(self, key: str) -> AnyStep:
        """Return the step with that id, which must exist."""
        return next(step for step in self.all_steps() if step.id == key)

    def models_of(self, work: ModelWork) -> tuple[str, ...]:
        """Return the models of a step in the order in which they are tried. `check` has ensured at least one."""
        model = work.model or self.defaults.model
        assert model is not None
        return (model, *(work.fallback.models if work.fallback else ()))

    def models(self) -> tuple[str, ...]:
        """Return the names of all models that a run may need, without duplicates."""
        found: dict[str, None] = {}
        for work in map(work_of, self.all_steps()):
            if isinstance(work, MODEL_KINDS):
                found |= dict.fromkeys(self.models_of(work))
            elif isinstance(work, DRAFT_KINDS):
                for _, draft in work.drafts():
                    found |= dict.fromkeys(self.models_of(draft))
                found |= dict.fromkeys(model for _, model in work.models())
        return tuple(found)

    def output_parts(self) -> dict[str, Output]:
        """Return the named parts of the run's output."""
        return {name: Output(value=part) if isinstance(part, str) else part for name, part in self.outputs.items()}

    def rank(self) -> tuple[PriorityName, int]:
        """Return the priority class, and the rank within it."""
        return (self.priority.class_, self.priority.rank) if isinstance(self.priority, Rank) else (self.priority, 1)

    def document(self) -> dict[str, Any]:
        """Return the definition as plain data, as it is stored and shown: without the fields that were not set."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)

    def sha256(self) -> str:
        """
        Return the hash of the document; definitions with the same meaning have the same hash.

        The order of keys counts, because it has a meaning in schemas.
        """
        canonical = json.dumps(self.document(), ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def from_document(document: Mapping[str, Any]) -> Definition:
    """Return the definition of a stored document, which was checked before it was stored."""
    return Definition.model_validate(document)


def needs_of(step: AnyStep) -> tuple[tuple[str, str | None], ...]:
    """Return the needs of a step: the id of each needed step, and the required branch or None."""
    parts = (need.partition(".") for need in step.needs)
    return tuple((key, branch or None) for key, _, branch in parts)


def ancestors(definition: Definition) -> Mapping[str, Set[str]]:
    """
    Return for each step its ancestors: the steps that may have ended when it starts.

    All ancestors have ended, except across a join `any`. Steps of a cycle are left out.
    """
    needs = {step.id: tuple(key for key, _ in needs_of(step)) for step in definition.all_steps()}
    late, regular = ([step.id for step in part] for part in (definition.on_failure, definition.steps))
    return ancestry.ancestors(topological_order(needs), needs, late, regular)


def topological_order(needs: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the steps in a topological order (Kahn 1962); steps of a cycle, and steps behind one, are left out."""
    missing = {key: len(set(of)) for key, of in needs.items()}
    followers: dict[str, list[str]] = {key: [] for key in needs}
    for key, of in needs.items():
        for need in set(of):
            followers[need].append(key)
    ordered = [key for key, count in missing.items() if count == 0]
    for key in ordered:
        for follower in followers[key]:
            missing[follower] -= 1
            if missing[follower] == 0:
                ordered.append(follower)
    return ordered


@dataclass(frozen=True, slots=True)
class RoutedDefinition:
    """A definition whose steps name models of the catalogue."""

    definition: Definition
    #: By step whose models were chosen, what was asked for, the models in order, and why.
    chosen: Mapping[str, Any] = field(default_factory=dict)


#: Chooses the models of a definition for a new run.
RouteModels = Callable[[Definition], RoutedDefinition]
