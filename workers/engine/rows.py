"""
Rows: a token for each output of a decode, found for many texts at once where that is faster.

The most likely tokens of all rows take one call of numpy. Texts that need only the best few get those, which are found
for all rows together too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from app.kernel.errors import StepFailure
from workers.engine.best import Best, Ids
from workers.engine.llama import LlamaModel, Logits
from workers.engine.sampling import Candidates, Chooser, logprob
from workers.engine.tasks import EngineTask


class Rows:
    """Chooses tokens for the texts of one context."""

    def __init__(self, model: LlamaModel) -> None:
        self._model = model
        self._candidates = Candidates(model.n_vocab)

    def choose(self, tasks: Sequence[EngineTask], logits: Logits) -> Iterator[tuple[EngineTask, int | StepFailure]]:
        """The next token of each task, or why there is none."""
        choosers = [task.chooser for task in tasks if task.chooser is not None]
        plain = [chooser.plain for chooser in choosers]
        before = {row: logits[row].copy() for row, task in enumerate(tasks) if task.request.logprobs is not None}
        for chooser, row in zip(choosers, logits, strict=True) if not all(plain) else ():
            chooser.adjust(row)
        best: list[int] = logits.argmax(axis=1).tolist() if any(chooser.greedy for chooser in choosers) else []
        near = self._near(choosers, logits)
        for row, (task, chooser) in enumerate(zip(tasks, choosers, strict=True)):
            if plain[row]:
                token = best[row]
            else:
                try:
                    first = best[row] if chooser.greedy else None
                    token = chooser.choose(logits[row], self._candidates, first, near.get(row))
                except StepFailure as failure:
                    yield task, failure
                    continue
            if row in before:
                task.logprobs.append(logprob(self._model, task.request.logprobs or 0, before[row], token))
            yield task, token

    def _near(self, choosers: Sequence[Chooser], logits: Logits) -> dict[int, Ids]:
        """The best tokens of the rows that need no more, by row."""
        wanting = [row for row, chooser in enumerate(choosers) if chooser.narrow]
        if not wanting:
            return {}
        count = max(choosers[row].narrow for row in wanting)
        best = Best(logits if len(wanting) == len(logits) else logits[wanting], count)
        found = {row: best.of(at) for at, row in enumerate(wanting)}
        # fewer there are only where logits are no numbers
        return {row: ids for row, ids in found.items() if len(ids) >= choosers[row].narrow}
