"""`arriero audit`: who has changed what."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer

from app.cli.client import connected
from app.cli.output import AsJson, console, print_json, settings_of, shortened, table
from app.kernel import clock
from app.kernel.errors import InvalidInput, Problem
from app.kernel.units import durations


def audit(
    context: typer.Context,
    namespace: Annotated[str | None, typer.Option(help="Only changes by keys of this namespace.")] = None,
    actor: Annotated[str | None, typer.Option(help="Only changes by this key (its name), or `local`.")] = None,
    action: Annotated[str | None, typer.Option(help="Only actions with this part, such as /v1/workflows.")] = None,
    target: Annotated[str | None, typer.Option(help="Only changes of what has this name or id.")] = None,
    since: Annotated[str | None, typer.Option(help="Only the last time: `2h`; or since an instant (ISO 8601).")] = None,
    limit: Annotated[int, typer.Option("-n", "--limit", min=1, max=500, help="Most entries.")] = 50,
    as_json: AsJson = False,
) -> None:
    """Print the audit log, the newest entry first: who has changed what, when, from where, and how it ended."""
    parameters: dict[str, Any] = {"namespace": namespace, "actor": actor, "action": action, "target": target}
    begin = None if since is None else _instant(since).isoformat()
    with connected(settings_of(context)) as client:
        found = client.get("/v1/audit", limit=limit, since=begin, **parameters)
    if as_json:
        print_json(found)
        return
    printed = table(("at", "who", "from", "action", "target", "status", "what"), right=("status",))
    for one in found["entries"]:
        printed.add_row(
            f"{one['at']:.19}",
            shortened(one["actor"], 40) + (f" ({one['namespace']})" if one["namespace"] else ""),
            shortened(one["address"], 45),
            shortened(one["action"], 60),
            shortened(", ".join(one["target"].values()), 60),
            str(one["status"]),
            shortened(one["summary"], 100),
        )
    console().print(printed if printed.row_count else "no entries")


def _instant(text: str) -> datetime:
    """Return the instant that a text means: a duration ago, or an instant."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        try:
            ago: timedelta = durations.parse(text)
        except ValueError:
            accepted = "a duration such as 2h, or an instant such as 2026-05-01T12:00:00Z"
            raise InvalidInput([Problem("--since", f"{text!r} is no instant", accepted)], "arguments") from None
        return clock.now() - ago
    return found.replace(tzinfo=found.tzinfo or UTC)
