"""
Token sampling: choosing the next token of one text from its row of logits.

Sampling uses a chain of llama.cpp's samplers, in llama.cpp's own order: penalties, DRY, top-k, typical, top-p, min-p,
temperature, draw. When only the top tokens can be chosen, the caller finds them for all rows at once
(`batch_sampler.py`), and the chain gets no others.
Penalties and biases change few tokens, so they are written into the row of logits without a pass over the vocabulary.
A grammar checks the chosen token first. Only when it rejects that token are candidates masked, the best few first.
"""

from __future__ import annotations

import ctypes
import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict
from time import perf_counter
from typing import Any, cast

import llama_cpp as api
import numpy as np
import numpy.typing as npt

from app.inference.requests import Sampling, TokenLogprob
from app.kernel.errors import FailureReason, StepFailure
from workers.engine.bindings import native
from workers.engine.bindings.llama import LlamaModel
from workers.engine.chat.lazy_grammar import LazyGrammar
from workers.engine.sampling import constraint
from workers.engine.sampling.top_tokens import Ids

LogitRow = npt.NDArray[np.float32]

#: Logits at or below this are masked.
_MASKED = -1e30
#: A sampler that needs more than this many top tokens gets the whole vocabulary.
_MAX_TOP_TOKENS = 256
#: With top_k = 0 the chain gets this many top tokens, if they contain all that top_p can keep.
_PREFILTER = 1024


class TokenCandidates:
    """A candidate array in llama.cpp's layout, of the vocabulary's size, reused for each token."""

    def __init__(self, n_vocab: int) -> None:
        data = np.zeros(n_vocab, native.TOKEN_DATA)
        self._ids, self._logits = data["id"], data["logit"]
        self._all = np.arange(n_vocab, dtype=np.int32)
        self._pointer: Any = data.ctypes.data_as(ctypes.POINTER(api.llama_token_data))
        self._array: Any = api.llama_token_data_array()
        self._reference = ctypes.byref(self._array)
        self._one: Any = api.llama_token_data()
        self._single: Any = cast(Any, api.llama_token_data_array())
        self._single.data, self._single.size = ctypes.pointer(self._one), 1  # a grammar moves nothing
        self._single.selected, self._single.sorted = -1, False
        self._single_reference = ctypes.byref(self._single)
        self._size = 0

    def fill(self, row: LogitRow, ids: Ids | None = None) -> None:
        """Load all tokens, or those of `ids`, with their logits from the row."""
        self._size = size = len(row) if ids is None else len(ids)
        self._ids[:size] = self._all if ids is None else ids
        self._logits[:size] = row if ids is None else row[ids]
        # "this pointer can be modified by the samplers"
        self._array.data, self._array.size, self._array.selected, self._array.sorted = (
            self._pointer,
            size,
            -1,
            False,
        )

    def apply(self, sampler: Any) -> None:
        """Apply a sampler or a chain."""
        native.apply(sampler, self._reference)

    def allowed(self) -> LogitRow:
        """Logits of the unmasked candidates. Valid only right after a grammar: chains move candidates."""
        logits = self._logits[: self._size]
        return logits[logits > _MASKED]

    def allowed_ids(self) -> Ids:
        """Token ids of the unmasked candidates. Valid only right after a grammar."""
        return self._ids[: self._size][self._logits[: self._size] > _MASKED].astype(np.intp)

    def chosen(self) -> tuple[int, float]:
        """The token that the chain selected, and its logit."""
        found = self._array.data[self._array.selected]
        return found.id, found.logit

    def best(self) -> tuple[int, float]:
        """The token with the highest logit, and that logit."""
        at = int(self._logits[: self._size].argmax())
        return int(self._ids[at]), float(self._logits[at])

    def allows(self, sampler: Any, token: int) -> bool:
        """Whether a grammar allows this token."""
        self._one.id, self._one.logit = token, 1.0
        native.apply(sampler, self._single_reference)
        return bool(self._one.logit > _MASKED)


