"""Two engines with the real model: one that takes every prediction, whatever it costs, and one without drafts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from app.catalog.model import PromptProfile
from app.inference.requests import Generated, GenerateRequest, Sampling
from workers.engine import loop as loop_module
from workers.engine.engine import LlamaEngine
from workers.engine.options import EngineOptions
from workers.engine.speculation.speculator import Speculator
from workers.engine.tasks import EngineTask

GREEDY = Sampling(temperature=0)


class EagerSpeculator(Speculator):
    """Takes every prediction."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._forced.max_seconds = float("inf")

    def _chosen(self, tasks: Sequence[EngineTask], room: int) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for task in tasks:
            draft = self._draft(task)
            reach = [] if draft is None else draft.reach(task.request.max_tokens - task.written - 1)
            count = min(len(reach), 7, room)
            if count > 0 and draft is not None and task.work is not None:
                found[task.work.sequence] = draft.take(count)
                room -= count
        return found


def require_settled(engine: LlamaEngine) -> None:
    """No cell is lost, and the cache holds what the accounting says."""
    slots, context = engine._loop.slots, engine._loop.context
    assert not slots.running
    assert not slots._drafted
    assert slots.cells.reserved_unused() == 0
    for sequence in slots.index.kept:
        assert context.positions(sequence)[1] + 1 == slots.cells.length(sequence) == len(slots.index.tokens(sequence))


@dataclass(frozen=True, slots=True)
class Pair:
    """An engine that takes every prediction, and one without drafts. Both run one text at a time here."""

    eager: LlamaEngine
    plain: LlamaEngine

    def same(self, request: GenerateRequest) -> tuple[Generated, int, int]:
        """Generate with both; the texts must be equal. Returns that with drafts, and the decodes of each."""
        found: list[tuple[Generated, int]] = []
        for engine in (self.eager, self.plain):
            before = engine.metrics().decodes
            generated = engine.generate(request).result(60)
            found.append((generated, engine.metrics().decodes - before))
            require_settled(engine)
        (drafted, fewer), (plain, decodes) = found
        assert drafted.text == plain.text
        assert (drafted.finish, drafted.tokens_out) == (plain.finish, plain.tokens_out)
        assert drafted.tool_calls == plain.tool_calls
        assert drafted.tokens_drafted >= drafted.tokens_accepted >= plain.tokens_drafted == 0
        return drafted, fewer, decodes


def engines(path: Path, **options: Any) -> Pair:
    """Engines with these options, to be closed by the caller."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_module, "Speculator", EagerSpeculator)
        eager = LlamaEngine(path, EngineOptions(**{"threads": 1, "speculation": "auto"} | options))
    return Pair(eager, LlamaEngine(path, EngineOptions(**{"threads": 1, "speculation": "off"} | options)))


@pytest.fixture(scope="session")
def pair(model_path: Path) -> Iterator[Pair]:
    """Engines of two slots, shared by all tests, as loading them takes longer than most of these."""
    made = engines(model_path, slots=2, context=2048, profile=PromptProfile(tools="hermes"))
    yield made
    made.eager.close()
    made.plain.close()
