"""`arriero compress`: a text or a conversation with fewer tokens."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli import output
from app.cli.client import connected
from app.cli.output import AsJson, print_json, settings_of
from app.kernel.errors import InvalidInput, Problem, Unavailable
from app.kernel.security.texts import printable

#: Most characters that are read.
_MAX_CHARACTERS = 16 * 1024 * 1024
#: Seconds to wait for the result.
_WAIT = 600


def compress(
    context: typer.Context,
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="A text, or JSON with a list of messages; - or none: stdin.")
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="The model whose tokenizer counts; it is not loaded.")
    ] = "smollm2:135m",
    ratio: Annotated[
        float | None, typer.Option("--ratio", "-r", help="Tokens before for each after; by default 2.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=1, help="Most tokens of the result.")] = None,
    query: Annotated[str, typer.Option("--query", "-q", help="What the result is for.")] = "",
    methods: Annotated[
        list[str] | None,
        typer.Option("--method", help="structure, deduplicate, select or prune; may be repeated. By default all."),
    ] = None,
    texts: Annotated[
        list[str] | None, typer.Option("--protect", help="A text that must stay; may be repeated.")
    ] = None,
    patterns: Annotated[
        list[str] | None, typer.Option("--protect-pattern", help="A regular expression (RE2) for what must stay.")
    ] = None,
    keep_recent: Annotated[
        int | None, typer.Option("--keep-recent", help="Last messages that stay as they are.")
    ] = None,
    embedding_model: Annotated[
        str | None, typer.Option("--embedding-model", help="A model with which sentences are chosen by meaning, too.")
    ] = None,
    summary_model: Annotated[
        str | None, typer.Option("--summary-model", help="A model that summarises what is left out.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """
    Print a text or a conversation with fewer tokens, counted by a model's tokenizer.

    What was done goes to standard error.

    Example: arriero compress notes.txt --max-tokens 500 --query "When does the lease end?"
    """
    value = _read(file)
    body: dict[str, Any] = {"model": model, "query": query, "messages" if isinstance(value, list) else "text": value}
    if ratio is not None or max_tokens is None:
        body["target_ratio"] = 2 if ratio is None else ratio
    given = {
        "max_tokens": max_tokens,
        "methods": methods,
        "keep_recent": keep_recent,
        "embedding_model": embedding_model,
        "summary": None if summary_model is None else {"model": summary_model},
        "protect": {"texts": texts or [], "patterns": patterns or []} if texts or patterns else None,
    }
    body |= {name: one for name, one in given.items() if one is not None}
    with connected(settings_of(context), timeout=_WAIT + 30.0) as client:
        found = client.post("/v1/compress", body, parameters={"wait": _WAIT})
    if "tokens" not in found:
        raise Unavailable(f"run {found['run']} is still {found['state']}; see: arriero runs show {found['run']}")
    if as_json:
        print_json(found)
        return
    if "text" in found:
        typer.echo(printable(found["text"]) if sys.stdout.isatty() else found["text"])
    else:
        print_json(found["messages"])
    _print_figures(found)


def _print_figures(found: dict[str, Any]) -> None:
    notes, tokens, protected = output.notes(), found["tokens"], found["protected"]
    notes.print(
        f"{tokens['before']} → {tokens['after']} tokens of {found['model']} (ratio {found['ratio']:.2f}); sentences: "
        f"{found['sentences']['whole']} whole, {found['sentences']['pruned']} pruned, {found['sentences']['dropped']} "
        f"dropped; protected: {protected['kept']} kept, {protected['dropped']} dropped with their sentences",
        highlight=False,
    )
    for warning in found["warnings"]:
        notes.print(f"[yellow]{printable(warning)}[/]", highlight=False)
    if not found["target_met"]:
        notes.print(f"[yellow]the target was not met:[/] {printable(found['reason'])}", highlight=False)


def _read(file: Path | None) -> str | list[Any]:
    """Return the text or the messages of a file. Raises InvalidInput."""
    try:
        if file is None or str(file) == "-":
            if sys.stdin.isatty():
                output.notes().print("[dim]reading the text from the terminal; end it with Ctrl-D[/]")
            text = sys.stdin.read(_MAX_CHARACTERS)
        else:
            with file.open(encoding="utf-8") as opened:
                text = opened.read(_MAX_CHARACTERS)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(
            [Problem("FILE", f"{file}: {error}", "a file with a text, or with messages")], "command"
        ) from None
    if file is not None and file.suffix == ".json":
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidInput([Problem("FILE", f"{file}: {error}", "a list of messages")], "command") from None
        value = value.get("messages") if isinstance(value, dict) and "messages" in value else value
        if isinstance(value, list) and all(isinstance(one, dict) and "role" in one for one in value):
            return value
    return text
