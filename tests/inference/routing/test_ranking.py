"""The choice of models by names, aliases and selectors, as tables."""

from __future__ import annotations

from typing import Any

import pytest

from app.catalog import catalog as catalogs
from app.catalog.catalog import Catalog
from app.catalog.serving import selector as selectors
from app.catalog.serving.selector import Preference, RemoteUse, Selector
from app.inference.routing import choice, ranking
from app.inference.routing.availability import Availability, FleetAvailability, ModelState, expected_wait
from app.kernel.errors import InvalidInput, NotFound

CATALOG = """
[[models]]
name = "small:1b"
aliases = ["tiny", "gpt-3.5-turbo"]
use_cases = ["chat", "classify"]
context = 4096
source = { path = "small.gguf", size = 1_000_000_000 }

[[models]]
name = "large:30b"
use_cases = ["chat", "code"]
context = 32768
source = { path = "large.gguf", size = 20_000_000_000 }
fallback = { models = ["tiny", "cloud:x"], max_wait = "10s" }

[[models]]
name = "tuned:1b"
use_cases = ["classify"]
context = 4096
source = { path = "small.gguf", size = 1_000_000_000 }

[[models]]
name = "cloud:x"
use_cases = ["chat", "code"]
context = 131072
rating = { quality = 0.95, speed = 0.6 }
[models.remote]
url = "https://api.example.com/v1"
model = "x"
allowed = true
cost_in = 1.0
cost_out = 8.0
"""

SERVING = Availability(ModelState.RESIDENT, slots=4)
COLD = Availability(ModelState.COLD, load=20.0, bytes=10, to_free=0)
GONE = Availability(ModelState.UNAVAILABLE, problem="no host has its file")


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return catalogs.merge([catalogs.parse(CATALOG, "here")])


def fleet(**states: Availability) -> FleetAvailability:
    """By the part of a name before the colon."""
    names = {"small": "small:1b", "large": "large:30b", "tuned": "tuned:1b", "cloud": "cloud:x"}
    return FleetAvailability({names[key]: one for key, one in states.items()})


@pytest.mark.parametrize(
    ("selector", "states", "chosen"),
    [
        # What is resident wins over what would have to be loaded, unless quality is asked for.
        ("auto:chat", {"small": SERVING, "large": COLD}, "small:1b"),
        ("auto:chat", {"small": COLD, "large": SERVING}, "large:30b"),
        ("auto:chat?prefer=quality", {"small": SERVING, "large": COLD}, "large:30b"),
        ("auto:chat?prefer=speed", {"small": COLD, "large": SERVING}, "small:1b"),
        ("auto:chat?prefer=resident", {"small": COLD, "large": SERVING}, "large:30b"),
        # The context and the use case exclude.
        ("auto:chat?context=8k", {"small": SERVING, "large": COLD}, "large:30b"),
        ("auto:code", {"small": SERVING, "large": COLD}, "large:30b"),
        # A full queue, and memory that others would have to free, count against a model.
        (
            "auto:chat?prefer=resident",
            {"small": Availability(ModelState.RESIDENT, slots=1, busy=1, waiting=40), "large": COLD},
            "large:30b",
        ),
        (
            "auto:classify?prefer=resident",
            {"small": Availability(load=20.0, bytes=10, to_free=10), "tuned": COLD},
            "tuned:1b",
        ),
        # A file that another entry has loaded is loaded sooner.
        ("auto:classify", {"small": COLD, "tuned": Availability(load=20.0, bytes=10, shares_file=True)}, "tuned:1b"),
        # Servers are chosen only on request, and by their price.
        ("auto:chat?prefer=quality", {"cloud": SERVING}, "large:30b"),
        ("auto:chat?prefer=quality&remote=yes", {"cloud": SERVING}, "cloud:x"),
        ("auto:chat?remote=only", {"small": SERVING, "cloud": SERVING}, "cloud:x"),
        ("auto:chat?prefer=quality&remote=yes&max_cost=5", {"cloud": SERVING}, "large:30b"),
        # What is unavailable is left out.
        ("auto:code?prefer=quality&remote=yes", {"large": SERVING, "cloud": GONE}, "large:30b"),
        # The same figures: the first in the catalogue.
        ("auto:classify", {"small": SERVING, "tuned": SERVING}, "small:1b"),
    ],
)
def test_a_selector_chooses(catalog: Catalog, selector: str, states: dict[str, Any], chosen: str) -> None:
    found = choice.choose(selector, catalog, fleet(**states))
    assert found.model.name == chosen, ranking.rank(selectors.parse(selector), catalog.models, fleet(**states))
    assert found.reason.startswith(f"{selector}: score ")


