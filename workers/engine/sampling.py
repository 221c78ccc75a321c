"""
Sampling: which token comes next, for each slot.

Choices run through a chain of llama.cpp's samplers, in llama.cpp's own order: penalties, DRY, top-k, typical, top-p,
min-p, temperature, draw. Where the best few tokens are all that a choice can fall on, the caller finds them for all
rows at once (`rows.py`), and the chain sees no others.
Penalties and biases touch few tokens, so they are written into the row of logits instead of walking the vocabulary.
A grammar is asked about the chosen token first; only a refused choice masks candidates, the best few before all.
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
from workers.engine import constraint, native
from workers.engine.best import Ids
from workers.engine.lazy import Lazy
from workers.engine.llama import LlamaModel

LogitRow = npt.NDArray[np.float32]

#: Logits at or below this are masked.
_MASKED = -1e30
#: Choices that need more than this many of the best tokens walk the vocabulary.
_MOST_NEAR = 256
#: With top_k = 0 the chain first gets this many candidates, if they hold all that top_p can keep.
_PREFILTER = 1024


class Candidates:
    """Candidates for one token, reused for each: the vocabulary's size, in llama.cpp's layout."""

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
        """Take all tokens, or those of `ids`, with the row's logits."""
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
        """Let a sampler or a chain work on them."""
        native.apply(sampler, self._reference)

    def allowed(self) -> LogitRow:
        """The logits of those that are not masked. Only right after a mask: chains move candidates."""
        logits = self._logits[: self._size]
        return logits[logits > _MASKED]

    def allowed_ids(self) -> Ids:
        """The tokens that are not masked. Only right after a mask."""
        return self._ids[: self._size][self._logits[: self._size] > _MASKED].astype(np.intp)

    def chosen(self) -> tuple[int, float]:
        """The token that the chain selected, and its logit."""
        found = self._array.data[self._array.selected]
        return found.id, found.logit

    def best(self) -> tuple[int, float]:
        """The token with the highest logit, and that logit."""
        at = int(self._logits[: self._size].argmax())
        return int(self._ids[at]), float(self._logits[at])

    def passes(self, sampler: Any, token: int) -> bool:
        """Whether a grammar lets this token stand."""
        self._one.id, self._one.logit = token, 1.0
        native.apply(sampler, self._single_reference)
        return bool(self._one.logit > _MASKED)


