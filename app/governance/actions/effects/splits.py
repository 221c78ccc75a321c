"""The effect on splits: everything goes to the control again."""

from __future__ import annotations

from app.governance.actions.action import RollBackSplitAction
from app.governance.actions.effects.effect import ActionContext, RowEffect, reason_of
from app.governance.actions.execution import ActionExecution
from app.governance.actions.outcome import ActionChange, ActionRefused
from app.inference.splits import service
from app.kernel.database import UnitOfWork
from app.kernel.live import notices
from app.kernel.live.notices import ChangeTopic


def _roll_back(
    context: ActionContext, work: UnitOfWork, action: RollBackSplitAction, execution: ActionExecution
) -> ActionChange:
    catalog = context.catalog()
    found = None if action.model is None else catalog.resolve(action.model)
    model = action.model if found is None else found.name
    ended = service.roll_back(work, action.split, model, reason_of(execution), catalog)
    if not ended:
        raise ActionRefused(f"no split {action.split!r} runs" if action.split else f"no split of {model} runs")
    work.after_commit(lambda: notices.send(context.publisher, ChangeTopic.SPLITS))
    return ActionChange(f"{', '.join(ended)} ended: everything goes to the control", ended, [])


ROLL_BACK = RowEffect(_roll_back)
