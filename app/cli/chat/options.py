"""The options that `chat` and `generate` share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from app.cli import output
from app.cli.client import Client
from app.kernel.errors import InvalidInput, Problem

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A model, an alias, or a selector such as auto:chat.")]
SystemMessage = Annotated[str | None, typer.Option("--system", help="The system message.")]
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", min=1, help="Most tokens of an answer; by default what the context has.")
]
Temperature = Annotated[float | None, typer.Option("--temperature", min=0, max=5, help="0 gives the likeliest text.")]
Seed = Annotated[int | None, typer.Option("--seed", help="For the same text again.")]

ConversationName = Annotated[
    str | None,
    typer.Option(
        "--conversation",
        metavar="ID",
        help="Continue a stored conversation; `new` begins one. Messages and answers are kept in it.",
    ),
]
MemoryUser = Annotated[
    str | None, typer.Option("--user", help="Whose long-term memory is used; that of a new conversation.")
]


def stored(client: Client, given: str | None, user: str | None) -> dict[str, Any]:
    """
    Return the fields of a request in a conversation; none without one. `new` makes one, and its id is printed.

    Raises InvalidInput for a user without a conversation, and what the API raises.
    """
    if given is None:
        if user is not None:
            problem = Problem("--user", "it has no effect without a conversation", "--conversation ID, or new")
            raise InvalidInput([problem], "command")
        return {}
    if given == "new":
        made = client.post("/v1/conversations", {} if user is None else {"user": user})
        output.notes().print(f"[dim]conversation {made['id']}[/]")
        given = str(made["id"])
    return {"conversation_id": given, **({} if user is None else {"user": user})}


def parameters(max_tokens: int | None, temperature: float | None, seed: int | None) -> dict[str, Any]:
    """Return the fields of a request for the given options."""
    given = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    return {name: value for name, value in given.items() if value is not None}
