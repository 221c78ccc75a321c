"""Hostile documents: each is rejected or fails its step, with the reason, and uses little memory and time."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from app import json_schema
from app.kernel.errors import FailureReason, InvalidDefinition, InvalidInput, StepFailure
from app.workflows.language import check, inputs, outputs
from app.workflows.language.definition import Definition, Output

#: Nested lists: sixty lines make 2^60 values.
SHARED = "{% set a = ['x'] %}" + "{% set a = [a, a] %}" * 60
ALSO = SHARED.replace("set a", "set b").replace("[a, a]", "[b, b]")
MUCH = "units of work"
DEEP = "nested too deep"
FAILS = "fails with template_error"


def merges(count: int) -> str:
    return "a0: &a0 {x: 1}\n" + "".join(
        f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}], k{i}: 1}}\n" for i in range(1, count)
    )


def laughs() -> str:
    tens = (f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9))
    return "\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x, x]", *tens])


def doubled(keyword: str, count: int = 40) -> dict[str, Any]:
    """A schema of `count` definitions, each of which refers twice to the next."""
    parts = {f"d{i}": {keyword: [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(count)}
    return {"$defs": {**parts, f"d{count}": {}}, "$ref": "#/$defs/d0"}


def steps(*made: dict[str, Any]) -> str:
    return json.dumps({"workflow": "w", "steps": list(made)})


def noops(count: int, needs: str) -> str:
    return steps(*({"id": f"s{i}", "kind": "noop", "needs": [needs.format(i - 1)] if i else []} for i in range(count)))


def generated(schema: Any) -> str:
    return steps({"id": "a", "kind": "generate", "model": "m", "prompt": "p", "output": {"schema": schema}})


TEMPLATES: Mapping[str, tuple[str, str]] = {
    "a method that pads": ("{{ 'x'.ljust(900000000) }}", "refused: the method 'ljust'"),
    "a method that formats": ("{{ '{:>900000000}'.format(1) }}", "refused: the method 'format'"),
    "a width": ("{{ 'x' | center(900000000) }}", "a width must be"),
    "an indentation": ("{{ inputs.text | indent(900000000) }}", "a width must be"),
    "many indentations": ("{{ (inputs.long | join('\n')) | indent(1000) }}", "longer than"),
    "a chain of ~": ("{% set a = 'xxxxxxxx' %}" + "{% set a = a ~ a %}" * 60, "longer than"),
    "a chain of +": ("{% set a = 'xxxxxxxx' %}" + "{% set a = a + a %}" * 60, "longer than"),
    "lists that double": ("{% set a = [1] %}" + "{% set a = a + a %}" * 60, MUCH),
    "nested lists, printed": (SHARED + "{{ a }}", MUCH),
    "nested lists, as JSON": (SHARED + "{{ a | tojson }}", MUCH),
    "nested lists, as indented JSON": (SHARED + "{{ a | tojson(16) }}", MUCH),
    "nested lists, compared": (SHARED + ALSO + "{{ a == b }}", MUCH),
    "nested lists, tested": (SHARED + ALSO + "{{ a is eq b }}", MUCH),
    "nested lists, looked for": (SHARED + ALSO + "{{ b in [a] }}", MUCH),
    "nested lists, joined": (SHARED + "{{ a | join }}", MUCH),
    "nested lists, sorted": (SHARED + "{{ a | sort }}", MUCH),
    "the greater of two lists in lists": (SHARED + ALSO + "{{ [a, b] | max }}", MUCH),
    "a replacement": ("{{ inputs.text | replace('x', 'yyyyyyyyyyyyyyyyyyyyyyyy') }}", "longer than"),
    "a replacement of nothing": ("{{ inputs.text | replace('', inputs.text) }}", "longer than"),
    "a separator": ("{{ inputs.long | join(inputs.text) }}", "longer than"),
    "a batch": ("{{ inputs.long | batch(1000000000, 'x') | length }}", MUCH),
    "slices": ("{{ inputs.long | slice(1000000000) | length }}", MUCH),
    "a slice in each turn": ("{% for a in inputs.long %}{{ inputs.long[0:] | length }}{% endfor %}", MUCH),
    "a long word, wrapped": ("{{ inputs.text | wordwrap(1) }}", "texts of up to"),
    "many comments, stripped": ("{{ inputs.comments | striptags }}", "texts of up to"),
    "a precision": ("{{ 5 | round(-100000000) }}", "'round' supports"),
    "a power": ("{{ 9 ** 99999999 }}", "exponents of up to 64"),
    "products": ("{% set a = 1000000000 ** 64 %}" + "{% set a = a * a %}" * 40 + "{{ a }}", "1024 bits"),
    "a sum of lists": ("{{ inputs.lists | sum(start=[]) }}", "numbers only"),
    "10^400 in arithmetic": ("{{ inputs.huge + 1 }}", "1024 bits"),
    "10^400 as a float": ("{{ inputs.huge | float }}", "too large"),
    "10^400 as a file size": ("{{ inputs.huge | filesizeformat }}", "too large"),
    "a block of text that is set": (
        "{% set x %}{% for a in inputs.long %}{% for b in inputs.long %}" + "y" * 1000 + "{% endfor %}{% endfor %}"
        "{% endset %}{{ x }}",
        MUCH,
    ),
    "a filtered block": (
        "{% filter upper %}{% for a in inputs.long %}{{ inputs.text }}{% endfor %}{% endfilter %}",
        MUCH,
    ),
    "a long body": ("{% for a in inputs.long %}" + "{% set b = a %}" * 1000 + "{% endfor %}", MUCH),
    "loops in loops": ("{% for a in inputs.long %}" * 3 + "{% endfor %}" * 3, "iterations"),
    "twenty loops": ("{% for a in inputs.long %}" * 30 + "{% endfor %}" * 30, DEEP),
    "a recursive loop": ("{% for a in inputs.items recursive %}{{ loop(a) }}{% endfor %}", "recursive loops"),
    "brackets": ("{{ " + "(" * 300 + "1" + ")" * 300 + " }}", DEEP),
    "lists in lists, written": ("{{ " + "[" * 500 + "]" * 500 + " }}", DEEP),
    "a long path": ("{{ inputs.items" + ".a" * 3000 + " }}", DEEP),
    "many signs": ("{{ " + "-" * 5000 + "1 }}", DEEP),
    "many branches": ("{% if 1 %}" * 1000 + "{% endif %}" * 1000, DEEP),
    "many tokens": ("{{ a }}" * 20_000, "tokens"),
    "many digits": ("{{ " + "1" * 100_000 + " }}", "too many digits"),
    "an infinite constant": ("{{ 1e999999999 }}", "beyond the range of a double"),
    "an unknown filter": ("{{ inputs.text | nothing }}", "No filter named"),
    "an attribute of Python": ("{{ ''.__class__.__mro__ }}", FAILS),
    "a filter for attributes": ("{{ inputs | attr('__class__') }}", "No filter named"),
    "attributes by map": ("{{ inputs.items | map(attribute='__class__') | list }}", FAILS),
    "a lone surrogate": ("{{ inputs.half }}", "lone surrogate"),
    "the names of internal filters": (
        "{% set _budget = 1 %}{% set _counted_iteration = 2 %}{% for a in inputs.items %}{% endfor %}",
        "gives 0",
    ),
}
EXPRESSIONS: Mapping[str, tuple[str, str]] = {
    "10^400 as a double": ("double(inputs.huge) > 1.0", "beyond 64 bits"),
    "10^400, added": ("inputs.huge + 1 > 1", "beyond 64 bits"),
    "10^400, multiplied": ("inputs.huge * inputs.huge > 1", "beyond 64 bits"),
    "10^400, divided": ("inputs.huge % 7 == 1", "beyond 64 bits"),
    "10^400 as a count": ("inputs.text.replace('a', 'b', inputs.huge) == ''", FAILS),
    "10^400 as an index": ("inputs.long[inputs.huge] == ''", "there is no item"),
    "10^400 as a time": ("timestamp(inputs.huge) > timestamp(0)", "beyond 64 bits"),
    "a pattern that backtracks": ("inputs.letters.matches('^(a+)+$')", "gives False"),
    "a pattern that looks ahead": ("inputs.letters.matches('(?=a)')", FAILS),
    "a pattern with many classes": ("inputs.letters.matches('" + "\\\\pL" * 200 + "')", "gives False"),
    "a lone surrogate": ("int(inputs.half) > 1", "lone surrogate"),
    "brackets": ("(" * 500 + "1" + ")" * 500 + " > 1", "refused"),
    "a long path": ("inputs" + ".m" * 5000 + " == 1", "refused"),
    "loops in loops": ("inputs.long.all(a, inputs.long.all(b, inputs.long.all(c, c == c)))", MUCH),
    "a text that grows": ("inputs.text.replace('', inputs.text).size() > 1", "longer than"),
    "a zone that is a path": ("timestamp('2020-01-01T00:00:00Z').getHours('../../etc/passwd') == 1", FAILS),
    "too long": ("'" + "x" * 20_001 + "' == ''", "longer than"),
    "NUL": ("\x00", "refused"),
}
JMESPATHS: Mapping[str, tuple[str, str]] = {
    "a long path": ("inputs" + ".m" * 9000, "longer, than"),
    "brackets": ("[" * 3000, "refused"),
    "many nots": ("!" * 5000 + "@", "nested"),
    "nested lists": ("@" + "|[@,@]" * 40, FAILS),
    "nested lists, compared": ("@" + "|[@,@]" * 40 + "==@", FAILS),
    "10^400 in a mean": ("avg([inputs.huge])", FAILS),
    "many digits": ("inputs.long[" + "9" * 5000 + "]", "refused"),
    "a literal that is deep": ("`" + "[" * 5000 + "`", "refused"),
    "an infinite number": ("to_number('1e999')", "infinity"),
    "a slice with step zero": ("inputs.long[::0]", FAILS),
    "a separator": ("join(inputs.text, inputs.long)", "longer than"),
}
DOCUMENTS: Mapping[str, tuple[str, str, str]] = {
    "brackets that open": ("json", "[" * 500, "64 levels"),
    "brackets": ("json", "[" * 500 + "]" * 500, "64 levels"),
    "a million brackets": ("json", "[" * 1_000_000, "100000 values"),
    "objects in objects": ("json", '{"a":' * 200 + "1" + "}" * 200, "64 levels"),
    "an unterminated string": ("json", '{"a": "' + "x" * 4_000_000, "this is not JSON"),
    "quotes that do not end": ("json", '["' + '\\"' * 1_000_000, "this is not JSON"),
    "1e400": ("json", "[1e400]", "beyond the range of a double"),
    "10^400": ("json", f"[{10**400}]", "308 digits"),
    "many digits": ("json", "[" + "1" * 100_000 + "]", "308 digits"),
    "NaN": ("json", "[NaN]", "JSON has no number NaN"),
    "a lone surrogate": ("json", '["\\ud800"]', "lone surrogate"),
    "a lone surrogate in a key": ("json", '{"\\udc00": 1}', "lone surrogate"),
    "a duplicate key": ("json", '{"a": [{"b": 1,\n"b": 2}]}', "duplicate key, first in line 1"),
    "many values": ("json", json.dumps(list(range(200_000))), "100000 values"),
    "a long key over many values": ("json", json.dumps({"k" * 500_000: [0] * 50_000}), "is read"),
    "brackets in YAML": ("yaml", "[" * 100_000, "64 levels"),
    "dashes in YAML": ("yaml", "- " * 5_000 + "x", "64 levels"),
    "mappings in YAML": ("yaml", "".join(" " * i + "a:\n" for i in range(1_000)), "64 levels"),
    "keys that are mappings": ("yaml", "? " * 3_000 + "x", "64 levels"),
    "merges that double": ("yaml", merges(50), "is read"),
    "merges that grow": ("yaml", merges(60) + "".join(f"b{i}: {{<<: *a59}}\n" for i in range(5_000)), "100000 values"),
    "a merge of itself": ("yaml", "a: &a {<<: *a}", "merged mappings are nested"),
    "a merge of a text": ("yaml", "a: {<<: x}", "can merge mappings only"),
    "an alias of itself": ("yaml", "a: &a [*a]", "64 levels"),
    "a billion laughs": ("yaml", laughs(), "100000 values"),
    "a number in base 60": ("yaml", "a: 1" + ":1" * 400_000, "308 digits"),
    "a number in base 16": ("yaml", "a: 0x" + "f" * 5_000, "308 digits"),
    "NaN in YAML": ("yaml", "a: .nan", "JSON has no infinity and no NaN"),
    "an object of Python": ("yaml", "a: !!python/name:os.system", "cannot be read"),
    "bytes": ("yaml", "a: !!binary aGVsbG8=", "not a string, a number, a boolean or null"),
    "a date by its tag": ("yaml", "a: !!timestamp 2020-01-01", "not a string, a number, a boolean or null"),
    "NUL in YAML": ("yaml", "a: \0", "neither YAML nor JSON"),
    "long YAML": ("yaml", "x" * 2_000_000, "the YAML has 2000000"),
}
DEFINITIONS: Mapping[str, tuple[str, str]] = {
    "a chain of ten thousand": (noops(10_000, "s{}"), "is taken"),
    "ten thousand needs of nothing": (noops(10_000, "x{}"), "there is no step 'x0'"),
    "a cycle of ten thousand": (noops(9_999, "s{}").replace('"needs": []', '"needs": ["s9998"]'), "form a cycle"),
    "ten thousand fields too many": (
        steps(*({"id": f"s{i}", "kind": "noop", f"x{i}": 1} for i in range(10_000))),
        "unknown field",
    ),
    "a field with a long name": (steps({"id": "a", "kind": "noop", "x" * 3_000_000: 1}), "unknown field"),
}
SCHEMAS: Mapping[str, tuple[Any, str]] = {
    "a pattern that looks ahead": ({"pattern": "^(?=a)b$"}, "cannot be used"),
    "a pattern that refers back": ({"pattern": "^(a)\\1$"}, "cannot be used"),
    "a pattern that is large": ({"pattern": "((a{1000}){1000}){1000}"}, "too large"),
    "a pattern that is long": ({"pattern": "a" * 5000}, "longer than"),
    "patterns that are large together": ({"allOf": [{"pattern": f".{{900}}{i}"} for i in range(200)]}, "together"),
    "a pattern in patternProperties": ({"patternProperties": {"^(a)\\1$": {}}}, "cannot be used"),
    "a reference to a server": ({"$ref": "http://127.0.0.1:1/x"}, "leads out of the schema"),
    "a reference to a file": ({"properties": {"a": {"$ref": "file:///etc/passwd"}}}, "leads out of the schema"),
    "a reference to the metaschema": ({"$ref": "https://json-schema.org/draft/2020-12/schema"}, "leads out"),
    "a reference to nothing": ({"$ref": "#/$defs/a"}, "points to nothing"),
    "a reference to a number": ({"$ref": 5}, "is not a reference"),
    "a reference by $id": ({"items": {"$id": "http://a/b", "$ref": "#/x"}}, "'$id' is not supported"),
    "a schema that is deep": (json.loads('{"not":' * 100 + "{}" + "}" * 100), "nests too deep"),
    "10^400": ({"minimum": 10**400}, "not JSON"),
    "no type": ({"type": {"a": 1}}, "'type' cannot be"),
}
HELD: Mapping[str, tuple[Any, Any, str]] = {
    "a pattern that backtracks": ({"pattern": "^(a+)+$"}, "a" * 24 + "b", "does not match"),
    "a pattern that RE2 does not take": ({"pattern": "(?=a)"}, "a", "cannot be validated"),
    "a long text and a large pattern": ({"pattern": "(.{500})y"}, "x" * 1_000_000, "too long for this pattern"),
    "conditions that double": (doubled("allOf"), 1, "units of work"),
    "alternatives that double": (doubled("oneOf"), 1, "refused"),
    "a schema that is itself": ({"$ref": "#"}, 1, "refers to itself"),
    "a reference to a server": ({"$ref": "http://127.0.0.1:1/x"}, 1, "leads out"),
    "a type that is none": ({"type": 5}, 1, "its schema is invalid"),
    "unique items": ({"uniqueItems": True}, [{"a": i} for i in range(50_000)], "conforms"),
    "a long list of values": ({"items": {"enum": list(range(5_000))}}, list(range(4_000)), "units of work"),
    "many broken items": ({"items": {"type": "string"}}, list(range(90_000)), "is not of type"),
    "a long text that is no number": ({"type": "number"}, "x" * 3_000_000, "is not of type"),
    "10^400 as a multiple": ({"multipleOf": 0.5}, 10**400, "conforms"),
    "10^400 and a bound": ({"maximum": 1.5}, 10**400, "greater than the maximum"),
    "evaluated again and again": ({**doubled("allOf"), "unevaluatedProperties": False}, {"a": 1}, "units of work"),
}
FORCED: Mapping[str, tuple[Any, str]] = {
    "a pattern of many states": ({"type": "string", "pattern": "^(a|b)*a(a|b){14}$"}, "states"),
    "a pattern of many sets": ({"type": "string", "pattern": "^([a-z]{1,30}[0-9]{1,30}){1,30}$"}, "refused"),
    "alternatives that multiply": (
        {"allOf": [{"anyOf": [{"const": i}, {"const": -i}]} for i in range(1, 40)]},
        "refused",
    ),
    "alternatives that must be apart": (
        {"oneOf": [{"type": "object", "properties": {f"p{j}": {"const": i} for j in range(20)}} for i in range(150)]},
        "refused",
    ),
    "a bound of many digits": ({"type": "number", "minimum": 10**300}, "refused"),
    "an enum of many values": ({"enum": [f"v{i}" for i in range(20_000)]}, "makes a grammar"),
    "unique items out of many": (
        {"type": "array", "uniqueItems": True, "items": {"enum": list(range(1_500))}},
        "refused: uniqueItems over 1500",
    ),
    "many properties": (
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(5_000)}},
        "refused",
    ),
    "a circle": (
        {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}}, "$ref": "#/$defs/a"},
        "refused",
    ),
}

CASES: list[tuple[str, str, list[Any], str]] = [
    *((f"template: {name}", "template", [text], told) for name, (text, told) in TEMPLATES.items()),
    *((f"CEL: {name}", "cel", [text], told) for name, (text, told) in EXPRESSIONS.items()),
    *((f"JMESPath: {name}", "jmespath", [text], told) for name, (text, told) in JMESPATHS.items()),
    *((f"document: {name}", "read", [text, syntax], told) for name, (syntax, text, told) in DOCUMENTS.items()),
    *((f"definition: {name}", "definition", [text], told) for name, (text, told) in DEFINITIONS.items()),
    *((f"schema: {name}", "schema", [schema], told) for name, (schema, told) in SCHEMAS.items()),
    *((f"value: {name}", "held", [schema, value], told) for name, (schema, value, told) in HELD.items()),
    *((f"grammar: {name}", "forced", [schema], told) for name, (schema, told) in FORCED.items()),
]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """The outcome of each document, in a process with little memory."""
    lines = "".join(json.dumps([name, kind, arguments]) + "\n" for name, kind, arguments, _ in CASES)
    root = Path(__file__).parents[2]
    ended = subprocess.run(
        [sys.executable, "-m", "tests.workflows.hostile"], input=lines, cwd=root, capture_output=True, text=True
    )
    found = [json.loads(line) for line in ended.stdout.splitlines()]
    made = {one["name"]: one["became"] for one in found if "name" in one}
    begun = [one["begun"] for one in found if "begun" in one]
    if len(made) < len(CASES):
        made[begun[-1] if begun else ""] = f"KILLED {ended.returncode}: {ended.stderr[-2000:]}"
    return made


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "outcome"), [pytest.param(name, outcome, id=name) for name, _, _, outcome in CASES])
def test_each_document_is_rejected_or_fails_within_the_limits(
    name: str, outcome: str, outcomes: dict[str, str]
) -> None:
    assert name in outcomes, "the process ended early"
    assert outcome in outcomes[name]
    assert "CRASH" not in outcomes[name]


def test_the_cases_are_many_and_unique() -> None:
    assert len(CASES) >= 100
    assert len({name for name, *_ in CASES}) == len(CASES)


class Asked(BaseHTTPRequestHandler):
    """Records the paths of the requests."""

    paths: list[str]

    def do_GET(self) -> None:
        self.paths.append(self.path)
        body = b'{"type": "integer"}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    paths: list[str] = []
    made = HTTPServer(("127.0.0.1", 0), type("Remembering", (Asked,), {"paths": paths}))
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{made.server_port}/schema", paths
    made.shutdown()
    thread.join()
    made.server_close()


def places(reference: str) -> dict[str, dict[str, Any]]:
    """Return definitions with the reference in each field that is a schema."""
    schema = {"type": "object", "properties": {"a": {"$ref": reference}}}
    noop = {"id": "a", "kind": "noop"}
    return {
        "inputs.x.properties.a.$ref": {"inputs": {"x": schema}, "steps": [noop]},
        "outputs.x.schema.properties.a.$ref": {"outputs": {"x": {"value": "1", "schema": schema}}, "steps": [noop]},
        "steps[0].schema.properties.a.$ref": {"steps": [{"id": "a", "kind": "wait", "event": "e", "schema": schema}]},
        "steps[0].output.schema.properties.a.$ref": {
            "steps": [{"id": "a", "kind": "generate", "model": "m", "prompt": "p", "output": {"schema": schema}}]
        },
        "steps[0].step.output.schema.properties.a.$ref": {
            "steps": [
                {
                    "id": "a",
                    "kind": "map",
                    "over": "[1]",
                    "step": {"kind": "generate", "model": "m", "prompt": "p", "output": {"schema": schema}},
                }
            ]
        },
    }


@pytest.mark.parametrize("where", places(""))
def test_no_reference_is_fetched_or_opened(where: str, server: tuple[str, list[str]], tmp_path: Path) -> None:
    url, asked = server
    secret = tmp_path / "secret.json"
    secret.write_text('{"const": "the secret"}')
    for reference in (url, secret.as_uri(), str(secret)):
        with pytest.raises(InvalidDefinition) as caught:
            check.parse(json.dumps({"workflow": "w", **places(reference)[where]}))
        problem = caught.value.problems[0]
        assert problem.where == where
        assert "leads out of the schema" in problem.message
        assert "the secret" not in str(caught.value)
    assert asked == []


def test_references_of_stored_definitions_are_not_fetched_either(server: tuple[str, list[str]]) -> None:
    url, asked = server
    schema = {"$ref": url}
    stored = Definition.model_validate(
        {"workflow": "w", "inputs": {"x": schema}, "steps": [{"id": "a", "kind": "noop"}]}
    )
    with pytest.raises(InvalidInput, match="leads out of the schema"):
        inputs.resolve(stored, {"x": 1})
    with pytest.raises(StepFailure) as caught:
        outputs.compute({"x": Output(value="1", schema=schema)}, {"inputs": {}, "steps": {}})
    assert caught.value.reason is FailureReason.INVALID_OUTPUT
    assert not json_schema.conforms(schema, 1)
    assert asked == []
