"""
The actions that a rule may name: their kinds and parameters.

A parameter that names a model, pool, host or workflow may be left out: it is then the label of that name of the firing,
so that one rule acts on whichever model it fires for.
Each action is bounded: by `max_per_hour` for one target, by how much it may touch at once, and by the limits of the
settings `actions.…` for all together.
An action with `undo` is taken back when its rule clears. The others happen once and leave nothing to take back.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from enum import StrEnum
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StringConstraints,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import ErrorDetails

from app.kernel.errors import InvalidInput, Problem
from app.kernel.units import durations
from app.kernel.units.durations import Duration

#: Most actions of one rule.
MAX_ACTIONS = 16
#: Most bytes of the inputs of a workflow, as JSON.
MAX_INPUTS = 16 * 1024

TargetName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@+ -]*$", max_length=100)]
ChannelName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
GroupLabel = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,62}$")]


class ActionKind(StrEnum):
    """What is done."""

    ALERT = "alert"
    CLEAN_UP_MEMORY = "clean_up_memory"
    EVICT_IDLE = "evict_idle"
    KEEP_RESIDENT = "keep_resident"
    RESIZE_SLOTS = "resize_slots"
    SCALE_POOL = "scale_pool"
    PAUSE_MODEL = "pause_model"
    PAUSE_WORKFLOW = "pause_workflow"
    RESUME_MODEL = "resume_model"
    RESUME_WORKFLOW = "resume_workflow"
    SWITCH_FALLBACK = "switch_fallback"
    SHED_LOAD = "shed_load"
    QUARANTINE_HOST = "quarantine_host"
    RESTART_POOL = "restart_pool"
    RUN_WORKFLOW = "run_workflow"
    ROLL_BACK_SPLIT = "roll_back_split"


class ActionFields(BaseModel):
    """What all actions have."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: ActionKind
    #: Most executions for one target within an hour; further ones are refused and recorded.
    max_per_hour: StrictInt = Field(default=6, ge=1, le=1000, description="an integer from 1 to 1000")

    @property
    def undone_on_clear(self) -> bool:
        """Whether it is taken back when its rule clears."""
        return bool(getattr(self, "undo", False))


class ReversibleFields(ActionFields):
    """What actions have that can be taken back."""

    #: Take it back when the rule clears.
    undo: StrictBool = Field(default=True, description="true or false")


class AlertAction(ActionFields):
    """Tell people, once in a cooldown."""

    kind: Literal[ActionKind.ALERT]
    max_per_hour: StrictInt = Field(default=1000, ge=1, le=1000, description="an integer from 1 to 1000")
    #: Channels that are told; without any, the default channels of the namespace.
    channels: tuple[ChannelName, ...] = Field(default=(), max_length=16, description="a list of names of channels")
    #: Time for which the same alert is not sent again; None: that of the rule, or of the setting alerts.cooldown.
    cooldown: Duration | None = Field(default=None, description=durations.ACCEPTED)
    #: Alerts with the same values of these labels are sent as one notification; `rule` and `severity` are labels too.
    group_by: tuple[GroupLabel, ...] = Field(default=("rule",), max_length=8, description="a list of names of labels")
    #: Send again after this time while the alert is open and nobody has acknowledged it; None: never.
    repeat: Duration | None = Field(default=None, description="a duration of at least '1m', such as '4h'")


class CleanUpMemoryAction(ActionFields):
    """Defragment now: move idle pools, so that models fit that now fit on no device."""

    kind: Literal[ActionKind.CLEAN_UP_MEMORY]
    #: Stop idle pools as well, the longest unused first, until no more than this part of each device is reserved.
    until: float | None = Field(default=None, ge=0, le=1, description="a part of the memory from 0 to 1, such as 0.7")
    #: Only on this host; by default the firing's, or all.
    host: TargetName | None = Field(default=None, description="the name of a host")
    max_pools: StrictInt = Field(default=4, ge=1, le=64, description="an integer from 1 to 64")


class EvictIdleAction(ActionFields):
    """Stop pools that do nothing. Pinned ones, and those that steps wait for, stay."""

    kind: Literal[ActionKind.EVICT_IDLE]
    model: TargetName | None = Field(default=None, description="the name of a model; by default the firing's, or all")
    host: TargetName | None = Field(default=None, description="the name of a host; by default the firing's, or all")
    #: Not used for at least this long.
    idle_for: Duration = Field(default=timedelta(seconds=30), description=durations.ACCEPTED)
    max_pools: StrictInt = Field(default=1, ge=1, le=64, description="an integer from 1 to 64")


class KeepResidentAction(ReversibleFields):
    """Keep the pools of a model loaded: against thrash. With `pinned` they are not evicted for others either."""

    kind: Literal[ActionKind.KEEP_RESIDENT]
    model: TargetName | None = Field(default=None, description="the name of a model; by default the firing's")
    pinned: StrictBool = Field(default=True, description="true or false")
    #: How long an idle pool stays; None: until it is undone.
    keep_alive: Duration | None = Field(default=None, description=durations.ACCEPTED)


