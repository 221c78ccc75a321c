"""Embeddings: the request, and its translation for an engine."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from app.inference.openai.generation import PlainText, RequestPart
from app.inference.requests import EmbedRequest, LongText

#: Most texts in a request, as in OpenAI's API.
MAX_INPUTS = 2_048


class EmbeddingsRequest(RequestPart):
    """A request for the embeddings of texts."""

    model: Annotated[PlainText, Field(min_length=1, max_length=200)]
    input: Annotated[list[Annotated[PlainText, Field(min_length=1)]], Field(min_length=1, max_length=MAX_INPUTS)]
    encoding_format: Literal["float", "base64"] = "float"
    #: Truncates each vector to this many numbers (Matryoshka) and normalises it again.
    dimensions: int | None = Field(default=None, ge=1, le=65_536)
    #: Extensions: the prefix that the model was trained with, and what happens to a text longer than its context.
    task: Literal["query", "document"] | None = None
    long_text: LongText = LongText.REFUSE

    @model_validator(mode="before")
    @classmethod
    def _in_a_list(cls, given: Any) -> Any:
        if isinstance(given, dict) and "input" in given:
            texts = given["input"]
            if isinstance(texts, str):
                return {**given, "input": [texts]}
            if isinstance(texts, list) and texts and not isinstance(texts[0], str):
                raise ValueError(
                    "input must be a text or a list of texts; token ids are not accepted: another model's ids would be "
                    "embedded without a sign of it (LangChain sends texts with check_embedding_ctx_length=False)"
                )
        return given

    def translated(self) -> EmbedRequest:
        """The request for an engine."""
        return EmbedRequest(tuple(self.input), self.long_text, self.task, self.dimensions)


def document(request: EmbeddingsRequest, vectors: Sequence[Sequence[float]], tokens: int) -> dict[str, Any]:
    """The answer: the vectors in the order of the texts, as numbers or as base64 of little-endian 32-bit floats."""
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector, request.encoding_format)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": request.model, "usage": usage}


def _encoded(vector: Sequence[float], form: str) -> list[float] | str:
    if form == "float":
        return list(vector)
    return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode("ascii")
