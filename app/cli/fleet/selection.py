"""`arriero models select`: which model a name, an alias or a selector means now."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from app.cli.client import connected
from app.cli.output import AsJson, console, print_json, print_text, settings_of, table
from app.kernel.units.sizes import rounded


def select(
    context: typer.Context,
    selector: Annotated[
        str, typer.Argument(metavar="SELECTOR", help="A selector such as 'auto:chat?prefer=speed', an alias or a name.")
    ],
    tokens: Annotated[int, typer.Option("--context", min=0, help="Tokens that the request needs.")] = 0,
    as_json: AsJson = False,
) -> None:
    """
    Show which model a request would be sent to now, with the figures of all that suit and why others do not.

    Example: arriero models select 'auto:chat?prefer=quality&context=4k'
    """
    with connected(settings_of(context)) as client:
        found = client.get("/v1/catalog/select", model=selector, context=tokens)
    if as_json:
        print_json(found)
        return
    if found["ranking"]:
        figures = ("score", "quality", "speed", "readiness")
        listed = table(("model", *figures, "state", "wait", "to free"), right=(*figures, "wait", "to free"))
        for one in found["ranking"]:
            free = rounded(one["bytes_to_free"]) if one["bytes_to_free"] else "-"
            cells = [one["model"], *(f"{one[name]:.2f}" for name in figures), one["state"]]
            listed.add_row(*map(Text, [*cells, f"{one['expected_wait_s']:.1f} s", free]))
        console().print(listed)
    for name, reason in found["excluded"].items():
        print_text(f"not {name}: {reason}")
    print_text(f"{found['asked']}: {', then '.join(found['tried'])}")
    for name, reason in found["passed_over"].items():
        print_text(f"passed over: {name}: {reason}")