def test_the_size_of_the_prompt_counts(catalog: Catalog) -> None:
    body = {"messages": [{"role": "user", "content": "word " * 4000}], "max_tokens": 500}
    needed = choice.needed_context(body)
    assert 5_000 < needed < 8_000
    assert choice.choose("auto:chat", catalog, fleet(small=SERVING), needed).model.name == "large:30b"


def test_texts_that_are_read_one_by_one_are_not_added_up() -> None:
    assert choice.needed_context({"input": ["word " * 100] * 50}) == choice.needed_context({"input": "word " * 100})
    several = {"query": "a", "documents": ["b" * 350, "c" * 700]}
    assert choice.needed_context(several) == round(701 / 3.5)
    assert choice.needed_context({"input": [], "messages": 5, "max_tokens": "many"}) == 0


def test_an_estimate_excludes_no_model_with_the_largest_context(catalog: Catalog) -> None:
    found = choice.choose("auto:chat", catalog, fleet(small=SERVING), 1_000_000, is_estimate=True)
    assert found.model.name == "large:30b"
    with pytest.raises(InvalidInput, match="1000000 are needed"):
        choice.choose("auto:chat", catalog, fleet(), 1_000_000)


def test_a_measured_pace_tells_the_speed_of_others_of_another_size(catalog: Catalog) -> None:
    measured = Availability(ModelState.RESIDENT, slots=4, pace=10.0)
    ranked = {one.model.name: one for one in _rank("auto:chat", catalog, fleet(small=measured)).ranked}
    assert ranked["small:1b"].speed == pytest.approx(1 / 3, abs=0.01)
    assert ranked["large:30b"].speed == 0.0  # half a token a second


def test_a_ranking_says_why_others_do_not_suit(catalog: Catalog) -> None:
    found = _rank("auto:chat?context=8k", catalog, fleet(large=GONE, small=SERVING))
    assert found.ranked == []
    assert found.excluded == {
        "small:1b": "its context has 4096 tokens, 8192 are needed",
        "large:30b": "unavailable: no host has its file",
        "tuned:1b": "its use cases are classify",
        "cloud:x": "a server serves it, and the selector does not say remote=yes",
    }
    with pytest.raises(choice.NoModelAvailable, match="large:30b: unavailable: no host has its file"):
        choice.choose("auto:chat?context=8k", catalog, fleet(large=GONE))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("auto:chat", Selector("chat")),
        ("auto:code?context=16k&prefer=speed", Selector("code", Preference.SPEED, 16_384)),
        ("auto:code?context=100", Selector("code", context=100)),
        ("auto:chat?remote=only&max_cost=2.5", Selector("chat", max_cost=2.5, remote=RemoteUse.ONLY)),
    ],
)
def test_selectors_are_read(text: str, expected: Selector) -> None:
    assert selectors.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("auto:", "is not a selector"),
        ("auto:Chat", "is not a selector"),
        ("auto:chat?", "is not a selector"),
        ("auto:" + "a" * 300, "is not a selector"),
        ("auto:chat?foo=1", "no condition 'foo'"),
        ("auto:chat?prefer=slow", "there are balanced, speed, quality, resident"),
        ("auto:chat?prefer=speed&prefer=speed", "given twice"),
        ("auto:chat?context=lots", "a number of tokens"),
        ("auto:chat?context=0", "a number of tokens"),
        ("auto:chat?context=999999999k", "a number of tokens"),
        ("auto:chat?max_cost=-1", "a price of a million tokens"),
        ("auto:chat?max_cost=1e9", "a price of a million tokens"),
        ("auto:chat?remote", "there are no, yes, only"),
    ],
)
def test_other_selectors_are_refused(text: str, problem: str) -> None:
    with pytest.raises(InvalidInput, match=problem):
        selectors.parse(text)


