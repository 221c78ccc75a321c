"""
Progress: the steps of a run while events are applied to them, with counts of the needs of each.

The end of a step updates only the steps that need it: the cost of an event depends on what it changes, not on the
number of steps. Only a step whose needs have changed is examined again.

It is a mapping that is changed in place. No step is reopened in it: for that, a new one is made.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping

from app.workflows.language.rule import StepRule
from app.workflows.state_machine.run import RunStep
from app.workflows.state_machine.states import FINAL_STEPS, StepState


class _Needs:
    """Counts of the needs of a step."""

    __slots__ = ("met", "open", "unmet")

    def __init__(self) -> None:
        self.open = self.met = self.unmet = 0

    def add(self, met: bool | None) -> None:
        """One more need."""
        if met is None:
            self.open += 1
        else:
            self._ended(met)

    def end(self, met: bool) -> None:
        """An open need has ended."""
        self.open -= 1
        self._ended(met)

    def _ended(self, met: bool) -> None:
        if met:
            self.met += 1
        else:
            self.unmet += 1


class RunProgress(dict[str, RunStep]):
    """The steps of a run by key."""

    def __init__(self, steps: Mapping[str, RunStep]) -> None:
        super().__init__(steps)
        self.regular = [key for key, step in steps.items() if not step.rule.on_failure]
        self.others = [key for key, step in steps.items() if step.rule.on_failure]
        #: The number of regular steps that make the run fail.
        self.failed = sum(_fails_run(steps[key]) for key in self.regular)
        self._open = {
            False: sum(steps[key].state not in FINAL_STEPS for key in self.regular),
            True: sum(steps[key].state not in FINAL_STEPS for key in self.others),
        }
        #: Steps to examine; at first, all.
        self._candidates = {False: deque(self.regular), True: deque(self.others)}
        self._needed_by: dict[str, list[tuple[str, str | None]]] = {}
        for key, step in steps.items():
            for need, branch in step.rule.needs:
                self._needed_by.setdefault(need, []).append((key, branch))
        self._needs: dict[str, _Needs] = {}

    def __setitem__(self, key: str, step: RunStep) -> None:
        before = self[key].state in FINAL_STEPS
        super().__setitem__(key, step)
        if before or step.state not in FINAL_STEPS:
            assert not before or step.state in FINAL_STEPS, "no step is reopened"
            return
        late = step.rule.on_failure
        self._open[late] -= 1
        self.failed += not late and _fails_run(step)
        for dependent, branch in self._needed_by.get(key, ()):
            met = _met(step, branch)
            if dependent in self._needs and met is not None:
                self._needs[dependent].end(met)
            self._candidates[self[dependent].rule.on_failure].append(dependent)

    @property
    def regular_ended(self) -> bool:
        """Whether every regular step has ended."""
        return not self._open[False]

    @property
    def all_ended(self) -> bool:
        """Whether every step has ended."""
        return not (self._open[False] or self._open[True])

    def candidates(self, *, on_failure: bool) -> Iterator[RunStep]:
        """Pending steps whose needs have changed, those included that change meanwhile."""
        queue = self._candidates[on_failure]
        while queue:
            step = self[queue.popleft()]
            if step.state is StepState.PENDING and not step.deciding:
                yield step

    def needs_met(self, key: str) -> bool | None:
        """Whether the needs of a step are met; False when they cannot be met any more, None while that is open."""
        rule, needs = self[key].rule, self._needs.get(key)
        if needs is None:
            needs = self._needs[key] = self._counted(rule)
        match rule.join:
            case "all":
                return False if needs.unmet else None if needs.open else True
            case "any":
                return True if needs.met or not rule.needs else None if needs.open else False
            case "all_done":
                return None if needs.open else True

    def _counted(self, rule: StepRule) -> _Needs:
        needs = _Needs()
        for need, branch in rule.needs:
            needs.add(_met(self[need], branch))
        return needs


def _met(step: RunStep, branch: str | None) -> bool | None:
    """Whether a need is met by the end of a step; None before it."""
    if step.state not in FINAL_STEPS:
        return None
    return step.state is StepState.SUCCEEDED and branch in (None, step.branch)


def _fails_run(step: RunStep) -> bool:
    """Whether the end of a step makes its run fail."""
    return step.state in (StepState.FAILED, StepState.CANCELLED) and not step.rule.allow_failure