class ResizeSlotsAction(ReversibleFields):
    """Serve a model with another number of slots. Its pools are replaced, because their memory changes."""

    kind: Literal[ActionKind.RESIZE_SLOTS]
    model: TargetName | None = Field(default=None, description="the name of a model; by default the firing's")
    slots: StrictInt = Field(ge=1, le=256, description="an integer from 1 to 256")


class ScalePoolAction(ReversibleFields):
    """Keep at least so many pools of a model running."""

    kind: Literal[ActionKind.SCALE_POOL]
    model: TargetName | None = Field(default=None, description="the name of a model; by default the firing's")
    pools: StrictInt = Field(ge=1, le=64, description="an integer from 1 to 64")


class PauseModelAction(ReversibleFields):
    """Stop serving a model: its steps wait, calls go to its fallbacks or are refused, its pools drain."""

    kind: Literal[ActionKind.PAUSE_MODEL]
    model: TargetName | None = Field(default=None, description="the name of a model; by default the firing's")


class ResumeModelAction(ActionFields):
    """Serve a paused model again."""

    kind: Literal[ActionKind.RESUME_MODEL]
    model: TargetName | None = Field(default=None, description="the name of a model; by default the firing's")


class PauseWorkflowAction(ReversibleFields):
    """Begin no further step of the runs of a workflow."""

    kind: Literal[ActionKind.PAUSE_WORKFLOW]
    workflow: TargetName | None = Field(default=None, description="the name of a workflow; by default the firing's")


class ResumeWorkflowAction(ActionFields):
    """Resume the runs of a paused workflow."""

    kind: Literal[ActionKind.RESUME_WORKFLOW]
    workflow: TargetName | None = Field(default=None, description="the name of a workflow; by default the firing's")


class SwitchFallbackAction(ReversibleFields):
    """Send the requests for a model to others."""

    kind: Literal[ActionKind.SWITCH_FALLBACK]
    model: TargetName | None = Field(default=None, description="the name of a model; by default the firing's")
    #: The models that are tried instead, in order; without any, those of its entry in the catalogue.
    to: tuple[TargetName, ...] = Field(default=(), max_length=8, description="a list of names of models")


class ShedLoadAction(ReversibleFields):
    """Refuse new calls and submissions of a class, with 503 and Retry-After. What was accepted goes on."""

    kind: Literal[ActionKind.SHED_LOAD]
    #: `interactive` is not among them: refusing it is an outage.
    classes: tuple[Literal["batch", "standard"], ...] = Field(
        default=("batch",), min_length=1, max_length=2, description="a list of batch, standard"
    )


class QuarantineHostAction(ReversibleFields):
    """Place no further pools on a host. Its pools go on."""

    kind: Literal[ActionKind.QUARANTINE_HOST]
    host: TargetName | None = Field(default=None, description="the name of a host; by default the firing's")


class RestartPoolAction(ActionFields):
    """Drain pools and start others in their place."""

    kind: Literal[ActionKind.RESTART_POOL]
    pool: TargetName | None = Field(default=None, description="the id of a pool, or its name; by default the firing's")
    model: TargetName | None = Field(default=None, description="the name of a model, for its oldest pools")
    max_pools: StrictInt = Field(default=1, ge=1, le=64, description="an integer from 1 to 64")


class RunWorkflowAction(ActionFields):
    """Submit a run of a registered workflow. Its input `firing` has the rule, the labels and the value."""

    kind: Literal[ActionKind.RUN_WORKFLOW]
    workflow: TargetName = Field(description="the name of a workflow")
    inputs: dict[str, Any] = Field(default_factory=dict, description="an object")
    #: Give the run the input `firing`; a workflow that does not declare it refuses it.
    with_firing: StrictBool = Field(default=False, description="true or false")
    priority: Literal["interactive", "standard", "batch"] = Field(
        default="batch", description="interactive, standard or batch"
    )


class RollBackSplitAction(ActionFields):
    """End a split: everything goes to its control."""

    kind: Literal[ActionKind.ROLL_BACK_SPLIT]
    #: None: each split that divides the calls of the model, or sends some to it.
    split: TargetName | None = Field(default=None, description="the name of a split")
    model: TargetName | None = Field(default=None, description="the name of a model; by default the firing's")


GovernanceAction = Annotated[
    AlertAction
    | CleanUpMemoryAction
    | EvictIdleAction
    | KeepResidentAction
    | ResizeSlotsAction
    | ScalePoolAction
    | PauseModelAction
    | ResumeModelAction
    | PauseWorkflowAction
    | ResumeWorkflowAction
    | SwitchFallbackAction
    | ShedLoadAction
    | QuarantineHostAction
    | RestartPoolAction
    | RunWorkflowAction
    | RollBackSplitAction,
    Field(discriminator="kind"),
]