class TokenSampler:
    """The token sampler of one text. It owns its chain and its grammar."""

    def __init__(
        self,
        model: LlamaModel,
        sampling: Sampling,
        seed: int,
        prompt: Sequence[int],
        *,
        grammar: Any = None,
        lazy: LazyGrammar | None = None,
        byte_index: constraint.FirstByteIndex,
        context: int = 0,
    ) -> None:
        """
        Start after `prompt`.

        `grammar` is a grammar clone that this sampler owns and frees; `lazy` may activate one later.
        """
        self._model, self._sampling, self._grammar, self.byte_index = model, sampling, grammar, byte_index
        if grammar is not None:
            byte_index.prepare()
        self._lazy = lazy
        self._bias = _bias(sampling)
        self._penalised = sampling.penalty_last_n != 0 and (
            sampling.repeat_penalty != 1 or sampling.frequency_penalty != 0 or sampling.presence_penalty != 0
        )
        last = sampling.penalty_last_n if sampling.penalty_last_n > 0 else None
        self._window: deque[int] = deque(prompt[-last:] if last else prompt, maxlen=last)
        self._counts: Counter[int] = Counter(self._window)
        self._dry = sampling.dry_multiplier > 0 and sampling.dry_base >= 1
        self._chain = None if sampling.temperature <= 0 and not self._dry else _chain(model, sampling, seed, context)
        if self._chain and self._dry:
            for token in prompt:
                native.accept(self._chain, token)
        needs_all = self._chain is None or self._dry or sampling.mirostat or sampling.top_k > _MAX_TOP_TOKENS
        #: How many of the top tokens an unconstrained choice needs; 0 when it may need all.
        self.top_count = 0 if needs_all else max(0, sampling.top_k)
        #: An unconstrained choice is the most likely token.
        self.is_greedy = self._chain is None
        #: Seconds spent in the grammar, and tokens for which candidates were masked.
        self.grammar_seconds = 0.0
        self.grammar_masks = 0
        #: Every choice is the most likely token; nothing changes the row.
        self.is_plain_greedy = (
            self.is_greedy and not self._penalised and self._bias is None and grammar is None and lazy is None
        )

    def close(self) -> None:
        """Free the chain and the grammar."""
        for sampler in (self._chain, self._grammar):
            if sampler:
                native.free_sampler(sampler)
        self._chain = self._grammar = None

    @property
    def grammar(self) -> Any:
        """The grammar in its present state, to be read only; None while the text is free."""
        return self._grammar

    @property
    def may_have_grammar(self) -> bool:
        """Whether there is a grammar, or may be one later."""
        return self._grammar is not None or self._lazy is not None

    def adjust(self, row: LogitRow) -> None:
        """Write biases and penalties into the logits."""
        if self._bias is not None:
            row[self._bias[0]] += self._bias[1]
        if self._penalised:
            self._penalise(row)

    def choose(
        self, row: LogitRow, candidates: TokenCandidates, best: int | None = None, top: Ids | None = None
    ) -> int:
        """
        Choose the next token from the logits after `adjust`. The row may be changed.

        `best` is the most likely token, `top` at least the `top_count` best ones in order of their ids, if the caller
        has found them. Raises StepFailure when the grammar allows no token.
        """
        token = self._choose_unconstrained(row, candidates, best, top)
        if self._lazy is not None:
            token = self._choose_before_call(self._lazy, token, row, candidates)
        elif self._grammar is not None:
            token = self._choose_constrained(token, row, candidates)
        if self._dry:
            native.accept(self._chain, token)
        if self._penalised:
            self._count(token)
        return token

    def _choose_before_call(self, lazy: LazyGrammar, token: int, row: LogitRow, candidates: TokenCandidates) -> int:
        """Return the unconstrained choice, or the next one that does not begin a call that the grammar rejects."""
        allowed, grammar = lazy.accept(token, candidates.allows)
        while not allowed and grammar is None:
            row[token] = -np.inf
            token = self._choose_unconstrained(row, candidates)
            allowed, grammar = lazy.accept(token, candidates.allows)
        if grammar is not None:
            self._grammar, self._lazy = grammar, None
        return token if allowed else self._choose_constrained(token, row, candidates)

    def _choose_constrained(self, token: int, row: LogitRow, candidates: TokenCandidates) -> int:
        """Return the unconstrained choice if the grammar allows it, else one that it allows."""
        started_at = perf_counter()
        if token in self.byte_index.forbidden or not candidates.allows(self._grammar, token):
            self.grammar_masks += 1
            token = self._choose_masked(token, row, candidates)
        if token not in self._model.end_tokens:
            native.accept(self._grammar, token)
        self.grammar_seconds += perf_counter() - started_at
        return token

    def _choose_unconstrained(
        self, row: LogitRow, candidates: TokenCandidates, best: int | None = None, top: Ids | None = None
    ) -> int:
        """Choose a token without a grammar."""
        if self._chain is None:
            return int(row.argmax()) if best is None else best
        if top is not None:
            candidates.fill(row, top)
        elif self._sampling.top_k > 0 or not self._prefilter(row, candidates):
            candidates.fill(row)
        candidates.apply(self._chain)
        return candidates.chosen()[0]

    def _choose_masked(self, rejected: int, row: LogitRow, candidates: TokenCandidates) -> int:
        row[self._model.forbidden_tokens] = -np.inf  # inside a string the grammar would allow their texts
        best_logit = float(row[rejected] if self.is_greedy and rejected not in self.byte_index.forbidden else row.max())
        if not self._mask(candidates, row, *constraint.near_best(row, best_logit)):
            candidates.fill(row, self.byte_index.byte_tokens)
            candidates.apply(self._grammar)
            for ids, bound in self.byte_index.starting_with(candidates.allowed_ids(), row):
                if self._mask(candidates, row, ids, bound):
                    break
        best, logit = candidates.best()
        if logit <= _MASKED:
            raise StepFailure(FailureReason.INVALID_OUTPUT, "the grammar allows no token of this model here")
        if self._chain is None:
            return best
        candidates.apply(self._chain)
        token, logit = candidates.chosen()
        # Accepting a token that the grammar rejects aborts the process.
        return token if logit > _MASKED and candidates.allows(self._grammar, token) else best

    def _mask(self, candidates: TokenCandidates, row: LogitRow, ids: Ids, bound: float) -> bool:
        """Apply the grammar to these tokens. Returns whether the choice can be made among them."""
        candidates.fill(row, ids)
        candidates.apply(self._grammar)
        if self._chain is None:
            return candidates.best()[1] > _MASKED
        sampling = self._sampling
        return constraint.is_sufficient(
            candidates.allowed(), bound, top_k=sampling.top_k, min_p=sampling.min_p, mirostat=sampling.mirostat
        )

    def _prefilter(self, row: LogitRow, candidates: TokenCandidates) -> bool:
        """Load only the top candidates if they contain all that top_p can keep. Returns whether it did."""
        if self._sampling.top_p >= 1 or self._sampling.mirostat or self._dry or len(row) <= _PREFILTER:
            return False
        ids = np.argpartition(row, -_PREFILTER)[-_PREFILTER:]
        best = row[ids]
        top = float(best.max())
        if float(np.exp(best - top).sum()) < self._sampling.top_p * float(np.exp(row - top).sum()):
            return False
        candidates.fill(row, ids)
        return True

    def _penalise(self, row: LogitRow) -> None:
        ids = np.fromiter(self._counts.keys(), np.intp, len(self._counts))
        counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
        logits = row[ids]
        repeat = np.float32(self._sampling.repeat_penalty)
        logits = np.where(logits <= 0, logits * repeat, logits / repeat)
        row[ids] = (
            logits - counts * np.float32(self._sampling.frequency_penalty) - np.float32(self._sampling.presence_penalty)
        )

    def _count(self, token: int) -> None:
        if self._window.maxlen is not None and len(self._window) == self._window.maxlen:
            oldest = self._window[0]
            self._counts[oldest] -= 1
            if not self._counts[oldest]:
                del self._counts[oldest]
        self._window.append(token)
        self._counts[token] += 1


