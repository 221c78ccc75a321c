"""`arriero alerts`: what people should know, who takes care, and where it is sent."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.text import Text

from app.cli.client import connected
from app.cli.output import AsJson, ago, console, print_json, settings_of, shortened, state, table
from app.kernel import clock
from app.kernel.errors import InvalidInput, Problem

app = typer.Typer(
    no_args_is_help=True,
    help="Alerts: opened when a rule fires, sent once in a cooldown, resolved when it clears.\n\n"
    "Channels say where they go: the log, web hooks, e-mail, or a service of apprise. Channels name secrets, which are "
    "variables (ARRIERO_SECRET_NAME) or files of the control workers.\n\n"
    "Example: arriero alerts set-channel ops webhook --default --option url=https://hooks.example.com",
)

_Id = Annotated[str, typer.Argument(metavar="ALERT_ID", help="The id of an alert, as `alerts list` shows it.")]
_Channel = Annotated[str, typer.Argument(metavar="CHANNEL", help="The name of a channel, such as ops.")]
_SEVERITIES = {"critical": "bold red", "warning": "yellow", "info": ""}
#: Characters of a summary in a table.
_WIDTH = 80


@app.command("list")
def list_alerts(
    context: typer.Context,
    everything: Annotated[bool, typer.Option("--all", help="Those that are resolved too.")] = False,
    severity: Annotated[str | None, typer.Option(help="Only these: info, warning or critical.")] = None,
    rule: Annotated[str | None, typer.Option(help="Only those of a rule.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=500, help="Most alerts.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List alerts that are open or acknowledged, the newest first."""
    states = ["open", "acknowledged", "resolved"] if everything else None
    with connected(settings_of(context)) as client:
        found = client.get("/v1/alerts", state=states, severity=severity, rule=rule, limit=limit)
    if as_json:
        print_json(found)
        return
    columns = ("id", "severity", "state", "rule", "labels", "count", "last", "summary")
    printed, now = table(columns, right=("count",)), clock.now()
    for one in found["alerts"]:
        printed.add_row(
            one["id"],
            Text(one["severity"], _SEVERITIES.get(one["severity"], "")),
            state(one["state"]),
            one["rule"],
            _labels(one["labels"]),
            str(one["count"]),
            ago(one["last_at"], now),
            shortened(one["summary"], _WIDTH),
        )
    console().print(printed if printed.row_count else "there is no alert")


@app.command()
def show(context: typer.Context, alert_id: _Id, as_json: AsJson = False) -> None:
    """Show an alert with its history, and what was sent."""
    with connected(settings_of(context)) as client:
        found = client.get(f"/v1/alerts/{quote(alert_id, safe='')}")
    if as_json:
        print_json(found)
        return
    console().print(
        Text.assemble(
            (found["severity"], _SEVERITIES.get(found["severity"], "")), f" {found['rule']}: ", found["state"]
        )
    )
    console().print(shortened(found["summary"], 1000), markup=False)
    console().print(f"labels: {_labels(found['labels'])}; firings: {found['count']}", markup=False)
    printed, now = table(("when", "what", "by", "detail")), clock.now()
    for one in found["history"]:
        printed.add_row(ago(one["at"], now), one["kind"], shortened(one["actor"], 40), shortened(one["detail"], _WIDTH))
    console().print(printed)
    if found["sent"]:
        _print_sent(found["sent"])


@app.command()
def ack(
    context: typer.Context,
    alert_id: _Id,
    note: Annotated[str, typer.Option(help="What you do about it.")] = "",
    as_json: AsJson = False,
) -> None:
    """Acknowledge an alert: somebody takes care, and it is not sent again until it is resolved."""
    _change(context, f"{quote(alert_id, safe='')}/acknowledge", {"note": note}, as_json=as_json)


@app.command()
def resolve(context: typer.Context, alert_id: _Id, as_json: AsJson = False) -> None:
    """Resolve an alert by hand. Its rule opens another one when it fires again."""
    _change(context, f"{quote(alert_id, safe='')}/resolve", {}, as_json=as_json)


@app.command()
def silence(
    context: typer.Context,
    time: Annotated[str, typer.Argument(metavar="TIME", help="For how long: '2h'.")],
    label: Annotated[
        list[str] | None,
        typer.Option("--label", metavar="NAME=VALUE", help="A label, or rule or severity; VALUE may end with '*'."),
    ] = None,
    alert: Annotated[str | None, typer.Option(help="The id of an alert, in the place of labels.")] = None,
    comment: Annotated[str, typer.Option(help="Why.")] = "",
    as_json: AsJson = False,
) -> None:
    """Send no alerts with these labels for a while. What is open when it ends is sent then."""
    if (alert is None) == (not label):
        raise InvalidInput([Problem("--label", "either labels or an alert is needed", "--label or --alert")], "request")
    body: dict[str, Any] = {"time": time, "comment": comment}
    with connected(settings_of(context)) as client:
        if alert is not None:
            made = client.post(f"/v1/alerts/{quote(alert, safe='')}/silence", body)
        else:
            made = client.post("/v1/alerts/silences", {**body, "matchers": _pairs("--label", label or [])})
    if as_json:
        print_json(made)
        return
    console().print(f"silence {made['id']} ends at {made['ends_at']:.19}: {_labels(made['matchers'])}", markup=False)


