"""`arriero recall`: what was said, found by words and by meaning."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape

from app.cli.client import connected
from app.cli.output import AsJson, console, notes, print_json, settings_of, table
from app.kernel.errors import InvalidInput, Problem
from app.kernel.security.texts import printable
from app.memory.recall.passages import SourceKind
from app.memory.recall.query import MAX_LIMIT, RecallMode, RecallScope

#: Characters of a passage in the table.
_SHOWN = 400


def recall(
    context: typer.Context,
    query: Annotated[str | None, typer.Argument(help="What is looked for, as a question or in some words.")] = None,
    user: Annotated[str | None, typer.Option(help="Whose passages; by default the namespace's own.")] = None,
    scope: Annotated[RecallScope, typer.Option(help="The user's, the namespace's too, or those of all users.")] = (
        RecallScope.OWN
    ),
    mode: Annotated[RecallMode, typer.Option(help="By words, by meaning, or by both.")] = RecallMode.HYBRID,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=MAX_LIMIT, help="Most passages.")] = 10,
    sources: Annotated[list[SourceKind] | None, typer.Option("--source", help="May be repeated.")] = None,
    conversations: Annotated[
        list[str] | None, typer.Option("--conversation", metavar="ID", help="May be repeated.")
    ] = None,
    roles: Annotated[list[str] | None, typer.Option("--role", help="May be repeated.")] = None,
    kinds: Annotated[list[str] | None, typer.Option("--kind", help="Of memories. May be repeated.")] = None,
    since: Annotated[str | None, typer.Option(metavar="TIME", help="From then on: 2026-11-22T09:00:00Z.")] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="Before then.")] = None,
    half_life: Annotated[str | None, typer.Option(help="The age at which a score is halved: 30d.")] = None,
    namespace: Annotated[str | None, typer.Option(help="By default that of the key, or `default`.")] = None,
    status: Annotated[bool, typer.Option("--status", help="What can be recalled, and how far vectors are.")] = False,
    as_json: AsJson = False,
) -> None:
    """Find what was said: messages, memories, blocks and documents, by words and by meaning."""
    if status == (query is not None):
        raise InvalidInput([Problem("QUERY", "either a query or --status is needed")], "command line")
    with connected(settings_of(context)) as client:
        if status:
            found = client.get("/v1/recall/status", namespace=namespace)
            print_json(found) if as_json else _print_status(found)
            return
        body: dict[str, Any] = {
            "query": query,
            "user": user,
            "scope": scope.value,
            "mode": mode.value,
            "limit": limit,
            "sources": [one.value for one in sources or ()],
            "conversations": conversations or [],
            "roles": roles or [],
            "kinds": kinds or [],
            "since": since,
            "until": until,
            "half_life": half_life,
        }
        given = {name: value for name, value in body.items() if value not in (None, [])}
        found = client.post("/v1/recall", given, parameters={"namespace": namespace})
    if as_json:
        print_json(found)
        return
    printed = table(("score", "when", "who", "text", "why"), right=("score",))
    for one in found["passages"]:
        who = one["speaker"] or one["role"] or one["kind"] or one["source"]
        text = printable(one["text"], _SHOWN)
        printed.add_row(
            f"{one['score']:.2f}", one["at"][:16].replace("T", " "), escape(printable(who)), escape(text),
            escape(f"{one['why']} [{one['source_id']}]"),
        )  # fmt: skip
    console().print(printed) if found["passages"] else notes().print("nothing was found")
    for leg, name in (("lexical", "words"), ("dense", "meaning")):
        reason = found[leg]["reason"]
        if reason and reason != "not asked for":
            how = "also said" if found[leg]["used"] else "not searched"
            notes().print(f"by {name}: {how}: {escape(printable(reason))}")


def _print_status(found: dict[str, Any]) -> None:
    about = "" if found["passages"]["is_exact"] else "about "
    waiting = f"{found['waiting']['count']:,}{'' if found['waiting']['is_exact'] else ' or more'}"
    console().print(f"{about}{found['passages']['count']:,} passages; {waiting} without vectors yet", highlight=False)
    if found["waiting"]["count"]:
        console().print(f"the oldest of them has waited for {found['lag_s']:g} s", highlight=False)
        if found["embedding_model"]:
            name = escape(printable(found["embedding_model"]))
            notes().print(f"if that goes on: arriero fleet why {name}", highlight=False)
    if found["refused"]:
        console().print(f"{found['refused']:,} cannot be embedded, and are found by their words alone")
    if not found["embedding_model"]:
        console().print("no embedding model is configured (setting recall.embedding_model)")
    if found["models"]:
        printed = table(
            ("model", "state", "dimensions", "vectors", "index", "problem"), right=("dimensions", "vectors")
        )
        for model in found["models"]:
            values = (model["state"], str(model["dimensions"] or ""), f"{model['vectors']:,}")
            index = "yes" if model["is_indexed"] else "no"
            printed.add_row(escape(model["name"]), *values, index, escape(printable(model["problem"] or "")))
        console().print(printed)
