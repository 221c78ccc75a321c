"""Definitions: what is accepted, and what is refused with its place and what would do."""

from __future__ import annotations

import json

import pytest

from app.kernel.errors import InvalidDefinition, Problem
from app.kernel.security.egress import EgressPolicy
from app.workflows import registry
from app.workflows.language import check, definition, shape_errors
from app.workflows.language.check import Catalogued
from app.workflows.language.steps import DocumentPart

POLICY = EgressPolicy.of(["api.example.com"], allow_private=False)
MODELS = Catalogued(frozenset({"smollm2:135m", "gemma3:270m"}), POLICY)


def refused(text: str) -> list[Problem]:
    with pytest.raises(InvalidDefinition) as caught:
        check.parse(text, MODELS)
    return list(caught.value.problems)


def steps(*lines: str, head: str = "workflow: w") -> str:
    return "\n".join([head, "steps:", *(f"  - {line}" for line in lines)])


def generate(more: str) -> str:
    return "{id: a, kind: generate, model: 'smollm2:135m', " + more + "}"


def one(fields: str, head: str = "workflow: w") -> str:
    """A workflow of one step, in line 3 unless there is more in the head."""
    return steps("{id: a, " + fields + "}", head=head)


def mapped(step: str, more: str = "") -> str:
    return one("kind: map, over: '[1]', step: {" + step + "}" + more)


def http(more: str) -> str:
    return one("kind: http, url: 'https://api.example.com/', " + more)