class Chooser:
    """The choices of one request. It owns its chain and its grammar."""

    def __init__(
        self,
        model: LlamaModel,
        sampling: Sampling,
        seed: int,
        prompt: Sequence[int],
        *,
        grammar: Any = None,
        lazy: Lazy | None = None,
        alphabet: constraint.Alphabet,
        context: int = 0,
    ) -> None:
        """Begin after `prompt`. `grammar` is a compiled grammar of its own, freed with this; `lazy` may bring one."""
        self._model, self._sampling, self._grammar, self._alphabet = model, sampling, grammar, alphabet
        if grammar is not None:
            alphabet.prepare()
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
        walks = self._chain is None or self._dry or sampling.mirostat or sampling.top_k > _MOST_NEAR
        #: The best so many tokens are all that a free choice needs; 0 where it may need more.
        self.narrow = 0 if walks else max(0, sampling.top_k)
        #: A free choice is the most likely token.
        self.greedy = self._chain is None
        #: Seconds spent in the grammar, and the tokens that took a mask.
        self.grammar_seconds = 0.0
        self.grammar_masks = 0
        #: There is nothing but that: the row is left as it is.
        self.plain = self.greedy and not self._penalised and self._bias is None and grammar is None and lazy is None

    def close(self) -> None:
        """Free the chain and the grammar."""
        for sampler in (self._chain, self._grammar):
            if sampler:
                native.free_sampler(sampler)
        self._chain = self._grammar = None

    def adjust(self, row: LogitRow) -> None:
        """Write biases and penalties into the logits."""
        if self._bias is not None:
            row[self._bias[0]] += self._bias[1]
        if self._penalised:
            self._punish(row)

    def choose(self, row: LogitRow, candidates: Candidates, best: int | None = None, near: Ids | None = None) -> int:
        """
        Take the next token from its logits after `adjust`; they may be written to.

        `best` is the most likely token, `near` at least the `narrow` best ones, in the order of their ids, where the
        caller has found them. Raises StepFailure when the grammar allows no token.
        """
        token = self._free_choice(row, candidates, best, near)
        if self._lazy is not None:
            token = self._until_bound(self._lazy, token, row, candidates)
        elif self._grammar is not None:
            token = self._constrained(token, row, candidates)
        if self._dry:
            native.accept(self._chain, token)
        if self._penalised:
            self._remember(token)
        return token

    def _until_bound(self, lazy: Lazy, token: int, row: LogitRow, candidates: Candidates) -> int:
        """The free choice, or the first after it that does not begin a call which the grammar refuses."""
        stands, grammar = lazy.take(token, candidates.passes)
        while not stands:
            row[token] = -np.inf
            token = self._free_choice(row, candidates)
            stands, grammar = lazy.take(token, candidates.passes)
        if grammar is not None:
            self._grammar, self._lazy = grammar, None
        return token

    def _constrained(self, token: int, row: LogitRow, candidates: Candidates) -> int:
        """The free choice, if the grammar lets it stand; else one that it allows."""
        begun = perf_counter()
        if token in self._alphabet.barred or not candidates.passes(self._grammar, token):
            self.grammar_masks += 1
            token = self._masked_choice(token, row, candidates)
        if token not in self._model.ends:
            native.accept(self._grammar, token)
        self.grammar_seconds += perf_counter() - begun
        return token

    def _free_choice(
        self, row: LogitRow, candidates: Candidates, best: int | None = None, near: Ids | None = None
    ) -> int:
        """What is chosen without a grammar."""
        if self._chain is None:
            return int(row.argmax()) if best is None else best
        if near is not None:
            candidates.fill(row, near)
        elif self._sampling.top_k > 0 or not self._narrow(row, candidates):
            candidates.fill(row)
        candidates.apply(self._chain)
        return candidates.chosen()[0]

    def _masked_choice(self, refused: int, row: LogitRow, candidates: Candidates) -> int:
        row[self._model.controls_array] = -np.inf  # inside a string a grammar would let their texts pass
        most = float(row[refused] if self.greedy and refused not in self._alphabet.barred else row.max())
        if not self._mask(candidates, row, *constraint.close(row, most)):
            candidates.fill(row, self._alphabet.probes)
            candidates.apply(self._grammar)
            for ids, least in self._alphabet.beginning(candidates.allowed_ids(), row):
                if self._mask(candidates, row, ids, least):
                    break
        best, logit = candidates.best()
        if logit <= _MASKED:
            raise StepFailure(FailureReason.INVALID_OUTPUT, "the grammar allows no token of this model here")
        if self._chain is None:
            return best
        candidates.apply(self._chain)
        token, logit = candidates.chosen()
        # a token that the grammar refuses, handed to it, ends the process
        return token if logit > _MASKED and candidates.passes(self._grammar, token) else best

    def _mask(self, candidates: Candidates, row: LogitRow, ids: Ids, least: float) -> bool:
        """Let the grammar mask these tokens; say whether the choice can be made among them."""
        candidates.fill(row, ids)
        candidates.apply(self._grammar)
        if self._chain is None:
            return candidates.best()[1] > _MASKED
        sampling = self._sampling
        return constraint.enough(
            candidates.allowed(), least, top_k=sampling.top_k, min_p=sampling.min_p, mirostat=sampling.mirostat
        )

    def _narrow(self, row: LogitRow, candidates: Candidates) -> bool:
        """Fill the best few candidates, if they are sure to hold all that top_p can keep."""
        if self._sampling.top_p >= 1 or self._sampling.mirostat or self._dry or len(row) <= _PREFILTER:
            return False
        ids = np.argpartition(row, -_PREFILTER)[-_PREFILTER:]
        best = row[ids]
        top = float(best.max())
        if float(np.exp(best - top).sum()) < self._sampling.top_p * float(np.exp(row - top).sum()):
            return False
        candidates.fill(row, ids)
        return True

    def _punish(self, row: LogitRow) -> None:
        ids = np.fromiter(self._counts.keys(), np.intp, len(self._counts))
        counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
        logits = row[ids]
        repeat = np.float32(self._sampling.repeat_penalty)
        logits = np.where(logits <= 0, logits * repeat, logits / repeat)
        row[ids] = (
            logits - counts * np.float32(self._sampling.frequency_penalty) - np.float32(self._sampling.presence_penalty)
        )

    def _remember(self, token: int) -> None:
        if self._window.maxlen is not None and len(self._window) == self._window.maxlen:
            oldest = self._window[0]
            self._counts[oldest] -= 1
            if not self._counts[oldest]:
                del self._counts[oldest]
        self._window.append(token)
        self._counts[token] += 1


def logprob(model: LlamaModel, count: int, row: LogitRow, token: int) -> TokenLogprob:
    """The logarithm of the token's probability before sampling, and the `count` best ones."""
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
        last = context if sampling.dry_last_n < 0 else sampling.dry_last_n  # this version takes -1 for off
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
    """What llama.cpp could not take of a sampling: each as a sentence."""
    found = []
    numbers = {name: value for name, value in asdict(sampling).items() if isinstance(value, float)}
    found += [f"{name} is {value}, not a finite number" for name, value in numbers.items() if not math.isfinite(value)]
    if sampling.repeat_penalty <= 0:
        found.append(f"repeat_penalty is {sampling.repeat_penalty}; it must be above 0")
    strange = [token for token in sampling.logit_bias if not 0 <= token < n_vocab]
    if strange:
        found.append(f"logit_bias names the token {strange[0]}; the model has {n_vocab}")
    if any(math.isnan(value) or value == math.inf for value in sampling.logit_bias.values()):
        found.append("logit_bias holds a number that is not finite")
    if sampling.seed is not None and not 0 <= sampling.seed < 2**32:
        found.append(f"seed is {sampling.seed}; it must be from 0 to 4294967295")
    if not -1 <= sampling.penalty_last_n <= 2**20 or not -1 <= sampling.dry_last_n <= 2**20:
        found.append("penalty_last_n and dry_last_n must be from -1 to 1048576")
    return found
