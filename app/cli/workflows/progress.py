"""
The progress of a run as lines: what has changed between two views of it. For logs, and where nothing can be redrawn.

Pure: views of the API in, lines out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from app.cli.output import seconds, shortened
from app.workflows.state_machine.states import FINAL_RUNS

#: Lines about the items of a map: at most one for each so many of them, in per cent.
_PART = 10
#: Seconds between two lines about tokens that are being written.
_EVERY = 5
#: Most characters of the request of an approval in a line.
_MESSAGE = 300
#: Most characters of the reason why no pool is started.
_REASON = 1_000

#: Figures of a reason, which change while it stays the same.
_FIGURES = re.compile(r"[\d.,]+( (s|min|steps?|[KMGT]iB|B)\b)?")

#: What is said of a text with the finish reason `length`.
CUT = "cut at max_tokens"

_View = Mapping[str, Any]


def changes(before: _View | None, now: _View, at: datetime, earlier: datetime | None = None) -> Iterator[str]:
    """
    Yield a line for each change of the run and its steps, and now and then one for tokens that are being written.

    `at` is the instant of the view, `earlier` that of the view before.
    """
    run = f"run {now['id']} of {now['workflow']}"
    changed, ended = before is None or before["state"] != now["state"], now["state"] in FINAL_RUNS
    if changed and not ended:
        yield f"{run} is {now['state']}{expected(now)}"
        if before is None and (warning := (now.get("expected") or {}).get("warning")):
            yield f"warning: {warning}"
    if before is not None and before["paused"] != now["paused"]:
        yield f"{run} is {'paused' if now['paused'] else 'resumed'}"
    steps = {} if before is None else {step["key"]: step for step in before["steps"]}
    for step in now["steps"]:
        lines = list(_of_step(steps.get(step["key"]), step, now["id"], at))
        yield from lines or _written(step, at, earlier)
    if changed and ended:
        yield f"{run} is {now['state']}"


def waits(before: _View | None, now: _View) -> Iterator[str]:
    """Yield for each step why no pool of its model is started, when that has changed."""
    steps = {} if before is None else {step["key"]: step for step in before["steps"]}
    for step in now["steps"]:
        yield from _waiting(steps.get(step["key"]), step)


def expected(run: _View) -> str:
    """Return for how long a run is expected to go on, with a comma before it; empty when that is a guess or unknown."""
    left = run.get("remaining")
    if left is None or left["basis"] == "defaults":
        return ""
    return f", about {seconds(left['seconds'])} left ({seconds(left['low'])} to {seconds(left['high'])})"


def shown_state(step: _View) -> str:
    """Return the state of a step for people: a step whose items or run are in progress is running."""
    awaits = step["awaits"] or {}
    return "running" if step["state"] == "awaiting" and (step["items"] or "run" in awaits) else str(step["state"])


def counted(step: _View, at: datetime) -> str:
    """Return how far a map has come, its rate, and the time that it still needs at that rate."""
    items = step["items"]
    done = _done(items)
    text = f"{done}/{items['total']} items" + (f", {items['failed']} failed" if items["failed"] else "")
    text += f", {items['truncated']} {CUT}" if items["truncated"] else ""
    left = items["total"] - done
    passed = _passed(step, at)
    if done and left and passed > 0 and step.get("kind") != "agent":  # nobody knows how many turns follow
        text += f", {done / passed:.2g}/s, about {seconds(left * passed / done)} left"
    written = tokens(step)
    return f"{text}, {written}" if written else text


def tokens(step: _View) -> str:
    """Return the tokens of a step, those that are being written included; empty when there are none."""
    live = step["live"]
    if live is None:
        return f"{step['tokens_in']} + {step['tokens_out']} tokens" if step["tokens_in"] or step["tokens_out"] else ""
    rate = "" if live["tokens_per_s"] is None else f", {live['tokens_per_s']:.3g}/s"
    return f"{step['tokens_out'] + live['tokens_out']} tokens so far{rate}"


def is_cut(step: _View) -> bool:
    """Return whether the text of a step, or of an item, is complete only in its beginning."""
    return bool(step["finish_reason"] == "length" and step["state"] == "succeeded")


def awaited(step: _View, run_id: str) -> str:
    """Return what an awaiting step waits for, with the command that ends the wait where there is one."""
    awaits = step["awaits"] or {}
    if "event" in awaits and awaits.get("message"):
        message = shortened(awaits["message"], _MESSAGE)
        return f"waits for an approval: {message} (arriero runs approve {run_id} {step['key']} [--reject])"
    if "event" in awaits:
        command = f"arriero runs send-event {run_id} {awaits['event']} --payload JSON"
        return f"waits for the event {awaits['event']} ({command})"
    if "run" in awaits:
        return f"waits for run {awaits['run']} of {awaits['workflow']}"
    if awaits.get("until"):
        return f"waits until {awaits['until']}"
    return f"waits for {seconds(awaits['for_s'])}" if awaits.get("for_s") is not None else "waits"


def _of_step(before: _View | None, now: _View, run_id: str, at: datetime) -> Iterator[str]:
    name, state = f"step {now['key']}", now["state"]
    changed = before is None or (before["state"], before["attempt"]) != (state, now["attempt"])
    if now["items"] and state == "awaiting":
        yield from _waiting(before, now)
        part = _done(now["items"]) * 100 // max(now["items"]["total"], 1) // _PART
        shown = (
            before is not None and before["items"] and _done(before["items"]) * 100 // max(before["items"]["total"], 1)
        )
        if changed or not isinstance(shown, int) or shown // _PART != part:
            yield f"{name}: {counted(now, at)}"
        return
    yield from _waiting(before, now)
    if not changed or state in ("pending", "ready"):
        return
    parts = [f"{name} {state}" if state != "awaiting" else f"{name} {awaited(now, run_id)}"]
    if state in ("succeeded", "failed", "cancelled"):
        if now["took_s"] is not None:
            parts.append(f"after {seconds(now['took_s'])}")
        if now["items"]:
            parts.append(f"({counted(now, at)})")
        elif written := tokens(now):
            parts.append(f"({written})")
    if is_cut(now):
        parts.append(f"- {CUT}")
    if now["branch"] and state == "succeeded":
        parts.append(f"→ {now['branch']}")
    if now["model"] and state == "running":
        parts.append(f"on {now['model']}" + (f", attempt {now['attempt']}" if now["attempt"] > 1 else ""))
    if now["error"] and state in ("failed", "waiting"):
        parts.append(f"- {shortened(now['error'].get('message', ''), 200)}")
    yield " ".join(parts)


def _written(step: _View, at: datetime, earlier: datetime | None) -> Iterator[str]:
    """Yield a line about tokens that are being written, once in so many seconds."""
    if step["live"] is None or earlier is None or _passed(step, at) // _EVERY == _passed(step, earlier) // _EVERY:
        return
    yield f"step {step['key']}: {counted(step, at) if step['items'] else tokens(step)}"


def _passed(step: _View, at: datetime) -> float:
    """Return the seconds since a step began."""
    return (at - datetime.fromisoformat(step["started_at"])).total_seconds() if step["started_at"] else 0.0


def _waiting(before: _View | None, now: _View) -> Iterator[str]:
    """Yield why no pool of the step's model is started, unless only figures in the reason have changed."""
    reason, known = now["waiting_reason"] or "", (before or now)["waiting_reason"] or ""
    if reason and (before is None or _FIGURES.sub("", reason) != _FIGURES.sub("", known)):
        model = f" for {now['model']}" if now["model"] else ""
        yield f"step {now['key']} waits{model}: {shortened(reason, _REASON)}"


def _done(items: Mapping[str, int]) -> int:
    return items["total"] - items["waiting"] - items["in_flight"]