def said(head: str, beside: str = "{id: a, kind: noop}") -> str:
    """Something in line 2, said of the whole workflow."""
    return steps(beside, head=f"workflow: w\n{head}")


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
    "no steps": ("workflow: w\nsteps: []", 2, "steps", "this is empty"),
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
        "0 is out of range at least 1",
    ),
    "a wrong temperature": (
        steps(generate("prompt: x, sampling: {temperature: hot}")),
        3,
        "steps[0].sampling.temperature",
        "hot",
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
        "invalid JSON Schema",
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
        "invalid JSON Schema",
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
    # What needs what.
    "a branch that there is not": (
        steps("{id: r, kind: switch, cases: {x: 'true'}}", "{id: b, kind: noop, needs: [r.y]}"),
        4,
        "steps[1].needs[0]",
        "the step 'r' has no branch 'y' r.x",
    ),
    "a branch of what has none": (
        steps("{id: n, kind: noop}", "{id: b, kind: noop, needs: [n.y]}"),
        4,
        "steps[1].needs[0]",
        "n: it has no branches",
    ),
    "a branch for the time without one": (
        steps("{id: p, kind: wait, event: e, expires: 1h}", "{id: b, kind: noop, needs: [p.timed_out]}"),
        4,
        "steps[1].needs[0]",
        "with 'on_timeout: continue'",
    ),
    "a need that is no name": (one("kind: noop, needs: [N-1]"), 3, "steps[0].needs[0]", "or a branch of it"),
    "needs that are no list": (one("kind: noop, needs: n"), 3, "steps[0].needs", "'n' is no list [n]"),
    "a join that is none": (one("kind: noop, join: some"), 3, "steps[0].join", "'all', 'any' or 'all_done'"),
    "join any of nothing": (one("kind: noop, join: any"), 3, "steps[0].join", "needs beside it"),
    "join all_done of nothing": (one("kind: noop, join: all_done"), 3, "steps[0].join", "needs beside it"),
    "a step for failures that needs a regular one": (
        said("on_failure: [{id: u, kind: noop, needs: [a]}, {id: v, kind: noop}]"),
        2,
        "on_failure[0].needs[0]",
        "'a' has ended before a step of on_failure begins one of v",
    ),
    "a regular step that needs one for failures": (
        said("on_failure: [{id: u, kind: noop}]", "{id: a, kind: noop, needs: [u]}"),
        4,
        "steps[0].needs[0]",
        "'u' begins only when the run has failed no needs",
    ),
    "a circle of steps for failures": (
        said("on_failure: [{id: u, kind: noop, needs: [v]}, {id: v, kind: noop, needs: [u]}]"),
        2,
        "on_failure[0].needs",
        "u → v → u",
    ),
    "an id of both lists": (said("on_failure: [{id: a, kind: noop}]"), 2, "on_failure[0].id", "steps[0] too"),
    "a join that prints what it does not need": (
        steps(
            "{id: n, kind: noop}", "{id: m, kind: noop}", "{id: j, kind: join, needs: [n], template: '{{ steps.m }}'}"
        ),
        5,
        "steps[2].template",
        "'steps.m' is no step that this one needs",
    ),
    # Conditions and other expressions.
    "a condition that ends too early": (one("kind: noop, when: '1 +'"), 3, "steps[0].when", "it ends too early CEL"),
    "a condition that is a text": (
        one("kind: noop, when: inputs.t", "workflow: w\ninputs: {t: {type: string}}"),
        4,
        "steps[0].when",
        "a text where true or false is wanted",
    ),
    "a condition that YAML takes for a truth value": (
        one("kind: noop, when: true"),
        3,
        "steps[0].when",
        "true is no text a text: write it in quotes, 'true'",
    ),
    "a condition on what is not there": (one("kind: noop, when: inputs.x"), 3, "steps[0].when", "'inputs.x' names no"),
    "a condition on what is not before": (
        steps("{id: n, kind: noop}", "{id: a, kind: noop, when: steps.n.output}"),
        4,
        "steps[1].when",
        "'steps.n' is no step that this one needs",
    ),
    "a condition on a field that steps have not": (
        steps("{id: n, kind: noop}", "{id: a, kind: noop, needs: [n], when: steps.n.result == 1}"),
        4,
        "steps[1].when",
        "steps.n.output, steps.n.state, steps.n.error",
    ),
    "an unknown function": (one("kind: noop, when: 'sise([]) == 0'"), 3, "steps[0].when", "did you mean 'size'?"),
    "types that do not fit": (one("kind: noop, when: \"1 == 'a'\""), 3, "steps[0].when", "int(…)"),
    "a secret in a condition": (one("kind: noop, when: secrets.x == 'a'"), 3, "steps[0].when", "'secrets' names"),
    # Switches.
    "a switch without cases": (one("kind: switch"), 3, "steps[0].cases", "missing branches and their conditions"),
    "a switch of nothing": (one("kind: switch, cases: {}"), 3, "steps[0].cases", "this is empty at least 1"),
    "a branch that is no name": (one("kind: switch, cases: {A b: 'true'}"), 3, "steps[0].cases.A b", "'A b' is not"),
    "a case that is no condition": (one("kind: switch, cases: {x: '1'}"), 3, "steps[0].cases.x", "an integer where"),
    "a default that is no name": (
        one("kind: switch, cases: {x: 'true'}, default: X y"),
        3,
        "steps[0].default",
        "'X y' is not written as a name",
    ),
    # Maps.
    "a map in a map": (
        mapped("kind: map, over: '[1]', step: {kind: noop}"),
        3,
        "steps[0].step",
        "no kind 'map' here kind: generate | embed | transform | http | workflow | noop; for more than one step",
    ),
    "a wait in a map": (mapped("kind: wait, for: 1h"), 3, "steps[0].step", "call a workflow"),
    "an unknown kind in a map": (mapped("kind: think"), 3, "steps[0].step", "there is no kind 'think' here"),
    "no kind in a map": (mapped("prompt: x"), 3, "steps[0].step", "no 'kind' kind: generate | embed | transform"),
    "needs in a map": (mapped("kind: noop, needs: [x]"), 3, "steps[0].step.needs", "here kind, retry, timeout"),
    "an unknown field in a map": (
        mapped("kind: generate, model: 'smollm2:135m', promt: x"),
        3,
        "steps[0].step.promt",
        "did you mean 'prompt'?",
    ),
    "a map without a step": (one("kind: map, over: '[1]'"), 3, "steps[0].step", "what is done for each item"),
    "a map without a list": (one("kind: map, step: {kind: noop}"), 3, "steps[0].over", "an expression that gives"),
    "a map over what is no list": (
        one("kind: map, over: '1', step: {kind: noop}"),
        3,
        "steps[0].over",
        "an integer where a list is wanted",
    ),
    "a map over its own items": (one("kind: map, over: item, step: {kind: noop}"), 3, "steps[0].over", "'item' names"),
    "an item outside a map": (one("kind: noop, when: item == 1"), 3, "steps[0].when", "'item' names nothing"),
    "a template in a map": (
        mapped("kind: generate, model: 'smollm2:135m', prompt: '{{ itm }}'"),
        3,
        "steps[0].step.prompt",
        "'itm' names nothing run, item, index",
    ),
    "no model in a map": (mapped("kind: generate, prompt: x"), 3, "steps[0].step", "names no model"),
    "a schema that is none in a map": (
        mapped("kind: generate, model: 'smollm2:135m', prompt: x, output: {schema: {type: objekt}}"),
        3,
        "steps[0].step.output.schema.type",
        "invalid JSON Schema",
    ),
    "too few at a time": (mapped("kind: noop", ", max_parallel: 0"), 3, "steps[0].max_parallel", "at least 1"),
    "too many at a time": (mapped("kind: noop", ", max_parallel: 1001"), 3, "steps[0].max_parallel", "at most 1000"),
    "a policy that maps have not": (mapped("kind: noop", ", on_error: skip"), 3, "steps[0].on_error", "'collect'"),
    # Waits.
    "a wait for two things": (one("kind: wait, for: 1h, event: e"), 3, "steps[0]", "one of 'for', 'until', 'event'"),
    "a wait for nothing": (one("kind: wait"), 3, "steps[0]", "one of 'for', 'until', 'event' and 'approval'"),
    "a schema without an event": (one("kind: wait, for: 1h, schema: {}"), 3, "steps[0]", "'schema' goes with 'event'"),
    "a schema with an approval": (
        one("kind: wait, approval: {message: x}, schema: {}"),
        3,
        "steps[0]",
        "'schema' goes with 'event'",
    ),
    "an end of what has its own": (one("kind: wait, for: 1h, expires: 1h"), 3, "steps[0]", "go with 'event'"),
    "a branch for a time that never ends": (
        one("kind: wait, event: e, on_timeout: continue"),
        3,
        "steps[0]",
        "'on_timeout' goes with 'expires'",
    ),
    "a payload schema that is none": (
        one("kind: wait, event: e, schema: {type: objekt}"),
        3,
        "steps[0].schema.type",
        "invalid JSON Schema",
    ),
    "an event that is no name": (one("kind: wait, event: My Event"), 3, "steps[0].event", "'My Event' is not"),
    "an approval of nothing": (one("kind: wait, approval: {}"), 3, "steps[0].approval.message", "the person reads"),
    "a field that approvals have not": (
        one("kind: wait, approval: {message: x, by: ana}"),
        3,
        "steps[0].approval.by",
        "no such field here message",
    ),
    "a secret for a person": (
        one("kind: wait, approval: {message: '{{ secrets.x }}'}"),
        3,
        "steps[0].approval.message",
        "secrets are offered to http steps only",
    ),
    "an instant that is none": (one("kind: wait, until: '3'"), 3, "steps[0].until", "timestamp(inputs.begin)"),
    "a time that is none": (one("kind: wait, for: tomorrow"), 3, "steps[0].for", "'tomorrow' is not a duration: write"),
    # Transforms, calls, embeds.
    "two transforms": (one("kind: transform, cel: '1', jmespath: a"), 3, "steps[0]", "either 'cel' or 'jmespath'"),
    "no transform": (one("kind: transform"), 3, "steps[0]", "either 'cel' or 'jmespath'"),
    "a transform of what is not there": (one("kind: transform, cel: inputs.x"), 3, "steps[0].cel", "'inputs.x' names"),
    "broken JMESPath": (one("kind: transform, jmespath: 'a['"), 3, "steps[0].jmespath", "jmespath.org"),
    "JMESPath of what is not there": (
        one("kind: transform, jmespath: steps.b.output"),
        3,
        "steps[0].jmespath",
        "'steps.b' is no step",
    ),
    "an unknown function of JMESPath": (
        one("kind: transform, jmespath: summ(inputs)"),
        3,
        "steps[0].jmespath",
        "did you mean 'sum'?",
    ),
    "a called workflow that is no name": (one("kind: workflow, workflow: My Flow"), 3, "steps[0].workflow", "hyphens"),
    "no called workflow": (one("kind: workflow"), 3, "steps[0].workflow", "this field is missing lower-case words"),
    "a version below none": (one("kind: workflow, workflow: v, version: -1"), 3, "steps[0].version", "at least 0"),
    "an input of a call that is not there": (
        one("kind: workflow, workflow: v, inputs: {x: inputs.y}"),
        3,
        "steps[0].inputs.x",
        "'inputs.y' names no input",
    ),
    "an input of a call that is no expression": (
        one("kind: workflow, workflow: v, inputs: {x: 3}"),
        3,
        "steps[0].inputs.x",
        "3 is no text a text: write it in quotes, '3'",
    ),
    "nothing to embed": (one("kind: embed, model: 'gemma3:270m'"), 3, "steps[0].texts", "a text, or a list of texts"),
    "a number to embed": (
        one("kind: embed, model: 'gemma3:270m', texts: '3'"),
        3,
        "steps[0].texts",
        "an integer where a text, or a list of texts, is wanted",
    ),
    "an unknown use of vectors": (
        one("kind: embed, model: 'gemma3:270m', texts: '[]', task: search"),
        3,
        "steps[0].task",
        "'query' or 'document'",
    ),
    "an embed without a model": (one("kind: embed, texts: '[]'"), 3, "steps[0]", "names no model"),
    # Calls to servers.
    "no address": (one("kind: http"), 3, "steps[0].url", "a template: https://host/path"),
    "a host that is not listed": (
        one("kind: http, url: 'https://evil.example.com/'"),
        3,
        "steps[0].url",
        "does not list 'evil.example.com'",
    ),
    "another scheme": (one("kind: http, url: 'ftp://api.example.com/'"), 3, "steps[0].url", "'ftp' http, https"),
    "two bodies": (http("json: {}, body: x"), 3, "steps[0]", "either 'json' or 'body'"),
    "an unknown method": (http("method: FETCH"), 3, "steps[0].method", "'GET', 'HEAD', 'POST'"),
    "a status that is none": (http("expect: [20]"), 3, "steps[0].expect[0]", "20 is out of range at least 100"),
    "a header that steers": (http("headers: {Host: x}"), 3, "steps[0].headers.Host", "cannot be set"),
    "a header for the key that is none": (
        http("idempotency_header: a b"),
        3,
        "steps[0].idempotency_header",
        "letters, digits and hyphens",
    ),
    "a template deep in a body": (
        http("json: {a: [{b: '{{ inputs.x }}'}]}"),
        3,
        "steps[0].json.a[0].b",
        "'inputs.x' names no input of the workflow run, secrets.NAME",
    ),
    "a template in a header": (http("headers: {x-a: '{{ x }}'}"), 3, "steps[0].headers.x-a", "'x' names nothing"),
    "too long an answer": (http("max_bytes: 99999999"), 3, "steps[0].max_bytes", "at most 67108864"),
    "a secret outside of http steps": (
        steps(generate("prompt: '{{ secrets.token }}'")),
        3,
        "steps[0].prompt",
        "secrets are offered to http steps only",
    ),
    "all secrets at once": (http("body: '{{ secrets }}'"), 3, "steps[0].body", "never taken together secrets.NAME"),
    "a secret that is no name": (http("body: '{{ secrets._x }}'"), 3, "steps[0].body", "a letter first"),
    # Attempts.
    "a reason that there is not": (one("kind: noop, retry: {on: [never]}"), 3, "steps[0].retry.on[0]", "'timeout'"),
    "a retry that sees what errors have not": (
        one("kind: noop, retry: {when: error.code == 1}"),
        3,
        "steps[0].retry.when",
        "'error' has no 'code' error.reason, error.message, error.attempt",
    ),
    "a retry that sees inputs": (
        one("kind: noop, retry: {when: inputs.x == 1}", "workflow: w\ninputs: {x: {}}"),
        4,
        "steps[0].retry.when",
        "'inputs' names nothing error.reason, error.message, error.attempt",
    ),
    "a retry whose condition is a text": (
        one("kind: noop, retry: {when: error.message}"),
        3,
        "steps[0].retry.when",
        "a text where true or false",
    ),
    "a retry in a map": (
        mapped("kind: noop, retry: {when: item == 1}"),
        3,
        "steps[0].step.retry.when",
        "'item' names nothing",
    ),
    "delays that shrink": (one("kind: noop, retry: {factor: 0.5}"), 3, "steps[0].retry.factor", "0.5 is out of range"),
    "no attempt": (one("kind: noop, retry: {max_attempts: 0}"), 3, "steps[0].retry.max_attempts", "at least 1"),
    "no time for an attempt": (one("kind: noop, timeout: 0"), 3, "steps[0].timeout", "write more than 0"),
    "no time for a step": (one("kind: noop, total_timeout: 0s"), 3, "steps[0].total_timeout", "write more than 0"),
    "less than no time": (one("kind: noop, total_timeout: -1"), 3, "steps[0].total_timeout", "between 0 and ten years"),
    "a failure that is allowed perhaps": (
        one("kind: noop, allow_failure: perhaps"),
        3,
        "steps[0].allow_failure",
        "true",
    ),
    "an unknown model to fall back on": (
        steps(generate("prompt: x, fallback: {models: ['gema3:270m']}")),
        3,
        "steps[0].fallback.models[0]",
        "did you mean 'gemma3:270m'?",
    ),
    "no model to fall back on": (
        steps(generate("prompt: x, fallback: {models: []}")),
        3,
        "steps[0].fallback.models",
        "this is empty at least 1",
    ),
    "no list to fall back on": (
        steps(generate("prompt: x, fallback: {on: [timeout]}")),
        3,
        "steps[0].fallback.models",
        "missing a list of models",
    ),
    "a reason for a fallback that there is not": (
        steps(generate("prompt: x, fallback: {models: ['gemma3:270m'], on: [bored]}")),
        3,
        "steps[0].fallback.on[0]",
        "'bored' is not offered here",
    ),
    "a fallback of what asks no model": (
        one("kind: noop, fallback: {models: ['gemma3:270m']}"),
        3,
        "steps[0].fallback",
        "no such field here allow_failure",
    ),
    "a text that ends nothing": (steps(generate("prompt: x, stop: ['']")), 3, "steps[0].stop[0]", "this is empty"),
    "an output that is no mapping": (steps(generate("prompt: x, output: json")), 3, "steps[0].output", "a mapping"),
    # What is said of the whole run.
    "a place that there is not": (said("priority: {class: batch, rank: 3}"), 2, "priority.rank", "at most 2"),
    "a class that there is not": (said("priority: {class: slow}"), 2, "priority.class", "'slow' is not offered here"),
    "a place without a class": (said("priority: {rank: 1}"), 2, "priority.class", "interactive | standard | batch"),
    "a field that priorities have not": (said("priority: {class: batch, at: 1}"), 2, "priority.at", "class, rank"),
    "a label that is no name": (said("labels: {my label: x}"), 2, "labels.my label", "63 letters, digits"),
    "a label that is a number": (said("labels: {year: 2026}"), 2, "labels.year", "write it in quotes, '2026'"),
    "a label with a long value": (said(f"labels: {{year: '{'x' * 501}'}}"), 2, "labels.year", "at most 500"),
    "labels that are a list": (said("labels: [a]"), 2, "labels", "a list is no mapping names and texts"),
    "no time for a run": (said("deadline: 0"), 2, "deadline", "write more than 0"),
    "a retention beyond all years": (said("retention: 99999d"), 2, "retention", "between 0 and ten years"),
    "an unknown policy of concurrency": (
        said("concurrency: {policy: drop}"),
        2,
        "concurrency.policy",
        "'queue', 'cancel_running' or 'reject'",
    ),
    "a limit of none": (said("concurrency: {limit: 0}"), 2, "concurrency.limit", "at least 1"),
    "a field that concurrency has not": (said("concurrency: {max: 1}"), 2, "concurrency.max", "key, limit, policy"),
    "a key of what is not there": (
        said("concurrency: {key: '{{ inputs.user }}'}"),
        2,
        "concurrency.key",
        "'inputs.user' names no input",
    ),
    "a key of what is done later": (
        said("concurrency: {key: '{{ steps.a.output }}'}"),
        2,
        "concurrency.key",
        "'steps' names nothing",
    ),
    "a key of the run itself": (
        said("deduplicate: {key: '{{ run.id }}', window: 1h}"),
        2,
        "deduplicate.key",
        "'run' names nothing",
    ),
    "no window": (said("deduplicate: {key: x}"), 2, "deduplicate.window", "this field is missing seconds"),
    "no key": (said("deduplicate: {window: 1h}"), 2, "deduplicate.key", "a template over the inputs"),
    "an output of no step": (said("outputs: {x: steps.m.output}"), 2, "outputs.x", "'steps.m' is no step"),
    "an output of a step for failures": (
        said("on_failure: [{id: u, kind: noop}]\noutputs: {x: steps.u.output}"),
        3,
        "outputs.x",
        "done before the run ends steps.a.output, run",
    ),
    "an output that ends too early": (said("outputs: {x: steps.}"), 2, "outputs.x", "is not expected here CEL"),
    "an output that is no JSON": (
        said("outputs: {x: \"timestamp('2026-01-01T00:00:00Z')\"}"),
        2,
        "outputs.x",
        "a timestamp, which is no JSON",
    ),
    "an output schema that is none": (
        said("outputs: {x: {value: steps.a.output, schema: {type: strin}}}"),
        2,
        "outputs.x.schema.type",
        "invalid JSON Schema",
    ),
    "a schema of no output": (said("outputs: {x: {schema: {}}}"), 2, "outputs.x.value", "missing an expression"),
    "a field that outputs have not": (
        said("outputs: {x: {value: '1', expr: y}}"),
        2,
        "outputs.x.expr",
        "no such field here schema, value",
    ),
    "inputs that are a list": (said("inputs: [a]"), 2, "inputs", "a list is no mapping names and their JSON Schemas"),
    "an input that is no schema": (said("inputs: {a: string}"), 2, "inputs.a", "'string' is no mapping {type: string}"),
    "steps that are a mapping": ("workflow: w\nsteps: {a: {kind: noop}}", 2, "steps", "a mapping is no list"),
    "a step that is a text": ("workflow: w\nsteps: [noop]", 2, "steps[0]", "this must be a mapping of fields"),
    "a description that is a list": (said("description: [a]"), 2, "description", "a list is no text a text"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_definitions_name_line_path_and_what_would_do(case: str) -> None:
    text, line, where, told = WRONG[case]
    problems = refused(text)

    assert len(problems) == 1, problems
    assert (problems[0].line, problems[0].where) == (line, where)
    assert told in f"{problems[0].message} {problems[0].accepted}"


def test_what_must_be_there_is_named_with_what_it_is() -> None:
    fields = {
        (field.alias or name)
        for part in every_part(definition.Definition)
        for name, field in part.model_fields.items()
        if field.is_required()
    }

    assert fields <= set(shape_errors.REQUIRED)


def every_part(part: type[DocumentPart]) -> set[type[DocumentPart]]:
    below = {inner for field in part.model_fields.values() for inner in shape_errors._parts(field.annotation)}
    return {part}.union(*map(every_part, below))


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
