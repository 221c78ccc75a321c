"""The tools of operators: memory of devices, governance, optimisation, figures, health."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import anyio
from pydantic import Field, model_validator

from app.mcp_server.api import Api, Refused
from app.mcp_server.tool import McpCall, NameText, ReportProgress, ServedTool, ToolArguments, WaitSeconds, object_of

FigureWindow = Annotated[Literal["15m", "1h", "6h", "24h", "7d", "31d"], Field(description="of the figures, until now")]

#: Signals that say how models work together, with what a low value means.
_COLLABORATION = ("collaboration_score", "steps_per_load", "prefix_hit_rate", "cooperation", "handoff_success")
_PERFORMANCE = ("response_time", "first_token_time", "queue_wait", "error_rate", "tokens", "cost", "cache_hit_rate")
_PAUSE = 1.0


class ReservesArguments(ToolArguments):
    """What to do with the memory of devices."""

    action: Literal["status", "explain", "load", "unload", "preview_defragment", "defragment"] = Field(
        default="status",
        description="status: what is reserved, used and free; explain: why a model is not loaded, and when it will be; "
        "load and unload a model; (preview_)defragment: move idle models so that others fit",
    )
    model: NameText | None = Field(default=None, description="with explain, load and unload")
    keep: bool = Field(default=False, description="with load: it stays, also when nobody uses it")
    wait_seconds: WaitSeconds = Field(default=60, description="with load: for the model to be ready")

    @model_validator(mode="after")
    def _is_complete(self) -> ReservesArguments:
        if self.action in ("explain", "load", "unload") and self.model is None:
            raise ValueError(f"action {self.action!r} needs 'model'")
        return self


async def manage_reserves(call: McpCall[ReservesArguments]) -> dict[str, Any]:
    """Show or change what the memory of devices is reserved for."""
    asked, api = call.arguments, call.api
    match asked.action:
        case "status":
            return {"fleet": await api.get("/v1/fleet")}
        case "explain":
            return {"explanation": await api.get("/v1/fleet/explain", model=asked.model)}
        case "unload":
            return {"pools": (await api.post("/v1/pools/stop", {"model": asked.model}))["pools"]}
        case "preview_defragment":
            return {"defragmentation": await api.get("/v1/fleet/defragment")}
        case "defragment":
            return {"defragmentation": await api.post("/v1/fleet/defragment")}
    await api.post("/v1/pools", {"model": asked.model, "keep": asked.keep})
    return await _loaded(api, str(asked.model), asked.wait_seconds, call.progress)


async def _loaded(api: Api, model: str, seconds: float, progress: ReportProgress) -> dict[str, Any]:
    """Wait for a pool of a model that serves. Returns the pools, and why none serves yet."""
    until, told = anyio.current_time() + seconds, 0
    while True:
        pools = (await api.get("/v1/pools", model=model))["pools"]
        if any(pool["state"] == "serving" for pool in pools) or anyio.current_time() >= until:
            break
        told += 1
        await progress(told, None, ", ".join(str(pool["state"]) for pool in pools) or "waiting for memory")
        await anyio.sleep(_PAUSE)
    ready = any(pool["state"] == "serving" for pool in pools)
    why = {} if ready else {"explanation": await api.get("/v1/fleet/explain", model=model)}
    return {"ready": ready, "pools": pools, **why}


class GovernanceArguments(ToolArguments):
    """Which part of governance is shown."""

    include: list[Literal["rules", "firings", "alerts", "actions", "jobs", "signals"]] = Field(
        default=["rules", "firings", "alerts"], min_length=1, max_length=6
    )
    limit: int = Field(default=20, ge=1, le=100, description="of each list")


async def governance(call: McpCall[GovernanceArguments]) -> dict[str, Any]:
    """Show what watches the installation, and what it has seen and done."""
    asked, api, found = call.arguments, call.api, dict[str, Any]()
    for part in dict.fromkeys(asked.include):
        match part:
            case "rules":
                rules = (await api.get("/v1/rules"))["rules"]
                found["rules"] = rules[: asked.limit]
            case "jobs":
                found["jobs"] = (await api.get("/v1/jobs"))["jobs"][: asked.limit]
            case "signals":
                found["signals"] = (await api.get("/v1/signals"))["signals"]
            case _:
                found[part] = (await api.get(f"/v1/{part}", limit=asked.limit))[part]
    if "alerts" in found:
        severities = sorted({str(alert["severity"]) for alert in found["alerts"]})
        found["summary"] = f"{len(found['alerts'])} alerts are open" + (
            f" ({', '.join(severities)})" if severities else ""
        )
    return found


class OptimizationArguments(ToolArguments):
    """Whether something is proposed, or done."""

    action: Literal["recommend", "kinds", "apply", "undo", "history"] = Field(
        default="recommend",
        description="recommend: what could be improved now, with the call that does it; kinds: all actions with their "
        "parameters; apply and undo one; history: what was done",
    )
    change: dict[str, Any] | None = Field(
        default=None, description="with apply: an object with `kind` and its parameters"
    )
    action_id: NameText | None = Field(default=None, description="with undo")
    reason: Annotated[str, Field(max_length=500)] = Field(default="", description="with apply: it is recorded")
    dry_run: bool = Field(default=False, description="with apply: only say what it would do")
    limit: int = Field(default=20, ge=1, le=100)

    @model_validator(mode="after")
    def _is_complete(self) -> OptimizationArguments:
        if self.action == "apply" and not self.change:
            raise ValueError("action 'apply' needs 'change'; action 'kinds' lists what it can be")
        if self.action == "undo" and self.action_id is None:
            raise ValueError("action 'undo' needs 'action_id'")
        return self


async def optimize(call: McpCall[OptimizationArguments]) -> dict[str, Any]:
    """Propose improvements, or carry out an action with the limits that hold for rules."""
    asked, api = call.arguments, call.api
    match asked.action:
        case "kinds":
            return dict(await api.get("/v1/actions/kinds"))
        case "history":
            return dict(await api.get("/v1/actions", limit=asked.limit))
        case "apply":
            body = {"action": asked.change, "reason": asked.reason, "dry_run": asked.dry_run}
            return {"applied": await api.post("/v1/actions", body)}
        case "undo":
            return {"undone": await api.post(f"/v1/actions/{asked.action_id}/undo")}
    fleet, values = await api.get("/v1/fleet"), await _values(api)
    preview = await api.get("/v1/fleet/defragment")
    return {"recommendations": recommendations(values, preview, fleet), "signals": values}


def recommendations(
    signals: Mapping[str, float | None], preview: Mapping[str, Any], fleet: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """
    Return what could be improved: each with the reason, and the call that does it.

    `signals` are values by name, `preview` is a preview of a defragmentation, `fleet` the fleet.
    """
    found: list[dict[str, Any]] = []

    def add(why: str, tool: str, arguments: Mapping[str, Any]) -> None:
        found.append({"why": why, "tool": tool, "arguments": dict(arguments)})

    if preview.get("moves"):
        why = f"{len(preview['moves'])} moves of idle models make room for models that fit nowhere now"
        add(why, "manage_memory_reserves", {"action": "defragment"})
    if (thrash := signals.get("thrash_rate") or 0.0) > 0.2:
        why = f"models are loaded {thrash:.2f} times for each step that they serve: keep the one that is needed most"
        add(why, "system_optimization", {"action": "kinds"})
    if (memory := signals.get("memory_utilisation") or 0.0) > 0.8:
        add(
            f"{memory:.0%} of the devices' memory is used",
            "system_optimization",
            {"action": "apply", "change": {"kind": "evict_idle"}},
        )
    if (errors := signals.get("error_rate") or 0.0) > 0.05:
        add(f"{errors:.0%} of attempts fail", "execute_automation_task", {"action": "list_tasks", "state": "failed"})
    if (wait := signals.get("queue_wait") or 0.0) > 3.0:
        add(f"steps wait {wait:.1f} s for their model", "manage_memory_reserves", {"action": "status"})
    for refusal in fleet.get("refusals", [])[:5]:
        model = str(refusal["model"])
        add(f"{model}: {refusal['reason']}", "manage_memory_reserves", {"action": "explain", "model": model})
    return found


class AnalyticsArguments(ToolArguments):
    """Which figures, of which time."""

    window: FigureWindow = "1h"
    by: Literal["model", "pool", "host", "namespace", "priority"] | None = Field(
        default=None, description="one line for each, instead of one for all"
    )
    signals: list[NameText] = Field(default=list(_PERFORMANCE), min_length=1, max_length=12)


async def analyse(call: McpCall[AnalyticsArguments]) -> dict[str, Any]:
    """Show how fast models work, how much, and at what cost."""
    asked, api = call.arguments, call.api
    histories = await _histories(api, asked.signals, asked.window, asked.by)
    return {"signals": histories, "models": await api.get("/v1/metrics/models", last=asked.window)}


class CollaborationArguments(ToolArguments):
    """Of which time."""

    window: FigureWindow = "24h"


async def collaboration(call: McpCall[CollaborationArguments]) -> dict[str, Any]:
    """Show how models and workflows share and build on each other."""
    api, window = call.api, call.arguments.window
    histories = await _histories(api, _COLLABORATION, window, None)
    values = {one["name"]: one["value"] for one in histories}
    words = {
        "steps_per_load": "steps that a model serves each time that it is loaded; few: models take turns too often",
        "prefix_hit_rate": "part of prompt tokens that were computed before; little: prompts begin differently",
        "cooperation": "part of attempts that go on with the results of other steps",
        "handoff_success": "part of hand-offs that succeeded; the target is 0.9",
        "collaboration_score": "0 to 1, of the three above; the target is 0.8",
    }
    return {"score": values.get("collaboration_score"), "parts": values, "meaning": words, "signals": histories}


class HealthArguments(ToolArguments):
    """What is looked at."""

    probes: bool = Field(default=True, description="also the last real token of each pool")


async def health(call: McpCall[HealthArguments]) -> dict[str, Any]:
    """Say of each component whether it works, and what is wrong."""
    api = call.api
    readiness = await api.readiness()
    found: dict[str, Any] = {"ready": readiness.get("ready"), "components": readiness}
    # While the database is down, only the components are known.
    for name, path in (("alerts", "/v1/alerts"), *((("probes", "/v1/probes"),) if call.arguments.probes else ())):
        try:
            found[name] = (await api.get(path))[name]
        except Refused as refused:
            found[name] = f"unknown: {refused}"
    return found


async def _values(api: Api) -> dict[str, float | None]:
    return {one["name"]: one["value"] for one in (await api.get("/v1/signals"))["signals"]}


async def _histories(api: Api, names: Sequence[str], window: str, by: str | None) -> list[dict[str, Any]]:
    """Return signals in a window, each with its value and its points."""
    known = {one["name"]: one for one in (await api.get("/v1/signals"))["signals"]}
    if unknown := [name for name in names if name not in known]:
        raise Refused(f"signals: {', '.join(unknown)}: no such signal; accepted: {', '.join(known)}")
    found = []
    for name in dict.fromkeys(names):
        chosen = by if by in known[name]["labels"] else None
        history = await api.get(f"/v1/signals/{name}", window=window, by=chosen)
        found.append({**history, "description": known[name]["description"], "value": known[name]["value"]})
    return found


TOOLS: tuple[ServedTool[Any], ...] = (
    ServedTool(
        "manage_memory_reserves",
        "Memory of devices",
        "Shows what the memory of GPUs and hosts is reserved for, explains why a model is not loaded, loads and "
        "unloads models, and defragments. Reservations are enforced: nothing here can take memory that others hold.",
        ReservesArguments,
        object_of(),
        manage_reserves,
    ),
    ServedTool(
        "governance_status",
        "Rules, firings, alerts",
        "Shows the rules that watch the installation, what fires now, open alerts, actions taken, and scheduled jobs.",
        GovernanceArguments,
        object_of(summary={"type": "string"}),
        governance,
        reads_only=True,
        idempotent=True,
    ),
    ServedTool(
        "system_optimization",
        "Improve what runs",
        "Recommends improvements from measured signals, each with the call that makes it; applies and takes back "
        "actions within the same limits as rules. Everything is recorded.",
        OptimizationArguments,
        object_of(recommendations={"type": "array", "items": {"type": "object"}}),
        optimize,
    ),
    ServedTool(
        "performance_analytics",
        "Latency, tokens, cost",
        "Response times, waiting, errors, tokens, cost and cache hits in a window, by model or namespace, and what "
        "each model did.",
        AnalyticsArguments,
        object_of(signals={"type": "array", "items": {"type": "object"}}, models={"type": "object"}),
        analyse,
        reads_only=True,
        idempotent=True,
    ),
    ServedTool(
        "collaboration_insights",
        "How models work together",
        "The collaboration score and its parts: sharing of loaded models and prompt prefixes, cooperation of steps, "
        "hand-offs.",
        CollaborationArguments,
        object_of(score={"type": ["number", "null"]}, parts={"type": "object"}),
        collaboration,
        reads_only=True,
        idempotent=True,
    ),
    ServedTool(
        "system_health_check",
        "Is everything well?",
        "The state of each component (database, broker, workers, models), open alerts, the last probe of each pool.",
        HealthArguments,
        object_of(ready={"type": ["boolean", "null"]}, components={"type": "object"}),
        health,
        reads_only=True,
        idempotent=True,
    ),
)
