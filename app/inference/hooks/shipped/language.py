"""
The hook `language`: the language of the last text of the user, or of the answer, as an annotation.

It is py3langid's: 97 languages by sequences of bytes. Short texts are often told wrongly; its probability says how sure
it is. With `allowed`, other languages are refused when they are likely enough.
"""

from __future__ import annotations

import threading
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from app.inference.hooks.exchange import HookAnswer, HookText
from app.inference.hooks.shipped.scanning import Clock
from app.kernel.sections.hooks import HookPoint

#: Most characters that are looked at.
_MOST = 4_000


class Options(BaseModel):
    """Which languages are allowed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: Codes such as `en`; empty for all.
    allowed: tuple[str, ...] = Field(default=(), max_length=100)
    #: The probability from which another language is refused.
    certain: float = Field(default=0.9, ge=0, le=1)
    #: Fewest characters of a text that is looked at.
    least: int = Field(default=20, ge=1, le=1_000)


class _Identifier:
    """The model of the library, which is loaded when it is first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: Any = None

    def of(self, text: str) -> tuple[str, float]:
        """The code of the language, and its probability."""
        with self._lock:
            if self._found is None:
                from py3langid.langid import MODEL_FILE, LanguageIdentifier

                self._found = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
            code, probability = self._found.classify(text)
        return str(code), float(probability)


_IDENTIFIER = _Identifier()


def call(point: HookPoint, texts: list[HookText], options: Options, _: Any, clock: Clock) -> HookAnswer:
    """Annotate, or refuse. Raises HookLate."""
    roles = ("user", "prompt") if point is HookPoint.PRE_PROMPT else ("assistant",)
    text = next((one.text for one in reversed(texts) if one.role in roles), "")[:_MOST].strip()
    if len(text) < options.least:
        return HookAnswer()
    code, probability = _IDENTIFIER.of(text)
    clock.check()
    found: dict[str, str | int | float | bool] = {"language": code, "probability": round(probability, 3)}
    if options.allowed and code not in options.allowed and probability >= options.certain:
        reason = f"the text is in a language that is not allowed ({code}); allowed: {', '.join(options.allowed)}"
        return HookAnswer(refuse=reason[:500], annotations=found)
    return HookAnswer(annotations=found)
