"""The options that `chat` and `generate` share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A model, an alias, or a selector such as auto:chat.")]
SystemMessage = Annotated[str | None, typer.Option("--system", help="The system message.")]
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", min=1, help="Most tokens of an answer; by default what the context has.")
]
Temperature = Annotated[float | None, typer.Option("--temperature", min=0, max=5, help="0 gives the likeliest text.")]
Seed = Annotated[int | None, typer.Option("--seed", help="For the same text again.")]


def parameters(max_tokens: int | None, temperature: float | None, seed: int | None) -> dict[str, Any]:
    """Return the fields of a request for the given options."""
    given = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    return {name: value for name, value in given.items() if value is not None}