@app.command()
def silences(
    context: typer.Context,
    ended: Annotated[bool, typer.Option("--ended", help="Those that have ended too.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the silences that are in force."""
    with connected(settings_of(context)) as client:
        found = client.get("/v1/alerts/silences", ended=ended)
    if as_json:
        print_json(found)
        return
    printed = table(("id", "labels", "until", "by", "comment"))
    for one in found["silences"]:
        until = f"{one['ends_at']:.19}"
        printed.add_row(one["id"], _labels(one["matchers"]), until, one["author"], shortened(one["comment"], _WIDTH))
    console().print(printed if printed.row_count else "nothing is silenced")


@app.command()
def unsilence(
    context: typer.Context,
    silence_id: Annotated[str, typer.Argument(metavar="SILENCE_ID", help="The id of a silence.")],
) -> None:
    """End a silence now."""
    with connected(settings_of(context)) as client:
        client.delete(f"/v1/alerts/silences/{quote(silence_id, safe='')}")
    console().print(f"silence {silence_id} has ended", markup=False)


@app.command("channels")
def list_channels(context: typer.Context, as_json: AsJson = False) -> None:
    """List the channels. The channel `log` is there without being stored."""
    with connected(settings_of(context)) as client:
        found = client.get("/v1/alerts/channels")
    if as_json:
        print_json(found)
        return
    printed = table(("name", "namespace", "kind", "options", "state"))
    for one in found["channels"]:
        shown = Text(f"disabled: {shortened(one['disabled'])}", "bold red") if one["disabled"] else "-"
        printed.add_row(one["name"], one["namespace"] or "-", one["kind"], shortened(one["options"], _WIDTH), shown)
    console().print(printed if printed.row_count else "no channel is stored: alerts go to the log")


@app.command("set-channel")
def set_channel(
    context: typer.Context,
    name: _Channel,
    kind: Annotated[str, typer.Argument(help="log, webhook, email or apprise.")],
    default: Annotated[bool, typer.Option("--default", help="Take the alerts of rules that name no channel.")] = False,
    min_severity: Annotated[str, typer.Option(help="Send nothing milder: info, warning or critical.")] = "info",
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="url, secret, url_secret, to (a JSON list). May be repeated."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Store a channel under its name. It replaces an earlier one, and enables it."""
    body = {"kind": kind, "default": default, "min_severity": min_severity, **_pairs("--option", option or [])}
    with connected(settings_of(context)) as client:
        made = client.put(f"/v1/alerts/channels/{quote(name, safe='')}", body)
    if as_json:
        print_json(made)
        return
    console().print(f"channel {made['name']}: {made['kind']} {shortened(made['options'], 200)}", markup=False)


@app.command("delete-channel")
def delete_channel(context: typer.Context, name: _Channel) -> None:
    """Delete a channel. What waits for it is dropped."""
    with connected(settings_of(context)) as client:
        client.delete(f"/v1/alerts/channels/{quote(name, safe='')}")
    console().print(f"channel {name} is deleted", markup=False)


@app.command("test")
def send_test(context: typer.Context, name: _Channel, as_json: AsJson = False) -> None:
    """Send a test to a channel. `alerts sent` shows what came of it."""
    with connected(settings_of(context)) as client:
        made = client.post(f"/v1/alerts/channels/{quote(name, safe='')}/test", {})
    if as_json:
        print_json(made)
        return
    console().print(f"notification {made['id']} is on its way: arriero alerts sent", markup=False)


@app.command()
def sent(
    context: typer.Context,
    with_state: Annotated[
        str | None, typer.Option("--state", help="Only those in a state: pending, sent, failed, dropped.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=500, help="Most notifications.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List what was sent, or is tried again, the newest first."""
    with connected(settings_of(context)) as client:
        found = client.get("/v1/alerts/notifications", state=with_state, limit=limit)
    if as_json:
        print_json(found)
        return
    _print_sent(found["notifications"])


def _change(context: typer.Context, path: str, body: Mapping[str, Any], *, as_json: bool) -> None:
    with connected(settings_of(context)) as client:
        found = client.post(f"/v1/alerts/{path}", body)
    if as_json:
        print_json(found)
        return
    console().print(f"alert {found['id']} ({found['rule']}) is {found['state']}", markup=False)


def _print_sent(found: list[Mapping[str, Any]]) -> None:
    printed, now = table(("notification", "channel", "kind", "state", "attempts", "when", "error")), clock.now()
    for one in found:
        printed.add_row(
            one["id"],
            one["channel"],
            one["kind"],
            state(one["state"]),
            str(one["attempts"]),
            ago(one["created_at"], now),
            shortened(one["error"], _WIDTH),
        )
    console().print(printed if printed.row_count else "nothing was sent")


def _labels(labels: Mapping[str, Any]) -> str:
    return shortened(", ".join(f"{name}={value}" for name, value in labels.items()), 60) or "-"


def _pairs(where: str, given: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals or not name:
            raise InvalidInput([Problem(where, f"{one!r} has no value", "NAME=VALUE")], "request")
        found[name] = json.loads(value) if value[:1] in ("[", "{") and _is_json(value) else value
        if where == "--option" and value in ("true", "false"):
            found[name] = value == "true"
    return found


def _is_json(value: str) -> bool:
    try:
        json.loads(value)
    except ValueError:
        return False
    return True
