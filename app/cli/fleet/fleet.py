"""`arriero fleet`, `arriero pools`, `arriero hosts`: the state of the fleet, explanations, and operator commands."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, timedelta
from typing import Annotated, Any
from urllib.parse import quote
from uuid import UUID

import typer
from rich.text import Text

from app.cli.client import Client, connected
from app.cli.output import AsJson, ago, console, notes, print_json, seconds, settings_of, table
from app.kernel import clock
from app.kernel.errors import Conflict, NotFound, Unavailable
from app.kernel.units import durations
from app.kernel.units.sizes import rounded

app = typer.Typer(
    no_args_is_help=False,
    help="The fleet: hosts, their devices, and the pools on them.\n\n"
    "Example: arriero fleet; arriero fleet why smollm2:135m",
)
pools_app = typer.Typer(
    no_args_is_help=True,
    help="Pools: one process each, with one model on one set of devices.\n\n"
    "They are started when there is demand for their model, and stopped when there is none, or to make room; "
    "`start` and `stop` do it by hand. A pool is named by its id, or by the end of its id.",
)
hosts_app = typer.Typer(
    no_args_is_help=True,
    help="Hosts: machines with an agent (`arriero agent`).\n\n"
    "A cordoned host gets no new pools. A draining host is emptied. A lost host gets no pools until its agent joins "
    "again.",
)

_STYLES: Mapping[str, str] = {
    "serving": "green",
    "starting": "cyan",
    "waiting": "magenta",
    "draining": "yellow",
    "suspect": "bold red",
    "ended": "dim",
    "failed": "red",
    "schedulable": "green",
    "cordoned": "yellow",
    "lost": "bold red",
    "silent": "bold red",
    "served": "green",
    "queued": "cyan",
    "coming": "cyan",
    "refused": "bold red",
    "unasked": "dim",
}
#: Seconds between two polls of a model that the command waits for.
_POLL = 0.5

_Pool = Annotated[str, typer.Argument(metavar="POOL", help="The id of a pool, or the end of its id.")]
_Host = Annotated[str, typer.Argument(metavar="HOST", help="The name of a host.")]


@app.callback(invoke_without_command=True)
def fleet(context: typer.Context, as_json: AsJson = False) -> None:
    """Show hosts, devices, pools, reserves, models that are kept running, and demanded models that are not started."""
    if context.invoked_subcommand is not None:
        return
    with connected(settings_of(context)) as client:
        found = client.get("/v1/fleet")
    if as_json:
        print_json(found)
        return
    _print_hosts(found["hosts"])
    console().print()
    _print_pools(found["pools"])
    _print_rest(found)


@app.command()
def why(
    context: typer.Context,
    what: Annotated[str, typer.Argument(metavar="MODEL|STEP", help="A model, or the id of a step that waits.")],
    as_json: AsJson = False,
) -> None:
    """Explain why a model is not running, what must happen first, and when it is expected to run."""
    query = {"step": what} if _is_id(what) else {"model": what}
    with connected(settings_of(context)) as client:
        found = client.get("/v1/fleet/explain", **query)
    if as_json:
        print_json(found)
        return
    _print_explanation(found)


@app.command()
def defragment(
    context: typer.Context,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be moved, and move nothing.")] = False,
    history: Annotated[bool, typer.Option("--history", help="Print past moves and what they gained.")] = False,
    as_json: AsJson = False,
) -> None:
    """
    Move idle pools, so that models fit that now fit on no device although the total free memory is enough.

    A control worker does this every fleet.defragment_every. Busy and pinned pools are never moved.
    """
    with connected(settings_of(context)) as client:
        if history:
            found = client.get("/v1/fleet/defragmentations")
        else:
            found = client.get("/v1/fleet/defragment") if dry_run else client.post("/v1/fleet/defragment")
    if as_json:
        print_json(found)
    elif history:
        now = clock.now().astimezone(UTC)
        for one in found["defragmentations"]:
            console().print(Text(ago(one["at"], now), "bold"))
            _print_moves(one, "moved")
        if not found["defragmentations"]:
            console().print("nothing was moved in the last thirty days")
    else:
        _print_moves(found, "would move" if dry_run else "moves")
        if not found["moves"]:
            console().print("nothing needs to be moved")


@pools_app.command("list")
def list_pools(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="Only pools of this model.")] = None,
    ended: Annotated[
        bool, typer.Option("--ended", help="Include pools that ended recently, with the reason of their end.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List pools, the newest first."""
    with connected(settings_of(context)) as client:
        found = client.get("/v1/pools", model=model, ended=ended)
    if as_json:
        print_json(found)
        return
    _print_pools(found["pools"], ended=ended)


