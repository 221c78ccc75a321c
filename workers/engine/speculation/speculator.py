"""
The speculator: adds draft tokens to the decodes of an engine, and verifies them.

A draft token is accepted when the sampler, which sees the logits of the model as without drafts, chooses that token. So
the texts, and the random numbers that they use, are those of decoding one token at a time; only the shape of a decode
differs. What follows the first token that was not accepted is removed from the cache.
Penalties, grammars, stop texts and ends apply to each token in turn, as always.

Texts without a match may have drafts of a draft model. It costs decodes of its own, which the engine counts.

There are no drafts for texts with images or with log-probabilities, for models whose state cannot be truncated, and
with a sliding window whose cells are reused (`swa_full` off).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from time import perf_counter

from app.catalog.engine_options import MAX_DRAFTS
from workers.engine.batch import Chunk
from workers.engine.bindings.llama import LlamaModel, Logits, truncation_problem
from workers.engine.metrics import Meter
from workers.engine.options import EngineOptions
from workers.engine.slots import Slots
from workers.engine.speculation.acceptance import AcceptanceRates
from workers.engine.speculation.costs import DecodeCosts
from workers.engine.speculation.draft import DraftState
from workers.engine.speculation.drafting import Balance, can_gain, plan_drafts
from workers.engine.speculation.forced import ForcedTokens
from workers.engine.speculation.model_drafts import ModelDrafts
from workers.engine.speculation.model_planning import Step
from workers.engine.tasks import EngineTask

#: Decodes after which a part of the drafts' failures is forgotten.
_FORGETTING = 64
#: With more texts than these, it is asked first whether any draft could gain: their predictions take longer to judge.
_MANY = 4
#: A piece of a decode, as `Context.decode` takes it.
Piece = tuple[int, int, Sequence[int], int]


class Speculator:
    """The drafts of one engine. Only its thread uses it."""

    def __init__(self, model: LlamaModel, options: EngineOptions, meter: Meter) -> None:
        self._drafts = options.drafts if truncation_problem(model, options) is None else 0
        self._batch, self._meter = options.batch, meter
        self._rates, self._costs, self._balance = AcceptanceRates(), DecodeCosts(), Balance()
        self._forced = ForcedTokens(model)
        #: The draft tokens of the next decode by sequence, and how many tokens it has without them.
        self._planned: dict[int, list[int]] = {}
        self._tokens = 0
        #: Of the last decode, if it had drafts and no prompt: the worth of an accepted token, and the seconds that the
        #: drafts added.
        self._value = self._cost = 0.0
        #: The seconds of the planning of the next decode, with the decodes of the draft model.
        self._planning = 0.0
        #: Those of them that looking for predictions took.
        self._looking = 0.0
        #: The seconds of the last decode with its planning; 0 if it had a prompt.
        self._seconds = 0.0
        self._decodes = 0
        #: The drafts of a draft model; None without one.
        self.model_drafts: ModelDrafts | None = None

    @property
    def is_on(self) -> bool:
        """Whether there can be drafts."""
        return self._drafts > 0

    def plan(self, chunks: Sequence[Chunk], running: Mapping[int, EngineTask]) -> None:
        """Choose the draft tokens of the next decode."""
        began = perf_counter()
        self._tokens = sum(chunk.count for chunk in chunks)
        tasks = [running[chunk.work.sequence] for chunk in chunks if chunk.is_text]
        room = min(self._drafts, self._batch - self._tokens)
        self._planned = self._chosen(tasks, room) if room > 0 else {}
        self._looking = perf_counter() - began
        if self.model_drafts is not None:
            self._planned |= self._of_model(self.model_drafts, tasks, room, running)
        self._planning = perf_counter() - began

    def _chosen(self, tasks: Sequence[EngineTask], room: int) -> dict[int, list[int]]:
        """Return the draft tokens of each sequence that has some, at most `room` in all."""
        found: dict[int, list[int]] = {}
        base = self._costs.known(len(tasks))
        if base is None or not self._balance.may_draft(base):  # looking takes time, too
            return found
        drafts = [self._draft(task) for task in tasks]
        rate = self._meter.prefill_rate * self._costs.pace
        self._costs.prompt_token = 1 / rate if rate else 0.0
        texts, value = len(tasks), base / len(tasks)
        if texts > _MANY and not can_gain(self._tokens, value, lambda added: self._more(texts, added), room):
            return found
        reaches = [[] if draft is None else draft.reach(_most(task)) for task, draft in zip(tasks, drafts, strict=True)]
        if not any(reaches):
            return found
        counts = plan_drafts(reaches, self._tokens, value, lambda added: self._more(texts, added), room)
        for task, count in zip(tasks, counts, strict=True):
            if count and task.draft is not None and task.work is not None:
                found[task.work.sequence] = task.draft.take(count)
        return found

    def _of_model(
        self, drafts: ModelDrafts, tasks: Sequence[EngineTask], room: int, running: Mapping[int, EngineTask]
    ) -> dict[int, list[int]]:
        """Return drafts of the draft model for texts without others; none beside prompts, whose costs are not known."""
        texts, added = len(tasks), self.drafted
        base = self._costs.known(texts) if texts == self._tokens else None
        if base is None or not all(task.work is not None and task.work.decoding for task in tasks):
            drafts.release(running.values(), self._balance)
            return {}
        before = self._costs.more(texts, added) if added else 0.0
        drafts.pace = self._costs.pace
        rate = self._meter.prefill_rate * self._costs.pace
        step = Step(
            texts,
            base,
            room - added,
            lambda count: self._costs.more(texts, added + count) - before,
            1 / rate if rate else 0.0,
        )
        able = [
            task
            for task in tasks
            if _may_draft(task) and task.work is not None and task.work.sequence not in self._planned
        ]
        return drafts.plan(able, running.values(), step, self._balance)

    def limit_threads(self, most: int) -> None:
        """Use at most so many CPU threads for the draft model from now on."""
        if self.model_drafts is not None:
            self.model_drafts.limit_threads(most)

    def rebuild(self) -> None:
        """Create the context of the draft model anew, after a fault of the backend."""
        self._planned = {}
        if self.model_drafts is not None:
            self.model_drafts.rebuild()

    def close(self) -> None:
        """Free the draft model."""
        if self.model_drafts is not None:
            self.model_drafts.close()

    def drop(self) -> None:
        """Leave the planned drafts out."""
        self._planned = {}
        if self.model_drafts is not None:
            self.model_drafts.drop()

    @property
    def drafted(self) -> int:
        """The number of planned draft tokens."""
        return sum(map(len, self._planned.values()))

    def pieces(self, chunks: Sequence[Chunk], running: Mapping[int, EngineTask]) -> list[Piece]:
        """Return the pieces of a decode, with the planned drafts."""
        found: list[Piece] = []
        for chunk in chunks:
            task = running[chunk.work.sequence]
            tokens = task.tokens[task.computed : task.computed + chunk.count]
            draft = self._planned.get(chunk.work.sequence)
            if draft is None:
                found.append((chunk.work.sequence, task.position, tokens, int(chunk.is_last)))
            else:
                found.append((chunk.work.sequence, task.position, tokens + draft, 1 + len(draft)))
        return found

    def decoded(self, chunks: Sequence[Chunk], seconds: float) -> None:
        """Learn from a decode that succeeded, before its tokens are chosen. `seconds` are those of `plan` too."""
        whole, seconds = seconds, seconds - self._planning
        self._balance.decoded(seconds / self._costs.pace)
        self._balance.drafted(0, 0.0, self._looking / self._costs.pace)
        self._decodes += 1
        if not self._decodes % _FORGETTING:
            self._rates.forget_drafts()
        added, texts = self.drafted, len(chunks)
        self._value = self._cost = self._seconds = 0.0
        if not self._drafts or self._tokens != texts:  # a prompt in it has no logits, and other costs
            return
        self._seconds = whole
        if not all(chunk.work.decoding for chunk in chunks):  # the last token of a prompt costs as others, once
            return
        self._costs.record(texts + added, seconds, has_drafts=added > 0)
        base = self._costs.known(texts) if added else None
        if base is not None:  # a single decode may have waited for a core
            self._value, self._cost = base / texts, self._costs.latest(texts + added) - base
            if self.model_drafts is not None:
                self._cost += self.model_drafts.seconds

    def rounds(self, last: Sequence[Chunk], slots: Slots, logits: Logits) -> Iterator[tuple[list[EngineTask], Logits]]:
        """
        Yield the texts whose next token is to be chosen, with their logits, until no draft token is left to verify.

        The caller chooses the tokens and appends them before it asks for the next round.
        """
        tasks = [slots.running[chunk.work.sequence] for chunk in last]
        planned, self._planned = self._planned, {}
        if not planned:
            yield tasks, logits
            return
        rows, at, drafted = [], 0, []
        for task, chunk in zip(tasks, last, strict=True):
            rows.append(at)
            if (draft := planned.get(chunk.work.sequence)) is not None:
                drafted.append((task, draft, at))
                slots.drafted(task, len(draft))
                if task.draft is not None:
                    task.draft.drafted += len(draft)
            at += 1 + len(draft or ())
        yield tasks, _rows(logits, rows)
        place = accepted = 0
        total = sum(map(len, planned.values()))
        while drafted:
            left = []
            for task, draft, at in drafted:
                if place < len(draft) and task.work is not None and task.tokens[-1] == draft[place]:
                    slots.accept(task)
                    if task.draft is not None:
                        task.draft.accepted += 1
                    left.append((task, draft, at))
                    continue
                accepted += place
                self._verified(task, len(draft), place, self._cost / total)
                if task.work is not None:
                    slots.roll_back(task)
            drafted, place = left, place + 1
            if drafted:
                yield [task for task, *_ in drafted], _rows(logits, [at + place for *_, at in drafted])
        self._count(total, accepted)

    def _verified(self, task: EngineTask, drafted: int, accepted: int, cost: float) -> None:
        """Record the outcome of a draft, of which each token added `cost` seconds."""
        paid = None
        if self.model_drafts is not None:
            paid = self.model_drafts.verified(task, accepted, self._value, cost)
        if paid is not None:
            self._balance.drafted(0, 0.0, paid)
        elif task.draft is not None:
            task.draft.verified(drafted, accepted)

    def _count(self, drafted: int, accepted: int) -> None:
        self._balance.drafted(accepted, self._value, self._cost)
        if self.model_drafts is not None:
            self._meter.tokens_drafted_by_model = self.model_drafts.drafted
            self._meter.tokens_accepted_by_model = self.model_drafts.accepted
        self._meter.verified(drafted, accepted, self._seconds)

    def _draft(self, task: EngineTask) -> DraftState | None:
        """Return the predictions of a text, with its newest tokens; None when it has none."""
        if not _may_draft(task):
            return None
        if task.draft is None:
            prompt = len(task.prompt)
            jump = None if task.sampler is None else self._forced.of(task.tokens, prompt, task.sampler)
            task.draft = DraftState(task.tokens, prompt, self._rates, jump)
        task.draft.follow(task.sampler)
        return task.draft

    def _more(self, texts: int, added: int) -> float:
        if self._tokens == texts:
            return self._costs.more(texts, added)
        base = self._costs.known(texts)
        assert base is not None, "there are no drafts before the cost without them is known"
        return added * (self._costs.prompt_token or base / texts)  # beside a prompt


def _may_draft(task: EngineTask) -> bool:
    return not task.images and task.request.logprobs is None


def _most(task: EngineTask) -> int:
    """Return how many draft tokens a text can use: one more token is chosen after them."""
    return min(MAX_DRAFTS, task.request.max_tokens - task.written - 1)


def _rows(logits: Logits, rows: list[int]) -> Logits:
    """Return these rows, which ascend. Those of a large vocabulary are only copied where others are between them."""
    first, after = rows[0], rows[-1] + 1
    return logits[first:after] if after - first == len(rows) else logits[rows]
