"""
The hook `language`: the language of the last text of the user, or of the answer, as an annotation.

It is py3langid's: 97 languages by sequences of bytes. Short texts are often told wrongly; its probability says how sure
it is. With `allowed`, other languages are refused when they are likely enough.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from app.inference.hooks.exchange import HookAnswer, HookText
from app.inference.hooks.shipped.scanning import TimeLimit
from app.kernel.sections.hooks import HookPoint

#: Most characters that are looked at.
_MOST = 4_000


class LanguageOptions(BaseModel):
    """Which languages are allowed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: Codes such as `en`; empty for all.
    allowed: tuple[str, ...] = Field(default=(), max_length=100)
    #: The probability from which another language is refused.
    certain: float = Field(default=0.9, ge=0, le=1)
    #: Fewest characters of a text that is looked at.
    least: int = Field(default=20, ge=1, le=1_000)


@cache
def _identifier() -> Any:
    """The model of the library, which is loaded when it is first needed."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def call(point: HookPoint, texts: list[HookText], options: LanguageOptions, _: Any, limit: TimeLimit) -> HookAnswer:
    """Annotate, or refuse. Raises HookLate."""
    roles = ("user", "prompt") if point is HookPoint.PRE_PROMPT else ("assistant",)
    text = next((one.text for one in reversed(texts) if one.role in roles), "")[:_MOST].strip()
    if len(text) < options.least:
        return HookAnswer()
    code, probability = _identifier().classify(text)
    limit.check()
    found: dict[str, str | int | float | bool] = {"language": str(code), "probability": round(float(probability), 3)}
    if options.allowed and code not in options.allowed and probability >= options.certain:
        reason = f"the text is in a language that is not allowed ({code}); allowed: {', '.join(options.allowed)}"
        return HookAnswer(refuse=reason[:500], annotations=found)
    return HookAnswer(annotations=found)
