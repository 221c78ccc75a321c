"""The check of definitions: valid ones are accepted, each problem is reported with its place and a remedy."""

from __future__ import annotations

import json

import pytest

from app.catalog import files
from app.kernel.errors import InvalidDefinition, Problem
from app.kernel.security.egress import EgressPolicy
from app.kernel.units import durations
from app.workflows import registry
from app.workflows.language import check, definition, shape_errors
from app.workflows.language.check import Deployment
from app.workflows.language.definition import LABEL
from app.workflows.language.step_work import DocumentPart

POLICY = EgressPolicy.of(["api.example.com"], allow_private=False)
MODELS = Deployment(files.read_catalog(), POLICY)


def refused(text: str) -> list[Problem]:
    with pytest.raises(InvalidDefinition) as caught:
        check.parse(text, MODELS)
    return list(caught.value.problems)


def steps(*lines: str, head: str = "workflow: w") -> str:
    return "\n".join([head, "steps:", *(f"  - {line}" for line in lines)])


def generate(more: str) -> str:
    return "{id: a, kind: generate, model: 'smollm2:135m', " + more + "}"


def one(fields: str, head: str = "workflow: w") -> str:
    """Return a workflow with one step, in line 3 unless the head is longer."""
    return steps("{id: a, " + fields + "}", head=head)


def mapped(step: str, fields: str = "") -> str:
    return one("kind: map, over: '[1]', step: {" + step + "}" + fields)


def http(more: str) -> str:
    return one("kind: http, url: 'https://api.example.com/', " + more)


def with_head(head: str, step: str = "{id: a, kind: noop}") -> str:
    """Return a workflow with `head` in line 2 and one step."""
    return steps(step, head=f"workflow: w\n{head}")