@pools_app.command()
def start(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model of the catalogue, such as smollm2:135m.")],
    keep: Annotated[bool, typer.Option("--keep", help="Keep it running until it is stopped.")] = False,
    pin: Annotated[
        bool, typer.Option("--pin", help="Keep it running, and never stop it to make room for others.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it serves, at most pools.start_timeout.")] = False,
    as_json: AsJson = False,
) -> None:
    """
    Load a model now. Without options it stays loaded for its keep_alive, as after a request.

    Exits with 4 when the model cannot be started and waiting does not help; with --wait, with 5 when it does not serve
    in time.
    """
    settings = settings_of(context)
    with connected(settings) as client:
        found = client.post("/v1/pools", {"model": model, "keep": keep, "pinned": pin})
        if wait:
            found = _until_served(client, model, settings.pools.start_timeout)
    if as_json:
        print_json(found)
    else:
        _print_explanation(found)
    if _is_hopeless(found):
        raise typer.Exit(4)


@pools_app.command()
def stop(
    context: typer.Context,
    what: Annotated[str, typer.Argument(metavar="POOL|MODEL", help="A pool, or a model with all its pools.")],
    as_json: AsJson = False,
) -> None:
    """
    Stop a pool, or all pools of a model. Steps may finish within pools.drain_timeout; the others are requeued.

    A model with demand is started again. A model that `start --keep` keeps running is no longer kept, unless
    pools.models or its entry says so.
    """
    with connected(settings_of(context)) as client:
        if ":" in what:
            found = client.post("/v1/pools/stop", {"model": what})
        else:
            found = {"pools": [client.post(f"/v1/pools/{_quoted(what)}/stop")]}
    if as_json:
        print_json(found)
        return
    if found["pools"]:
        _print_pools(found["pools"])
    else:
        console().print(f"{what} has no pools; no operator command keeps it running any more")


@pools_app.command()
def restart(
    context: typer.Context,
    what: Annotated[str, typer.Argument(metavar="POOL|MODEL", help="A pool, or a model with all its pools.")],
    as_json: AsJson = False,
) -> None:
    """Stop a pool, or all pools of a model, and start new ones."""
    with connected(settings_of(context)) as client:
        pools = [what]
        if ":" in what:
            pools = [pool["id"] for pool in client.get("/v1/pools", model=what)["pools"]]
            if not pools:
                raise NotFound("pool of the model", what)
        found = {"pools": [client.post(f"/v1/pools/{_quoted(pool)}/restart") for pool in pools]}
    if as_json:
        print_json(found)
        return
    _print_pools(found["pools"])


@pools_app.command()
def logs(context: typer.Context, pool: _Pool, as_json: AsJson = False) -> None:
    """Print the last lines of a pool's log, of an ended pool too."""
    with connected(settings_of(context)) as client:
        found = client.get(f"/v1/pools/{_quoted(pool)}/log")
    if as_json:
        print_json(found)
        return
    for line in found["lines"]:
        typer.echo(line)


@hosts_app.command("list")
def list_hosts(context: typer.Context, as_json: AsJson = False) -> None:
    """List hosts and their devices."""
    with connected(settings_of(context)) as client:
        found = client.get("/v1/hosts")
    if as_json:
        print_json(found)
        return
    _print_hosts(found["hosts"])


@hosts_app.command()
def cordon(context: typer.Context, host: _Host, as_json: AsJson = False) -> None:
    """Cordon a host: no new pool is placed on it; running pools continue."""
    _mark(context, host, "cordoned", as_json=as_json)


@hosts_app.command()
def drain(context: typer.Context, host: _Host, as_json: AsJson = False) -> None:
    """Drain a host: its pools are started on other hosts if possible, and stopped here."""
    _mark(context, host, "draining", as_json=as_json)


@hosts_app.command("uncordon")
def uncordon(context: typer.Context, host: _Host, as_json: AsJson = False) -> None:
    """Uncordon a host: new pools are placed on it again."""
    _mark(context, host, "schedulable", as_json=as_json)


@hosts_app.command()
def remove(
    context: typer.Context,
    host: _Host,
    lost: Annotated[
        bool, typer.Option("--lost", help="The machine is gone permanently, with all its processes.")
    ] = False,
) -> None:
    """Remove a host whose agent has ended."""
    with connected(settings_of(context)) as client:
        client.delete(f"/v1/hosts/{_quoted(host)}", lost=lost)
    console().print(f"{host} is removed")


