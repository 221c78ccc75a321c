"""
The definition of a split: what is divided, the candidates, who gets which, and what ends it.

Nothing here reads a clock or a database.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, StringConstraints, ValidationError

from app.access import namespaces
from app.inference.openai.chat import ChatRequest
from app.inference.openai.generation import place_of
from app.kernel.errors import InvalidInput, Problem
from app.kernel.units.durations import Duration

#: The name of the variant that is what would be used without the split.
CONTROL = "control"
#: Most candidates, stages of a ramp and pins.
MAX_CANDIDATES, MAX_STAGES, MAX_PINS = 4, 16, 100

_NAME = r"^[a-z0-9][a-z0-9_-]{0,39}$"
_NAME_ACCEPTED = "lower-case letters, digits, '_' and '-', at most 40"
_Part = Annotated[StrictFloat | StrictInt, Field(gt=0, le=1)]
#: A name of a model, a workflow, a user or a namespace.
TargetText = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00]*$")]
SplitName = Annotated[str, Field(pattern=_NAME, description=_NAME_ACCEPTED)]
#: The fields of a call that a candidate may set.
SETTABLE = (
    *("temperature", "top_p", "top_k", "min_p", "seed", "stop", "max_tokens", "max_completion_tokens"),
    *("presence_penalty", "frequency_penalty", "repeat_penalty", "response_format"),
)


class SplitUnit(StrEnum):
    """Who is assigned to a variant, and keeps it."""

    #: The field `user` of a call, or the label `user` of a run.
    USER = "user"
    #: The conversation of a call, or the label `session` of a run.
    SESSION = "session"
    #: Each call and run by itself.
    RUN = "run"


class SplitMetric(StrEnum):
    """What is compared."""

    #: Failed runs, by ended ones.
    ERROR = "error"
    #: From the submission to the end: the ratio of the geometric means.
    SECONDS = "seconds"
    #: From when a step is ready to its first token: likewise.
    FIRST_TOKEN = "first_token"  # noqa: S105 no password
    #: What people, programs or verifiers said of the outputs, from 0 to 1.
    SCORE = "score"

    @property
    def is_logarithmic(self) -> bool:
        """Whether its difference is that of logarithms, so that `effect` is a relative one."""
        return self in (SplitMetric.SECONDS, SplitMetric.FIRST_TOKEN)

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger mean is better."""
        return self is SplitMetric.SCORE


