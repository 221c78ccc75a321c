"""`arriero generate`: one answer of a model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli import output
from app.cli.chat import options
from app.cli.chat.answer import written
from app.cli.client import connected
from app.cli.output import settings_of
from app.kernel.errors import InvalidInput, Problem

#: Most characters that are read of a file or of standard input.
_MAX_CHARACTERS = 16 * 1024 * 1024


def generate(
    context: typer.Context,
    model: options.ModelName,
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="The message; - or none reads standard input.")
    ] = None,
    system: options.SystemMessage = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    seed: options.Seed = None,
    schema: Annotated[
        Path | None, typer.Option("--schema", help="A file with a JSON Schema that the answer conforms to.")
    ] = None,
    conversation: options.ConversationName = None,
    user: options.MemoryUser = None,
) -> None:
    """
    Print the answer of a model to one message, while it is written.

    Example: arriero generate smollm2:135m "Write a haiku about llamas."; git diff | arriero generate qwen3:4b --system
    "Write a commit message."
    """
    if prompt in (None, "-"):
        if sys.stdin.isatty():
            output.notes().print("[dim]reading the message from the terminal; end it with Ctrl-D[/]")
        prompt = sys.stdin.read(_MAX_CHARACTERS)
    if not prompt or not prompt.strip():
        raise InvalidInput(
            [Problem("PROMPT", "the message is empty", "a text, or a text on standard input")], "command"
        )
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    given = options.parameters(max_tokens, temperature, seed)
    if schema is not None:
        form = {"name": "answer", "schema": _schema(schema)}
        given["response_format"] = {"type": "json_schema", "json_schema": form}
    with connected(settings_of(context)) as client:
        given |= options.stored(client, conversation, user)
        answer = written(client, model, messages, given)
    if not sys.stdout.isatty():
        sys.stdout.write("\n")
    if answer.stopped:
        raise typer.Exit(130)
    if answer.finish == "length":
        tokens = answer.usage.get("completion_tokens", 0)
        output.notes().print(f"[yellow]the answer was cut at {tokens} tokens[/]; --max-tokens allows more")


def _schema(path: Path) -> Any:
    try:
        with path.open(encoding="utf-8") as file:
            return json.loads(file.read(_MAX_CHARACTERS))
    except (OSError, ValueError, RecursionError) as error:
        message = f"{path}: {error.strerror if isinstance(error, OSError) else error}"
        raise InvalidInput([Problem("--schema", message, "a file with a JSON Schema")], "command") from None