def test_a_selector_that_nothing_suits_is_refused_with_the_reasons(catalog: Catalog) -> None:
    with pytest.raises(InvalidInput, match="no model has the use case 'paint'; there are: chat, classify, code"):
        choice.choose("auto:paint", catalog, fleet())
    with pytest.raises(InvalidInput, match="small:1b: its context has 4096 tokens, 1048576 are needed"):
        choice.choose("auto:chat?context=1024k", catalog, fleet())


def test_names_and_aliases(catalog: Catalog) -> None:
    assert choice.choose("small:1b", catalog, fleet()) == choice.ChosenModel(catalog.get("small:1b"))
    found = choice.choose("gpt-3.5-turbo", catalog, fleet())
    assert (found.model.name, found.reason) == ("small:1b", "gpt-3.5-turbo is an alias of small:1b")
    with pytest.raises(NotFound, match=r"no model 'gpt-4'; there are: small:1b"):
        choice.choose("gpt-4", catalog, fleet())


@pytest.mark.parametrize(
    ("states", "tried", "passed_over"),
    [
        ({"large": SERVING}, ["large:30b", "small:1b", "cloud:x"], []),
        ({"large": GONE}, ["small:1b", "cloud:x"], ["large:30b is unavailable: no host has its file"]),
        ({"large": GONE, "small": GONE}, ["cloud:x"], ["large:30b is unavailable", "small:1b is unavailable"]),
        # Nobody serves: each is tried, in order.
        ({"large": GONE, "small": GONE, "cloud": GONE}, ["large:30b", "small:1b", "cloud:x"], []),
        # The first token is expected too late.
        ({"large": COLD}, ["small:1b", "cloud:x"], ["is expected in 20.0 s, max_wait is 10 s"]),
    ],
)
def test_models_are_passed_over(
    catalog: Catalog, states: dict[str, Any], tried: list[str], passed_over: list[str]
) -> None:
    found = choice.plan(catalog.get("large:30b"), catalog, fleet(**states))
    assert [model.name for model in found.tried] == tried
    assert len(found.passed_over) == len(passed_over)
    for one, reason in zip(found.passed_over, passed_over, strict=True):
        assert reason in one.reason


@pytest.mark.parametrize(
    ("of", "seconds"),
    [
        (Availability(ModelState.RESIDENT, slots=4, busy=3, duration=2), 0.0),
        (Availability(ModelState.RESIDENT, slots=4, busy=4, duration=2), 0.25),
        (Availability(ModelState.RESIDENT, slots=2, busy=2, waiting=3, duration=2), 3.5),
        (Availability(ModelState.LOADING, slots=2, waiting=2, duration=2, loading_left=7), 9.0),
        (Availability(ModelState.COLD, load=20), 20.0),
        (Availability(ModelState.COLD, load=20, shares_file=True), 10.0),
        (Availability(ModelState.COLD, load=20, bytes=9, to_free=4, duration=2), 26.0),
        (GONE, None),
    ],
)
def test_the_expected_wait(of: Availability, seconds: float | None) -> None:
    assert expected_wait(of) == (None if seconds is None else pytest.approx(seconds))


def _rank(text: str, catalog: Catalog, of: FleetAvailability) -> ranking.Ranking:
    return ranking.rank(selectors.parse(text), catalog.models, of)
