"""Templates: they read data only, their work is limited, and a missing value is an error."""

from __future__ import annotations

import pytest

from app.kernel.errors import FailureReason, StepFailure
from app.workflows.expressions import templates
from app.workflows.expressions.templates import Scope

DATA = {
    "inputs": {"name": "Ada", "items": ["x", "y"], "text": "{{ 7 * 7 }}"},
    "steps": {"draft": {"output": {"title": "T", "keys": 3}}},
}


def render(template: str) -> str:
    return templates.render(template, DATA)


def failed(template: str) -> str:
    with pytest.raises(StepFailure) as caught:
        render(template)
    assert caught.value.reason is FailureReason.TEMPLATE_ERROR
    return caught.value.message


def test_data_is_printed_and_iterated() -> None:
    assert render("{{ inputs.name }}: {{ steps.draft.output.title }}") == "Ada: T"
    assert render("{% for item in inputs['items'] %}{{ loop.index }}{{ item }} {% endfor %}") == "1x 2y "
    assert render("{{ steps.draft.output | tojson }}") == '{"title": "T", "keys": 3}', "the keys are not sorted"
    assert render("{{ ['<ü>', none] | tojson }}") == '["<ü>", null]', "the characters are not escaped for HTML"
    assert failed("{{ {'a': inputs.nobody} | tojson }}")


def test_a_field_takes_precedence_over_a_method_of_the_same_name() -> None:
    assert render("{{ steps.draft.output.keys }}{{ inputs.items | length }}") == "32"


def test_input_data_is_never_rendered_as_a_template() -> None:
    assert render("{{ inputs.text }}") == "{{ 7 * 7 }}"


@pytest.mark.parametrize(
    "template",
    [
        "{{ inputs.nobody }}",
        "{{ steps.draft.output.nothing }}",
        "{{ inputs.name + 1 }}",
        "{{ inputs.items[7] }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_missing_value_fails_the_step(template: str) -> None:
    assert "cannot be rendered" in failed(template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ inputs.__class__ }}",
        "{{ inputs.items.append('z') }}",
        "{{ inputs.name.format_map(inputs) if 0 else inputs.name.__init__.__globals__ }}",
        "{{ cycler.__init__ }}",
        "{{ ''|attr('__class__')|attr('__mro__') }}",
    ],
)
def test_only_data_is_accessible(template: str) -> None:
    failed(template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 1000000000 }}",
        "{{ 9 ** 99999999 }}",
        "{{ '%09999999999d' % 7 }}",
        "{{ [1] | tojson(999999999) }}",
        "{% for a in inputs.name * 99999 %}{% endfor %}",
    ],
)
def test_results_cannot_become_huge(template: str) -> None:
    failed(template)


def test_loop_iterations_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"inputs": {"l": list(range(2000))}, "steps": {}}
    with pytest.raises(StepFailure, match="iterations"):
        templates.render("{% for a in inputs.l %}{% for b in inputs.l %}{% endfor %}{% endfor %}", data)


def test_text_length_is_limited() -> None:
    data = {"inputs": {"l": list(range(1000)), "t": "x" * 10_000}, "steps": {}}
    with pytest.raises(StepFailure, match="longer than"):
        templates.render("{% for a in inputs.l %}{{ inputs.t }}{% endfor %}", data)


@pytest.mark.parametrize(
    ("template", "names"),
    [
        ("{{ inputs.name }}{{ steps.draft.output.a.b }}", 0),
        ("{% set x = inputs.name %}{{ x }}{% for steps in inputs.items %}{{ steps }}{% endfor %}", 0),
        ("{{ inputs['name'] }}{{ steps['draft']['output'] }}", 0),
        ("{{ inputs.nme }}{{ inputs['nme2'] }}", 2),
        ("{{ steps.final.output }}", 1),
        ("{{ who }}", 1),
        ("{{ range(3) }}", 1),
    ],
)
def test_names_are_checked_at_submission(template: str, names: int) -> None:
    found = templates.check(template, "prompt", Scope(("name", "items"), ("draft",)))

    assert len(found) == names, found
    assert all("steps.draft.output" in problem.accepted for problem in found)
