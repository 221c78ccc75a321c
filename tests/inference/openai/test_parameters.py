"""The tables of docs/openai.md: a new parameter of the official client is noticed, and rows do what they say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params
from pydantic import BaseModel, ValidationError

from app.inference.openai.chat import ChatRequest
from app.inference.openai.completion import CompletionRequest
from app.inference.openai.embedding import EmbeddingsRequest
from app.inference.openai.responses.request import ResponsesRequest

PAGE = (Path(__file__).parents[3] / "docs/openai.md").read_text()
USER = [{"role": "user", "content": "x"}]

#: By endpoint: the parameters of the official client, the request here, the heading of the table, a request.
ENDPOINTS: dict[str, tuple[Any, type[BaseModel], str, dict[str, Any]]] = {
    "chat": (chat_create_params.CompletionCreateParamsBase, ChatRequest, "Parameters", {"messages": USER}),
    "completions": (
        completion_create_params.CompletionCreateParamsBase,
        CompletionRequest,
        "Parameters",
        {"prompt": "x"},
    ),
    "embeddings": (embedding_create_params.EmbeddingCreateParams, EmbeddingsRequest, "Parameters", {"input": "x"}),
    "responses": (response_create_params.ResponseCreateParamsBase, ResponsesRequest, "Responses", {"input": "x"}),
}


def rows(heading: str) -> dict[str, str]:
    """By parameter, what the table below a heading says of it."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    found = {}
    for line in section.splitlines():
        if line.startswith("| `"):
            names, meaning = (cell.strip() for cell in line.strip("|").split("|", 1))
            found |= dict.fromkeys(re.findall(r"`(\w+)`", names), meaning.strip(" |"))
    return found


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_every_parameter_of_the_official_client_is_documented(endpoint: str) -> None:
    params, _, heading, _ = ENDPOINTS[endpoint]
    assert set(get_type_hints(params)) - set(rows(heading)) == set()


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_every_field_of_the_request_is_documented(endpoint: str) -> None:
    _, request, heading, _ = ENDPOINTS[endpoint]
    assert set(request.model_fields) - set(rows(heading)) == set()


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_the_rows_do_what_they_say(endpoint: str) -> None:
    params, request, heading, body = ENDPOINTS[endpoint]
    for name in get_type_hints(params):
        meaning = rows(heading)[name]
        if meaning.startswith("refused"):
            with pytest.raises(ValidationError) as caught:
                request.model_validate({"model": "m", **body, name: {"some": "value"}})
            assert name in str(caught.value)
        elif meaning == "no effect" or (name == "user" and endpoint in ("completions", "embeddings")):
            assert name not in request.model_fields
            request.model_validate({"model": "m", **body, name: {"some": "value"}})
        else:
            assert name in request.model_fields, f"{name}: {meaning}"
