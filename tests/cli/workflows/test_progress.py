"""The progress of a run as lines."""

from __future__ import annotations

import io
from datetime import UTC, datetime, timedelta
from typing import Any

from rich.console import Console

from app.cli.workflows.graph import drawn
from app.cli.workflows.progress import changes, shown_state, waits

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


def step(key: str = "a", state: str = "pending", **more: Any) -> dict[str, Any]:
    """A step as the API shows it."""
    made = dict.fromkeys(
        (
            "branch",
            "model",
            "awaits",
            "items",
            "error",
            "took_s",
            "started_at",
            "finish_reason",
            "live",
            "waiting_reason",
        )
    )
    return made | {"key": key, "state": state, "attempt": 1, "tokens_in": 0, "tokens_out": 0} | more


def run(*steps: dict[str, Any], state: str = "running", paused: bool = False) -> dict[str, Any]:
    return {"id": "r1", "workflow": "flow", "state": state, "paused": paused, "steps": list(steps)}


def mapped(done: int, *, failed: int = 0, cut: int = 0, of: int = 40) -> dict[str, Any]:
    items = {"total": of, "waiting": of - done - 4, "in_flight": 4, "failed": failed, "truncated": cut}
    return step("each", "awaiting", items=items, started_at=BEGAN.isoformat())


def lines(before: dict[str, Any] | None, now: dict[str, Any], after: int = 10) -> list[str]:
    return list(changes(before, now, BEGAN + timedelta(seconds=after)))


def test_each_change_is_a_line() -> None:
    first = run(step("a", "running", model="m:1"), step("b"))
    done = step("a", "succeeded", model="m:1", took_s=3.21, tokens_in=12, tokens_out=40)
    failed = step("b", "failed", took_s=0.5, error={"message": "no\n \x1b[31manswer\x07"})

    assert lines(None, first) == ["run r1 of flow is running", "step a running on m:1"]
    assert lines(first, first) == []
    assert lines(first, run(done, failed, state="failed")) == [
        "step a succeeded after 3.21 s (12 + 40 tokens)",
        "step b failed after 0.50 s - no answer\ufffd",
        "run r1 of flow is failed",
    ]
    assert lines(first, first | {"paused": True}) == ["run r1 of flow is paused"]


def test_a_map_shows_items_rate_and_what_is_left_at_each_tenth() -> None:
    assert lines(run(mapped(0)), run(mapped(3))) == []
    assert lines(run(mapped(3)), run(mapped(10, failed=1))) == [
        "step each: 10/40 items, 1 failed, 1/s, about 30 s left"
    ]
    assert shown_state(mapped(3)) == "running"


def test_what_is_waited_for_names_the_command() -> None:
    approval = step("ok", "awaiting", awaits={"event": "ok", "message": "Publish\nthis?"})
    event = step("pay", "awaiting", awaits={"event": "payment"})
    called = step("call", "awaiting", awaits={"run": "r2", "workflow": "child"})
    until = step("later", "awaiting", awaits={"until": "2026-01-02T00:00:00+00:00"})

    assert lines(run(), run(approval, event, called, until)) == [
        "step ok waits for an approval: Publish this? (arriero runs approve r1 ok [--reject])",
        "step pay waits for the event payment (arriero runs send-event r1 payment --payload JSON)",
        "step call waits for run r2 of child",
        "step later waits until 2026-01-02T00:00:00+00:00",
    ]
    assert [shown_state(one) for one in (approval, called)] == ["awaiting", "running"]


def test_another_attempt_is_a_line() -> None:
    waits = step("a", "waiting", model="m:1", error={"message": "broke"})
    again = step("a", "running", model="m:1", attempt=2)

    assert lines(run(step("a", "running")), run(waits)) == ["step a waiting - broke"]
    assert lines(run(waits), run(again)) == ["step a running on m:1, attempt 2"]


def test_a_cut_text_is_marked() -> None:
    cut = step("a", "succeeded", model="m:1", took_s=1.0, tokens_in=3, tokens_out=8, finish_reason="length")

    assert lines(run(step("a", "running", model="m:1")), run(cut)) == [
        "step a succeeded after 1.00 s (3 + 8 tokens) - cut at max_tokens"
    ]
    assert "2 cut at max_tokens" in lines(run(mapped(3)), run(mapped(10, cut=2)))[0]
    whole = cut | {"finish_reason": "stop"}
    assert "cut" not in lines(run(step("a", "running")), run(whole))[0]


def test_tokens_that_are_being_written_are_a_line_each_five_seconds() -> None:
    live = {"tokens_out": 43, "tokens_per_s": 21.44}
    writing = run(step("a", "running", model="m:1", started_at=BEGAN.isoformat(), live=live))

    def seen(earlier: int, at: int, now: dict[str, Any] = writing) -> list[str]:
        return list(changes(now, now, BEGAN + timedelta(seconds=at), BEGAN + timedelta(seconds=earlier)))

    assert seen(4, 6) == ["step a: 43 tokens so far, 21.4/s"]
    assert seen(5, 6) == []
    each = mapped(10) | {"tokens_in": 70, "tokens_out": 30, "live": {"tokens_out": 5, "tokens_per_s": None}}
    assert seen(9, 10, run(each)) == ["step each: 10/40 items, 1/s, about 30 s left, 35 tokens so far"]
    out = io.StringIO()
    text = Console(width=120, file=out, no_color=True)
    text.print(drawn(writing | {"steps": [step | {"needs": []} for step in writing["steps"]]}, BEGAN))
    assert "a running  m:1, 43 tokens so far, 21.4/s" in out.getvalue()


def test_why_no_pool_is_started_is_a_line_and_not_repeated_for_other_figures() -> None:
    first = step("a", "ready", model="m:1", waiting_reason="needs 4 GiB, about 12 s to go; it waits\n\x07")
    later = first | {"waiting_reason": "needs 4.1 GiB, about 2 min to go; it waits\n\x07"}
    other = first | {"waiting_reason": "no host has its file"}

    assert lines(run(step("a", "ready", model="m:1")), run(first)) == [
        "step a waits for m:1: needs 4 GiB, about 12 s to go; it waits \ufffd"
    ]
    assert lines(run(first), run(later)) == []
    assert lines(run(later), run(other)) == ["step a waits for m:1: no host has its file"]
    assert lines(run(other), run(step("a", "running", model="m:1"))) == ["step a running on m:1"]
    assert lines(None, run(other))[1:] == ["step a waits for m:1: no host has its file"]
    assert list(waits(None, run(other))) == ["step a waits for m:1: no host has its file"], "with --json too"
    assert list(waits(run(other), run(other))) == []
    waiting = mapped(3) | {"waiting_reason": "no host has its file"}
    assert lines(run(mapped(3)), run(waiting)) == ["step each waits: no host has its file"]
