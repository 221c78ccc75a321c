"""
The first admin key: created where an API needs keys and has none, and printed at the terminal once.

It goes to no log: with `arriero up -d` the command in the foreground creates it.
"""

from __future__ import annotations

from pathlib import Path

from app.access import operator_key
from app.access.callers import KeyScope
from app.cli.client import connected_to

NEEDED = "an API key is needed; commands on this machine, with this data directory, have one"
NOT_NEEDED = "no key is needed on this machine, and no other machine can reach the API"


def lines(url: str, data_dir: Path) -> list[str]:
    """Return what a user needs to know about keys of the API of this `arriero up`: the first one, if it is new."""
    key = operator_key.read(data_dir)
    if key is None:
        return [NOT_NEEDED]
    with connected_to(url, key=key) as client:
        if client.get("/v1/keys", limit=1)["keys"]:
            return [f"{NEEDED} (`arriero keys list`)"]
        made = client.post("/v1/keys", {"name": "admin", "scopes": list(KeyScope)})
    first = f"the first admin key, which is shown only now: [bold]{made['key']}[/]"
    return [NEEDED, first, "`arriero keys create NAME` creates others"]