def logprob(model: LlamaModel, count: int, row: LogitRow, token: int) -> TokenLogprob:
    """Return the token's log-probability before sampling, and those of the `count` most likely tokens."""
    most = float(row.max())
    total = most + float(np.log(np.exp(row - most).sum(dtype=np.float64)))
    top: tuple[tuple[int, bytes, float], ...] = ()
    if count:
        best = np.argpartition(row, -count)[-count:]
        best = best[np.argsort(-row[best], kind="stable")]
        top = tuple((at, model.piece(at, special=True), float(row[at]) - total) for at in map(int, best))
    return TokenLogprob(token, model.piece(token, special=True), float(row[token]) - total, top)


def _bias(sampling: Sampling) -> tuple[Ids, LogitRow] | None:
    if not sampling.logit_bias:
        return None
    ids = np.array(list(sampling.logit_bias), np.intp)
    return ids, np.array(list(sampling.logit_bias.values()), np.float32)


def _chain(model: LlamaModel, sampling: Sampling, seed: int, context: int) -> Any:
    chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
    add = api.llama_sampler_chain_add
    if sampling.dry_multiplier > 0:
        breakers = [text.encode() for text in sampling.dry_breakers]
        last = context if sampling.dry_last_n < 0 else sampling.dry_last_n  # for this version -1 means off
        add(
            chain,
            api.llama_sampler_init_dry(
                model.vocab,
                sampling.dry_multiplier,
                sampling.dry_base,
                sampling.dry_allowed_length,
                last,
                (ctypes.c_char_p * max(1, len(breakers)))(*breakers),
                len(breakers),
            ),
        )
    if sampling.temperature <= 0:
        add(chain, api.llama_sampler_init_greedy())
        return chain
    if sampling.mirostat:
        add(chain, api.llama_sampler_init_temp(sampling.temperature))
        add(chain, api.llama_sampler_init_mirostat_v2(seed, sampling.mirostat_tau, sampling.mirostat_eta))
        return chain
    if sampling.top_k > 0:
        add(chain, api.llama_sampler_init_top_k(sampling.top_k))
    if sampling.typical_p < 1:
        add(chain, api.llama_sampler_init_typical(sampling.typical_p, 1))
    if sampling.top_p < 1:
        add(chain, api.llama_sampler_init_top_p(sampling.top_p, 1))
    if sampling.min_p > 0:
        add(chain, api.llama_sampler_init_min_p(sampling.min_p, 1))
    add(chain, api.llama_sampler_init_temp(sampling.temperature))
    add(chain, api.llama_sampler_init_dist(seed))
    return chain


