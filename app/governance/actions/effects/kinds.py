"""The effect of each kind of action. An alert is none: it is opened with its firing."""

from __future__ import annotations

from collections.abc import Mapping

from app.governance.actions.action import ActionKind
from app.governance.actions.effects import memory, pools, serving, splits, workflows
from app.governance.actions.effects.effect import OutsideEffect, RowEffect

EFFECTS: Mapping[ActionKind, RowEffect | OutsideEffect] = {
    ActionKind.CLEAN_UP_MEMORY: memory.CLEAN_UP,
    ActionKind.EVICT_IDLE: pools.EVICT,
    ActionKind.KEEP_RESIDENT: serving.KEEP,
    ActionKind.RESIZE_SLOTS: serving.RESIZE,
    ActionKind.SCALE_POOL: pools.SCALE,
    ActionKind.PAUSE_MODEL: serving.PAUSE,
    ActionKind.RESUME_MODEL: serving.RESUME,
    ActionKind.PAUSE_WORKFLOW: workflows.PAUSE,
    ActionKind.RESUME_WORKFLOW: workflows.RESUME,
    ActionKind.SWITCH_FALLBACK: serving.SWITCH,
    ActionKind.SHED_LOAD: serving.SHED,
    ActionKind.QUARANTINE_HOST: pools.QUARANTINE,
    ActionKind.RESTART_POOL: pools.RESTART,
    ActionKind.RUN_WORKFLOW: workflows.RUN,
    ActionKind.ROLL_BACK_SPLIT: splits.ROLL_BACK,
}
