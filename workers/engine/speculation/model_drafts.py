"""
Drafts of a draft model: its context, the tokens in it, and its predictions for the texts of an engine.

Each text that runs has a slot of its own in the draft model's context. A slot keeps its tokens when the text ends or is
parked, and the next one continues after the tokens that the two have in common. What differs is removed before the next
draft, so the engine need not say that a text was cancelled, parked or rolled back.
A text's tokens are computed when drafts are expected to gain more than that costs, a part in each step.
Only the engine's thread uses it. A fault of the draft model fails no text; after several there are no more drafts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from time import perf_counter

import structlog

from app.kernel.errors import ArrieroError
from workers.engine.bindings.llama import Context, LlamaModel
from workers.engine.options import EngineOptions
from workers.engine.speculation import model_planning
from workers.engine.speculation.drafting import Balance
from workers.engine.speculation.model_planning import DraftCosts, DraftRate, Step
from workers.engine.tasks import EngineTask

_LOG = structlog.get_logger(__name__)

#: A text with more missing tokens is behind: they are computed apart from drafts.
_BEHIND = 16
#: Fewest tokens of a part, unless fewer are missing.
_MIN_PART = 32
#: Faults without a successful decode in between, after which there are no more drafts.
_MAX_FAULTS = 3
#: Weight of a new value in a moving average.
_BLEND = 1 / 4


class _Slot:
    """A sequence of the draft model's context, and the tokens in it."""

    __slots__ = ("number", "tokens")

    def __init__(self, number: int) -> None:
        self.number = number
        self.tokens: list[int] = []


class _Text:
    """A running text with its slot."""

    __slots__ = ("common", "debt", "draft", "rate", "slot", "task")

    def __init__(self, task: EngineTask, slot: _Slot, engine: DraftRate) -> None:
        self.task, self.slot, self.rate = task, slot, DraftRate(engine)
        #: The tokens of the slot, from the first on, that are the text's.
        self.common = 0
        #: Seconds that computing its tokens cost and that its drafts have not gained yet.
        self.debt = 0.0
        #: Tokens that were drafted and not verified yet.
        self.draft: list[int] = []
        self.follow()

    def follow(self) -> None:
        """Find what the slot has in common with the newest tokens of the text, of which the last is left to compute."""
        mine, held, at = self.task.tokens, self.slot.tokens, self.common
        end = min(len(mine) - 1, len(held))
        while at < end and mine[at] == held[at]:
            at += 1
        self.common = at

    @property
    def missing(self) -> int:
        """Tokens of the text that the draft model has not computed."""
        return len(self.task.tokens) - self.common

    @property
    def left(self) -> int:
        """Draft tokens that the text can use: one more token is chosen after them."""
        return self.task.request.max_tokens - self.task.written - 1


