"""Definitions: what is accepted, and what is refused with its place and what would do."""

from __future__ import annotations

import json

import pytest

from app.kernel.errors import InvalidDefinition, Problem
from app.workflows import check, definition, registry
from app.workflows.check import Catalogued

MODELS = Catalogued(frozenset({"smollm2:135m", "gemma3:270m"}))


def refused(text: str) -> list[Problem]:
    with pytest.raises(InvalidDefinition) as caught:
        check.parse(text, MODELS)
    return list(caught.value.problems)


def steps(*lines: str, head: str = "workflow: w") -> str:
    return "\n".join([head, "steps:", *(f"  - {line}" for line in lines)])


def generate(more: str) -> str:
    return "{id: a, kind: generate, model: 'smollm2:135m', " + more + "}"


#: source, line, path, a part of the message or of what is accepted
WRONG = {
    "empty": ("", 1, "", "the document is empty"),
    "no mapping": ("- a\n- b", 1, "", "mapping of fields"),
    "malformed": ("workflow: w\nsteps: [", 2, "", "neither YAML nor JSON"),
    "malformed JSON": ('{"workflow": "w",\n "steps": [}', 2, "", "neither YAML nor JSON"),
    "a key twice": ("workflow: w\nworkflow: v\nsteps: []", 2, "workflow", "stands twice, first in line 1"),
    "a tab": ("workflow: w\nsteps:\n\t- a", 3, "", "neither YAML nor JSON"),
    "no name": ("steps:\n  - {id: a, kind: noop}", 1, "workflow", "this field is missing"),
    "a name that is none": (steps("{id: a, kind: noop}", head="workflow: My Flow"), 1, "workflow", "hyphens"),
    "no steps": ("workflow: w\nsteps: []", 2, "steps", "at least 1 item"),
    "an unknown field": (
        steps("{id: a, kind: noop}", head="workflow: w\ndescrption: x"),
        2,
        "descrption",
        "'description'",
    ),
    "an unknown field of a step": (steps("{id: a, kind: noop, neds: [b]}"), 3, "steps[0].neds", "'needs'"),
    "an unknown field of sampling": (
        steps(generate("prompt: x, sampling: {temprature: 1}")),
        3,
        "steps[0].sampling.temprature",
        "'temperature'",
    ),
    "an unknown field of retry": (
        steps("{id: a, kind: noop, retry: {attempts: 1}}"),
        3,
        "steps[0].retry.attempts",
        "max_attempts",
    ),
    "no kind": (steps("{id: a}"), 3, "steps[0]", "generate | embed | transform | http"),
    "an unknown kind": (steps("{id: a, kind: think}"), 3, "steps[0]", "generate | embed | transform | http"),
    "an id that is none": (steps("{id: A-1, kind: noop}"), 3, "steps[0].id", "underscores"),
    "an id twice": (steps("{id: a, kind: noop}", "{id: a, kind: noop}"), 4, "steps[1].id", "steps[0] too"),
    "an unknown need": (steps("{id: a, kind: noop, needs: [b]}"), 3, "steps[0].needs[0]", "there is no step 'b'"),
    "a misspelt need": (
        steps("{id: draft, kind: noop}", "{id: b, kind: noop, needs: [darft]}"),
        4,
        "steps[1].needs[0]",
        "did you mean 'draft'?",
    ),
    "a need of itself": (steps("{id: a, kind: noop, needs: [a]}"), 3, "steps[0].needs[0]", "cannot need itself"),
    "a need twice": (
        steps("{id: a, kind: noop}", "{id: b, kind: noop, needs: [a, a]}"),
        4,
        "steps[1].needs[1]",
        "needed twice",
    ),
    "a circle": (
        steps("{id: a, kind: noop, needs: [c]}", "{id: b, kind: noop, needs: [a]}", "{id: c, kind: noop, needs: [b]}"),
        3,
        "steps[0].needs",
        "a → c → b → a",
    ),
    "a join of nothing": (steps("{id: a, kind: join}"), 3, "steps[0].needs", "nothing to wait for"),
    "neither prompt nor messages": (steps(generate("max_tokens: 5")), 3, "steps[0]", "either 'prompt'"),
    "prompt and messages": (
        steps(generate("prompt: x, messages: [{role: user, content: y}]")),
        3,
        "steps[0]",
        "either 'prompt'",
    ),
    "a bare prompt with a system message": (
        steps(generate("prompt: x, system: y, chat: false")),
        3,
        "steps[0]",
        "'chat: false'",
    ),
    "no model": (steps("{id: a, kind: generate, prompt: x}"), 3, "steps[0]", "names no model"),
    "an unknown model": (
        steps("{id: a, kind: generate, prompt: x, model: 'smollm:135m'}"),
        3,
        "steps[0].model",
        "did you mean 'smollm2:135m'?",
    ),
    "an unknown default model": (
        steps("{id: a, kind: generate, prompt: x}", head="workflow: w\ndefaults: {model: gpt}"),
        2,
        "defaults.model",
        "gemma3:270m",
    ),
    "a wrong number": (
        steps(generate("prompt: x, max_tokens: 0")),
        3,
        "steps[0].max_tokens",
        "greater than or equal to 1",
    ),
    "a wrong temperature": (
        steps(generate("prompt: x, sampling: {temperature: hot}")),
        3,
        "steps[0].sampling.temperature",
        "valid number",
    ),
    "a wrong duration": (steps("{id: a, kind: noop, timeout: soon}"), 3, "steps[0].timeout", "'15s'"),
    "a wrong reason": (
        steps("{id: a, kind: noop, retry: {non_retryable: [boredom]}}"),
        3,
        "steps[0].retry.non_retryable[0]",
        "'timeout'",
    ),
    "a wrong priority": (
        steps("{id: a, kind: noop}", head="workflow: w\npriority: urgent"),
        2,
        "priority",
        "'interactive'",
    ),
    "a template with a fault": (
        steps(generate("prompt: '{{ inputs.x '")),
        3,
        "steps[0].prompt",
        "line 1 of the template",
    ),
    "a template that names nothing": (
        steps(generate("prompt: '{{ customer }}'")),
        3,
        "steps[0].prompt",
        "names nothing",
    ),
    "an unknown input": (
        steps(generate("prompt: '{{ inputs.mesage }}'"), head="workflow: w\ninputs: {message: {type: string}}"),
        4,
        "steps[0].prompt",
        "inputs.message",
    ),
    "a step that is not before": (
        steps("{id: b, kind: noop}", generate("prompt: '{{ steps.b.output }}'")),
        4,
        "steps[1].prompt",
        "is no step that this one needs",
    ),
    "a field that steps have not": (
        steps("{id: b, kind: noop}", generate("needs: [b], prompt: '{{ steps.b.result }}'")),
        4,
        "steps[1].prompt",
        "steps.b.output",
    ),
    "a statement that is not offered": (
        steps(generate("prompt: \"{% include 'x' %}\"")),
        3,
        "steps[0].prompt",
        "not offered",
    ),
    "a schema that is none": (
        steps(generate("prompt: x, output: {schema: {type: objekt}}")),
        3,
        "steps[0].output.schema.type",
        "no JSON Schema",
    ),
    "a schema that cannot be forced": (
        steps(generate("prompt: x, output: {schema: {type: integer, multipleOf: 7}}")),
        3,
        "steps[0].output.schema.multipleOf",
        "multipleOf",
    ),
    "a message of an unknown role": (
        steps(generate("messages: [{role: boss, content: x}]")),
        3,
        "steps[0].messages[0].role",
        "'system'",
    ),
    "an input schema that is none": (
        steps("{id: a, kind: noop}", head="workflow: w\ninputs: {n: {type: numbr}}"),
        2,
        "inputs.n.type",
        "no JSON Schema",
    ),
    "a default that breaks its schema": (
        steps("{id: a, kind: noop}", head="workflow: w\ninputs: {n: {type: integer, default: x}}"),
        2,
        "inputs.n.default",
        "'x' is not",
    ),
    "an input that cannot be named": (
        steps("{id: a, kind: noop}", head="workflow: w\ninputs: {my input: {}}"),
        2,
        "inputs.my input",
        "cannot be named",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_definitions_name_line_path_and_what_would_do(case: str) -> None:
    text, line, where, told = WRONG[case]
    problems = refused(text)

    assert len(problems) == 1, problems
    assert (problems[0].line, problems[0].where) == (line, where)
    assert told in f"{problems[0].message} {problems[0].accepted}"


def test_every_problem_is_found_in_one_reading() -> None:
    text = steps("{id: a, kind: noop, needs: [x]}", "{id: a, kind: noop, needs: [y]}", "{id: b, kind: join}")

    assert [problem.where for problem in refused(text)] == [
        "steps[0].needs[0]",
        "steps[1].id",
        "steps[1].needs[0]",
        "steps[2].needs",
    ]


def test_a_document_that_its_aliases_blow_up_is_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]

    assert "more than 100000 values" in refused("\n".join(lines))[0].message


def test_a_document_that_contains_itself_is_refused() -> None:
    assert "nested deeper" in refused("a: &a [*a]")[0].message


def test_yaml_means_what_people_mean() -> None:
    parsed = check.parse(
        "workflow: w\ninputs:\n  country: {type: string, default: no}\n  day: {type: string, default: 2026-11-21}\n"
        "steps: [{id: a, kind: noop}]"
    )

    assert parsed.inputs["country"]["default"] == "no"
    assert parsed.inputs["day"]["default"] == "2026-11-21"


def test_json_is_read_as_json() -> None:
    text = '{\n\t"workflow": "w", "description": "\\ud83e\\udd99 \\/",\n\t"steps": [{"id": "a", "kind": "noop"}]}'

    assert check.parse(text).description == "🦙 /"


def test_equal_definitions_have_one_hash_and_different_ones_do_not() -> None:
    one = check.parse("workflow: w\nsteps:\n  - {id: a, kind: noop, timeout: 60}")
    same = check.parse(json.dumps({"steps": [{"kind": "noop", "id": "a", "timeout": "1m"}], "workflow": "w"}))
    other = check.parse("workflow: w\nsteps:\n  - {id: a, kind: noop, timeout: 61}")

    assert one.sha256() == same.sha256()
    assert one.sha256() != other.sha256()


@pytest.mark.parametrize("name", registry.shipped())
def test_what_is_stored_is_what_was_checked(name: str) -> None:
    shipped = registry.shipped()[name].definition

    assert definition.stored(json.loads(json.dumps(shipped.document()))) == shipped
