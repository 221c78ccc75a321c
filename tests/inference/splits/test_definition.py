"""What a split may say, and who gets which variant."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from app.inference.splits import assignment, definition, table
from app.inference.splits.assignment import UNIT_LABEL, ActiveSplit
from app.inference.splits.definition import CONTROL, SplitUnit
from app.kernel.errors import InvalidInput

ID = "01a20000-0000-7000-8000-000000000001"
PLAIN: dict[str, Any] = {"split": "s", "model": "smollm2:135m", "candidates": [{"name": "b", "set": {"top_k": 3}}]}


def split(share: float = 0.3, **more: Any) -> ActiveSplit:
    return ActiveSplit(ID, definition.parse({**PLAIN, **more}), share)


@pytest.mark.parametrize(
    ("change", "field", "accepted"),
    [
        ({"model": None}, "model", "exactly one"),
        ({"workflow": "w"}, "model", "exactly one"),
        ({"split": "A b"}, "split", "[a-z0-9]"),
        ({"candidates": []}, "candidates", ""),
        ({"candidates": [{"name": "control", "model": "x"}]}, "candidates", "other names"),
        ({"candidates": [{"name": "b"}]}, "candidates.0", "model, set, system"),
        ({"candidates": [{"name": "b", "version": 2}]}, "candidates.0.version", "model, set, system"),
        ({"candidates": [{"name": "b", "set": {"messages": []}}]}, "candidates.0.set.messages", "temperature"),
        ({"candidates": [{"name": "b", "set": {"temperature": "hot"}}]}, "candidates.0.set.temperature", ""),
        ({"pins": [{"variant": "c", "users": ["u"]}]}, "pins.0.variant", "control, b"),
        ({"pins": [{"variant": "b"}]}, "pins.0", "users"),
        ({"ramp": [{"share": 0.1}, {"share": 0.2}]}, "ramp.0.for", "a duration"),
        ({"ramp": [{"share": 0.1, "for": "1h"}]}, "ramp.0.for", "nothing"),
        ({"ramp": [{"share": 1.5}]}, "ramp.0.share", ""),
        ({"namespaces": ["A B"]}, "namespaces", "lower-case"),
        ({"goal": {"effect": 0}}, "goal.effect", ""),
        ({"guards": {"seconds": 0.5}}, "guards.seconds", ""),
        ({"unknown": 1}, "unknown", ""),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], field: str, accepted: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        definition.parse({**PLAIN, **change})

    assert [one.where for one in caught.value.problems][:1] == [field]
    assert accepted in caught.value.problems[0].accepted
    assert caught.value.problems[0].accepted


def test_two_candidates_share_the_traffic_with_the_control() -> None:
    two = [{"name": "b", "set": {"top_k": 3}}, {"name": "c", "set": {"top_k": 4}}]
    assert definition.parse({**PLAIN, "candidates": two, "ramp": [{"share": 0.5}]}).most == 0.5
    with pytest.raises(InvalidInput, match="too much"):
        definition.parse({**PLAIN, "candidates": two, "ramp": [{"share": 0.6}]})


def test_shares_are_kept_and_a_ramp_takes_no_unit_away() -> None:
    two = [{"name": "b", "set": {"top_k": 3}}, {"name": "c", "set": {"top_k": 4}}]
    units = [f"user-{number}" for number in range(10_000)]
    before: dict[str, str] = {}
    for share in (0.01, 0.1, 0.25, 0.5):
        ramped = split(share, candidates=two)
        found = {unit: ramped.variant("default", unit) for unit in units}
        counts = Counter(found.values())
        assert abs(counts["b"] / 10_000 - share) < 0.015
        assert abs(counts["c"] / 10_000 - share) < 0.015
        assert all(found[unit] == variant for unit, variant in before.items() if variant != CONTROL)
        before = found
    assert before == {unit: split(0.5, candidates=two).variant("default", unit) for unit in units}


def test_two_splits_divide_independently() -> None:
    other = ActiveSplit(ID[::-1], split().definition, 0.5)
    found = Counter((split(0.5).variant("a", str(unit)), other.variant("a", str(unit))) for unit in range(10_000))

    assert len(found) == 4
    assert all(abs(count - 2_500) < 200 for count in found.values())


def test_pins_are_feature_flags() -> None:
    pins = [{"variant": "b", "users": ["ana"]}, {"variant": "control", "namespaces": ["careful"]}]
    pinned = split(1.0, pins=pins, ramp=[{"share": 1.0}])

    assert pinned.variant("careful", "anybody") == CONTROL
    assert split(0.000001, pins=pins).variant("default", "ana", "ana") == "b"
    assert pinned.variant("default", "anybody") == "b"


def test_the_unit_is_hashed_in_labels() -> None:
    found = assignment.assign(split(), "a", "ana@example.com", ID, "ana@example.com")

    assert found.labels["split.s"] in ("b", CONTROL)
    assert len(found.labels[UNIT_LABEL]) == 20
    assert "ana" not in found.labels[UNIT_LABEL]
    assert UNIT_LABEL not in assignment.assign(split(), "a", None, ID).labels


@pytest.mark.parametrize(
    ("kind", "body", "unit"),
    [
        (SplitUnit.USER, {"user": "ana", "conversation_id": "c"}, "ana"),
        (SplitUnit.USER, {"safety_identifier": "x"}, "x"),
        (SplitUnit.USER, {}, None),
        (SplitUnit.SESSION, {"user": "ana", "conversation_id": "c"}, "c"),
        (SplitUnit.SESSION, {"conversation": {"id": "conv"}}, "conv"),
        (SplitUnit.SESSION, {"user": "ana"}, "ana"),
        (SplitUnit.SESSION, {"user": 7}, None),
        (SplitUnit.RUN, {"user": "ana"}, None),
    ],
)
def test_the_unit_of_a_call(kind: SplitUnit, body: dict[str, Any], unit: str | None) -> None:
    assert assignment.unit_of_call(kind, body) == unit


def test_a_candidate_changes_the_request() -> None:
    candidate = definition.parse(
        {**PLAIN, "candidates": [{"name": "b", "system": "Be short.", "set": {"max_tokens": 5, "temperature": 0}}]}
    ).candidates[0]
    body = {
        "messages": [{"role": "system", "content": "Be long."}, {"role": "user", "content": "Hi"}],
        "max_completion_tokens": 900,
        "user": "ana",
    }

    changed = table.changed_body(body, candidate)

    assert changed == {
        "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}],
        "max_tokens": 5,
        "temperature": 0,
        "user": "ana",
    }
    assert table.changed_body({"prompt": "x"}, candidate) == {"prompt": "x", "max_tokens": 5, "temperature": 0}
