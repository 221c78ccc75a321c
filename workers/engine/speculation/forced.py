"""
Jump-ahead: predicts the tokens that a grammar forces, such as the keys of a JSON document.

The forced text is tokenised together with the last token of the text, as the tokenizer of the model splits it. The
model may split it otherwise, or join its end with what follows; then the prediction is wrong, and made anew.
So a prediction is never more than that: whether it was right is measured, for its last token apart from the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from time import thread_time
from typing import Final, NamedTuple

from workers.engine.bindings.llama import LlamaModel
from workers.engine.sampling.constraint import FirstByteIndex
from workers.engine.sampling.forced_text import ForcedText
from workers.engine.sampling.sampler import TokenSampler
from workers.engine.speculation.hit_rates import HitRates

#: CPU seconds of one look at a grammar, on average, above which a text gets no others, and looks before that is judged:
#: copying a very large grammar takes milliseconds.
_MAX_SECONDS, _JUDGED_AFTER = 0.002, 4
#: Forced text is tokenised with at most so many tokens before it: a character may have several.
_BEFORE = 4
#: Newest tokens of a written text in which the habit of spaces is looked up; few, as their text is joined each time.
_HABIT = 64


class ForcedPlace(IntEnum):
    """A place in a forced text; acceptance differs between them."""

    #: Certain, and not the last token.
    INNER = 0
    #: Up to and after a space that is not certain.
    GUESSED = 1
    #: The last token, which may be joined with what follows.
    LAST = 2


#: The acceptance rates with which an engine begins, by place.
_FIRST: Final = (0.95, 0.85, 0.7)
#: The decay of an outcome with each later one.
_DECAY = 0.98


class Look(NamedTuple):
    """The forced text that was found, its bytes that depend on no predicted space, and the tokens before it."""

    text: bytes
    certain: int
    written: int


_NO_LOOK: Final = Look(b"", 0, 0)


class ForcedRates(HitRates):
    """How often forced tokens, whose earlier tokens were right, were the model's choice, by their place."""

    __slots__ = ()

    def __init__(self, prior: ForcedRates | None = None) -> None:
        """`prior` are the rates of the engine, which get each outcome too."""
        super().__init__(_FIRST, _DECAY, prior)


class JumpAhead:
    """The forced tokens of one text."""

    __slots__ = (
        "_at", "_look", "_looks", "_places", "_rates", "_seconds", "_seen", "_source", "_start", "_tokens", "_wanted",
    )  # fmt: skip

    def __init__(self, tokens: Sequence[int], prompt: int, source: ForcedTokens, rates: ForcedRates) -> None:
        """`tokens` is the text's own list, to which its new tokens are added; it begins after `prompt` of them."""
        self._tokens, self._start, self._seen = tokens, prompt, len(tokens)
        self._source, self._rates = source, ForcedRates(rates)
        self._look = _NO_LOOK
        #: The predicted tokens with their places, and how many of them were written.
        self._wanted: Sequence[int] = ()
        self._places: Sequence[ForcedPlace] = ()
        self._at = 0
        #: How often it was looked for forced text, and the CPU seconds of that.
        self._looks, self._seconds = 0, 0.0

    def follow(self, sampler: TokenSampler) -> None:
        """Add the tokens that were written since the last call, and find what is forced after them."""
        tokens, was_written = self._tokens, self._seen < len(self._tokens)
        for token in tokens[self._seen :]:
            if self._at < len(self._wanted):
                is_hit = token == self._wanted[self._at]
                self._rates.record(self._places[self._at], is_hit)
                self._at = self._at + 1 if is_hit else len(self._wanted)
        self._seen = len(tokens)
        is_slow = self._looks >= _JUDGED_AFTER and self._seconds > self._looks * self._source.max_seconds
        is_known = self._at < len(self._wanted) or (self._looks > 0 and not was_written)
        if is_known or is_slow or sampler.grammar is None:
            return
        began, written = thread_time(), tokens[self._start :]
        self._look = self._source.look(sampler, written, self._look)
        self._wanted, self._places = self._source.tokens(self._look, sampler, written)
        self._at = 0
        self._looks += 1
        self._seconds += thread_time() - began

    def predict(self, most: int) -> list[int]:
        """Return at most `most` tokens that are forced next."""
        return list(self._wanted[self._at : self._at + most])

    def reach(self, most: int) -> list[float]:
        """Return the probabilities that the first, the first two, … of them are accepted."""
        found: list[float] = []
        probability = 1.0
        for place in self._places[self._at : self._at + most]:
            probability *= self._rates.rate(place)
            found.append(probability)
        return found


