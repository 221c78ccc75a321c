"""
Responses: what follows a firing, and its end. Actions and alerts are requested in the transaction of the firing.

A firing of a rule without the action `alert` has no alert. Control workers are woken after the commit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from app.governance.actions import action as actions
from app.governance.actions import service
from app.governance.actions.action import AlertAction
from app.governance.actions.execution import Cause
from app.governance.alerts.service import AlertService
from app.governance.rules.firing import Firing
from app.governance.tasks import ACTIONS, ALERTS
from app.kernel import log
from app.kernel.broker import CONTROL_QUEUE, PRIORITIES, Publisher
from app.kernel.database import UnitOfWork
from app.kernel.errors import InvalidInput
from app.kernel.settings import Settings

_log = log.get(__name__)

#: Seconds after which a wake-up is obsolete: beat has sent its own since.
_EXPIRES = 10.0


@dataclass(frozen=True, slots=True)
class Responses:
    """Requests the actions and alerts of firings. It is a `FiringHooks`."""

    #: The settings of this moment.
    settings: Callable[[], Settings]
    publisher: Publisher

    def on_firing(self, work: UnitOfWork, firing: Firing) -> None:
        """Request the actions of a firing, and open its alerts."""
        cause, settings = cause_of(firing), self.settings()
        found = self._actions_of(firing)
        service.fired(work, cause, found, settings.actions)
        for action in found:
            if isinstance(action, AlertAction):
                AlertService(settings.alerts).fired(work, cause, action, firing.rule.cooldown)
        self._wake(work)

    def on_cleared(self, work: UnitOfWork, firing: Firing) -> None:
        """Request that what still holds is taken back, and resolve the alerts of a firing."""
        service.cleared(work, firing.id)
        AlertService(self.settings().alerts).cleared(work, cause_of(firing))
        self._wake(work)

    def _actions_of(self, firing: Firing) -> tuple[Any, ...]:
        """The actions of the rule. Those that are not valid in this version are logged, and stop none of the others."""
        found: list[Any] = []
        for number, one in enumerate(firing.rule.actions):
            try:
                found += actions.parse([{"action": one.action, "with": dict(one.options)}], firing.namespace)
            except InvalidInput as error:
                _log.error("action_invalid", rule=firing.rule.rule, position=number, error=str(error))
        return tuple(found)

    def _wake(self, work: UnitOfWork) -> None:
        def wake() -> None:
            for task in (ACTIONS, ALERTS):
                self.publisher.publish(
                    task,
                    (),
                    queue=CONTROL_QUEUE,
                    priority=PRIORITIES["interactive"],
                    description="wake-up",
                    expires=_EXPIRES,
                )

        work.after_commit(wake)


def cause_of(firing: Firing) -> Cause:
    """Return the cause of what follows a firing."""
    values = [seen["value"] for seen in firing.values.values() if seen.get("holds") and seen.get("value") is not None]
    return Cause(
        rule=firing.rule.rule,
        summary=firing.reason or firing.rule.description or firing.rule.rule,
        severity=firing.rule.severity.value,
        namespace=firing.namespace,
        labels=dict(firing.labels),
        firing_id=firing.id,
        value=float(values[0]) if values else None,
        dry_run=firing.dry_run,
    )
