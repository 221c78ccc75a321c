"""Alerts and actions: what rules tell people, and what they have done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict

from arriero_client import exchange
from arriero_client.effects import Operation, Request
from arriero_client.exchange import Retries
from arriero_client.operations import operation


class Alert(BaseModel):
    """An alert. Fields that a newer server adds are kept as extra attributes."""

    model_config = ConfigDict(extra="allow", frozen=True)

    id: str
    rule: str
    severity: str
    #: `open`, `acknowledged` or `resolved`.
    state: str
    summary: str
    labels: Mapping[str, Any] = {}
    #: Firings since it was opened.
    count: int = 1
    first_at: datetime
    last_at: datetime
    resolved_at: datetime | None = None


class Action(BaseModel):
    """An action for a firing or an operator, and what came of it."""

    model_config = ConfigDict(extra="allow", frozen=True)

    id: str
    rule: str = ""
    kind: str
    target: str
    #: `pending`, `applied`, `done`, `refused`, `failed`, `undoing`, `undone` or `kept`.
    state: str
    detail: str = ""
    before: Any = None
    after: Any = None


class Alerts:
    """The operations on alerts and actions."""

    retries: Retries

    @operation
    def alerts(
        self, *, states: Sequence[str] = (), severity: str | None = None, rule: str | None = None, limit: int = 100
    ) -> Operation[Sequence[Alert]]:
        """Return alerts, the newest first; those that are not resolved, unless states are given."""
        query: dict[str, Any] = {"limit": limit, "state": list(states), "severity": severity, "rule": rule}
        request = Request("GET", "/v1/alerts", query={name: value for name, value in query.items() if value})
        found = yield from exchange.send_json(request, self.retries)
        return [Alert.model_validate(one) for one in found["alerts"]]

    @operation
    def alert(self, alert_id: str) -> Operation[Alert]:
        """Return an alert, with its `history` and what was `sent`."""
        request = Request("GET", f"/v1/alerts/{quote(alert_id, safe='')}")
        return Alert.model_validate((yield from exchange.send_json(request, self.retries)))

    @operation
    def acknowledge_alert(self, alert_id: str, note: str = "") -> Operation[Alert]:
        """Take care of an alert: it is not sent again until it is resolved."""
        request = Request("POST", f"/v1/alerts/{quote(alert_id, safe='')}/acknowledge", body={"note": note})
        return Alert.model_validate((yield from exchange.send_json(request, self.retries)))

    @operation
    def resolve_alert(self, alert_id: str) -> Operation[Alert]:
        """End an alert by hand."""
        request = Request("POST", f"/v1/alerts/{quote(alert_id, safe='')}/resolve", body={})
        return Alert.model_validate((yield from exchange.send_json(request, self.retries)))

    @operation
    def silence_alerts(self, matchers: Mapping[str, str], time: str, comment: str = "") -> Operation[str]:
        """Send no alerts with these labels for a while. Returns the id of the silence."""
        body = {"matchers": dict(matchers), "time": time, "comment": comment}
        request = Request("POST", "/v1/alerts/silences", body=body, repeatable=False)
        return str((yield from exchange.send_json(request, self.retries))["id"])

    @operation
    def actions(
        self, *, rule: str | None = None, state: str | None = None, limit: int = 100
    ) -> Operation[Sequence[Action]]:
        """Return what was done, refused and taken back, the newest first."""
        query: dict[str, Any] = {"limit": limit, "rule": rule, "state": state}
        request = Request("GET", "/v1/actions", query={name: value for name, value in query.items() if value})
        found = yield from exchange.send_json(request, self.retries)
        return [Action.model_validate(one) for one in found["actions"]]

    @operation
    def act(self, kind: str, /, *, reason: str = "", dry_run: bool = False, **parameters: Any) -> Operation[Action]:
        """Carry out an action now, with its parameters. A control worker does it within moments."""
        body = {"action": {"kind": kind, **parameters}, "reason": reason, "dry_run": dry_run}
        request = Request("POST", "/v1/actions", body=body, repeatable=False)
        return Action.model_validate((yield from exchange.send_json(request, self.retries)))

    @operation
    def undo_action(self, action_id: str) -> Operation[Action]:
        """Take back an action that holds."""
        request = Request("POST", f"/v1/actions/{quote(action_id, safe='')}/undo", body={}, repeatable=False)
        return Action.model_validate((yield from exchange.send_json(request, self.retries)))