def problems(sampling: Sampling, n_vocab: int) -> list[str]:
    """Return the invalid sampling values, each as a sentence. llama.cpp would abort on them."""
    found = []
    numbers = {name: value for name, value in asdict(sampling).items() if isinstance(value, float)}
    found += [
        f"{name} is {value}; it must be a finite number" for name, value in numbers.items() if not math.isfinite(value)
    ]
    if sampling.repeat_penalty <= 0:
        found.append(f"repeat_penalty is {sampling.repeat_penalty}; it must be above 0")
    invalid = [token for token in sampling.logit_bias if not 0 <= token < n_vocab]
    if invalid:
        found.append(f"logit_bias names the token {invalid[0]}; it must be from 0 to {n_vocab - 1} for this model")
    if any(math.isnan(value) or value == math.inf for value in sampling.logit_bias.values()):
        found.append("logit_bias contains NaN or +infinity; its values must be finite or -infinity")
    if sampling.seed is not None and not 0 <= sampling.seed < 2**32:
        found.append(f"seed is {sampling.seed}; it must be from 0 to 4294967295")
    if not -1 <= sampling.penalty_last_n <= 2**20 or not -1 <= sampling.dry_last_n <= 2**20:
        found.append("penalty_last_n and dry_last_n must be from -1 to 1048576")
    return found