@hosts_app.command()
def invite(
    context: typer.Context,
    host: Annotated[
        str, typer.Argument(metavar="[HOST]", help="The only host that may use it. By default any new one.")
    ] = "",
    expires: Annotated[str, typer.Option(help="The time until the token expires: '10m', '1d'; at most 7d.")] = "1h",
    as_json: AsJson = False,
) -> None:
    """
    Invite a host: print a token with which it joins, once.

    The token is printed to standard output and is shown only now. On the host: `arriero agent join URL --token-file -`.
    """
    with connected(settings_of(context)) as client:
        made = client.post("/v1/hosts/invitations", {"host": host or None, "expires_in": expires})
        url = client.url
    if as_json:
        print_json(made)
        return
    typer.echo(made["token"])
    for warning in made["warnings"]:
        notes().print(f"warning: {warning}", style="yellow", soft_wrap=True)
    named = f" --host {host}" if host else ""
    notes().print(
        f"It is not shown again, expires {made['expires_at']}, and is used once. On the host:\n"
        f"  arriero agent join {url}{named} --token-file -",
        soft_wrap=True,
        highlight=False,
    )


@hosts_app.command("invitations")
def list_invitations(context: typer.Context, as_json: AsJson = False) -> None:
    """List invitations, used and expired ones too."""
    with connected(settings_of(context)) as client:
        found = client.get("/v1/hosts/invitations")
    if as_json:
        print_json(found)
        return
    printed = table(("id", "host", "created by", "expires", "used by"))
    for one in found["invitations"]:
        printed.add_row(
            one["id"], one["host"] or "any new", one["created_by"], one["expires_at"], one["used_by"] or "-"
        )
    console().print(printed)


@hosts_app.command()
def withdraw(context: typer.Context, invitation: str) -> None:
    """Withdraw an invitation, by the id in its token."""
    with connected(settings_of(context)) as client:
        client.delete(f"/v1/hosts/invitations/{_quoted(invitation)}")
    console().print(f"the invitation {invitation} is withdrawn")


def _until_served(client: Client, model: str, deadline: timedelta) -> Any:
    """
    Wait until the model serves, and return its explanation.

    Raises Conflict when waiting does not help, Unavailable at the deadline.
    """
    limit = time.monotonic() + deadline.total_seconds()
    while True:
        found = client.get("/v1/fleet/explain", model=model)
        if found["condition"] in {"served", "queued"}:
            return found
        if _is_hopeless(found):
            raise Conflict(f"{model} is not started: {found['reason']}")
        if time.monotonic() > limit:
            raise Unavailable(f"{model} does not serve after {durations.show(deadline)}: {found['reason']}")
        time.sleep(_POLL)


def _is_hopeless(found: Mapping[str, Any]) -> bool:
    """Whether a model is refused for a reason that does not pass by itself."""
    return found["condition"] == "refused" and found["estimate_s"] is None


def _mark(context: typer.Context, host: str, state: str, *, as_json: bool) -> None:
    with connected(settings_of(context)) as client:
        found = client.put(f"/v1/hosts/{_quoted(host)}", {"state": state})
    if as_json:
        print_json(found)
        return
    _print_hosts([found])


def _print_explanation(found: Mapping[str, Any]) -> None:
    if (step := found["step"]) is not None:
        console().print(
            Text.assemble(("step ", "bold"), (step["key"], "bold"), f" of run {step['run']}: {step['detail']}"),
            soft_wrap=True,
        )
    condition = Text(found["condition"], _STYLES.get(found["condition"], ""))
    count = found["waiting"]
    steps = f", {count} step waits" if count == 1 else f", {count} steps wait" if count else ""
    console().print(
        Text.assemble((found["model"], "bold"), " is ", condition, f"{steps}: {found['reason']}"), soft_wrap=True
    )
    if found["estimate_s"] is None:
        console().print("No estimate: waiting alone does not help.")
    elif found["estimate_s"]:
        unasked = found["condition"] == "unasked"
        what = "It would serve" if unasked else "It is expected to serve"
        what = "The last of its steps is expected to start" if count else what
        console().print(f"{what} in about {seconds(found['estimate_s'])}.")


def _print_moves(found: Mapping[str, Any], verb: str) -> None:
    for move in found["moves"]:
        console().print(f"{verb} {move['pool'][-6:]}: {move['reason']}", soft_wrap=True)
    for title, style in (("gains", "green"), ("stuck", "yellow")):
        for one in found[title]:
            named = "" if one["reason"].startswith(f"`{one['model']}`") else f"{one['model']}: "
            console().print(Text.assemble((f"{title}  ", style), named, one["reason"]), soft_wrap=True)


