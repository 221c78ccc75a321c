"""
The definition of a workflow: its inputs, its steps, and the acyclic graph of what needs what.

The shape is held here; whether the parts fit each other is seen in `app.workflows.language.check`.
A definition never changes: runs keep the one that they started with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence, Set
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from app.kernel.units.durations import Duration
from app.workflows.language import ancestry
from app.workflows.language.steps import (
    MODEL_KINDS,
    NAME,
    AnyStep,
    DiscriminatedStep,
    DocumentPart,
    EmbedFields,
    Expression,
    GenerateFields,
    Span,
    Template,
    body_of,
)

#: Names of labels.
LABEL = r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,62}$"
#: The value of a label: at most so many characters.
LabelValue = Annotated[str, Field(max_length=500)]
PriorityName = Literal["interactive", "standard", "batch"]


class Rank(DocumentPart):
    """A class of priority, and the place within it."""

    class_: PriorityName = Field(alias="class")
    #: 0 goes before 1, 1 before 2.
    rank: int = Field(default=1, ge=0, le=2)


#: A class, or a class with the place within it.
AnyPriority = Annotated[
    Annotated[PriorityName, Tag("priority_class")] | Annotated[Rank, Tag("priority_rank")],
    Discriminator(lambda value: "priority_rank" if isinstance(value, dict | Rank) else "priority_class"),
]


class Concurrency(DocumentPart):
    """How many runs with the same key go on at a time."""

    #: A template over the inputs; without it all runs of the workflow count together.
    key: Template = "all"
    limit: int = Field(default=1, ge=1, le=10_000)
    #: What happens to a run that is one too many: it waits, it ends the oldest that go on, or it is refused.
    policy: Literal["queue", "cancel_running", "reject"] = "queue"


class Deduplicate(DocumentPart):
    """Submissions with the same key within a window give the same run. Calls by workflows and forks do not count."""

    #: A template over the inputs.
    key: Template
    window: Span


class Defaults(DocumentPart):
    """What steps take when they do not say it themselves."""

    model: str | None = Field(default=None, min_length=1)


class Output(DocumentPart):
    """A part of a run's output."""

    value: Expression
    #: A JSON Schema that it must conform to; the run fails where it does not.
    schema_: Mapping[str, Any] = Field(default={}, alias="schema")


#: An expression, or one with the schema of what it gives.
AnyOutput = Annotated[
    Annotated[Expression, Tag("output_expression")] | Annotated[Output, Tag("output_part")],
    Discriminator(lambda value: "output_part" if isinstance(value, dict | Output) else "output_expression"),
]


class Definition(DocumentPart):
    """A workflow."""

    workflow: str = Field(pattern=NAME, max_length=100, description="lower-case words joined by hyphens")
    description: str = ""
    #: Name to JSON Schema. An input with a `default` may be left out by the client.
    inputs: Mapping[str, Mapping[str, Any]] = {}
    defaults: Defaults = Defaults()
    priority: AnyPriority = "standard"
    labels: Mapping[Annotated[str, Field(pattern=LABEL)], LabelValue] = Field(default={}, max_length=32)
    #: For the whole run, from its submission.
    deadline: Span | None = None
    concurrency: Concurrency | None = None
    deduplicate: Deduplicate | None = None
    #: How long a finished run is kept; the setting runs.retention without it.
    retention: Duration | None = None
    steps: tuple[DiscriminatedStep, ...] = Field(min_length=1, max_length=10_000)
    #: Steps that run when the run has failed or was cancelled.
    on_failure: tuple[DiscriminatedStep, ...] = Field(default=(), max_length=1_000)
    #: Name to an expression, or to `value` and `schema`: the output of the run. Without it, the outputs of the steps
    #: that no other needs.
    outputs: Mapping[str, AnyOutput] = {}

    def all_steps(self) -> tuple[AnyStep, ...]:
        """The steps, those for failures last."""
        return (*self.steps, *self.on_failure)

    def step(self, key: str) -> AnyStep:
        """The step of that id, which must exist."""
        return next(step for step in self.all_steps() if step.id == key)

    def models_of(self, work: GenerateFields | EmbedFields) -> tuple[str, ...]:
        """The models that a step asks, one after another. `check` has seen that there is one."""
        model = work.model or self.defaults.model
        assert model is not None
        return (model, *(work.fallback.models if work.fallback else ()))

    def models(self) -> tuple[str, ...]:
        """Every model that a run of this may need, once each."""
        asked = (body_of(step) for step in self.all_steps())
        named = (self.models_of(work) for work in asked if isinstance(work, MODEL_KINDS))
        return tuple(dict.fromkeys(model for models in named for model in models))

    def parts(self) -> dict[str, Output]:
        """The parts of the run's output."""
        return {name: Output(value=part) if isinstance(part, str) else part for name, part in self.outputs.items()}

    def rank(self) -> tuple[PriorityName, int]:
        """The class of priority, and the place within it."""
        return (self.priority.class_, self.priority.rank) if isinstance(self.priority, Rank) else (self.priority, 1)

    def document(self) -> dict[str, Any]:
        """The definition as plain data, as it is stored and shown: what was not written is not there."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)

    def sha256(self) -> str:
        """Equal for definitions that mean the same; in a schema the order of keys means something too."""
        canonical = json.dumps(self.document(), ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def stored(document: Mapping[str, Any]) -> Definition:
    """A definition that was checked before it was stored."""
    return Definition.model_validate(document)


def needed(step: AnyStep) -> tuple[tuple[str, str | None], ...]:
    """What a step needs: the id of each step, and the branch of it if that matters."""
    parts = (need.partition(".") for need in step.needs)
    return tuple((key, branch or None) for key, _, branch in parts)


def ancestors(definition: Definition) -> Mapping[str, Set[str]]:
    """
    For each step, those that may have ended when it begins.

    All of them have, unless an `any` lies between. Steps of a circle are left out.
    """
    needs = {step.id: tuple(key for key, _ in needed(step)) for step in definition.all_steps()}
    late, regular = ([step.id for step in part] for part in (definition.on_failure, definition.steps))
    return ancestry.ancestors(in_order(needs), needs, late, regular)


def in_order(needs: Mapping[str, Sequence[str]]) -> list[str]:
    """The steps, each after those that it needs (Kahn 1962); steps of a circle are left out."""
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
