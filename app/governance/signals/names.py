"""
The signals: their names, units, labels and statistics.

A signal is a stream of observations. Each has a value and a weight; the mean is the sum of the values by the sum of the
weights, where a sum of weights below one counts as one. So the mean of a ratio is right at each level: used bytes by
all bytes, failures by attempts.

`docs/governance.md` lists them; a test compares the list with this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

#: The labels of observations.
LABELS = ("model", "pool", "host", "device", "namespace", "priority")


class SignalKind(StrEnum):
    """What the observations of a signal are."""

    #: A state that is sampled: a value, or a part and the whole.
    GAUGE = "gauge"
    #: Events: how many of them are of a kind.
    RATIO = "ratio"
    #: Values whose quantiles are kept.
    DISTRIBUTION = "distribution"
    #: Amounts that add up.
    COUNTER = "counter"


class Unit(StrEnum):
    """The unit of a signal."""

    #: From 0 to 1.
    RATIO = "ratio"
    SECONDS = "seconds"
    STEPS = "steps"
    MESSAGES = "messages"
    TOKENS = "tokens"
    SPLITS = "splits"
    #: The currency of the catalogue.
    CURRENCY = "currency"


class Statistic(StrEnum):
    """What is computed of the observations in a window."""

    MEAN = "mean"
    MIN = "min"
    MAX = "max"
    #: The mean of the latest minute.
    LAST = "last"
    SUM = "sum"
    #: The sum, by the minutes of the window.
    PER_MINUTE = "per_minute"
    #: The number of observations.
    COUNT = "count"
    P50 = "p50"
    P95 = "p95"
    P99 = "p99"


#: Statistics that need a histogram, and the quantile of each.
QUANTILES: Mapping[Statistic, float] = {Statistic.P50: 0.5, Statistic.P95: 0.95, Statistic.P99: 0.99}
_SAMPLED = (Statistic.MEAN, Statistic.MIN, Statistic.MAX, Statistic.LAST, Statistic.COUNT)
#: The statistics of each kind, the default first.
STATISTICS: Mapping[SignalKind, tuple[Statistic, ...]] = {
    SignalKind.GAUGE: _SAMPLED,
    SignalKind.RATIO: (Statistic.MEAN, Statistic.LAST, Statistic.SUM, Statistic.PER_MINUTE, Statistic.COUNT),
    SignalKind.DISTRIBUTION: (Statistic.P95, Statistic.P50, Statistic.P99, *_SAMPLED),
    SignalKind.COUNTER: (Statistic.SUM, Statistic.PER_MINUTE, Statistic.MAX, Statistic.COUNT),
}


@dataclass(frozen=True, slots=True)
class SignalDefinition:
    """A signal that can be written and read."""

    name: str
    kind: SignalKind
    unit: Unit
    #: The labels that its observations may have.
    labels: tuple[str, ...]
    description: str

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """What can be computed of it, the default first."""
        return STATISTICS[self.kind]


_GAUGE, _RATIO, _DISTRIBUTION, _COUNTER = SignalKind
_WORK = ("model", "pool", "host", "namespace", "priority")
_DEVICE = ("host", "device")


def _definitions(*listed: SignalDefinition) -> Mapping[str, SignalDefinition]:
    return {one.name: one for one in listed}


#: All signals, by name.
SIGNALS: Mapping[str, SignalDefinition] = _definitions(
    SignalDefinition("memory_utilisation", _GAUGE, Unit.RATIO, _DEVICE, "used bytes of devices, by their bytes"),
    SignalDefinition("memory_reserved", _GAUGE, Unit.RATIO, _DEVICE, "reserved bytes of devices, by their capacity"),
    SignalDefinition(
        "pool_memory",
        _GAUGE,
        Unit.RATIO,
        ("model", "pool", "host"),
        "used bytes of pools, by those that they reserved",
    ),
    SignalDefinition("gpu_utilisation", _GAUGE, Unit.RATIO, _DEVICE, "the part of the time in which GPUs compute"),
    SignalDefinition(
        "response_time", _DISTRIBUTION, Unit.SECONDS, _WORK, "from when a step is ready until it has succeeded"
    ),
    SignalDefinition(
        "first_token_time", _DISTRIBUTION, Unit.SECONDS, _WORK, "from when a step is ready until its first token"
    ),
    SignalDefinition(
        "queue_wait", _DISTRIBUTION, Unit.SECONDS, _WORK, "from when a step is ready until its first attempt begins"
    ),
    SignalDefinition(
        "queue_age", _GAUGE, Unit.SECONDS, ("model", "priority"), "how long the oldest ready step has waited"
    ),
    SignalDefinition("waiting_steps", _GAUGE, Unit.STEPS, ("model", "priority"), "steps that are ready and wait"),
    SignalDefinition("error_rate", _RATIO, Unit.RATIO, _WORK, "failed attempts with a model, by ended ones"),
    SignalDefinition(
        "out_of_memory_rate",
        _RATIO,
        Unit.RATIO,
        ("model", "host"),
        "pools that ended or refused to load for lack of memory, by pools that ended",
    ),
    SignalDefinition("thrash_rate", _RATIO, Unit.RATIO, ("model",), "loads of models, by steps that they served"),
    SignalDefinition("steps_per_load", _RATIO, Unit.STEPS, ("model",), "steps that were served, by loads of models"),
    SignalDefinition(
        "cache_hit_rate",
        _RATIO,
        Unit.RATIO,
        ("model", "namespace"),
        "calls that got a cached or shared answer, by calls that may be cached",
    ),
    SignalDefinition(
        "prefix_hit_rate", _RATIO, Unit.RATIO, _WORK, "prompt tokens that were computed before, by prompt tokens"
    ),
    SignalDefinition(
        "handoff_success",
        _RATIO,
        Unit.RATIO,
        ("namespace",),
        "called runs and messages of hand-offs that succeeded, by those that ended",
    ),
    SignalDefinition(
        "cooperation",
        _RATIO,
        Unit.RATIO,
        ("model", "namespace"),
        "attempts that succeeded, of those that go on with the results of other steps",
    ),
    SignalDefinition("collaboration_score", _GAUGE, Unit.RATIO, (), "from sharing, hand-offs and cooperation"),
    SignalDefinition(
        "conversation_growth", _COUNTER, Unit.MESSAGES, ("namespace",), "messages that were added to conversations"
    ),
    SignalDefinition(
        "conversation_length", _DISTRIBUTION, Unit.MESSAGES, ("namespace",), "messages of conversations that changed"
    ),
    SignalDefinition(
        "heartbeat_age",
        _GAUGE,
        Unit.SECONDS,
        ("host", "pool", "model"),
        "the time since the last heartbeat of agents and pools",
    ),
    SignalDefinition("tokens", _COUNTER, Unit.TOKENS, _WORK, "tokens of prompts and answers"),
    SignalDefinition("split_rollbacks", _COUNTER, Unit.SPLITS, ("model",), "splits that a guard has rolled back"),
    SignalDefinition("cost", _COUNTER, Unit.CURRENCY, _WORK, "the cost of attempts, where models have prices"),
)
#: How messages name them.
NAMES = tuple(SIGNALS)
