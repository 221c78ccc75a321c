"""
The definition of a workflow: its inputs, its steps, and the acyclic graph of what needs what.

The shape is held here; whether the parts fit each other is seen in `app.workflows.check`.
A definition never changes: runs keep the one that they started with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from app.kernel.durations import Duration
from app.kernel.errors import FailureReason

#: Ids are names in templates (`steps.draft.output`), so they are written like names.
_ID = r"^[a-z][a-z0-9_]{0,62}$"
#: Names of workflows, as they stand in URLs.
_NAME = r"^[a-z][a-z0-9]*(-[a-z0-9]+)*$"

Priority = Literal["interactive", "standard", "batch"]


class Part(BaseModel):
    """A mapping of the document. Fields that it does not know are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Retry(Part):
    """What follows a failed attempt."""

    #: Attempts that may fail before the step does. A worker's death is counted elsewhere.
    max_attempts: int = Field(default=3, ge=1, le=100)
    #: The first delay; each further one is `factor` times the last, up to `cap`.
    delay: Duration = Field(default="1s", validate_default=True)
    factor: float = Field(default=2.0, ge=1, le=100)
    cap: Duration = Field(default="1m", validate_default=True)
    #: Reasons after which no other attempt is made.
    never_on: tuple[FailureReason, ...] = (
        FailureReason.TEMPLATE_ERROR,
        FailureReason.CONTEXT_EXCEEDED,
        FailureReason.INVALID_REQUEST,
    )


class SamplingFields(Part):
    """How the next token is chosen; what is not given is left to the model's defaults."""

    temperature: float | None = Field(default=None, ge=0, le=5)
    top_k: int | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    typical_p: float | None = Field(default=None, gt=0, le=1)
    repeat_penalty: float | None = Field(default=None, gt=0, le=5)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    seed: int | None = Field(default=None, ge=0, lt=2**32)


class MessageTemplate(Part):
    """One message to the model; the content is a template."""

    role: Literal["system", "user", "assistant"]
    content: str = Field(min_length=1)


class OutputFields(Part):
    """What the text of the model must be."""

    #: A JSON Schema. A grammar forces the text into it, and the result is checked against it again.
    schema_: Mapping[str, Any] = Field(alias="schema")


class StepPart(Part):
    """What every kind of step has."""

    id: str = Field(pattern=_ID, description="lower-case letters, digits and underscores, a letter first")
    needs: tuple[str, ...] = ()
    retry: Retry = Retry()
    #: For one attempt, from its claim.
    timeout: Duration = Field(default="10m", validate_default=True)


class GenerateStep(StepPart):
    """Asks a model. Its output is the text, or the JSON value where a schema is given."""

    kind: Literal["generate"]
    model: str | None = Field(default=None, min_length=1)
    system: str | None = Field(default=None, min_length=1)
    prompt: str | None = Field(default=None, min_length=1)
    messages: tuple[MessageTemplate, ...] = ()
    #: False gives the prompt to the model as it is, without its chat template: for base models, and for completion.
    chat: bool = True
    sampling: SamplingFields = SamplingFields()
    max_tokens: int = Field(default=256, ge=1, le=1_000_000)
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(default=(), max_length=16)
    output: OutputFields | None = None

    @model_validator(mode="after")
    def _asks_once(self) -> GenerateStep:
        if bool(self.messages) == (self.prompt is not None):
            raise ValueError("a generate step has either 'prompt' (with 'system', if wanted) or 'messages'")
        if self.messages and self.system is not None:
            raise ValueError("'system' goes with 'prompt'; among 'messages', write a message of the role system")
        if not self.chat and (self.messages or self.system is not None):
            raise ValueError("without the chat template ('chat: false') there is a 'prompt' and nothing else")
        return self


class JoinStep(StepPart):
    """Waits for the steps that it needs. Its output is their outputs by id, or the text of its template."""

    kind: Literal["join"]
    template: str | None = Field(default=None, min_length=1)


class NoopStep(StepPart):
    """Does nothing, durably. Its output is null."""

    kind: Literal["noop"]


Step = Annotated[GenerateStep | JoinStep | NoopStep, Field(discriminator="kind")]
#: The kinds, as messages list them.
KINDS = ("generate", "join", "noop")


class Defaults(Part):
    """What steps take when they do not say it themselves."""

    model: str | None = Field(default=None, min_length=1)


class Definition(Part):
    """A workflow."""

    workflow: str = Field(pattern=_NAME, max_length=100, description="lower-case words joined by hyphens")
    description: str = ""
    #: Name to JSON Schema. An input with a `default` may be left out by the client.
    inputs: Mapping[str, Mapping[str, Any]] = {}
    defaults: Defaults = Defaults()
    priority: Priority = "standard"
    steps: tuple[Step, ...] = Field(min_length=1, max_length=10_000)

    def step(self, key: str) -> GenerateStep | JoinStep | NoopStep:
        """The step of that id, which must exist."""
        return next(step for step in self.steps if step.id == key)

    def model_of(self, step: GenerateStep) -> str:
        """The model that a step asks. `check` has seen that there is one."""
        model = step.model or self.defaults.model
        assert model is not None
        return model

    def models(self) -> tuple[str, ...]:
        """Every model that a run of this needs, once each."""
        asked = (self.model_of(step) for step in self.steps if isinstance(step, GenerateStep))
        return tuple(dict.fromkeys(asked))

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


def ancestors(definition: Definition) -> dict[str, frozenset[str]]:
    """For each step, every step that is finished when it begins."""
    found: dict[str, frozenset[str]] = {}
    needs = {step.id: step.needs for step in definition.steps}
    for key in in_order(needs):
        found[key] = frozenset(needs[key]).union(*(found[need] for need in needs[key]))
    return found


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
