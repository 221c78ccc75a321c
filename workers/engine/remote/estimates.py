"""Tokens of a model whose tokenizer is not known: estimates that are rather too high."""

from __future__ import annotations

from collections.abc import Sequence

from app.inference.requests import GenerateRequest

#: Characters of a token, at the least, and tokens that a chat template adds to a message.
_CHARACTERS, _MESSAGE = 3, 8


class EstimatedTokens:
    """Counts for an engine that cannot count."""

    @property
    def reads_images(self) -> bool:
        """See the protocol of engines."""
        return False

    @property
    def counts_exactly(self) -> bool:
        """See the protocol of engines."""
        return False

    def count(self, request: GenerateRequest) -> int:
        """See the protocol of engines."""
        texts = [request.prompt] if request.prompt is not None else [one.content for one in request.messages]
        return sum(self.count_texts(texts)) + _MESSAGE * len(request.messages)

    def count_texts(self, texts: Sequence[str]) -> list[int]:
        """See the protocol of engines."""
        return [len(text) // _CHARACTERS + 1 for text in texts]