class _SplitPart(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SplitCandidate(_SplitPart):
    """A variant that is tried: what differs from the control."""

    name: Annotated[str, Field(pattern=_NAME)]
    #: Of a split of calls: the model that answers.
    model: TargetText | None = None
    #: Of a split of calls: fields that replace those of the request.
    set: Mapping[str, Any] = Field(default={}, max_length=len(SETTABLE))
    #: Of a split of calls: the system message, in the place of that of the request.
    system: Annotated[str, Field(min_length=1, max_length=100_000)] | None = None
    #: Of a split of runs: the version of the workflow.
    version: Annotated[StrictInt, Field(ge=0)] | None = None
    #: Of a split of runs: other models by id of a step; `*` is every step that uses one.
    models: Mapping[str, TargetText] = Field(default={}, max_length=1_000)


class SplitStage(_SplitPart):
    """A stage of a ramp."""

    #: The part of the traffic that each candidate gets.
    share: _Part
    #: How long the stage lasts; None for the last one.
    hold: Duration | None = Field(default=None, alias="for")


class Pin(_SplitPart):
    """A variant for some users or namespaces, whatever the hash says: a feature flag."""

    variant: Annotated[str, Field(pattern=_NAME)]
    users: tuple[TargetText, ...] = Field(default=(), max_length=1_000)
    namespaces: tuple[TargetText, ...] = Field(default=(), max_length=100)


class Goal(_SplitPart):
    """What a candidate should do better, and how sure the answer must be."""

    metric: SplitMetric = SplitMetric.SCORE
    #: The smallest difference that matters: of a rate or a score absolute, of seconds relative.
    effect: Annotated[float, Field(gt=0.0005, le=1)] = 0.05
    #: The probability of a wrong verdict, however often one looks.
    alpha: Annotated[float, Field(ge=0.0001, le=0.2)] = 0.05
    #: End the split when the verdict is known; otherwise it is reported.
    stop: bool = False


class Guards(_SplitPart):
    """What a candidate may not do worse. Without a value nothing is guarded."""

    #: By how much failures may be more frequent.
    error: Annotated[float, Field(gt=0, le=1)] | None = 0.05
    #: By which factor times may be longer.
    seconds: Annotated[float, Field(gt=1, le=1_000)] | None = None
    first_token: Annotated[float, Field(gt=1, le=1_000)] | None = None
    #: By how much the score may be lower.
    score: Annotated[float, Field(gt=0, le=1)] | None = None

    def tolerances(self) -> dict[SplitMetric, float]:
        """What is tolerated, by metric, as it is given."""
        return {SplitMetric(name): value for name, value in self.model_dump().items() if value is not None}


class SplitDefinition(_SplitPart):
    """A split: of the calls of a model, or of the runs of a workflow."""

    split: SplitName
    description: Annotated[str, Field(max_length=1_000, pattern=r"^[^\x00]*$")] = ""
    #: The model whose calls are divided: a name or an alias.
    model: TargetText | None = None
    #: The workflow whose runs are divided, where they name no version.
    workflow: TargetText | None = None
    #: Where it holds; without any, everywhere.
    namespaces: tuple[TargetText, ...] = Field(default=(), max_length=100)
    unit: SplitUnit = SplitUnit.USER
    candidates: tuple[SplitCandidate, ...] = Field(min_length=1, max_length=MAX_CANDIDATES)
    pins: tuple[Pin, ...] = Field(default=(), max_length=MAX_PINS)
    ramp: tuple[SplitStage, ...] = Field(default=(SplitStage(share=0.1),), min_length=1, max_length=MAX_STAGES)
    goal: Goal = Goal()
    #: The name of the scores that count; None: the mean of all.
    score: Annotated[str, Field(pattern=_NAME)] | None = None
    guards: Guards = Guards()

    @property
    def most(self) -> float:
        """The largest part of the traffic that one candidate can get."""
        return 1 / len(self.candidates)

    def candidate(self, name: str) -> SplitCandidate | None:
        """The candidate of that name; None for the control."""
        return next((one for one in self.candidates if one.name == name), None)

    @property
    def kind(self) -> Literal["calls", "runs"]:
        """What is divided."""
        return "calls" if self.model is not None else "runs"


def parse(document: Any) -> SplitDefinition:
    """Return the split of a document. Raises InvalidInput with every problem."""
    try:
        found = SplitDefinition.model_validate(document)
    except ValidationError as error:
        raise InvalidInput(problems_of(error, "split"), "split") from None
    problems = list(_problems(found))
    if problems:
        raise InvalidInput(problems, "split")
    return found


def problems_of(error: ValidationError, what: str) -> list[Problem]:
    """Return what is wrong with a document, field by field; `what` names the document itself."""
    return [
        Problem(".".join(map(str, one["loc"])) or what, one["msg"].removeprefix("Value error, "), _accepted(one))
        for one in error.errors(include_url=False, include_input=False)
    ]


def _accepted(error: Any) -> str:
    context = error.get("ctx", {})
    return str(context.get("pattern") or context.get("expected") or "see docs/splits.md")


def _problems(given: SplitDefinition) -> list[Problem]:
    found = []
    if (given.model is None) == (given.workflow is None):
        found.append(Problem("model", "a split is of a model or of a workflow", "exactly one of model and workflow"))
    names = [one.name for one in given.candidates]
    if len({*names, CONTROL}) <= len(names):
        found.append(Problem("candidates", "names are given twice, or are 'control'", "other names"))
    for at, candidate in enumerate(given.candidates):
        found += _of_candidate(given, candidate, f"candidates.{at}")
    for at, pin in enumerate(given.pins):
        if pin.variant not in (*names, CONTROL):
            found.append(Problem(f"pins.{at}.variant", f"there is no {pin.variant!r}", ", ".join((CONTROL, *names))))
        if not pin.users and not pin.namespaces:
            found.append(Problem(f"pins.{at}", "it names nobody", "users, namespaces, or both"))
    for at, stage in enumerate(given.ramp):
        if stage.share > given.most + 1e-9:
            most = f"at most {given.most:g}: the control and {len(names)} candidates divide the traffic"
            found.append(Problem(f"ramp.{at}.share", f"{stage.share:g} is too much for each candidate", most))
        is_last = at == len(given.ramp) - 1
        if (stage.hold is None) is not is_last:
            problem = "the last stage holds until the split ends" if is_last else "it does not say how long it lasts"
            found.append(Problem(f"ramp.{at}.for", problem, "nothing" if is_last else "a duration such as '1h'"))
    places = [
        ("namespaces", given.namespaces),
        *((f"pins.{at}.namespaces", p.namespaces) for at, p in enumerate(given.pins)),
    ]
    for where, listed in places:
        found += [
            Problem(where, f"{name!r} is no name of a namespace", namespaces.ACCEPTED)
            for name in listed
            if not namespaces.is_valid(name)
        ]
    return found


def _of_candidate(given: SplitDefinition, candidate: SplitCandidate, where: str) -> list[Problem]:
    of_calls = {"model": candidate.model, "set": candidate.set, "system": candidate.system}
    of_runs = {"version": candidate.version, "models": candidate.models or None}
    own, other = (of_calls, of_runs) if given.model is not None else (of_runs, of_calls)
    other_kind = "runs" if given.model is not None else "calls"
    found = [
        Problem(f"{where}.{name}", f"it is for splits of {other_kind}", ", ".join(own))
        for name, value in other.items()
        if value not in (None, {})
    ]
    if all(value in (None, {}) for value in own.values()):
        found.append(Problem(where, "it does not differ from the control", ", ".join(own)))
    unknown = [name for name in candidate.set if name not in SETTABLE]
    found += [Problem(f"{where}.set.{name[:60]}", "it cannot be set", ", ".join(SETTABLE)) for name in unknown]
    if candidate.set and not unknown:
        probe = {"model": "m", "messages": [{"role": "user", "content": "x"}], **candidate.set}
        try:
            ChatRequest.model_validate(probe)
        except ValidationError as error:
            found += [
                Problem(f"{where}.set.{'.'.join(map(str, place_of(one)))}", one["msg"], "a value of that field")
                for one in error.errors(include_url=False, include_input=False)
            ]
    return found
