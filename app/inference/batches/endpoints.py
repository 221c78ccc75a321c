"""The endpoints whose requests a batch can have."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel

from app.inference.openai.chat import ChatRequest
from app.inference.openai.completion import CompletionRequest
from app.inference.openai.embedding import EmbeddingsRequest
from app.inference.openai.reranking import RerankingRequest

#: The endpoints whose requests a batch can have, with the types of their bodies.
ENDPOINTS: Mapping[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/embeddings": EmbeddingsRequest,
    "/v1/rerank": RerankingRequest,
}
#: The field that only requests of the endpoint have.
OWN_FIELDS: Mapping[str, str] = {
    "/v1/chat/completions": "messages",
    "/v1/completions": "prompt",
    "/v1/embeddings": "input",
    "/v1/rerank": "query",
}