#: The actions that a rule of one namespace may name: what they touch belongs to that namespace.
OF_NAMESPACES = frozenset(
    {ActionKind.ALERT, ActionKind.PAUSE_WORKFLOW, ActionKind.RESUME_WORKFLOW, ActionKind.RUN_WORKFLOW}
)

_ONE: TypeAdapter[GovernanceAction] = TypeAdapter(GovernanceAction)
#: The class of each kind.
CLASSES: Mapping[ActionKind, type[ActionFields]] = {
    get_args(one.model_fields["kind"].annotation)[0]: one for one in get_args(get_args(GovernanceAction)[0])
}


def parse(
    documents: Any, namespace: str = "", where: str = "actions", what: str = "rule"
) -> tuple[GovernanceAction, ...]:
    """
    Return the actions of a list. `namespace` is that of the rule; empty for one of the installation.

    An action is written `{"kind": K, "PARAMETER": V}`, `{"action": K, "with": {"PARAMETER": V}}`, or as its kind alone.
    Raises InvalidInput with every problem.
    """
    if not isinstance(documents, list | tuple) or len(documents) > MAX_ACTIONS:
        raise InvalidInput([Problem(where, "it is not a list of actions", f"a list of at most {MAX_ACTIONS}")], what)
    found: list[GovernanceAction] = []
    problems: list[Problem] = []
    for number, document in enumerate(documents):
        place = where if where == "action" else f"{where}[{number}]"
        document = _flat(document)
        if document is None:
            accepted = "the name of a kind, or an object with `kind`, or with `action` and `with`"
            problems.append(Problem(place, "it is not an action", accepted))
            continue
        try:
            action = _ONE.validate_python(document)
        except ValidationError as error:
            problems += [_problem(place, item, document) for item in error.errors(include_url=False)]
            continue
        problems += _more_problems(place, action, namespace)
        found.append(action)
    if problems:
        raise InvalidInput(problems, what)
    return tuple(found)


def document_of(action: ActionFields) -> dict[str, Any]:
    """Return the JSON object of an action, without the parameters that have their defaults."""
    changed = action.model_dump(mode="json", exclude_defaults=True)
    return {
        "kind": action.kind.value,
        **{name: _shown(getattr(action, name), value) for name, value in changed.items() if name != "kind"},
    }


def _flat(document: Any) -> dict[str, Any] | None:
    """Return an action with its kind beside its parameters; None for what is no action."""
    if isinstance(document, str):
        return {"kind": document}
    if not isinstance(document, Mapping):
        return None
    if "action" not in document:
        return {**document}
    parameters = document.get("with") or {}
    if not isinstance(parameters, Mapping) or set(document) - {"action", "with"} or "kind" in parameters:
        return None
    return {**parameters, "kind": document["action"]}


def _shown(value: Any, dumped: Any) -> Any:
    return durations.show(value) if isinstance(value, timedelta) else dumped


def _more_problems(place: str, action: ActionFields, namespace: str) -> list[Problem]:
    problems = []
    if namespace and action.kind not in OF_NAMESPACES:
        message = f"{action.kind} touches what all namespaces share; only a rule without a namespace may name it"
        problems.append(Problem(f"{place}.kind", message, ", ".join(sorted(OF_NAMESPACES))))
    match action:
        case AlertAction(repeat=timedelta() as repeat) if repeat < timedelta(minutes=1):
            problems.append(Problem(f"{place}.repeat", "it is too short", "a duration of at least '1m'"))
        case SwitchFallbackAction(model=str() as model, to=to) if model in to:
            problems.append(Problem(f"{place}.to", f"{model} cannot replace itself", "other models"))
        case RunWorkflowAction(inputs=inputs) if not _is_small_json(inputs):
            problems.append(Problem(f"{place}.inputs", "it is too large", f"JSON of at most {MAX_INPUTS} bytes"))
    return problems


def _is_small_json(value: Any) -> bool:
    try:
        return len(TypeAdapter(Any).dump_json(value)) <= MAX_INPUTS
    except (ValueError, TypeError, RecursionError):
        return False


def _problem(place: str, item: ErrorDetails, document: Mapping[str, Any]) -> Problem:
    kinds = ", ".join(ActionKind)
    path = [str(part) for part in item["loc"]]
    if item["type"] in ("union_tag_invalid", "union_tag_not_found"):
        given = document.get("kind")
        message = "it is missing" if given is None else f"{str(given)[:50]!r} is not a kind of action"
        return Problem(f"{place}.kind", message, kinds)
    path = path[1:]  # the first part is the kind
    fields = CLASSES[ActionKind(str(document["kind"]))].model_fields
    where = ".".join([place, *path])
    field = fields.get(path[0]) if path else None
    if item["type"] == "extra_forbidden":
        return Problem(where, "there is no such parameter", ", ".join(name for name in fields if name != "kind"))
    accepted = (field.description or "") if field else ""
    message = "it is missing" if item["type"] == "missing" else item["msg"].removeprefix("Value error, ")
    return Problem(where, message, accepted)
