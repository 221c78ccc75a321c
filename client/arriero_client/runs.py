"""Runs: submit, watch, steer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import quote

from arriero_client import exchange, streams
from arriero_client.effects import Clock, ConnectionLost, Emit, Open, Operation, Read, Request, Sleep
from arriero_client.errors import ClientError, RunFailed, TimedOut
from arriero_client.exchange import Retries
from arriero_client.operations import operation, stream
from arriero_client.results import Event, Run, RunPage, RunState, RunSummary, SentEvent, Token
from arriero_client.streams import SILENCE, StreamEvent


class Runs:
    """The operations on runs."""

    retries: Retries

    @operation
    def submit(
        self,
        workflow: str | None = None,
        *,
        definition: Mapping[str, Any] | str | None = None,
        inputs: Mapping[str, Any] | None = None,
        version: int | None = None,
        models: Mapping[str, str] | None = None,
        priority: str | None = None,
        rank: int | None = None,
        labels: Mapping[str, str] | None = None,
        deadline: str | float | None = None,
        retention: str | float | None = None,
        idempotency_key: str | None = None,
    ) -> Operation[Run]:
        """
        Submit a run of a named workflow, or of a definition; it is stored when this returns.

        A submission that is repeated after a lost connection makes no second run: it has an idempotency key.
        """
        body = _without_none(
            workflow=workflow,
            definition=definition,
            inputs=dict(inputs or {}),
            version=version,
            models=models,
            priority=priority,
            rank=rank,
            labels=labels,
            deadline=deadline,
            retention=retention,
        )
        headers = {"Idempotency-Key": idempotency_key or exchange.new_key()}
        found = yield from exchange.send_json(Request("POST", "/v1/runs", body=body, headers=headers), self.retries)
        return Run.model_validate(found)

    @operation
    def get(self, run_id: str) -> Operation[Run]:
        """Return a run with its steps."""
        return (yield from _get(self, run_id))

    @operation
    def list(
        self,
        *,
        state: str | Sequence[str] | None = None,
        workflow: str | None = None,
        labels: Mapping[str, str] | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> Operation[RunPage]:
        """
        Return a page of runs, the newest first. `cursor` is `next_cursor` of the page before.

        Runs that were submitted at `created_after` or later, and before `created_before`; both with a time zone.
        """
        return (yield from _page(self, state, workflow, labels, (created_after, created_before), limit, cursor))

    @stream
    def list_all(
        self,
        *,
        state: str | Sequence[str] | None = None,
        workflow: str | None = None,
        labels: Mapping[str, str] | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
    ) -> Operation[type[RunSummary]]:
        """Yield all runs, the newest first, page by page."""
        cursor: str | None = None
        while True:
            page = yield from _page(self, state, workflow, labels, (created_after, created_before), 200, cursor)
            for run in page.runs:
                yield Emit(run)
            if (cursor := page.next_cursor) is None:
                return RunSummary

    @operation
    def wait(self, run_id: str, *, timeout: float | None = None, check: bool = True) -> Operation[Run]:
        """
        Wait until a run has ended, and return it. Raises TimedOut after `timeout` seconds.

        Raises RunFailed for a run that did not succeed, unless `check` is false.
        """
        return (yield from _wait(self, run_id, timeout, check))

    @operation
    def run(
        self,
        /,
        workflow: str | None = None,
        *,
        definition: Mapping[str, Any] | str | None = None,
        inputs: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        check: bool = True,
        idempotency_key: str | None = None,
        **options: Any,
    ) -> Operation[Run]:
        """Submit a run, wait for its end, and return it: `submit` and `wait`, whose arguments it has."""
        submitted = yield from Runs.submit.function(
            self, workflow, definition=definition, inputs=inputs, idempotency_key=idempotency_key, **options
        )
        return (yield from _wait(self, submitted.id, timeout, check))

    @stream
    def events(self, run_id: str, *, after: int = 0) -> Operation[type[Event]]:
        """Yield the history of a run, with what is still to come, until it has ended. Lost connections are resumed."""

        def consume(event: StreamEvent) -> tuple[bool, Any]:
            return False, Event.model_validate(event.json())

        request = Request("GET", f"{_path(run_id)}/events", timeout=SILENCE)
        last = str(after) if after else ""
        yield from streams.resumed(request, self.retries, consume, last, lambda: _has_ended(self, run_id))
        return Event

    @stream
    def tokens(self, run_id: str, step: str, *, after: str = "") -> Operation[type[Token]]:
        """
        Yield the tokens of a step while it is written, until it has ended. Lost connections are resumed.

        `after` is the id of the last known one. The server keeps tokens for ten minutes.
        """

        def consume(event: StreamEvent) -> tuple[bool, Any]:
            if event.kind == "error":
                raise ClientError(str(event.json()))
            return event.kind == "done", Token(event.id, event.kind, event.json())

        def has_ended() -> Operation[bool]:
            found = yield from _get(self, run_id)
            states = [one.state for one in found.steps if one.key == step]
            return found.is_final or not states or states[0] in ("succeeded", "failed", "cancelled", "skipped")

        request = Request("GET", f"{_path(run_id)}/steps/{quote(step, safe='')}/tokens", timeout=SILENCE)
        yield from streams.resumed(request, self.retries, consume, after, has_ended)
        return Token

    @operation
    def cancel(self, run_id: str) -> Operation[RunState]:
        """Request the end of a run. Its steps stop at their next token."""
        found = yield from exchange.send_json(Request("POST", f"{_path(run_id)}/cancel"), self.retries)
        return RunState.model_validate(found)

    @operation
    def retry(self, run_id: str) -> Operation[RunState]:
        """Repeat what did not succeed in a run that has ended."""
        request = Request("POST", f"{_path(run_id)}/retry", repeatable=False)
        return RunState.model_validate((yield from exchange.send_json(request, self.retries)))

    @operation
    def fork(self, run_id: str, step: str, *, inputs: Mapping[str, Any] | None = None) -> Operation[Run]:
        """Run a finished run again from a step on, as a new run; `inputs` replace those of the same names."""
        body = {"from": step, "inputs": dict(inputs or {})}
        request = Request("POST", f"{_path(run_id)}/fork", body=body, repeatable=False)
        return Run.model_validate((yield from exchange.send_json(request, self.retries)))

    @operation
    def send_event(
        self, run_id: str, name: str, payload: Any = None, *, idempotency_key: str | None = None
    ) -> Operation[SentEvent]:
        """Send an event to a run, such as the answer that a `wait` step waits for. Repeating it sends it once."""
        request = Request(
            "POST",
            f"{_path(run_id)}/events",
            body={"name": name, "payload": payload},
            headers={"Idempotency-Key": idempotency_key or exchange.new_key()},
        )
        return SentEvent.model_validate((yield from exchange.send_json(request, self.retries)))

    @operation
    def payload(self, value: Any) -> Operation[Any]:
        """Return a value of a run; one that was too long for the answer (`{"$payload": …}`) is fetched."""
        reference = value.get("$payload") if isinstance(value, dict) and len(value) == 1 else None
        if not isinstance(reference, dict) or not str(reference.get("href", "")).startswith("/v1/"):
            return value
        return (yield from exchange.send_json(Request("GET", str(reference["href"])), self.retries))


def _path(run_id: str) -> str:
    return f"/v1/runs/{quote(run_id, safe='')}"


def _get(client: Runs, run_id: str) -> Operation[Run]:
    return Run.model_validate((yield from exchange.send_json(Request("GET", _path(run_id)), client.retries)))


def _has_ended(client: Runs, run_id: str) -> Operation[bool]:
    return (yield from _get(client, run_id)).is_final


def _page(
    client: Runs,
    state: str | Sequence[str] | None,
    workflow: str | None,
    labels: Mapping[str, str] | None,
    times: tuple[datetime | None, datetime | None],
    limit: int,
    cursor: str | None,
) -> Operation[RunPage]:
    after, before = (None if one is None else one.isoformat() for one in times)
    query = {
        "state": [state] if isinstance(state, str) else state,
        "workflow": workflow,
        "label": [f"{name}={value}" for name, value in labels.items()] if labels else None,
        "created_after": after,
        "created_before": before,
        "limit": limit,
        "cursor": cursor,
    }
    return RunPage.model_validate((yield from exchange.send_json(Request("GET", "/v1/runs", query), client.retries)))


def _wait(client: Runs, run_id: str, timeout: float | None, check: bool) -> Operation[Run]:
    until = math.inf if timeout is None else (yield Clock()) + timeout
    while True:
        found = yield from _get(client, run_id)
        if found.is_final:
            if check and found.state != "succeeded":
                raise RunFailed(found)
            return found
        if (yield Clock()) >= until:
            raise TimedOut(f"run {run_id} has not ended within {timeout:g} s; it is {found.state}")
        yield from _watch(run_id, until)


def _watch(run_id: str, until: float) -> Operation[None]:
    """Read the events of a run until its end, an instant of the clock, or a lost connection."""
    seconds = min(max(until - (yield Clock()), 0.01), SILENCE)
    request = Request("GET", f"{_path(run_id)}/events", headers={"Accept": "text/event-stream"}, timeout=seconds)
    try:
        reply = yield Open(request)
        if reply.status < 400:
            while (yield Read()) is not None:
                if (yield Clock()) >= until:
                    return
            return
    except ConnectionLost as lost:
        if lost.timed_out:
            return
    yield Sleep(min(1.0, seconds))


def _without_none(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
