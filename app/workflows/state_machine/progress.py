"""
Progress: the steps of a run while events are applied to them, with what each needs counted.

A step that ends is told to those that need it and to nobody else: what an event costs follows from what it changes, not
from how many steps there are. Only a step that may begin, or cannot any more, is looked at again.

A mapping that is changed in place. No step is reopened in it: for that, a new one is made.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping

from app.workflows.language.rule import StepRule
from app.workflows.state_machine.run import RunStep
from app.workflows.state_machine.states import FINAL_STEPS, StepState


class _Needs:
    """How what a step needs stands, counted."""

    __slots__ = ("met", "missed", "open")

    def __init__(self) -> None:
        self.open = self.met = self.missed = 0

    def add(self, met: bool | None) -> None:
        """One more need."""
        if met is None:
            self.open += 1
        else:
            self._ended(met)

    def end(self, met: bool) -> None:
        """A need that was open has ended."""
        self.open -= 1
        self._ended(met)

    def _ended(self, met: bool) -> None:
        if met:
            self.met += 1
        else:
            self.missed += 1


class RunProgress(dict[str, RunStep]):
    """The steps of a run by key."""

    def __init__(self, steps: Mapping[str, RunStep]) -> None:
        super().__init__(steps)
        self.regular = [key for key, step in steps.items() if not step.rule.on_failure]
        self.others = [key for key, step in steps.items() if step.rule.on_failure]
        #: Regular steps that ended in a way that makes the run fail.
        self.missed = sum(_missed(steps[key]) for key in self.regular)
        self._open = {
            False: sum(steps[key].state not in FINAL_STEPS for key in self.regular),
            True: sum(steps[key].state not in FINAL_STEPS for key in self.others),
        }
        #: Steps that are to be looked at; at first, all.
        self._to_look_at = {False: deque(self.regular), True: deque(self.others)}
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
        self.missed += not late and _missed(step)
        for dependent, branch in self._needed_by.get(key, ()):
            met = _met(step, branch)
            if dependent in self._needs and met is not None:
                self._needs[dependent].end(met)
            self._to_look_at[self[dependent].rule.on_failure].append(dependent)

    @property
    def regular_ended(self) -> bool:
        """Whether every regular step has ended."""
        return not self._open[False]

    @property
    def all_ended(self) -> bool:
        """Whether every step has ended."""
        return not (self._open[False] or self._open[True])

    def to_look_at(self, *, on_failure: bool) -> Iterator[RunStep]:
        """Pending steps whose needs may have come about, while there are any; those that follow from a change too."""
        queue = self._to_look_at[on_failure]
        while queue:
            step = self[queue.popleft()]
            if step.state is StepState.PENDING and not step.asked:
                yield step

    def standing(self, key: str) -> bool | None:
        """Whether what a step needs has come about, or cannot any more; None while it still may."""
        rule, needs = self[key].rule, self._needs.get(key)
        if needs is None:
            needs = self._needs[key] = self._counted(rule)
        match rule.join:
            case "all":
                return False if needs.missed else None if needs.open else True
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


def _missed(step: RunStep) -> bool:
    """Whether a step ended in a way that makes its run fail."""
    return step.state in (StepState.FAILED, StepState.CANCELLED) and not step.rule.allow_failure