class ForcedTokens:
    """Finds the forced tokens of the texts of one engine."""

    def __init__(self, model: LlamaModel) -> None:
        self._model = model
        #: A text whose looks at its grammar take more CPU seconds on average gets no others.
        self.max_seconds = _MAX_SECONDS
        self._text: ForcedText | None = None
        self.rates = ForcedRates()

    def of(self, tokens: Sequence[int], prompt: int, sampler: TokenSampler) -> JumpAhead | None:
        """Return the forced tokens of a text, as `JumpAhead`; None for one that has no grammar."""
        return JumpAhead(tokens, prompt, self, self.rates) if sampler.may_have_grammar else None

    def look(self, sampler: TokenSampler, written: Sequence[int], before: Look = _NO_LOOK) -> Look:
        """Return the forced text after the tokens that are written. What is left of that `before` needs no walk."""
        if before.text:
            added = self._bytes(written[before.written :])
            rest = before.text.removeprefix(added)
            if len(added) <= before.certain and rest and len(rest) < len(before.text):
                return Look(rest, before.certain - len(added), len(written))
        if self._text is None:
            self._text = ForcedText(self._model, sampler.byte_index)
        forced, certain = self._text.after(
            sampler.grammar, lambda found: _has_space(self._bytes(written[-_HABIT:]) + found)
        )
        return Look(forced, certain, len(written))

    def tokens(self, look: Look, sampler: TokenSampler, written: Sequence[int]) -> tuple[list[int], list[ForcedPlace]]:
        """Return the forced tokens after those that are written, and the place of each."""
        forced, certain, _ = look
        if not forced:
            return [], []
        tokens = self._tokenised(written, forced, sampler.byte_index)
        places, end = [ForcedPlace.INNER] * len(tokens), 0
        for at, token in enumerate(tokens):
            end += len(self._model.piece(token))
            places[at] = ForcedPlace.INNER if end <= certain else ForcedPlace.GUESSED
        places[-1:] = [ForcedPlace.LAST] * bool(places)
        return tokens, places

    def _tokenised(self, written: Sequence[int], forced: bytes, index: FirstByteIndex) -> list[int]:
        """Tokenise forced text as it stands after the written tokens; empty where the tokens do not meet there."""
        for count in (*range(1, min(_BEFORE, len(written)) + 1), 0):
            before = self._bytes(written[len(written) - count :])
            try:
                text = (before + forced).decode()
            except UnicodeDecodeError as error:
                if error.start < len(before) or error.end < len(before + forced):
                    continue
                text = (before + forced)[: error.start].decode()  # it ends inside a character
            tokens = self._rest(text, len(before))
            if tokens is not None and index.forbidden.isdisjoint(tokens):
                return tokens
        return []

    def _rest(self, text: str, before: int) -> list[int] | None:
        """Return the tokens of the text after its first `before` bytes; None where no token begins there."""
        tokens = self._model.tokenize(text, add_special=False, parse_special=True)
        # Some tokenizers add a space before a text.
        left = len(self._bytes(tokens)) - len(text.encode()) + before
        at = 0
        while left > 0 and at < len(tokens):
            left -= len(self._model.piece(tokens[at]))
            at += 1
        return tokens[at:] if not left else None

    def _bytes(self, tokens: Sequence[int]) -> bytes:
        return b"".join(map(self._model.piece, tokens))


def _has_space(text: bytes) -> bool:
    """Whether there was a space after the same byte before; models that write JSON mostly do."""
    at = text.rfind(text[-1:], 0, len(text) - 1) if text else -1
    return at < 0 or text[at + 1 : at + 2] == b" "
