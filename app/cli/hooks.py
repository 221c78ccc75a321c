"""`arriero hooks`: the hooks on requests to models."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from app.cli.client import connected
from app.cli.output import AsJson, console, notes, print_json, settings_of, table
from app.inference.hooks import shipped
from app.inference.hooks.exchange import HookText
from app.inference.hooks.shipped.scanning import HookLate, TimeLimit
from app.kernel.errors import InvalidInput, NotFound, Problem
from app.kernel.sections.hooks import HookPoint

app = typer.Typer(no_args_is_help=True, help="Hooks on requests to models: list them, and try shipped ones.")


@app.command("list")
def list_hooks(context: typer.Context, as_json: AsJson = False) -> None:
    """List the hooks in the order in which they see a prompt; they see the result in the reverse order."""
    with connected(settings_of(context)) as client:
        found = client.get("/v1/prompt-hooks")
    if as_json:
        print_json(found)
        return
    if not found["hooks"]:
        notes().print("there are no hooks; they are tables [[hooks]] in arriero.toml (docs/hooks.md)", markup=False)
        return
    printed = table(
        ("hook", "kind", "at", "order", "models", "workflows", "namespaces", "limit", "on failure", "calls")
    )
    for row in found["hooks"]:
        calls = (row["calls"] or "-") + (" (not installed here)" if row["installed"] is False else "")
        places = [", ".join(row[name]) for name in ("models", "workflows", "namespaces")]
        of = [row["name"], row["kind"], row["at"], str(row["order"]), *places, row["timeout"], row["on_failure"], calls]
        printed.add_row(*of)
    console().print(printed)


@app.command("try")
def try_hook(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="A shipped hook of the settings.")],
    text: Annotated[str, typer.Option("--text", help="The text of a message.")],
    role: Annotated[str, typer.Option(help="The role of the message: user, tool, system or assistant.")] = "user",
    at: Annotated[HookPoint, typer.Option(help="Where it is called.")] = HookPoint.PRE_PROMPT,
) -> None:
    """
    Show what a shipped hook does with a text, as JSON. No request is sent.

    Python and HTTP hooks run in pools only: send a request, and see `arriero runs show --json`.
    """
    hooks = {hook.name: hook for hook in settings_of(context).hooks}
    if name not in hooks:
        raise NotFound("hook", name, sorted(hooks))
    hook = hooks[name]
    if not hook.is_shipped:
        raise InvalidInput(
            [Problem("NAME", f"{name} is of the kind {hook.kind}, which runs in pools", "a shipped hook")]
        )
    limit = TimeLimit(time.monotonic, time.monotonic() + hook.timeout.total_seconds())
    try:
        answer = shipped.call(hook, at, [HookText(role=role, text=text)], None, limit)
    except HookLate:
        seconds = hook.timeout.total_seconds()
        raise InvalidInput(
            [Problem("--text", f"{name} did not answer within {seconds:g} s", "a shorter text")]
        ) from None
    shown = answer.texts[0].text if answer.texts else text
    print_json({"refused": answer.refuse, "text": shown, "annotations": dict(answer.annotations)})
