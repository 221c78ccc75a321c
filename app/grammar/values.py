"""
Values: converts constraints to grammar terms.

Every text of a term is JSON that satisfies the constraints, but not every value that satisfies them has a text.
These restrictions are intended: properties have the declared order; an object that lists properties has no others
unless additionalProperties allows them; a schema without `type` that has keywords of some types has only those types;
strings, arrays and numbers are bounded; recursive schemas nest a few times; numbers with bounds have no exponent; and
at most one space follows a comma or a colon.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from app.grammar import automata, numbers, patterns, strings
from app.grammar.constraints import (
    TYPE_KEYWORDS,
    TYPES,
    ConstraintReader,
    Constraints,
    LocatedSchemas,
    canonical,
    schema_key,
    subpath,
)
from app.grammar.formats import MAX_LENGTHS, PATTERNS
from app.grammar.gbnf import (
    EMPTY,
    MAX_REPEAT,
    Chars,
    RuleName,
    Rules,
    Term,
    Text,
    chain,
    choice,
    literals,
    optional,
)
from app.grammar.sequences import Member, Sequences

#: Maximum recursion of a schema: deeper values are not written.
MAX_RECURSION = 6
#: Maximum nested schemas, references included.
MAX_OPEN = 110

#: Maximum nesting of a value without a schema.
ANY_DEPTH = 3
#: Maximum items and properties at one level of a value without a schema.
ANY_ITEMS = 16

#: Unique items of at most this many values have any order; of more values, the order of the enum.
MAX_PERMUTED = 6


#: Maximum members of a selection with a limited count: the size of the grammar is quadratic.
MAX_SELECTED = 250


class Unsatisfiable(Exception):
    """No value satisfies the constraints: where, and why. Never leaves this module."""

    def __init__(self, where: str, message: str, accepted: str = "") -> None:
        self.where, self.accepted = where, accepted
        super().__init__(message)


class Writer:
    """Converts the schemas of one root to terms."""

    def __init__(self, rules: Rules, reader: ConstraintReader, max_string: int, max_items: int) -> None:
        self._rules = rules
        self._reader = reader
        self._max_string = max_string
        self._max_items = max_items
        self._sequences = Sequences(rules)
        self._colon = rules.add("colon", chain(Text(":"), optional(Text(" "))))
        #: Terms by the text of their schemas and their recursion level.
        self._terms: dict[tuple[str, int], Term | None] = {}
        self._open_schemas: set[tuple[str, int]] = set()
        self._level = 0
        #: How often a value was left out because it nests too deep, and the schemas that have no value for this reason.
        self.depth_cuts = 0
        self._cut_schemas: set[tuple[str, int]] = set()

    def value(self, parts: LocatedSchemas, hint: str) -> Term | None:
        """Returns the values that satisfy all the schemas; None when there is none, or all of them nest too deep."""
        text = schema_key(parts)
        # A schema inside itself is converted again at the next level, so that no rule refers to itself.
        level = self._level + ((text, self._level) in self._open_schemas)
        place = (text, level)
        if level > MAX_RECURSION or len(self._open_schemas) >= MAX_OPEN:
            if level == 0:
                self._reader.refuse(parts[0][1] if parts else "", "the schema nests too deep", f"{MAX_OPEN} levels")
            self.depth_cuts += 1
            return None
        if place not in self._terms:
            depth_cuts, outer, self._level = self.depth_cuts, self._level, level
            self._open_schemas.add(place)
            term = self._value(parts, hint)
            self._open_schemas.remove(place)
            self._level = outer
            if term is None and self.depth_cuts > depth_cuts:
                self._cut_schemas.add(place)
            simple = term is None or isinstance(term, Text | Chars | RuleName)
            self._terms[place] = term if term is None or simple else self._rules.add(hint, term)
        self.depth_cuts += place in self._cut_schemas
        return self._terms[place]

    def _value(self, parts: LocatedSchemas, hint: str) -> Term | None:
        if any(schema is False for schema, _ in parts):
            return None
        if len(parts) == 1 and isinstance(parts[0][0], dict):
            simple = self._single_combiner(parts[0][0], parts[0][1], hint)
            if simple is not None:
                return simple
        where = parts[0][1] if parts else ""
        depth_cuts = self.depth_cuts
        alternatives = self._reader.alternatives(parts)
        terms: list[Term] = []
        reasons: list[Unsatisfiable] = []
        for item in alternatives:
            try:
                terms.append(self._term(item, hint, sole=len(alternatives) == 1))
            except Unsatisfiable as reason:
                reasons.append(reason)
        if terms:
            return choice(*terms)
        if self.depth_cuts > depth_cuts:
            return None
        if len(reasons) == 1:
            self._reader.refuse(reasons[0].where, str(reasons[0]), reasons[0].accepted)
        else:
            causes = "; ".join(dict.fromkeys(map(str, reasons))) or "its constraints contradict one another"
            self._reader.refuse(where, f"no value conforms: {causes}")
        return EMPTY

    def _single_combiner(self, schema: Mapping[str, Any], where: str, hint: str) -> Term | None:
        """Returns the term of a schema that is only a reference or a union: separate rules make recursion possible."""
        words = self._reader.constraining_keywords(schema)
        if words == {"$ref"}:
            target = self._reader.target(schema["$ref"], where)
            return EMPTY if target is None else self.value((target,), schema["$ref"].rpartition("/")[2] or hint)
        if words not in ({"anyOf"}, {"oneOf"}):
            return None
        (keyword,) = words
        branches = tuple((item, f"{subpath(where, keyword)}[{i}]") for i, item in enumerate(schema[keyword]))
        if keyword == "oneOf":
            self._reader.check_disjoint(
                [self._reader.alternatives((branch,)) for branch in branches], subpath(where, keyword)
            )
        terms = [term for branch in branches if (term := self.value((branch,), hint)) is not None]
        return choice(*terms) if terms else None

    def _term(self, item: Constraints, hint: str, *, sole: bool) -> Term:
        if item.values is not None:
            values = self._reader.conforming(item)
            scalars = [json.dumps(value, ensure_ascii=False) for value in values if not isinstance(value, list | dict)]
            options = [literals(scalars)] if scalars else []
            return choice(*options, *(self._literal(value) for value in values if isinstance(value, list | dict)))
        types = _types(item)
        if types is None:
            return self._any_value(ANY_DEPTH)
        terms: list[Term] = []
        reasons: list[Unsatisfiable] = []
        depth_cuts = self.depth_cuts
        for kind in TYPES:
            if kind in types and not (kind == "integer" and "number" in types):
                try:
                    terms.append(self._of_type(kind, item, hint))
                except Unsatisfiable as reason:
                    reasons.append(reason)
        if reasons and ((sole and self.depth_cuts == depth_cuts) or not terms):
            raise reasons[0]
        return choice(*terms)

    def _of_type(self, kind: str, item: Constraints, hint: str) -> Term:
        if kind == "object":
            return self._object(item, hint)
        if kind == "array":
            return self._array(item, hint)
        if kind == "string":
            return self._string(item)
        if kind == "number":
            return self._number(item)
        if kind == "integer":
            return self._integer(item)
        return Text("null") if kind == "null" else choice(Text("true"), Text("false"))

    def _literal(self, value: Any) -> Term:
        """Returns the text of one JSON value."""
        if isinstance(value, dict):
            members = [
                chain(Text(json.dumps(name, ensure_ascii=False)), self._colon, self._literal(item))
                for name, item in value.items()
            ]
            return chain(Text("{"), self._sequences.all_of(members), Text("}"))
        if isinstance(value, list):
            return chain(Text("["), self._sequences.all_of([self._literal(item) for item in value]), Text("]"))
        return Text(json.dumps(value, ensure_ascii=False))

    def _string(self, item: Constraints) -> Term:
        least, most = item.min_length, item.max_length
        if most is not None and least > most:
            raise Unsatisfiable(subpath(item.where, "minLength"), f"minLength {least} is above maxLength {most}")
        if len(item.patterns) > 1:
            _, _, where = item.patterns[1]
            raise Unsatisfiable(
                where, "a second pattern or format applies to the same string", "one pattern or one format"
            )
        if item.patterns:
            keyword, text, where = item.patterns[0]
            return chain(Text('"'), self._patterned(keyword, text, where, least, most), Text('"'))
        for word, bound in (("minLength", least), ("maxLength", most or 0)):
            _check_repetitions(item.where, word, bound)
        longest = max(self._max_string, least) if most is None else most
        whole = chain(Text('"'), self._rules.repeat(strings.character(self._rules), least, longest), Text('"'))
        return self._rules.add("string", whole)

    def _patterned(self, keyword: str, text: str, where: str, least: int, most: int | None) -> Term:
        pattern = PATTERNS[text] if keyword == "format" else text
        longest = min(self._max_string, MAX_LENGTHS.get(text, self._max_string) if keyword == "format" else MAX_REPEAT)
        try:
            return automata.body(self._rules, patterns.read(pattern), least, most, longest)
        except patterns.PatternRejected as refused:
            raise Unsatisfiable(where, f"{keyword} {text!r}: {refused}", patterns.ACCEPTED) from None

    def _integer(self, item: Constraints) -> Term:
        bounds = numbers.integer_bounds(item.minimum, item.above, item.maximum, item.below)
        if bounds is None:
            raise Unsatisfiable(*_no_number_problem(item, "integer"))
        step = self._step(item)
        if step == 1:
            return numbers.integers(*bounds)
        first, last = -(-bounds[0] // step), bounds[1] // step
        if first > last:
            raise Unsatisfiable(*_no_number_problem(item, f"multiple of {step}"))
        term = numbers.multiples(*bounds, step)
        if term is None:
            message = f"multipleOf {step} has {last - first + 1} values here"
            raise Unsatisfiable(
                subpath(item.where, "multipleOf"), message, "a power of ten, or bounds with up to 256 multiples"
            )
        return term

    def _number(self, item: Constraints) -> Term:
        if item.multiple_of:
            return self._integer(item)
        if item.minimum is item.above is item.maximum is item.below is None:
            return self._rules.add("number", numbers.any_number())
        bounds = numbers.decimal_bounds(item.minimum, item.above, item.maximum, item.below)
        if bounds is None:
            raise Unsatisfiable(
                *_no_number_problem(item, f"number of {numbers.INTEGER_DIGITS} digits and {numbers.DECIMALS} decimals")
            )
        return numbers.decimals(*bounds)

    def _step(self, item: Constraints) -> int:
        for step in item.multiple_of:
            if step != int(step):
                where, message = subpath(item.where, "multipleOf"), f"multipleOf {step} is not a whole number"
                raise Unsatisfiable(where, message, "a whole number: doubles are seldom exact multiples of a fraction")
        return math.lcm(*map(int, item.multiple_of))

    def _array(self, item: Constraints, hint: str) -> Term:
        least, most, start = item.min_items, item.max_items, len(item.prefix)
        if most is not None and least > most:
            raise Unsatisfiable(subpath(item.where, "minItems"), f"minItems {least} is above maxItems {most}")
        for word, bound in (("minItems", least), ("maxItems", most or 0)):
            _check_repetitions(item.where, word, bound)
        most = max(self._max_items, least, start) if most is None else most
        if item.prefix and not item.items:
            most = min(most, max(start, least))
        if item.unique and most > 1:
            return self._unique(item, least, most)
        prefix = []
        for i, parts in enumerate(item.prefix[:most]):
            term = self.value(parts, f"{hint}-{i}")
            if term is None:
                most = i
                break
            prefix.append(term)
        rest = self.value(item.items, f"{hint}-item") if most > start else EMPTY
        if rest is None:
            rest, most = EMPTY, min(most, start)
        if least > most:
            raise Unsatisfiable(
                subpath(item.where, "minItems"), f"minItems {least} requires items that are not allowed"
            )
        more: Term = EMPTY
        if most > start:
            more = self._sequences.repeated(rest, max(0, least - start), most - start, after=start > 0)
        return chain(Text("["), self._sequences.prefixed(prefix, more, least), Text("]"))

    def _unique(self, item: Constraints, least: int, most: int) -> Term:
        values: list[Any] = []
        provable = not item.prefix
        for option in self._reader.alternatives(item.items):
            provable = provable and (option.values is not None or option.types in _LISTED_TYPES)
            found = (
                self._reader.conforming(option) if option.values is not None else _LISTED_TYPES.get(option.types, ())
            )
            values += [value for value in found if canonical(value) not in map(canonical, values)]
        if not provable:
            where, message = subpath(item.where, "uniqueItems"), "the items cannot be kept different"
            raise Unsatisfiable(where, message, "uniqueItems with an enum as items, or maxItems up to 1")
        if least > len(values):
            raise Unsatisfiable(
                subpath(item.where, "minItems"), f"minItems {least} exceeds the {len(values)} different items"
            )
        if len(values) > MAX_SELECTED:
            message = f"uniqueItems over {len(values)} different items"
            raise Unsatisfiable(subpath(item.where, "uniqueItems"), message, f"up to {MAX_SELECTED} values in the enum")
        terms = [self._literal(value) for value in values]
        if len(terms) <= MAX_PERMUTED:
            return chain(Text("["), self._sequences.permutations(terms, least, most), Text("]"))
        body = self._sequences.selection([Member(term) for term in terms], least, most)
        assert body is not None
        return chain(Text("["), body, Text("]"))

    def _object(self, item: Constraints, hint: str) -> Term:
        least, most = item.min_properties, item.max_properties
        if most is not None and least > most:
            raise Unsatisfiable(
                subpath(item.where, "minProperties"), f"minProperties {least} is above maxProperties {most}"
            )
        for word, bound in (("minProperties", least), ("maxProperties", most or 0)):
            _check_repetitions(item.where, word, bound)
        listed = dict(item.properties) | {n: item.additional for n in item.required if n not in item.properties}
        members = []
        for name, parts in listed.items():
            term = self.value(parts, name)
            if term is not None:
                text = Text(json.dumps(name, ensure_ascii=False))
                members.append(Member(chain(text, self._colon, term), name in item.required))
            elif name in item.required:
                raise Unsatisfiable(subpath(item.where, "required"), f"the required property {name!r} is not allowed")
        closed = "properties" in item.keywords or bool(item.required)
        if len(listed) > MAX_SELECTED and (least > len(item.required) or most is not None):
            message = f"minProperties and maxProperties over {len(listed)} properties"
            raise Unsatisfiable(
                subpath(item.where, "properties"), message, f"up to {MAX_SELECTED} properties with them"
            )
        extra = None
        if item.additional or not closed:
            term = self.value(item.additional, f"{hint}-value")
            extra = None if term is None else chain(self._other_name(list(listed)), self._colon, term)
        body = self._sequences.selection(members, least, most, extra, self._max_items)
        if body is None:
            message = "minProperties and maxProperties cannot be satisfied with the allowed properties"
            raise Unsatisfiable(
                subpath(item.where, "minProperties"), message, "at most one property beyond those listed"
            )
        return chain(Text("{"), body, Text("}"))

    def _other_name(self, names: Sequence[str]) -> RuleName:
        return strings.other_name(self._rules, names, min(strings.MAX_NAME, self._max_string))

    def _any_value(self, depth: int) -> Term:
        """Returns any value: scalars, and arrays and objects of at most `depth` levels."""
        scalars = choice(
            self._string(Constraints()),
            self._rules.add("number", numbers.any_number()),
            *(Text(word) for word in ("true", "false", "null")),
        )
        if depth == 0:
            return self._rules.add("any", scalars)
        inner = self._any_value(depth - 1)
        most = min(ANY_ITEMS, self._max_items)
        array = chain(Text("["), self._sequences.repeated(inner, 0, most), Text("]"))
        member = chain(self._other_name(()), self._colon, inner)
        structure = chain(Text("{"), self._sequences.repeated(member, 0, most), Text("}"))
        return self._rules.add("any", choice(scalars, array, structure))


#: The values of types that have only a few.
_LISTED_TYPES: Mapping[frozenset[str] | None, tuple[Any, ...]] = {
    frozenset({"boolean"}): (True, False),
    frozenset({"null"}): (None,),
    frozenset({"boolean", "null"}): (True, False, None),
}


def _types(item: Constraints) -> frozenset[str] | None:
    """Returns the types of the value; None for an unconstrained value."""
    if item.types is not None:
        return item.types
    found = frozenset(kind for kind, words in TYPE_KEYWORDS.items() if words & item.keywords)
    return found or None


def _no_number_problem(item: Constraints, kind: str) -> tuple[str, str]:
    bounds = {
        "minimum": item.minimum,
        "exclusiveMinimum": item.above,
        "maximum": item.maximum,
        "exclusiveMaximum": item.below,
    }
    given = {word: bound for word, bound in bounds.items() if bound is not None}
    listed = " and ".join(f"{word} {bound}" for word, bound in given.items())
    return subpath(item.where, next(iter(given), "type")), f"no {kind} is within {listed}"


def _check_repetitions(where: str, keyword: str, bound: int) -> None:
    if bound > MAX_REPEAT:
        message = f"{keyword} {bound} exceeds the {MAX_REPEAT} repetitions that llama.cpp supports"
        raise Unsatisfiable(subpath(where, keyword), message, f"at most {MAX_REPEAT}")
