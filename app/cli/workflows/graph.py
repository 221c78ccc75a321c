"""The graph of a run for the terminal: a tree of steps with their states and figures."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text
from rich.tree import Tree

from app.cli.output import seconds, shortened, state
from app.cli.workflows.progress import CUT, awaited, counted, expected, is_cut, shown_state, tokens

#: The mark before a step, by its state.
MARKS: Mapping[str, str] = {
    "pending": "·",
    "ready": "○",
    "running": "●",
    "waiting": "↻",
    "awaiting": "◔",
    "cancelling": "◌",
    "succeeded": "✓",
    "failed": "✗",
    "skipped": "-",
    "cancelled": "✗",
}


def drawn(found: Mapping[str, Any], at: datetime) -> RenderableType:
    """Return the tree of a run of the API at an instant. A step that needs several is below the deepest of them."""
    paused = Text(" (paused)", "yellow") if found["paused"] else Text()
    head = Text.assemble("run ", (found["id"], "bold"), f" of {found['workflow']} is ", state(found["state"]), paused)
    head.append(expected(found), "dim")
    if warning := (found.get("expected") or {}).get("warning") if not found.get("finished_at") else None:
        head.append(f"\nwarning: {warning}", "yellow")
    steps = {step["key"]: step for step in found["steps"]}
    depths: dict[str, int] = {}
    nodes: dict[str, Tree] = {}
    root = Tree("", hide_root=True, guide_style="dim")
    for key in _in_order(steps):
        needs = [need.partition(".")[0] for need in steps[key]["needs"]]
        above = max(needs, key=lambda need: depths[need], default=None)
        depths[key] = 0 if above is None else depths[above] + 1
        others = [need for need in steps[key]["needs"] if need.partition(".")[0] != above]
        nodes[key] = (nodes[above] if above is not None else root).add(_line(steps[key], others, found["id"], at))
    return Group(head, root)


def _line(step: Mapping[str, Any], others: list[str], run_id: str, at: datetime) -> Text:
    now = shown_state(step)
    line = Text.assemble((MARKS[now] + " ", ""), (step["key"], "bold"), " ", state(now))
    parts = []
    if step["branch"]:
        parts.append(f"→ {step['branch']}")
    if step["model"]:
        parts.append(", ".join(filter(None, (step["model"], tokens(step)))))
    if step["items"]:
        parts.append(counted(step, at))
    if step["took_s"] is not None:
        parts.append(seconds(step["took_s"]))
    if step["attempt"] > 1:
        parts.append(f"attempt {step['attempt']}")
    if step["state"] == "awaiting" and step["awaits"] and not step["items"]:
        parts.append(awaited(step, run_id))
    if step["waiting_reason"]:
        parts.append(f"waits: {shortened(step['waiting_reason'], 400)}")
    if others:
        parts.append("also after " + ", ".join(others))
    if step["error"] and step["state"] in ("failed", "waiting"):
        parts.append(shortened(step["error"].get("message", ""), 80))
    if is_cut(step):
        line.append(f"  {CUT}", "yellow")
    return line.append("  " + " · ".join(parts), "dim") if parts else line


def _in_order(steps: Mapping[str, Mapping[str, Any]]) -> list[str]:
    ordered: list[str] = []
    left = list(steps)
    while left:
        ready = [key for key in left if all(need.partition(".")[0] in ordered for need in steps[key]["needs"])]
        ordered += ready
        left = [key for key in left if key not in ready]
    return ordered
