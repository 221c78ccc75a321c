"""Signals and rules: what is measured, what is watched, and what fired."""

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


class _Document(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


class Signal(_Document):
    """A signal that is measured."""

    name: str
    unit: str
    labels: Sequence[str] = ()
    statistics: Sequence[str] = ()
    description: str = ""
    #: Its default statistic over the last five minutes; None: nothing was observed.
    value: float | None = None


class SignalHistory(_Document):
    """A signal in a window: `values` of the whole window, `points` of each minute, hour or day."""

    name: str
    unit: str
    statistic: str
    window: str
    resolution: str
    values: Sequence[Mapping[str, Any]] = ()
    points: Sequence[Mapping[str, Any]] = ()


class Rule(_Document):
    """A rule, and what it does now."""

    name: str
    namespace: str = ""
    version: int
    source: str
    enabled: bool
    #: `off`, `quiet`, `pending` or `firing`.
    state: str
    #: The stored document.
    rule: Mapping[str, Any]


class RuleFiring(_Document):
    """A firing of a rule."""

    id: str
    rule: str
    labels: Mapping[str, str] = {}
    state: str
    dry_run: bool = False
    fired_at: datetime | None = None
    cleared_at: datetime | None = None
    reason: str = ""


class RuleTest(_Document):
    """When a rule would have fired."""

    begin: datetime
    end: datetime
    #: The first observation; None: nothing was measured.
    measured_from: datetime | None = None
    evaluations: int
    firings: Sequence[Mapping[str, Any]] = ()
    firing_ratio: float = 0.0


class Rules:
    """The operations on signals and rules."""

    retries: Retries

    @operation
    def signals(self, *, namespace: str | None = None) -> Operation[Sequence[Signal]]:
        """Return all signals, with their values now."""
        found = yield from exchange.send_json(Request("GET", "/v1/signals", {"namespace": namespace}), self.retries)
        return [Signal.model_validate(one) for one in found["signals"]]

    @operation
    def signal(
        self,
        name: str,
        *,
        window: str = "1h",
        by: str | None = None,
        statistic: str | None = None,
        resolution: str | None = None,
        namespace: str | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> Operation[SignalHistory]:
        """Return a signal in a window that ends now. `labels` are what its observations must have."""
        given: dict[str, Any] = {"window": window, "by": by, "statistic": statistic, "resolution": resolution}
        request = Request(
            "GET", f"/v1/signals/{quote(name, safe='')}", {**given, "namespace": namespace, **(labels or {})}
        )
        return SignalHistory.model_validate((yield from exchange.send_json(request, self.retries)))

    @operation
    def rules(self, *, namespace: str | None = None) -> Operation[Sequence[Rule]]:
        """Return rules, by name."""
        found = yield from exchange.send_json(Request("GET", "/v1/rules", {"namespace": namespace}), self.retries)
        return [Rule.model_validate(one) for one in found["rules"]]

    @operation
    def rule(self, name: str, *, namespace: str | None = None) -> Operation[Rule]:
        """Return a rule."""
        request = Request("GET", _of(name), {"namespace": namespace})
        return Rule.model_validate((yield from exchange.send_json(request, self.retries)))

    @operation
    def put_rule(
        self, document: Mapping[str, Any], *, enabled: bool | None = None, namespace: str | None = None
    ) -> Operation[Rule]:
        """Store a rule under the name in its document; one of that name gets a new version."""
        parameters = {"enabled": enabled, "namespace": namespace}
        request = Request("PUT", _of(str(document.get("rule", ""))), parameters, body=dict(document))
        return Rule.model_validate((yield from exchange.send_json(request, self.retries)))

    @operation
    def delete_rule(self, name: str, *, namespace: str | None = None) -> Operation[None]:
        """Remove a rule; of a built-in one, what was changed."""
        yield from exchange.send(Request("DELETE", _of(name), {"namespace": namespace}), self.retries)

    @operation
    def enable_rule(self, name: str, *, namespace: str | None = None) -> Operation[Rule]:
        """Switch a rule on."""
        request = Request("POST", f"{_of(name)}/enable", {"namespace": namespace})
        return Rule.model_validate((yield from exchange.send_json(request, self.retries)))

    @operation
    def disable_rule(self, name: str, *, namespace: str | None = None) -> Operation[Rule]:
        """Switch a rule off; what it fires is cleared."""
        request = Request("POST", f"{_of(name)}/disable", {"namespace": namespace})
        return Rule.model_validate((yield from exchange.send_json(request, self.retries)))

    @operation
    def try_rule(
        self, rule: str | Mapping[str, Any], *, last: str = "24h", namespace: str | None = None
    ) -> Operation[RuleTest]:
        """Return when a rule would have fired: a stored one by its name, or a document. Nothing is stored."""
        parameters = {"last": last, "namespace": namespace}
        if isinstance(rule, str):
            request = Request("POST", f"{_of(rule)}/test", parameters)
        else:
            request = Request("POST", "/v1/rules/test", parameters, body=dict(rule))
        return RuleTest.model_validate((yield from exchange.send_json(request, self.retries)))

    @operation
    def firings(
        self,
        *,
        rule: str | None = None,
        state: str | None = None,
        limit: int = 50,
        cursor: str | None = None,
        namespace: str | None = None,
    ) -> Operation[Sequence[RuleFiring]]:
        """Return firings, the newest first."""
        given = {"rule": rule, "state": state, "limit": limit, "cursor": cursor, "namespace": namespace}
        found = yield from exchange.send_json(Request("GET", "/v1/firings", given), self.retries)
        return [RuleFiring.model_validate(one) for one in found["firings"]]


def _of(name: str) -> str:
    return f"/v1/rules/{quote(name, safe='')}"
