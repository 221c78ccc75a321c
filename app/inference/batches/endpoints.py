"""The endpoints whose requests a batch can have."""

from __future__ import annotations

from collections.abc import Mapping

from app.inference.openai.chat import ChatRequest
from app.inference.openai.completion import CompletionRequest
from app.inference.openai.embedding import EmbeddingsRequest
from app.inference.openai.reranking import RerankingRequest
from app.inference.openai.responses.request import ResponsesRequest

#: The request of a line.
BatchRequest = ChatRequest | CompletionRequest | EmbeddingsRequest | RerankingRequest | ResponsesRequest

#: The endpoints whose requests a batch can have, with the types of their bodies.
ENDPOINTS: Mapping[str, type[BatchRequest]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/completions": CompletionRequest,
    "/v1/embeddings": EmbeddingsRequest,
    "/v1/rerank": RerankingRequest,
}
