"""Reranking: the relevance of documents to a query, in the form that Jina, Cohere and llama.cpp's server share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, model_validator

from app.inference.openai.generation import PlainText, RequestPart
from app.inference.requests import RerankRequest

#: Most documents in a request.
MAX_DOCUMENTS = 1_024


class RerankingRequest(RequestPart):
    """A request for the relevance of documents to a query."""

    model: Annotated[PlainText, Field(min_length=1, max_length=200)]
    query: Annotated[PlainText, Field(min_length=1)]
    documents: Annotated[list[Annotated[PlainText, Field(min_length=1)]], Field(min_length=1, max_length=MAX_DOCUMENTS)]
    #: Only so many of the best are returned.
    top_n: int | None = Field(default=None, ge=1)
    return_documents: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _texts(cls, given: Any) -> Any:
        """Cohere's form of a document: an object with a `text`."""
        if isinstance(given, dict) and isinstance(given.get("documents"), list):
            documents = [one.get("text") if isinstance(one, dict) else one for one in given["documents"]]
            return {**given, "documents": documents}
        return given

    def translated(self) -> RerankRequest:
        """The request for an engine."""
        return RerankRequest(self.query, tuple(self.documents))


def document(request: RerankingRequest, scores: Sequence[float], tokens: int) -> dict[str, Any]:
    """The answer: the documents with their scores, best first. Only comparisons of the scores are meaningful."""
    best = sorted(range(len(scores)), key=lambda index: (-scores[index], index))[: request.top_n]
    results = [
        {"index": index, "relevance_score": scores[index]}
        | ({"document": {"text": request.documents[index]}} if request.return_documents else {})
        for index in best
    ]
    return {
        "object": "list",
        "model": request.model,
        "results": results,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