def _print_rest(found: Mapping[str, Any]) -> None:
    """Print everything except hosts and pools."""
    lines: list[tuple[str, str, str]] = []
    for one in found["targets"]:
        count = "a pool" if one["pools"] == 1 else f"{one['pools']} pools"
        source = "by pools.models" if one["by"] == "settings" else "until it is stopped"
        lines.append(("kept", "green", f"{one['model']}: {count}{', pinned' if one['pinned'] else ''}, {source}"))
    for one in found["reserves"]:
        size, where = rounded(sum(one["bytes"].values())), f"{', '.join(one['devices'])} of {one['host']}"
        use = "idle, and lent to others" if one["idle"] else "in use"
        lines.append(("reserve", "cyan", f"{one['model']}: {size} on {where}, {use}"))
    for one in found["orphans"]:
        kind = "a process without a reservation" if one["kind"] == "process" else "a reservation without a process"
        lines.append(("orphan", "bold red", f"{one['pool'][-6:]} ({one['model']}) on {one['host']}: {kind}"))
    for one in found["refusals"]:
        when = "" if one["estimate_s"] is None else f" (in about {seconds(one['estimate_s'])})"
        lines.append(("not started", "bold red", f"{one['model']}: {one['reason']}{when}"))
    if lines:
        console().print()
    for title, style, text in lines:
        console().print(Text.assemble((f"{title:<13}", style), text), soft_wrap=True)


def _print_hosts(hosts: Sequence[Mapping[str, Any]]) -> None:
    columns = ("host", "state", "device", "type", "capacity", "reserved", "guaranteed", "free", "used", "unmanaged")
    printed = table(columns, right=columns[4:])
    for host in hosts:
        state = host["state"] if host["alive"] or host["state"] == "lost" else "silent"
        for number, device in enumerate(host["devices"]):
            first = number == 0
            what = device["type"] if device["present"] else f"{device['type']} (gone)"
            printed.add_row(
                host["name"] if first else "",
                Text(state, _STYLES.get(state, "")) if first else "",
                Text(device["name"], "magenta" if device["simulated"] else ""),
                what,
                rounded(device["capacity"]),
                rounded(device["reserved"]) if device["reserved"] else "-",
                rounded(device["guaranteed"]) if device["guaranteed"] else "-",
                rounded(device["free"]),
                "-" if device["simulated"] else rounded(device["used"]),
                "-" if device["simulated"] else rounded(device["unmanaged"]),
            )
    console().print(printed if printed.row_count else "no host has joined: start an agent with `arriero agent`")
    for host in hosts:
        for problem in host["problems"]:
            console().print(Text.assemble(("warning: ", "yellow"), f"{host['name']}: {problem}"), soft_wrap=True)


def _print_pools(pools: Sequence[Mapping[str, Any]], *, ended: bool = False) -> None:
    columns = ("pool", "model", "state", "host", "devices", "reserved", "used", "busy", "since", "why")
    printed = table(columns, right=("reserved", "used", "busy"))
    now = clock.now().astimezone(UTC)
    for pool in pools:
        state = pool["state"] or ("failed" if pool["failed"] else "ended")
        label = (
            f"{pool['phase']} {pool['progress']:.0%}" if state == "starting" and pool["phase"] == "loading" else state
        )
        why = pool["ending"] if pool["state"] is None else pool["stop_reason"] or pool["reason"]
        printed.add_row(
            pool["id"][-6:],
            Text(pool["model"] + (" (simulated)" if pool["simulated"] else ""), "magenta" if pool["simulated"] else ""),
            Text(label + (" pinned" if pool["pinned"] else ""), _STYLES.get(state, "")),
            pool["host"],
            ", ".join(pool["devices"]),
            rounded(sum(pool["bytes"].values())),
            rounded(sum(pool["used"].values())) if pool["used"] else "-",
            f"{pool['busy']}/{pool['slots']}",
            ago(pool["ended_at"] if pool["state"] is None else pool["created_at"], now),
            why or "-",
        )
    console().print(printed if printed.row_count else "no pools" + (" ended recently" if ended else ""))


def _quoted(name: str) -> str:
    """Return a name escaped for a URL path."""
    return quote(name, safe="")


def _is_id(text: str) -> bool:
    try:
        UUID(text)
    except ValueError:
        return False
    return True
