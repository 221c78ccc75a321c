"""Expected times: averages, intervals, timelines and forecasts, as values."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from app.inference import waiting
from app.inference.prediction import forecast as forecasts
from app.inference.prediction.averages import DecayedLine, DecayedMean
from app.inference.prediction.forecast import Basis, Learned, StepProgress
from app.inference.prediction.history import ModelHistory, StepSample, WorkflowHistory
from app.inference.prediction.learn import EndedRun, EndedStep, Knowledge, learn
from app.inference.prediction.residuals import ENOUGH, MOST, Residuals
from app.inference.prediction.timeline import ExpectedStep, ModelSlots, timeline
from app.inference.waiting import ModelQueue
from app.kernel.priority import Priority
from app.workflows.language import check
from benchmarks.prediction import SCENARIOS, measured

TWO = """
workflow: two
defaults: {model: "m:1"}
steps:
  - {id: a, kind: generate, prompt: x}
  - {id: b, kind: generate, prompt: x, needs: [a]}
"""


def step(key: str, tokens_out: int = 50, seconds: float = 2.0) -> EndedStep:
    return EndedStep(key, True, samples=[StepSample(seconds, "m:1", 100, 0, tokens_out, seconds / 2)])


def taught(runs: int = 20, seconds: float = 4.0) -> Knowledge:
    known = Knowledge(WorkflowHistory())
    for _ in range(runs):
        expected = forecasts.as_stored(forecasts.forecast(check.parse(TWO), Learned(known.workflow, known.models), 100))
        learn(known, EndedRun(100, seconds, expected, [step("a"), step("b")]))
    return known


def test_a_mean_follows_its_latest_values() -> None:
    mean = DecayedMean()
    for value in [1.0] * 100 + [3.0] * 100:
        mean = mean.add(value)
    assert mean.mean == pytest.approx(3.0, abs=0.05)
    assert DecayedMean.of(mean.state()).mean == pytest.approx(mean.mean, rel=1e-5)


def test_a_line_is_used_only_where_it_explains_the_values() -> None:
    chance = random.Random(1)
    steep = noise = DecayedLine()
    for _ in range(50):
        x = chance.uniform(0, 100)
        steep, noise = steep.add(x, 2 * x + chance.uniform(-5, 5)), noise.add(x, chance.uniform(90, 110))
    assert steep.at(80) == pytest.approx(160, rel=0.1)
    assert noise.at(0) == noise.at(100) == noise.mean_y
    assert steep.at(1e9) <= steep.mean_y * 4
    assert DecayedLine.of(steep.state()).at(80) == pytest.approx(steep.at(80), rel=1e-4)


def test_an_interval_holds_four_of_five_truths_although_predictions_are_biased() -> None:
    chance, found, hits, given = random.Random(2), Residuals(), 0, 0
    for number in range(2_000):
        truth = 3.0 * chance.lognormvariate(0, 0.6)
        interval = found.around(1.0)
        if number >= 100:
            given, hits = given + 1, hits + (interval.low <= truth <= interval.high)
        found = found.add(1.0, truth, interval)
    assert 0.77 <= hits / given <= 0.83
    assert len(found.values) == MOST
    assert Residuals.of(found.state()) == Residuals(found.values, round(found.below, 4), round(found.above, 4))


def test_few_residuals_give_a_wide_interval() -> None:
    found = Residuals()
    for _ in range(ENOUGH - 1):
        found = found.add(1.0, 1.0)
    assert (found.is_enough, found.around(8.0).low, found.around(8.0).high) == (False, 2.0, 32.0)
    assert found.add(1.0, 1.0).around(8.0).high == pytest.approx(8.0)


def test_a_timeline_shares_slots_and_follows_the_longest_path() -> None:
    steps = [
        ExpectedStep("a", (), 2.0, "m"),
        ExpectedStep("b", (), 2.0, "m"),
        ExpectedStep("c", (), 2.0, "m"),
        ExpectedStep("end", ("a", "b", "c"), 1.0),
    ]
    assert timeline(steps, {"m": ModelSlots(3)}).seconds == 3.0
    assert timeline(steps, {"m": ModelSlots(1)}).seconds == 7.0
    assert timeline(steps, {"m": ModelSlots(3, free_in=10.0)}).seconds == 13.0
    assert timeline([*steps, ExpectedStep("x", (), 9.0, runs=True)], {"m": ModelSlots(3)}).seconds == 9.0
    assert timeline([], {}).seconds == 0.0


@pytest.mark.parametrize(("parallel", "slots", "seconds"), [(4, 8, 5.0), (8, 2, 10.0), (1, 8, 20.0)])
def test_a_map_takes_as_many_slots_as_it_and_its_model_allow(parallel: int, slots: int, seconds: float) -> None:
    steps = [ExpectedStep("each", (), 1.0, "m", items=20, parallel=parallel)]
    assert timeline(steps, {"m": ModelSlots(slots)}).seconds == seconds


def test_a_forecast_says_what_it_was_made_of() -> None:
    definition = check.parse(TWO)
    nothing = forecasts.forecast(definition, Learned(WorkflowHistory()), 100)
    known = taught()
    found = forecasts.forecast(definition, Learned(known.workflow, known.models), 100)

    assert (nothing.basis, nothing.is_calibrated) == (Basis.DEFAULTS, False)
    assert (found.basis, found.is_calibrated) == (Basis.HISTORY, True)
    assert found.interval.seconds == pytest.approx(4.0, rel=0.05)
    assert {key: round(one.seconds) for key, one in found.steps.items()} == {"a": 2, "b": 2}


def test_what_is_left_of_a_run_falls_as_it_goes_on() -> None:
    definition, known = check.parse(TWO), taught()
    learned = Learned(known.workflow, known.models)

    def left(progress: StepProgress, ended: frozenset[str] = frozenset()) -> float:
        return forecasts.forecast(definition, learned, 100, {"a": progress, "b": StepProgress()}, ended).raw

    whole = left(StepProgress())
    assert left(StepProgress(elapsed=1.0)) == pytest.approx(whole - 1.0, abs=0.1)
    # What a text has come to says more than the time that has passed.
    assert left(StepProgress(elapsed=1.0, written=40)) < left(StepProgress(elapsed=1.0, written=10))
    assert left(StepProgress(), frozenset({"a"})) == pytest.approx(whole / 2, rel=0.05)
    assert left(StepProgress(), frozenset({"a", "b"})) == 0.0


def test_a_model_that_becomes_slower_is_learned_of_other_workflows_too() -> None:
    known = taught()
    for _ in range(60):
        learn(known, EndedRun(0, None, None, [step("elsewhere", seconds=6.0)]))
    found = forecasts.forecast(check.parse(TWO), Learned(known.workflow, known.models), 100)
    assert found.raw == pytest.approx(12.0, rel=0.1)


def test_a_step_that_is_often_skipped_counts_by_its_share() -> None:
    known = taught()
    for _ in range(100):
        learn(known, EndedRun(100, None, None, [step("a"), EndedStep("b", was_done=False, was_skipped=True)]))
    found = forecasts.forecast(check.parse(TWO), Learned(known.workflow, known.models), 100)
    assert found.raw == pytest.approx(2.0, rel=0.1)


def test_the_interval_is_calibrated_on_simulated_runs() -> None:
    """The benchmark, small: runs of four workflows in bursts, each predicted from those that ended before."""
    steady = measured(SCENARIOS[0], [7], 500)
    assert 0.7 <= steady["hit"] <= 0.9
    assert steady["error"] < steady["mean_error"]
    assert steady["score"] < steady["mean_score"]


def test_the_state_of_a_workflow_is_bounded() -> None:
    known = Knowledge(WorkflowHistory())
    for number in range(30):
        learn(known, EndedRun(1, 1.0, None, [step(f"s{number}-{index}") for index in range(10)]))
    assert len(known.workflow.steps) == 100
    assert WorkflowHistory.of(known.workflow.state()).steps.keys() == known.workflow.steps.keys()
    assert ModelHistory.of(known.models["m:1"].state()).is_known


def test_a_wait_adds_what_the_steps_before_are_expected_to_take() -> None:
    """Not the mean of the model: a long one ahead counts as long."""
    queue = ModelQueue("m:1", slots=1, duration=2.0, waiting=2, before_new=2, work=(30.0, 1.0), runs={"x": 2})
    assert waiting.estimate(queue, None).seconds == 33.0
    assert waiting.estimate(queue, "x").seconds == 32.0
    assert waiting.estimate(queue, None).high is None

    known = waiting.estimate(replace(queue, spread=(0.25, 4.0)), "x")
    assert known.low is not None
    assert known.high is not None
    assert 8 < known.low < 32 < known.high < 128, "what two take together differs less than what one takes"
    assert "about 32 s (12 to 86 s)" in known.detail


@pytest.mark.parametrize(("priority", "seconds"), [("interactive", 3.0), ("standard", 7.0), ("batch", 11.0)])
def test_a_new_call_waits_for_those_of_its_class_and_above(priority: str, seconds: float) -> None:
    queue = ModelQueue("m:1", slots=1, duration=1.0, waiting=10, before_new=2, before_standard=6, before_batch=10)
    assert waiting.estimate(queue, None, Priority(priority)).seconds == seconds
