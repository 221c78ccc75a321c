"""
The batch sampler: chooses the next token for each row of logits of a decode.

Work that is faster for many rows at once is done once: one numpy call finds the most likely token of every row, and
another pass finds the top tokens of the rows that need no others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from app.kernel.errors import StepFailure
from workers.engine.bindings.llama import LlamaModel, Logits
from workers.engine.sampling.sampler import TokenCandidates, TokenSampler, logprob
from workers.engine.sampling.top_tokens import Ids, TopTokens
from workers.engine.tasks import EngineTask


class BatchSampler:
    """Chooses the next tokens of the running texts of one context."""

    def __init__(self, model: LlamaModel) -> None:
        self._model = model
        self._candidates = TokenCandidates(model.n_vocab)

    def sample(self, tasks: Sequence[EngineTask], logits: Logits) -> Iterator[tuple[EngineTask, int | StepFailure]]:
        """Yield each task with its next token, or with the failure that ends it."""
        samplers = [task.sampler for task in tasks if task.sampler is not None]
        plain = [sampler.is_plain_greedy for sampler in samplers]
        before = {row: logits[row].copy() for row, task in enumerate(tasks) if task.request.logprobs is not None}
        for sampler, row in zip(samplers, logits, strict=True) if not all(plain) else ():
            sampler.adjust(row)
        best: list[int] = logits.argmax(axis=1).tolist() if any(sampler.is_greedy for sampler in samplers) else []
        top = self._top_tokens(samplers, logits)
        for row, (task, sampler) in enumerate(zip(tasks, samplers, strict=True)):
            if plain[row]:
                token = best[row]
            else:
                try:
                    first = best[row] if sampler.is_greedy else None
                    token = sampler.choose(logits[row], self._candidates, first, top.get(row))
                except StepFailure as failure:
                    yield task, failure
                    continue
            if row in before:
                task.logprobs.append(logprob(self._model, task.request.logprobs or 0, before[row], token))
            yield task, token

    def _top_tokens(self, samplers: Sequence[TokenSampler], logits: Logits) -> dict[int, Ids]:
        """Return the top tokens, by row, of the rows whose samplers need no others."""
        rows = [row for row, sampler in enumerate(samplers) if sampler.top_count]
        if not rows:
            return {}
        count = max(samplers[row].top_count for row in rows)
        best = TopTokens(logits if len(rows) == len(logits) else logits[rows], count)
        found = {row: best.of_row(at) for at, row in enumerate(rows)}
        # A row has fewer only when its logits are NaN.
        return {row: ids for row, ids in found.items() if len(ids) >= samplers[row].top_count}