#: source, line, path, a part of the message or of what is accepted
WRONG = {
    "empty": ("", 1, "", "the document is empty"),
    "not a mapping": ("- a\n- b", 1, "", "mapping of fields"),
    "malformed": ("workflow: w\nsteps: [", 2, "", "neither YAML nor JSON"),
    "malformed JSON": ('{"workflow": "w",\n "steps": [}', 2, "", "neither YAML nor JSON"),
    "a duplicate key": ("workflow: w\nworkflow: v\nsteps: []", 2, "workflow", "duplicate key, first in line 1"),
    "a tab": ("workflow: w\nsteps:\n\t- a", 3, "", "neither YAML nor JSON"),
    "no name": ("steps:\n  - {id: a, kind: noop}", 1, "workflow", "this field is missing"),
    "an invalid name": (steps("{id: a, kind: noop}", head="workflow: My Flow"), 1, "workflow", "hyphens"),
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
    "no kind": (
        steps("{id: a}"),
        3,
        "steps[0]",
        "generate | embed | openai | agent | compress | summarize | remember | recall | embed_passages",
    ),
    "an unknown kind": (
        steps("{id: a, kind: think}"),
        3,
        "steps[0]",
        "generate | embed | openai | agent | compress | summarize | remember | recall | embed_passages",
    ),
    "an invalid id": (steps("{id: A-1, kind: noop}"), 3, "steps[0].id", "underscores"),
    "a duplicate id": (
        steps("{id: a, kind: noop}", "{id: a, kind: noop}"),
        4,
        "steps[1].id",
        "already the id of steps[0]",
    ),
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
        "listed twice",
    ),
    "a cycle": (
        steps("{id: a, kind: noop, needs: [c]}", "{id: b, kind: noop, needs: [a]}", "{id: c, kind: noop, needs: [b]}"),
        3,
        "steps[0].needs",
        "a → c → b → a",
    ),
    "a join step without needs": (steps("{id: a, kind: join}"), 3, "steps[0].needs", "a join step without 'needs'"),
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
    "a template with a syntax error": (
        steps(generate("prompt: '{{ inputs.x '")),
        3,
        "steps[0].prompt",
        "line 1 of the template",
    ),
    "a template with an unknown name": (
        steps(generate("prompt: '{{ customer }}'")),
        3,
        "steps[0].prompt",
        "is not defined here",
    ),
    "an unknown input": (
        steps(generate("prompt: '{{ inputs.mesage }}'"), head="workflow: w\ninputs: {message: {type: string}}"),
        4,
        "steps[0].prompt",
        "inputs.message",
    ),
    "a step that is not an ancestor": (
        steps("{id: b, kind: noop}", generate("prompt: '{{ steps.b.output }}'")),
        4,
        "steps[1].prompt",
        "is not a step that this one needs",
    ),
    "an unknown field of a step's result": (
        steps("{id: b, kind: noop}", generate("needs: [b], prompt: '{{ steps.b.result }}'")),
        4,
        "steps[1].prompt",
        "steps.b.output",
    ),
    "an unsupported statement": (
        steps(generate("prompt: \"{% include 'x' %}\"")),
        3,
        "steps[0].prompt",
        "is not supported here",
    ),
    "an invalid schema": (
        steps(generate("prompt: x, output: {schema: {type: objekt}}")),
        3,
        "steps[0].output.schema.type",
        "invalid JSON Schema",
    ),
    "a schema that no grammar can enforce": (
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
    "an invalid input schema": (
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
    "an input whose name is not an identifier": (
        steps("{id: a, kind: noop}", head="workflow: w\ninputs: {my input: {}}"),
        2,
        "inputs.my input",
        "cannot be used as a name",
    ),
    # Needs.
    "an unknown branch": (
        steps("{id: r, kind: switch, cases: {x: 'true'}}", "{id: b, kind: noop, needs: [r.y]}"),
        4,
        "steps[1].needs[0]",
        "the step 'r' has no branch 'y' r.x",
    ),
    "a branch of a step without branches": (
        steps("{id: n, kind: noop}", "{id: b, kind: noop, needs: [n.y]}"),
        4,
        "steps[1].needs[0]",
        "n: it has no branches",
    ),
    "the branch timed_out without on_timeout": (
        steps("{id: p, kind: wait, event: e, expires: 1h}", "{id: b, kind: noop, needs: [p.timed_out]}"),
        4,
        "steps[1].needs[0]",
        "with 'on_timeout: continue'",
    ),
    "an invalid need": (one("kind: noop, needs: [N-1]"), 3, "steps[0].needs[0]", "or a branch of it"),
    "needs that are not a list": (one("kind: noop, needs: n"), 3, "steps[0].needs", "'n' is not a list [n]"),
    "an unknown join": (one("kind: noop, join: some"), 3, "steps[0].join", "'all', 'any' or 'all_done'"),
    "join any without needs": (one("kind: noop, join: any"), 3, "steps[0].join", "'needs' in the same step"),
    "join all_done without needs": (one("kind: noop, join: all_done"), 3, "steps[0].join", "'needs' in the same step"),
    "a step of on_failure that needs a regular step": (
        with_head("on_failure: [{id: u, kind: noop, needs: [a]}, {id: v, kind: noop}]"),
        2,
        "on_failure[0].needs[0]",
        "'a' has ended before a step of on_failure starts one of v",
    ),
    "a regular step that needs a step of on_failure": (
        with_head("on_failure: [{id: u, kind: noop}]", "{id: a, kind: noop, needs: [u]}"),
        4,
        "steps[0].needs[0]",
        "'u' starts only after the run fails no needs",
    ),
    "a cycle of steps of on_failure": (
        with_head("on_failure: [{id: u, kind: noop, needs: [v]}, {id: v, kind: noop, needs: [u]}]"),
        2,
        "on_failure[0].needs",
        "u → v → u",
    ),
    "an id in both lists": (
        with_head("on_failure: [{id: a, kind: noop}]"),
        2,
        "on_failure[0].id",
        "already the id of steps[0]",
    ),
    "a join whose template uses a step that it does not need": (
        steps(
            "{id: n, kind: noop}", "{id: m, kind: noop}", "{id: j, kind: join, needs: [n], template: '{{ steps.m }}'}"
        ),
        5,
        "steps[2].template",
        "'steps.m' is not a step that this one needs, directly or through others needs: [n, m] in this step",
    ),
    "a step that needs this one": (
        steps("{id: n, kind: noop, when: steps.m.output == 1}", "{id: m, kind: noop, needs: [n]}"),
        3,
        "steps[0].when",
        "directly or through others run",
    ),
    # Conditions and other expressions.
    "a condition that ends too early": (one("kind: noop, when: '1 +'"), 3, "steps[0].when", "it ends too early CEL"),
    "a condition of type string": (
        one("kind: noop, when: inputs.t", "workflow: w\ninputs: {t: {type: string}}"),
        4,
        "steps[0].when",
        "a string, expected true or false",
    ),
    "a condition that YAML reads as a boolean": (
        one("kind: noop, when: true"),
        3,
        "steps[0].when",
        "true is not a string a string: write it in quotes, 'true'",
    ),
    "a condition on an unknown input": (
        one("kind: noop, when: inputs.x"),
        3,
        "steps[0].when",
        "'inputs.x' is not an input",
    ),
    "a condition on a step that is not an ancestor": (
        steps("{id: n, kind: noop}", "{id: a, kind: noop, when: steps.n.output}"),
        4,
        "steps[1].when",
        "'steps.n' is not a step that this one needs",
    ),
    "a condition on an unknown field of a step": (
        steps("{id: n, kind: noop}", "{id: a, kind: noop, needs: [n], when: steps.n.result == 1}"),
        4,
        "steps[1].when",
        "steps.n.output, steps.n.state, steps.n.error",
    ),
    "an unknown function": (one("kind: noop, when: 'sise([]) == 0'"), 3, "steps[0].when", "did you mean 'size'?"),
    "mismatched types": (one("kind: noop, when: \"1 == 'a'\""), 3, "steps[0].when", "int(…)"),
    "a secret in a condition": (
        one("kind: noop, when: secrets.x == 'a'"),
        3,
        "steps[0].when",
        "'secrets' is not defined",
    ),
    # Switches.
    "a switch without cases": (one("kind: switch"), 3, "steps[0].cases", "missing branches and their conditions"),
    "a switch with empty cases": (one("kind: switch, cases: {}"), 3, "steps[0].cases", "this is empty at least 1"),
    "an invalid branch name": (one("kind: switch, cases: {A b: 'true'}"), 3, "steps[0].cases.A b", "'A b' is not"),
    "a case that is not a condition": (
        one("kind: switch, cases: {x: '1'}"),
        3,
        "steps[0].cases.x",
        "an integer, expected true or false",
    ),
    "an invalid name of the default branch": (
        one("kind: switch, cases: {x: 'true'}, default: X y"),
        3,
        "steps[0].default",
        "'X y' is not a valid name",
    ),
    # Maps.
    "a map in a map": (
        mapped("kind: map, over: '[1]', step: {kind: noop}"),
        3,
        "steps[0].step",
        (
            "'map' is not supported here "
            "kind: generate | embed | openai | compress | summarize | recall | refine | ensemble | verify | "
            "remember | transform | python | http | workflow | noop; for more than one step"
        ),
    ),
    "a wait in a map": (mapped("kind: wait, for: 1h"), 3, "steps[0].step", "call a workflow"),
    "an unknown kind in a map": (mapped("kind: think"), 3, "steps[0].step", "the kind 'think' is not supported here"),
    "no kind in a map": (
        mapped("prompt: x"),
        3,
        "steps[0].step",
        "no field 'kind' kind: generate | embed | openai",
    ),
    "needs in a map": (
        mapped("kind: noop, needs: [x]"),
        3,
        "steps[0].step.needs",
        "unknown field kind, retry, timeout",
    ),
    "an unknown field in a map": (
        mapped("kind: generate, model: 'smollm2:135m', promt: x"),
        3,
        "steps[0].step.promt",
        "did you mean 'prompt'?",
    ),
    "a map without a step": (one("kind: map, over: '[1]'"), 3, "steps[0].step", "the work for each item"),
    "a map without a list": (one("kind: map, step: {kind: noop}"), 3, "steps[0].over", "an expression that returns"),
    "a map over a value that is not a list": (
        one("kind: map, over: '1', step: {kind: noop}"),
        3,
        "steps[0].over",
        "an integer, expected a list",
    ),
    "a map over its own items": (
        one("kind: map, over: item, step: {kind: noop}"),
        3,
        "steps[0].over",
        "'item' is not defined",
    ),
    "an item outside a map": (one("kind: noop, when: item == 1"), 3, "steps[0].when", "'item' is not defined here"),
    "a template in a map": (
        mapped("kind: generate, model: 'smollm2:135m', prompt: '{{ itm }}'"),
        3,
        "steps[0].step.prompt",
        "'itm' is not defined here run, item, index",
    ),
    "no model in a map": (mapped("kind: generate, prompt: x"), 3, "steps[0].step", "names no model"),
    "an invalid schema in a map": (
        mapped("kind: generate, model: 'smollm2:135m', prompt: x, output: {schema: {type: objekt}}"),
        3,
        "steps[0].step.output.schema.type",
        "invalid JSON Schema",
    ),
    "max_parallel too small": (mapped("kind: noop", ", max_parallel: 0"), 3, "steps[0].max_parallel", "at least 1"),
    "max_parallel too large": (
        mapped("kind: noop", ", max_parallel: 1001"),
        3,
        "steps[0].max_parallel",
        "at most 1000",
    ),
    "a policy that maps have not": (mapped("kind: noop", ", on_error: skip"), 3, "steps[0].on_error", "'collect'"),
    # Waits.
    "a wait for two things": (one("kind: wait, for: 1h, event: e"), 3, "steps[0]", "one of 'for', 'until', 'event'"),
    "a wait for nothing": (one("kind: wait"), 3, "steps[0]", "one of 'for', 'until', 'event' and 'approval'"),
    "a schema without an event": (
        one("kind: wait, for: 1h, schema: {}"),
        3,
        "steps[0]",
        "'schema' can be used with 'event' only",
    ),
    "a schema with an approval": (
        one("kind: wait, approval: {message: x}, schema: {}"),
        3,
        "steps[0]",
        "'schema' can be used with 'event' only",
    ),
    "expires on a wait for a duration": (
        one("kind: wait, for: 1h, expires: 1h"),
        3,
        "steps[0]",
        "can be used with 'event' or 'approval' only",
    ),
    "a branch for a time that never ends": (
        one("kind: wait, event: e, on_timeout: continue"),
        3,
        "steps[0]",
        "'on_timeout' needs 'expires'",
    ),
    "an invalid payload schema": (
        one("kind: wait, event: e, schema: {type: objekt}"),
        3,
        "steps[0].schema.type",
        "invalid JSON Schema",
    ),
    "an invalid event name": (one("kind: wait, event: My Event"), 3, "steps[0].event", "'My Event' is not"),
    "an approval without a message": (
        one("kind: wait, approval: {}"),
        3,
        "steps[0].approval.message",
        "the question to the person",
    ),
    "an unknown field of an approval": (
        one("kind: wait, approval: {message: x, by: ana}"),
        3,
        "steps[0].approval.by",
        "unknown field message",
    ),
    "a secret in an approval": (
        one("kind: wait, approval: {message: '{{ secrets.x }}'}"),
        3,
        "steps[0].approval.message",
        "secrets can be used in http steps only",
    ),
    "an invalid instant": (one("kind: wait, until: '3'"), 3, "steps[0].until", "timestamp(inputs.begin)"),
    "an invalid duration": (one("kind: wait, for: tomorrow"), 3, "steps[0].for", "'tomorrow' is not a duration: write"),
    # Transforms, calls, embeds.
    "two transforms": (one("kind: transform, cel: '1', jmespath: a"), 3, "steps[0]", "either 'cel' or 'jmespath'"),
    "no transform": (one("kind: transform"), 3, "steps[0]", "either 'cel' or 'jmespath'"),
    "a transform of an unknown input": (
        one("kind: transform, cel: inputs.x"),
        3,
        "steps[0].cel",
        "'inputs.x' is not an input",
    ),
    "broken JMESPath": (one("kind: transform, jmespath: 'a['"), 3, "steps[0].jmespath", "jmespath.org"),
    "JMESPath with an unknown step": (
        one("kind: transform, jmespath: steps.b.output"),
        3,
        "steps[0].jmespath",
        "'steps.b' is not a step",
    ),
    "an unknown function of JMESPath": (
        one("kind: transform, jmespath: summ(inputs)"),
        3,
        "steps[0].jmespath",
        "did you mean 'sum'?",
    ),
    "an invalid name of a called workflow": (
        one("kind: workflow, workflow: My Flow"),
        3,
        "steps[0].workflow",
        "hyphens",
    ),
    "no called workflow": (one("kind: workflow"), 3, "steps[0].workflow", "this field is missing lower-case words"),
    "a negative version": (one("kind: workflow, workflow: v, version: -1"), 3, "steps[0].version", "at least 0"),
    "an input of a call from an unknown input": (
        one("kind: workflow, workflow: v, inputs: {x: inputs.y}"),
        3,
        "steps[0].inputs.x",
        "'inputs.y' is not an input",
    ),
    "an input of a call that is not an expression": (
        one("kind: workflow, workflow: v, inputs: {x: 3}"),
        3,
        "steps[0].inputs.x",
        "3 is not a string a string: write it in quotes, '3'",
    ),
    "nothing to embed": (
        one("kind: embed, model: 'gemma3:270m'"),
        3,
        "steps[0].texts",
        "a string or a list of strings",
    ),
    "a number to embed": (
        one("kind: embed, model: 'nomic-embed-text:v1.5', texts: '3'"),
        3,
        "steps[0].texts",
        "an integer, expected a string or a list of strings",
    ),
    "an unknown treatment of a cut text": (
        one("kind: generate, model: 'smollm2:135m', prompt: x, on_length: stop"),
        3,
        "steps[0].on_length",
        "'keep' or 'fail'",
    ),
    "a model without embeddings": (
        one("kind: embed, model: 'gemma3:270m', texts: '[]'"),
        3,
        "steps[0].model",
        "serves no embeddings: its use_cases have neither embed nor rerank all-minilm:l6-v2, nomic-embed-text:v1.5",
    ),
    "more tokens than the context of the model": (
        one("kind: generate, model: 'smollm2:135m', prompt: x, max_tokens: 2048"),
        3,
        "steps[0].max_tokens",
        "2048 tokens do not fit in the context of 'smollm2:135m', which has 2048 1 to 2047",
    ),
    "more tokens than the context of a fallback": (
        one("kind: generate, model: 'qwen3:4b', prompt: x, max_tokens: 3000, fallback: {models: ['smollm2:135m']}"),
        3,
        "steps[0].max_tokens",
        "the context of 'smollm2:135m'",
    ),
    "an unknown task of an embedding": (
        one("kind: embed, model: 'gemma3:270m', texts: '[]', task: search"),
        3,
        "steps[0].task",
        "'query' or 'document'",
    ),
    "an embed without a model": (one("kind: embed, texts: '[]'"), 3, "steps[0]", "names no model"),
    # Calls to servers.
    "no URL": (one("kind: http"), 3, "steps[0].url", "a template: https://host/path"),
    "a host that is not listed": (
        one("kind: http, url: 'https://evil.example.com/'"),
        3,
        "steps[0].url",
        "does not list 'evil.example.com'",
    ),
    "another scheme": (
        one("kind: http, url: 'ftp://api.example.com/'"),
        3,
        "steps[0].url",
        "the scheme 'ftp' of the URL is not supported http, https",
    ),
    "two bodies": (http("json: {}, body: x"), 3, "steps[0]", "either 'json' or 'body'"),
    "an unknown method": (http("method: FETCH"), 3, "steps[0].method", "'GET', 'HEAD', 'POST'"),
    "an invalid status": (http("expect: [20]"), 3, "steps[0].expect[0]", "20 is out of range at least 100"),
    "a reserved header": (http("headers: {Host: x}"), 3, "steps[0].headers.Host", "cannot be set"),
    "an invalid name of the idempotency header": (
        http("idempotency_header: a b"),
        3,
        "steps[0].idempotency_header",
        "letters, digits and hyphens",
    ),
    "a template deep in a body": (
        http("json: {a: [{b: '{{ inputs.x }}'}]}"),
        3,
        "steps[0].json.a[0].b",
        "'inputs.x' is not an input of the workflow run, secrets.NAME",
    ),
    "a template in a header": (http("headers: {x-a: '{{ x }}'}"), 3, "steps[0].headers.x-a", "'x' is not defined here"),
    "max_bytes too large": (http("max_bytes: 99999999"), 3, "steps[0].max_bytes", "at most 67108864"),
    "a secret outside of http steps": (
        steps(generate("prompt: '{{ secrets.token }}'")),
        3,
        "steps[0].prompt",
        "secrets can be used in http steps only",
    ),
    "secrets as a whole": (
        http("body: '{{ secrets }}'"),
        3,
        "steps[0].body",
        "only one secret by its name secrets.NAME",
    ),
    "an invalid secret name": (http("body: '{{ secrets._x }}'"), 3, "steps[0].body", "a letter first"),
    # Attempts.
    "an unknown reason": (one("kind: noop, retry: {on: [never]}"), 3, "steps[0].retry.on[0]", "'timeout'"),
    "a retry condition on an unknown field of the error": (
        one("kind: noop, retry: {when: error.code == 1}"),
        3,
        "steps[0].retry.when",
        "'error' has no 'code' error.reason, error.message, error.attempt",
    ),
    "a retry condition on inputs": (
        one("kind: noop, retry: {when: inputs.x == 1}", "workflow: w\ninputs: {x: {}}"),
        4,
        "steps[0].retry.when",
        "'inputs' is not defined here error.reason, error.message, error.attempt",
    ),
    "a retry condition of type string": (
        one("kind: noop, retry: {when: error.message}"),
        3,
        "steps[0].retry.when",
        "a string, expected true or false",
    ),
    "a retry in a map": (
        mapped("kind: noop, retry: {when: item == 1}"),
        3,
        "steps[0].step.retry.when",
        "'item' is not defined here",
    ),
    "delays that shrink": (one("kind: noop, retry: {factor: 0.5}"), 3, "steps[0].retry.factor", "0.5 is out of range"),
    "zero attempts": (one("kind: noop, retry: {max_attempts: 0}"), 3, "steps[0].retry.max_attempts", "at least 1"),
    "a zero timeout": (one("kind: noop, timeout: 0"), 3, "steps[0].timeout", "greater than 0"),
    "a zero total_timeout": (one("kind: noop, total_timeout: 0s"), 3, "steps[0].total_timeout", "greater than 0"),
    "a negative total_timeout": (
        one("kind: noop, total_timeout: -1"),
        3,
        "steps[0].total_timeout",
        "between 0 and ten years",
    ),
    "allow_failure that is not a boolean": (
        one("kind: noop, allow_failure: perhaps"),
        3,
        "steps[0].allow_failure",
        "true",
    ),
    "an unknown fallback model": (
        steps(generate("prompt: x, fallback: {models: ['gema3:270m']}")),
        3,
        "steps[0].fallback.models[0]",
        "did you mean 'gemma3:270m'?",
    ),
    "no fallback model": (
        steps(generate("prompt: x, fallback: {models: []}")),
        3,
        "steps[0].fallback.models",
        "this is empty at least 1",
    ),
    "a fallback without models": (
        steps(generate("prompt: x, fallback: {on: [timeout]}")),
        3,
        "steps[0].fallback.models",
        "missing a list of models",
    ),
    "an unknown reason of a fallback": (
        steps(generate("prompt: x, fallback: {models: ['gemma3:270m'], on: [bored]}")),
        3,
        "steps[0].fallback.on[0]",
        "'bored' is not supported here",
    ),
    "a fallback of a step without a model": (
        one("kind: noop, fallback: {models: ['gemma3:270m']}"),
        3,
        "steps[0].fallback",
        "unknown field allow_failure",
    ),
    "an empty stop text": (steps(generate("prompt: x, stop: ['']")), 3, "steps[0].stop[0]", "this is empty"),
    "an output that is not a mapping": (steps(generate("prompt: x, output: json")), 3, "steps[0].output", "a mapping"),
    # Fields of the whole run.
    "an unknown rank": (with_head("priority: {class: batch, rank: 3}"), 2, "priority.rank", "at most 2"),
    "an unknown priority class": (
        with_head("priority: {class: slow}"),
        2,
        "priority.class",
        "'slow' is not supported here",
    ),
    "a rank without a class": (with_head("priority: {rank: 1}"), 2, "priority.class", "interactive | standard | batch"),
    "an unknown field of priority": (with_head("priority: {class: batch, at: 1}"), 2, "priority.at", "class, rank"),
    "an invalid label name": (with_head("labels: {my label: x}"), 2, "labels.my label", "at most 63 letters, digits"),
    "a label that is a number": (with_head("labels: {year: 2026}"), 2, "labels.year", "write it in quotes, '2026'"),
    "a label with a long value": (with_head(f"labels: {{a: '{'x' * 501}'}}"), 2, "labels.a", "at most 500"),
    "labels that are a list": (with_head("labels: [a]"), 2, "labels", "a list is not a mapping names and strings"),
    "a zero deadline": (with_head("deadline: 0"), 2, "deadline", "greater than 0"),
    "a retention that is too long": (with_head("retention: 99999d"), 2, "retention", "between 0 and ten years"),
    "an unknown policy of concurrency": (
        with_head("concurrency: {policy: drop}"),
        2,
        "concurrency.policy",
        "'queue', 'cancel_running' or 'reject'",
    ),
    "a zero concurrency limit": (with_head("concurrency: {limit: 0}"), 2, "concurrency.limit", "at least 1"),
    "an unknown field of concurrency": (with_head("concurrency: {max: 1}"), 2, "concurrency.max", "key, limit, policy"),
    "a key with an unknown input": (
        with_head("concurrency: {key: '{{ inputs.user }}'}"),
        2,
        "concurrency.key",
        "'inputs.user' is not an input",
    ),
    "a key that uses steps": (
        with_head("concurrency: {key: '{{ steps.a.output }}'}"),
        2,
        "concurrency.key",
        "'steps' is not defined here",
    ),
    "a key that uses the run": (
        with_head("deduplicate: {key: '{{ run.id }}', window: 1h}"),
        2,
        "deduplicate.key",
        "'run' is not defined here",
    ),
    "no window": (with_head("deduplicate: {key: x}"), 2, "deduplicate.window", "this field is missing seconds"),
    "no key": (with_head("deduplicate: {window: 1h}"), 2, "deduplicate.key", "a template over the inputs"),
    "an output of an unknown step": (
        with_head("outputs: {x: steps.m.output}"),
        2,
        "outputs.x",
        "'steps.m' is not a step",
    ),
    "an output of a step of on_failure": (
        with_head("on_failure: [{id: u, kind: noop}]\noutputs: {x: steps.u.output}"),
        3,
        "outputs.x",
        "runs before the run ends steps.a.output, run",
    ),
    "an output that ends too early": (with_head("outputs: {x: steps.}"), 2, "outputs.x", "is not expected here CEL"),
    "an output without a JSON form": (
        with_head("outputs: {x: \"timestamp('2026-01-01T00:00:00Z')\"}"),
        2,
        "outputs.x",
        "a timestamp, which JSON cannot represent",
    ),
    "an invalid output schema": (
        with_head("outputs: {x: {value: steps.a.output, schema: {type: strin}}}"),
        2,
        "outputs.x.schema.type",
        "invalid JSON Schema",
    ),
    "an output without a value": (
        with_head("outputs: {x: {schema: {}}}"),
        2,
        "outputs.x.value",
        "missing an expression",
    ),
    "an unknown field of an output": (
        with_head("outputs: {x: {value: '1', expr: y}}"),
        2,
        "outputs.x.expr",
        "unknown field schema, value",
    ),
    "inputs that are a list": (
        with_head("inputs: [a]"),
        2,
        "inputs",
        "a list is not a mapping names and their JSON Schemas",
    ),
    "an input that is not a schema": (
        with_head("inputs: {a: string}"),
        2,
        "inputs.a",
        "'string' is not a mapping {type: string}",
    ),
    "steps that are a mapping": ("workflow: w\nsteps: {a: {kind: noop}}", 2, "steps", "a mapping is not a list"),
    "a step that is a string": ("workflow: w\nsteps: [noop]", 2, "steps[0]", "this must be a mapping of fields"),
    "a description that is a list": (
        with_head("description: [a]"),
        2,
        "description",
        "a list is not a string a string",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_problems_have_a_line_a_path_and_a_remedy(case: str) -> None:
    text, line, where, expected = WRONG[case]
    problems = refused(text)

    assert len(problems) == 1, problems
    assert (problems[0].line, problems[0].where) == (line, where)
    assert expected in f"{problems[0].message} {problems[0].accepted}"


def test_every_required_field_has_a_description() -> None:
    fields = {
        (field.alias or name)
        for part in every_part(definition.Definition)
        for name, field in part.model_fields.items()
        if field.is_required()
    }

    assert fields <= set(shape_errors.REQUIRED)


def test_every_pattern_of_a_field_or_key_has_a_description() -> None:
    """A value that does not match is then a problem, and no defect."""
    found: set[str] = set()

    def walk(schema: object) -> None:
        if isinstance(schema, dict):
            found.update(schema.get("patternProperties", {}))
            found.update([schema["pattern"]] if isinstance(schema.get("pattern"), str) else [])
        for inner in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
            walk(inner)

    walk(definition.Definition.model_json_schema())
    assert LABEL in found
    assert found - {durations.PATTERN} <= set(shape_errors._PATTERNS)


def test_a_token_that_is_no_number_is_refused() -> None:
    (problem,) = refused(one("kind: generate, model: 'smollm2:135m', prompt: x, sampling: {logit_bias: {word: 1}}"))

    assert (problem.where, problem.line) == ("steps[0].sampling.logit_bias.word", 3)
    assert problem.accepted == "the id of a token: up to nine digits, in quotes"


def test_a_tool_of_an_agent_with_a_wrong_name_is_refused() -> None:
    found = refused(one("kind: agent, model: 'smollm2:135m', prompt: x, tools: [{name: '1 2', workflow: w}]"))

    assert any(one.where == "steps[0].tools[0].name" and "letters, digits" in one.accepted for one in found), found


def every_part(part: type[DocumentPart]) -> set[type[DocumentPart]]:
    children = {inner for field in part.model_fields.values() for inner in shape_errors._parts(field.annotation)}
    return {part}.union(*map(every_part, children))


def test_one_check_reports_all_problems() -> None:
    text = steps("{id: a, kind: noop, needs: [x]}", "{id: a, kind: noop, needs: [y]}", "{id: b, kind: join}")

    assert [problem.where for problem in refused(text)] == [
        "steps[0].needs[0]",
        "steps[1].id",
        "steps[1].needs[0]",
        "steps[2].needs",
    ]


def test_expanding_aliases_are_limited() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]

    assert "more than 100000 values" in refused("\n".join(lines))[0].message


def test_a_recursive_alias_is_rejected() -> None:
    assert "nested deeper" in refused("a: &a [*a]")[0].message


def test_yaml_words_and_dates_are_strings() -> None:
    parsed = check.parse(
        "workflow: w\ninputs:\n  country: {type: string, default: no}\n  day: {type: string, default: 2026-11-21}\n"
        "steps: [{id: a, kind: noop}]"
    )

    assert parsed.inputs["country"]["default"] == "no"
    assert parsed.inputs["day"]["default"] == "2026-11-21"


def test_json_is_parsed_as_json() -> None:
    text = '{\n\t"workflow": "w", "description": "\\ud83e\\udd99 \\/",\n\t"steps": [{"id": "a", "kind": "noop"}]}'

    assert check.parse(text).description == "🦙 /"


def test_definitions_have_the_same_hash_only_when_they_are_equal() -> None:
    one = check.parse("workflow: w\nsteps:\n  - {id: a, kind: noop, timeout: 60}")
    same = check.parse(json.dumps({"steps": [{"kind": "noop", "id": "a", "timeout": "1m"}], "workflow": "w"}))
    other = check.parse("workflow: w\nsteps:\n  - {id: a, kind: noop, timeout: 61}")

    assert one.sha256() == same.sha256()
    assert one.sha256() != other.sha256()


@pytest.mark.parametrize("name", registry.shipped())
def test_a_stored_definition_equals_the_checked_one(name: str) -> None:
    shipped = registry.shipped()[name].definition

    assert definition.from_document(json.loads(json.dumps(shipped.document()))) == shipped
