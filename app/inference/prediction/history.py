"""
History: what was learned of the steps of a workflow and of the speed of a model, as values.

A step that uses a model is described by its tokens, so that its time follows from the speed of its model; any other by
its time. For a map these are of one item; for an agent and a called workflow the time is that of the whole step.

Its state is JSON of bounded size: `MOST_STEPS` steps of a workflow are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from app.inference.prediction.averages import NO_LINE, NO_MEAN, DecayedLine, DecayedMean
from app.inference.prediction.residuals import NO_RESIDUALS, Interval, Residuals

#: Steps of a workflow that are kept.
MOST_STEPS = 100
#: Seconds of a step, and tokens of a text, of which nothing is known.
DEFAULT_SECONDS, DEFAULT_TOKENS = 5.0, 128.0
#: Weight from which a mean is used.
_KNOWN = 1.0


@dataclass(frozen=True, slots=True)
class StepSample:
    """What a step has used: of a map, one of its items."""

    #: Seconds in a slot or in a worker.
    seconds: float
    model: str | None = None
    tokens_in: int = 0
    #: Of `tokens_in`, those that were not computed again.
    tokens_cached: int = 0
    tokens_out: int = 0
    #: Seconds until its first token; None when that is not known.
    first_token: float | None = None
    #: Seconds from ready to its start.
    waited: float | None = None


@dataclass(frozen=True, slots=True)
class ModelHistory:
    """The speed of a model."""

    #: Seconds until the first token, and the tokens of the prompt that were computed.
    prefill: DecayedMean = NO_MEAN
    prompt: DecayedMean = NO_MEAN
    #: Seconds after the first token, and the tokens of the text.
    decode: DecayedMean = NO_MEAN
    text: DecayedMean = NO_MEAN
    #: Seconds that a step waits for a slot.
    wait: DecayedMean = NO_MEAN
    #: Of the times of steps, for steps without enough of their own.
    residuals: Residuals = NO_RESIDUALS

    @property
    def is_known(self) -> bool:
        """Whether a step of it has ended."""
        return self.text.weight >= _KNOWN and self.text.mean > 0

    def seconds(self, tokens_in: float, tokens_out: float) -> float:
        """Return the expected time of a step with these tokens."""
        per_prompt = self.prefill.mean / self.prompt.mean if self.prompt.mean > 0 else 0.0
        return tokens_in * per_prompt + tokens_out * self.per_token

    @property
    def per_token(self) -> float:
        """Seconds for each token of a text; 0 while it is not known."""
        return self.decode.mean / self.text.mean if self.text.mean > 0 else 0.0

    def add(self, sample: StepSample) -> ModelHistory:
        """Return the history with one more step of the model."""
        found = self if sample.waited is None else replace(self, wait=self.wait.add(sample.waited))
        if not sample.tokens_out and not sample.tokens_in:
            return found
        first = min(sample.first_token, sample.seconds) if sample.first_token is not None else 0.0
        return replace(
            found,
            prefill=found.prefill.add(first),
            prompt=found.prompt.add(max(sample.tokens_in - sample.tokens_cached, 1)),
            decode=found.decode.add(sample.seconds - first),
            text=found.text.add(sample.tokens_out),
        )

    def state(self) -> dict[str, Any]:
        """Return it as JSON."""
        means = {name: getattr(self, name).state() for name in ("prefill", "prompt", "decode", "text", "wait")}
        return {**means, "residuals": self.residuals.state()}

    @classmethod
    def of(cls, state: Mapping[str, Any] | None) -> ModelHistory:
        """Return the history of a state."""
        if not state:
            return cls()
        means = {name: DecayedMean.of(state[name]) for name in ("prefill", "prompt", "decode", "text", "wait")}
        return cls(**means, residuals=Residuals.of(state["residuals"]))


@dataclass(frozen=True, slots=True)
class StepHistory:
    """A step of a workflow. Lines are over the bytes of the inputs of the run."""

    seconds: DecayedMean = NO_MEAN
    tokens_in: DecayedLine = NO_LINE
    tokens_out: DecayedLine = NO_LINE
    #: Items of a map.
    items: DecayedLine = NO_LINE
    #: How often it was executed, from 0 to 1.
    share: DecayedMean = NO_MEAN
    residuals: Residuals = NO_RESIDUALS

    @property
    def is_known(self) -> bool:
        """Whether such a step has ended."""
        return self.seconds.weight >= _KNOWN

    def expected(self, inputs_bytes: float, model: ModelHistory | None) -> float:
        """Return the expected seconds of a step, or of an item, whose model has that history."""
        if model is not None and model.is_known and self.tokens_out.weight >= _KNOWN:
            return model.seconds(self.tokens_in.at(inputs_bytes), self.tokens_out.at(inputs_bytes))
        if self.is_known:
            return self.seconds.mean
        if model is not None and model.is_known:
            return model.seconds(model.prompt.mean, model.text.mean)
        return DEFAULT_SECONDS

    def interval(self, seconds: float, model: ModelHistory | None) -> Interval:
        """Return the interval of an expected time of the step."""
        if self.residuals.is_enough or model is None:
            return self.residuals.around(seconds)
        return model.residuals.around(seconds)

    def add(self, inputs_bytes: float, sample: StepSample, predicted: float | None, given: Interval) -> StepHistory:
        """Return the history with one more step, whose time was `predicted` with that interval."""
        found = replace(self, seconds=self.seconds.add(sample.seconds))
        if predicted is not None:
            found = replace(found, residuals=self.residuals.add(predicted, sample.seconds, given))
        if sample.model is None or not (sample.tokens_in or sample.tokens_out):
            return found
        return replace(
            found,
            tokens_in=self.tokens_in.add(inputs_bytes, sample.tokens_in),
            tokens_out=self.tokens_out.add(inputs_bytes, sample.tokens_out),
        )

    def state(self) -> dict[str, Any]:
        """Return it as JSON."""
        averages = {name: getattr(self, name).state() for name in (*_MEANS, *_LINES)}
        return {**averages, "residuals": self.residuals.state()}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> StepHistory:
        """Return the history of a state."""
        seconds, share = (DecayedMean.of(state[name]) for name in _MEANS)
        tokens_in, tokens_out, items = (DecayedLine.of(state[name]) for name in _LINES)
        return cls(seconds, tokens_in, tokens_out, items, share, Residuals.of(state["residuals"]))


_MEANS, _LINES = ("seconds", "share"), ("tokens_in", "tokens_out", "items")
#: A step that was never seen.
NEW_STEP = StepHistory()


@dataclass(frozen=True, slots=True)
class WorkflowHistory:
    """The steps of a workflow, and how wrong the predictions of its runs were."""

    steps: Mapping[str, StepHistory] = field(default_factory=dict)
    residuals: Residuals = NO_RESIDUALS

    def state(self) -> dict[str, Any]:
        """Return it as JSON."""
        steps = {key: step.state() for key, step in self.steps.items()}
        return {"steps": steps, "residuals": self.residuals.state()}

    @classmethod
    def of(cls, state: Mapping[str, Any] | None) -> WorkflowHistory:
        """Return the history of a state."""
        if not state:
            return cls()
        steps = {key: StepHistory.of(step) for key, step in state["steps"].items()}
        return cls(steps, Residuals.of(state["residuals"]))
