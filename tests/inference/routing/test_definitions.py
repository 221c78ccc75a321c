"""The models of workflows, chosen as their runs are submitted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from app.catalog import catalog as catalogs
from app.catalog.catalog import Catalog
from app.inference.routing.availability import Availability, FleetAvailability, ModelState
from app.inference.routing.definitions import ModelRouter
from app.kernel.errors import FailureReason, InvalidDefinition, InvalidInput
from app.workflows.language import check
from app.workflows.language import definition as definitions
from app.workflows.language.check import Deployment
from app.workflows.language.definition import Definition, RoutedDefinition
from app.workflows.language.graph import Graph
from app.workflows.language.source import SourceDocument
from app.workflows.runs import views
from app.workflows.runs.service import Runs
from app.workflows.runs.submission import Submission

CATALOG = """
[[models]]
name = "small:1b"
aliases = ["tiny"]
use_cases = ["chat", "embed"]
source = { path = "small.gguf", size = 1_000_000_000 }

[[models]]
name = "large:30b"
use_cases = ["chat"]
source = { path = "large.gguf", size = 20_000_000_000 }
fallback = { models = ["tiny"], on = ["engine_error"] }
"""
SERVING, GONE = Availability(ModelState.RESIDENT, slots=4), Availability(ModelState.UNAVAILABLE, problem="it is gone")


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return catalogs.merge([catalogs.parse(CATALOG, "here")])


def flow(*models: Any, **more: Any) -> Definition:
    steps = [
        {"id": f"s{number}", "kind": "generate", "prompt": "Hello.", **({"model": model} if model else {}), **more}
        for number, model in enumerate(models)
    ]
    return definitions.from_document({"workflow": "w", "steps": steps})


def routed(catalog: Catalog, definition: Definition, **states: Availability) -> RoutedDefinition:
    names = {"small": "small:1b", "large": "large:30b"}
    found = FleetAvailability({names[key]: one for key, one in states.items()})
    return ModelRouter(lambda: catalog, lambda _: found)(definition)


def test_plain_names_stay_and_read_nothing(catalog: Catalog) -> None:
    def fail(_: Catalog) -> FleetAvailability:
        raise AssertionError("the fleet is not needed")

    for given in (flow("small:1b", "unknown:x"), definitions.from_document(_noop())):
        assert ModelRouter(lambda: catalog, fail)(given) == RoutedDefinition(given)


def _noop() -> dict[str, Any]:
    return {"workflow": "w", "steps": [{"id": "a", "kind": "noop"}]}


@pytest.mark.parametrize(
    ("asked", "states", "models"),
    [
        ("tiny", {}, ("small:1b",)),
        ("auto:chat", {"small": SERVING}, ("small:1b",)),
        # The catalogue's fallbacks follow.
        ("large:30b", {}, ("large:30b", "small:1b")),
        ("auto:chat?prefer=quality", {"large": SERVING}, ("large:30b", "small:1b")),
        # What is unavailable now is the last that is tried.
        ("large:30b", {"large": GONE}, ("small:1b", "large:30b")),
    ],
)
def test_models_are_chosen(
    catalog: Catalog, asked: str, states: dict[str, Availability], models: tuple[str, ...]
) -> None:
    found = routed(catalog, flow(asked), **states)
    assert Graph(found.definition).models("s0") == models
    assert found.chosen["s0"]["asked"] == asked
    assert found.chosen["s0"]["models"] == list(models)


def test_the_reasons_of_the_catalogue_hold_for_its_fallbacks(catalog: Catalog) -> None:
    step: Any = routed(catalog, flow("large:30b")).definition.step("s0")
    assert step.fallback.on == (FailureReason.ENGINE_ERROR,)


def test_the_fallbacks_of_a_step_come_first_with_their_reasons(catalog: Catalog) -> None:
    given = flow("large:30b", fallback={"models": ["other:1"], "on": ["timeout"]})
    step: Any = routed(catalog, given, large=GONE).definition.step("s0")
    assert (step.model, step.fallback.models) == ("large:30b", ("other:1", "small:1b"))
    assert step.fallback.on == (FailureReason.TIMEOUT,)


def test_defaults_and_items_of_maps(catalog: Catalog) -> None:
    document = {
        "workflow": "w",
        "defaults": {"model": "auto:chat"},
        "steps": [
            {"id": "a", "kind": "generate", "prompt": "Hello."},
            {"id": "b", "kind": "map", "over": "[1]", "step": {"kind": "embed", "model": "tiny", "texts": "'x'"}},
        ],
    }
    found = routed(catalog, definitions.from_document(document), small=SERVING)
    assert found.definition.models() == ("small:1b",)
    assert set(found.chosen) == {"a", "b"}


def test_a_selector_that_nothing_suits_names_the_step(catalog: Catalog) -> None:
    with pytest.raises(InvalidInput, match=r"steps.s0.model: no model suits"):
        routed(catalog, flow("auto:chat", max_tokens=100_000))


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ("tiny", None),
        ("auto:chat", None),
        ("auto:chat?context=1024k", "steps[0].model: no model suits"),
        ("auto:chat?wrong=1", "steps[0].model: there is no condition 'wrong'"),
        ("huge", "steps[0].model: the catalogue has no model 'huge'"),
    ],
)
def test_a_workflow_may_name_aliases_and_selectors(catalog: Catalog, model: str, problem: str | None) -> None:
    document = SourceDocument(flow(model).document(), {})
    if problem is None:
        assert check.check(document, Deployment(catalog)).models() == (model,)
        return
    with pytest.raises(InvalidDefinition) as caught:
        check.check(document, Deployment(catalog))
    assert problem in str(caught.value)


def test_a_run_has_the_chosen_models_and_says_why(catalog: Catalog, runs: Runs) -> None:
    found = FleetAvailability({"large:30b": GONE})
    routing = replace(runs, route=ModelRouter(lambda: catalog, lambda _: found))
    submission = Submission(flow("tiny", "large:30b", "small:1b"), {}, idempotency_key="once")
    id_ = routing.submit(submission).id
    view = views.run(runs.database, id_)
    assert [step.model for step in view.steps] == ["small:1b", "small:1b", "small:1b"]
    chosen = {one.step: one.cause for one in views.history(runs.database, id_)[1] if one.event == "model_chosen"}
    assert chosen == {
        "s0": {"asked": "tiny", "models": ["small:1b"], "reasons": ["tiny is an alias of small:1b"]},
        "s1": {
            "asked": "large:30b",
            "models": ["small:1b", "large:30b"],
            "reasons": ["large:30b is unavailable: it is gone"],
        },
    }
    # The same request is the same run, whatever would be chosen now.
    assert routing.submit(submission).id == id_
