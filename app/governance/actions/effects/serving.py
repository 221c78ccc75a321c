"""
Effects on the serving of models: run-time settings of the section `serving`, which all processes follow in moments.

So an operator sees in `arriero settings` what a rule has changed, and can change it back. What somebody else has
changed since is left alone when the rule clears.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import text

from app.governance.actions.action import (
    KeepResidentAction,
    PauseModelAction,
    ResizeSlotsAction,
    ResumeModelAction,
    ShedLoadAction,
    SwitchFallbackAction,
)
from app.governance.actions.effects.effect import ActionContext, RowEffect, author_of, reason_of
from app.governance.actions.execution import ActionExecution
from app.governance.actions.outcome import ActionChange, ActionRefused
from app.kernel import log
from app.kernel import settings as all_settings
from app.kernel.database import UnitOfWork
from app.kernel.errors import BrokerUnreachable, InvalidSettings
from app.kernel.live import notices, versions
from app.kernel.live.notices import ChangeTopic
from app.kernel.live.versions import SettingChange
from app.kernel.sections.governance import ServingSettings
from app.kernel.units import durations
from app.scheduler import residencies
from app.scheduler.residencies import Residency

_log = log.get(__name__)


@dataclass(frozen=True, slots=True)
class ServingEntry:
    """The part of a setting that one action changes."""

    #: The name of the field of the section `serving`.
    field: str
    read: Callable[[ServingSettings], Any]
    #: The whole field with another value of that part.
    written: Callable[[ServingSettings, Any], tuple[str, ...]]


def listed(field: str, model: str) -> ServingEntry:
    """Whether a model is in a list."""

    def written(serving: ServingSettings, value: Any) -> tuple[str, ...]:
        others = tuple(name for name in getattr(serving, field) if name != model)
        return (*others, model) if value else others

    return ServingEntry(field, lambda serving: model in getattr(serving, field), written)


def mapped(field: str, model: str) -> ServingEntry:
    """What a list of `MODEL=VALUE` has for a model: a text, or None."""

    def read(serving: ServingSettings) -> str | None:
        pairs = (entry.rpartition("=") for entry in getattr(serving, field))
        return next((value for name, _, value in pairs if name == model), None)

    def written(serving: ServingSettings, value: Any) -> tuple[str, ...]:
        others = tuple(entry for entry in getattr(serving, field) if not entry.startswith(f"{model}="))
        return others if value is None else (*others, f"{model}={value}")

    return ServingEntry(field, read, written)


_POOLS_OF = text("""
    SELECT pool.id FROM pool JOIN reservation ON reservation.id = pool.id
    WHERE pool.model = :model AND reservation.state <> 'released'