class ModelDrafts:
    """The drafts of one engine by a draft model."""

    def __init__(self, model: LlamaModel, options: EngineOptions, most: int, ratio: float) -> None:
        """
        Create the context of the loaded `model`. `most` and `ratio` as for `model_planning`.

        Raises what `Context` raises. From then on it owns the model.
        """
        self._model, self._options, self._most = model, options, most
        self.costs, self._engine_rate = DraftCosts(ratio), DraftRate()
        self._context: Context | None = Context(model, options)
        self._limit = self._limit_of(self._context)
        self._slots = [_Slot(number) for number in range(options.slots)]
        self._texts: dict[int, _Text] = {}
        self._faults = 0
        #: Seconds of its decodes for the planned drafts.
        self.seconds = 0.0
        #: How many times as long as usual decodes take now (`DecodeCosts.pace`). Seconds are those at the usual pace.
        self.pace = 1.0
        #: Draft tokens that were verified, and accepted.
        self.drafted = self.accepted = 0

    @property
    def is_on(self) -> bool:
        """Whether there can be drafts; not after several faults."""
        return self._context is not None

    def close(self) -> None:
        """Free the context and the model."""
        self._end()
        self._model.close()

    def limit_threads(self, most: int) -> None:
        """Use at most so many CPU threads from now on, also in a new context."""
        self._options = self._options.model_copy(update={"most_threads": most})
        if self._context is not None:
            self._context.threads.limit(most)

    def rebuild(self) -> None:
        """Create the context anew, after a fault of the backend. Without one there are no more drafts."""
        if self._context is None:
            return
        threads = self._context.threads
        self._end()
        self._forget()
        try:
            self._context = Context(self._model, self._options)
            self._context.threads = threads
        except (ArrieroError, OSError, MemoryError):
            _LOG.exception("draft_context_lost", model=self._model.path.name)

    def plan(
        self, tasks: Sequence[EngineTask], running: Collection[EngineTask], step: Step, balance: Balance
    ) -> dict[int, list[int]]:
        """
        Return the draft tokens by sequence for some of the `tasks`, which may have drafts.

        `running` are all tasks with a slot.
        """
        self.release(running, balance)
        self.costs.rest()
        if self._context is None or step.room <= 0 or not balance.may_draft(step.base):
            return {}
        texts = [self._text(task) for task in tasks if self._can_draft(task)]
        texts = [text for text in texts if text.left > 0]
        if not texts:
            return {}
        for text in texts:
            text.rate.rest()
            text.follow()
        wanted = self._wanted(texts, step, ready=len(texts))
        behind = [texts[place] for place in wanted.chosen if texts[place].missing > _BEHIND]
        if behind:
            self._compute_part(behind, wanted.gain / len(wanted.chosen), step)
            if not self.is_on:
                return {}
            texts = [text for text in texts if text.missing <= _BEHIND]
            wanted = self._wanted(texts, step, ready=0)
        found = self._predict([texts[place] for place in wanted.chosen], wanted.depth)
        if not found and self.seconds:
            balance.drafted(0, 0.0, self.seconds)
        return found

    def release(self, running: Collection[EngineTask], balance: Balance) -> None:
        """Give back the slots of texts that no longer run. What they did not gain back is lost."""
        self.seconds = 0.0
        now = {task.id for task in running}
        for number in [number for number in self._texts if number not in now]:
            if (debt := self._texts.pop(number).debt) > 0:
                balance.drafted(0, 0.0, debt)

    def verified(self, task: EngineTask, accepted: int, value: float, cost: float) -> float | None:
        """
        Record how many tokens of the task's draft were accepted; None if it was not of the draft model.

        `value` are the seconds that each saved, `cost` those that a draft token added. Returns the seconds of the gain
        that pay for computing the text by the draft model before.
        """
        text = self._texts.get(task.id)
        if text is None or not text.draft:
            return None
        drafted, text.draft = len(text.draft), []
        text.rate.record(drafted, accepted)
        self.drafted += drafted
        self.accepted += accepted
        paid = min(text.debt, max(0.0, accepted * value - drafted * cost))
        text.debt -= paid
        return paid

    def drop(self) -> None:
        """Forget the planned drafts, which will not be verified."""
        for text in self._texts.values():
            text.draft = []

    def _wanted(self, texts: Sequence[_Text], step: Step, ready: int) -> model_planning.DraftPlan:
        """Return the plan for the texts, with the tokens that they miss, or `ready` if it is not 0."""
        missing = ready or sum(text.missing for text in texts)
        rates = [text.rate.value for text in texts]
        return model_planning.plan_model_drafts(rates, missing, self._most, step, self.costs)

    def _text(self, task: EngineTask) -> _Text:
        """Return the text of a task. A new one gets the free slot that has most in common with it."""
        if (found := self._texts.get(task.id)) is None:
            taken = {text.slot.number for text in self._texts.values()}
            free = [_Text(task, slot, self._engine_rate) for slot in self._slots if slot.number not in taken]
            # Of those with nothing in common the emptiest, so that what others may continue is kept.
            found = max(free, key=lambda text: (text.common, -len(text.slot.tokens)))
            self._texts[task.id] = found
        return found

    def _can_draft(self, task: EngineTask) -> bool:
        """Whether there are drafts for a text; a longer one than the draft model's slot has none."""
        return len(task.tokens) + self._most <= self._limit

    def _compute_part(self, texts: Sequence[_Text], gain: float, step: Step) -> None:
        """Compute a part of the missing tokens of the first text that is worth it, within the time of a step."""
        assert self._context is not None
        token = self.costs.prompt_token or self.costs.ratio * (step.prompt_token or step.value)
        for text in texts:
            if not model_planning.is_worth_computing(text.missing, text.task.written, text.left, gain, step, token):
                continue
            most = min(self._context.n_batch, max(_MIN_PART, int(step.base / token)))
            part = text.task.tokens[text.common : min(len(text.task.tokens) - 1, text.common + most)]
            if not self._truncate(text):
                return
            began = perf_counter()
            if not self._decode([(text, part, 0)]):
                return
            seconds = (perf_counter() - began) / self.pace
            text.debt += seconds
            found = seconds / len(part)
            known = self.costs.prompt_token
            self.costs.prompt_token = known + (found - known) * _BLEND if known else found
            return

    def _predict(self, texts: Sequence[_Text], depth: int) -> dict[int, list[int]]:
        """
        Return the next tokens of the texts, by greedy choice, at most `depth` for each.

        Texts whose missing tokens do not fit a batch of the draft model have none.
        """
        assert self._context is not None
        active, room = [], self._context.n_batch
        for text in texts:  # those of the best rates first
            if self._truncate(text) and text.missing <= room:
                active.append(text)
                room -= text.missing
        pending = {text.task.id: text.task.tokens[text.common :] for text in active}
        for _ in range(depth):
            active = [text for text in active if len(text.draft) < text.left]
            if not active:
                break
            began = perf_counter()
            if not self._decode([(text, pending[text.task.id], 1) for text in active]):
                return {}
            assert self._context is not None
            chosen = self._context.logits(len(active)).argmax(axis=1).tolist()
            self.seconds += self.costs.record(
                sum(len(pending[text.task.id]) for text in active), (perf_counter() - began) / self.pace
            )
            going_on = []
            for text, token in zip(active, chosen, strict=True):
                if token in self._model.end_tokens:  # the text would end there, so computing it gains nothing
                    continue
                text.draft.append(token)
                pending[text.task.id] = [token]
                going_on.append(text)
            active = going_on
        return {text.task.work.sequence: list(text.draft) for text in texts if text.draft and text.task.work}

    def _truncate(self, text: _Text) -> bool:
        """Remove the tokens of the slot that are not the text's. Returns False when all were lost."""
        assert self._context is not None
        text.draft = []
        slot = text.slot
        if len(slot.tokens) == text.common:
            return True
        kept = self._context.truncate(slot.number, text.common)
        del slot.tokens[text.common if kept else 0 :]
        text.common = len(slot.tokens)
        return kept

    def _decode(self, parts: Sequence[tuple[_Text, list[int], int]]) -> bool:
        """Decode tokens of texts, with logits for the last ones. Returns whether it succeeded."""
        assert self._context is not None
        code = self._context.decode(
            [(text.slot.number, len(text.slot.tokens), part, outputs) for text, part, outputs in parts]
        )
        if code:
            self._failed(code)
            return False
        self._faults = 0
        for text, part, _ in parts:
            text.slot.tokens += part
            text.common = min(len(text.task.tokens) - 1, text.common + len(part))
        return True

    def _failed(self, code: int) -> None:
        """Empty the context, which may hold a part of the decode."""
        assert self._context is not None
        self._faults += 1
        _LOG.error("draft_decode_failed", code=code, model=self._model.path.name, faults=self._faults)
        for slot in self._slots:
            self._context.drop(slot.number)
        self._forget()
        if self._faults >= _MAX_FAULTS:
            _LOG.error("draft_model_off", model=self._model.path.name)
            self._end()

    def _forget(self) -> None:
        """Forget what is in the context."""
        for slot in self._slots:
            slot.tokens = []
        for text in self._texts.values():
            text.common, text.draft = 0, []

    def _end(self) -> None:
        if self._context is not None:
            self._context.close()
            self._context = None

    def _limit_of(self, context: Context) -> int:
        trained = self._model.n_context_trained
        return min(context.n_sequence, trained) if trained else context.n_sequence