""")
_SHED = ServingEntry("shed", lambda serving: sorted(serving.shed), lambda _, value: tuple(value))


def _change(context: ActionContext, work: UnitOfWork, entry: ServingEntry, value: Any, by: SettingChange) -> Any:
    """Set a part of a setting; returns its value before. It is locked until the end of the transaction."""
    serving = _current(context, work)
    before = entry.read(serving)
    if before != value:
        key = f"serving.{entry.field}"
        try:
            versions.change(work, context.base, {key: list(entry.written(serving, value))}, by)
        except InvalidSettings as error:
            raise ActionRefused(str(error.problems[0])) from None
        work.after_commit(lambda: notices.send(context.publisher, ChangeTopic.SETTINGS))
        work.after_commit(context.wake)
    return before


def _current(context: ActionContext, work: UnitOfWork) -> ServingSettings:
    """The section as it holds now, and not as this process last heard."""
    versions.lock(work)
    stored = versions.newest(work).values
    given = {key: value for key, value in stored.items() if key.startswith("serving.")}
    return all_settings.with_values(context.base, given, "run time").serving


def _by(execution: ActionExecution, *, undo: bool = False) -> SettingChange:
    why = f"cleared: {reason_of(execution)}" if undo else reason_of(execution)
    return SettingChange(author_of(execution), why)


def _undo(entry_of: Callable[[str], ServingEntry]) -> Callable[[ActionContext, UnitOfWork, Any, ActionExecution], str]:
    def undo(context: ActionContext, work: UnitOfWork, _: Any, execution: ActionExecution) -> str:
        entry = entry_of(_model_of(execution))
        now = entry.read(_current(context, work))
        if now != execution.after:
            raise ActionRefused(f"serving.{entry.field} has been changed since: it is left as it is")
        _change(context, work, entry, execution.before, _by(execution, undo=True))
        return f"serving.{entry.field} is as before: {_shown(execution.before)}"

    return undo


def _shown(value: Any) -> str:
    match value:
        case bool():
            return "listed" if value else "not listed"
        case list():
            return ", ".join(map(str, value)) or "nothing"
        case None:
            return "nothing"
    return str(value)


def _target(context: ActionContext, _: UnitOfWork, action: Any, __: ActionExecution) -> str:
    """The target by the name of the model, when the action has an alias."""
    return f"model {_model(context, action.model)}"


def _model_of(execution: ActionExecution) -> str:
    return execution.target.removeprefix("model ")


def _model(context: ActionContext, name: str | None) -> str:
    """The name of a model of the catalogue, given it or an alias."""
    found = context.catalog().resolve(name or "")
    if found is None:
        raise ActionRefused(f"the catalogue has no model {name!r}")
    return found.name


def _pause(context: ActionContext, work: UnitOfWork, action: PauseModelAction, by: ActionExecution) -> ActionChange:
    model = _model(context, action.model)
    before = _change(context, work, listed("paused", model), True, _by(by))
    return ActionChange(f"{model} is paused", before, True, holds=True)


def _resume(context: ActionContext, work: UnitOfWork, action: ResumeModelAction, by: ActionExecution) -> ActionChange:
    model = _model(context, action.model)
    before = _change(context, work, listed("paused", model), False, _by(by))
    if not before:
        raise ActionRefused(f"{model} is not paused")
    return ActionChange(f"{model} is served again", before, False)


def _switch(
    context: ActionContext, work: UnitOfWork, action: SwitchFallbackAction, by: ActionExecution
) -> ActionChange:
    catalog = context.catalog()
    model = _model(context, action.model)
    others = [_model(context, name) for name in action.to or catalog.get(model).fallback.models]
    others = [name for name in dict.fromkeys(others) if name != model]
    if not others:
        raise ActionRefused(f"neither the action nor the catalogue names a fallback of {model}")
    value = "+".join(others)
    before = _change(context, work, mapped("diverted", model), value, _by(by))
    return ActionChange(f"requests for {model} go to {', '.join(others)}", before, value, holds=True)


def _resize(context: ActionContext, work: UnitOfWork, action: ResizeSlotsAction, by: ActionExecution) -> ActionChange:
    model = _model(context, action.model)
    value = str(action.slots)
    before = _change(context, work, mapped("slots", model), value, _by(by))
    was = before or context.catalog().get(model).slots
    return ActionChange(f"{model} has {value} slots, in the place of {was}", before, value, holds=True)


def _shed(context: ActionContext, work: UnitOfWork, action: ShedLoadAction, by: ActionExecution) -> ActionChange:
    before = sorted(_current(context, work).shed)
    after = sorted({*before, *action.classes})
    _change(context, work, _SHED, after, _by(by))
    return ActionChange(f"new work of the classes {', '.join(after)} is refused", before, after, holds=True)


def _keep(context: ActionContext, work: UnitOfWork, action: KeepResidentAction, by: ActionExecution) -> ActionChange:
    model = _model(context, action.model)
    if not action.pinned:
        return _keep_alive(context, work, model, action.keep_alive)
    before = _change(context, work, listed("resident", model), True, _by(by))
    return ActionChange(f"{model} has a pool that is not stopped for others", before, True, holds=True)


def _keep_alive(context: ActionContext, work: UnitOfWork, model: str, keep: timedelta | None) -> ActionChange:
    """Store a residency: a hint in Redis, after the commit."""
    pools = [str(row.id) for row in work.rows(_POOLS_OF, {"model": model})]
    if not pools:
        raise ActionRefused(f"{model} has no pool to keep")
    try:
        with context.publisher.connection() as client:
            known = residencies.read(client).get(model)
    except BrokerUnreachable as error:
        raise ActionRefused(str(error)) from None
    before = None if known is None else known.encoded()
    value = Residency(keep, frozenset(pools)).encoded()
    _after_commit_store(context, work, model, value)
    shown = "until it is undone" if keep is None else f"for {durations.show(keep)} after its last request"
    return ActionChange(f"{model} stays loaded {shown}", before, value, holds=True)


def _after_commit_store(context: ActionContext, work: UnitOfWork, model: str, value: str | None) -> None:
    def store() -> None:
        try:
            with context.publisher.connection() as client:
                if value is None:
                    residencies.remove(client, model)
                else:
                    residencies.store(client, model, Residency.decoded(value))
        except BrokerUnreachable as error:
            _log.warning("residency_not_stored", model=model, error=str(error))

    work.after_commit(store)
    work.after_commit(context.wake)


def _unkeep(context: ActionContext, work: UnitOfWork, action: KeepResidentAction, by: ActionExecution) -> str:
    if action.pinned:
        return _undo(lambda model: listed("resident", model))(context, work, action, by)
    model = _model_of(by)
    with context.publisher.connection() as client:
        known = residencies.read(client).get(model)
    if known is None or known.encoded() != by.after:
        raise ActionRefused("a client has asked for another time since, or its pools are gone")
    _after_commit_store(context, work, model, by.before)
    return f"{model} stays loaded as before"


PAUSE = RowEffect(_pause, _undo(lambda model: listed("paused", model)), _target)
RESUME = RowEffect(_resume, target=_target)
SWITCH = RowEffect(_switch, _undo(lambda model: mapped("diverted", model)), _target)
RESIZE = RowEffect(_resize, _undo(lambda model: mapped("slots", model)), _target)
SHED = RowEffect(_shed, _undo(lambda _: _SHED))
KEEP = RowEffect(_keep, _unkeep, _target)
