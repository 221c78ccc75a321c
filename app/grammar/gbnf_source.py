"""
GBNF that users write: read, bounded, and written anew, so that llama.cpp reads exactly what was checked.

llama.cpp recurses into brackets without a limit, follows every way to a first character, and keeps a stack for every
way in which a text can be read. So here brackets, repetitions, ways and open alternatives are limited, and a rule can
refer to itself only at the end of an alternative: nested texts need a JSON Schema. Left recursion is refused.

The notation is specified in llama.cpp's grammars/README.md. Tokens (`<think>`) are not supported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from app.grammar.gbnf import MAX_EXPANDED, MAX_REPEAT
from app.kernel.errors import InvalidInput, Problem

#: Most characters of a source, rules, and levels of brackets.
MAX_SOURCE, MAX_RULES, MAX_DEPTH = 50_000, 1_000, 50
#: Most alternatives that can be open at the same time: the time for a token grows with them.
MAX_OPEN = 500
#: Most ways from a rule to a first character: llama.cpp follows each of them.
MAX_WAYS = 10_000
#: Above this, numbers are no longer added up.
_MANY = 10**9

_NAME = re.compile(r"[A-Za-z0-9-]+")
_RULE = re.compile(r"([A-Za-z0-9-]+)[ \t]*::=")
_SPACE = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_SPACE_AND_LINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_ESCAPE = r"""\\(?:[nrt\\"\[\]^-]|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8})"""
_TEXT = re.compile(rf'"((?:{_ESCAPE}|[^"\\\r\n])*)"')
_CLASS = re.compile(rf"\[\^?(?:{_ESCAPE}|[^\]\\\r\n])+\]")
_CODE = re.compile(r"\\[uU]([0-9A-Fa-f]{8}|[0-9A-Fa-f]{4})")
_TIMES = re.compile(r"\{[ \t]*(\d{1,6})[ \t]*(,[ \t]*(\d{1,6})?[ \t]*)?\}")
_ENDLESS = None


@dataclass(frozen=True, slots=True)
class _Characters:
    """A text or a class of characters, as written."""

    text: str


@dataclass(frozen=True, slots=True)
class _Reference:
    name: str


@dataclass(frozen=True, slots=True)
class _Sequence:
    parts: tuple[_Part, ...]


@dataclass(frozen=True, slots=True)
class _Alternatives:
    parts: tuple[_Part, ...]


@dataclass(frozen=True, slots=True)
class _Repeated:
    part: _Part
    least: int
    #: None is without end.
    most: int | None


_Part = _Characters | _Reference | _Sequence | _Alternatives | _Repeated


def checked(source: str) -> str:
    """
    Return the grammar, written anew, without rules that `root` does not need.

    Raises InvalidInput with the first problem.
    """
    if len(source) > MAX_SOURCE:
        raise _invalid(f"the grammar has {len(source)} characters", f"at most {MAX_SOURCE}")
    rules = _Reader(source).rules()
    if "root" not in rules:
        raise _invalid("the grammar has no rule named root", "root ::= …")
    needed = _needed(rules)
    try:
        _Bounds(needed).check()
    except RecursionError:
        raise _invalid("its rules refer to one another in a chain that is too long", "fewer rules") from None
    return "".join(f"{name} ::= {_written(part)}\n" for name, part in needed.items())


class _Reader:
    """The reader of a source."""

    def __init__(self, source: str) -> None:
        self._source, self._at = source, 0

    def rules(self) -> dict[str, _Part]:
        found: dict[str, _Part] = {}
        self._skip(_SPACE_AND_LINES)
        while self._at < len(self._source):
            rule = _RULE.match(self._source, self._at)
            if rule is None:
                raise self._wrong("a rule `name ::= …` (letters, digits and hyphens in names)")
            if rule[1] in found:
                raise _invalid(
                    f"the rule {rule[1]!r} is defined twice", "one definition, with `|` between alternatives"
                )
            self._at = rule.end()
            self._skip(_SPACE_AND_LINES)
            found[rule[1]] = self._alternatives(0)
            if self._at < len(self._source) and self._source[self._at] not in "\r\n":
                raise self._wrong("the end of the rule")
            self._skip(_SPACE_AND_LINES)
            if len(found) > MAX_RULES:
                raise _invalid(f"the grammar has more than {MAX_RULES} rules", f"at most {MAX_RULES}")
        return found

    def _alternatives(self, depth: int) -> _Part:
        if depth > MAX_DEPTH:
            raise _invalid(f"its brackets are nested more than {MAX_DEPTH} deep", f"at most {MAX_DEPTH} levels")
        parts = [self._sequence(depth)]
        while self._source.startswith("|", self._at):
            self._at += 1
            self._skip(_SPACE_AND_LINES)
            parts.append(self._sequence(depth))
        return parts[0] if len(parts) == 1 else _Alternatives(tuple(parts))

    def _sequence(self, depth: int) -> _Part:
        parts: list[_Part] = []
        while (part := self._part(depth)) is not None:
            parts.append(self._repeated(part))
            self._skip(_SPACE_AND_LINES if depth else _SPACE)
        return parts[0] if len(parts) == 1 else _Sequence(tuple(parts))

    def _part(self, depth: int) -> _Part | None:
        source, at = self._source, self._at
        match source[at : at + 1]:
            case '"':
                return _Characters(self._matched(_TEXT, "a text in quotes, on one line, with valid escapes"))
            case "[":
                return _Characters(self._matched(_CLASS, "characters in `[…]`, on one line, with valid escapes"))
            case ".":
                self._at += 1
                return _Characters(".")
            case "(":
                self._at += 1
                self._skip(_SPACE_AND_LINES)
                part = self._alternatives(depth + 1)
                if not source.startswith(")", self._at):
                    raise self._wrong("`)`")
                self._at += 1
                return part
            case _:
                name = _NAME.match(source, at)
                if name is None or (not depth and _RULE.match(source, at)):
                    return None
                self._at = name.end()
                return _Reference(name[0])

    def _repeated(self, part: _Part) -> _Part:
        sign = self._source[self._at : self._at + 1]
        if sign in ("*", "+", "?") and sign:
            self._at += 1
            found = _Repeated(part, 1 if sign == "+" else 0, 1 if sign == "?" else None)
        elif sign == "{":
            times = _TIMES.match(self._source, self._at)
            if times is None:
                raise self._wrong("`{n}`, `{n,}` or `{n,m}`")
            self._at = times.end()
            least = int(times[1])
            most = least if times[2] is None else None if times[3] is None else int(times[3])
            if max(least, most or 0) > MAX_REPEAT or (most is not None and most < least):
                raise _invalid(f"the repetition {times[0]} is not possible", f"{{n,m}} with n ≤ m ≤ {MAX_REPEAT}")
            found = _Repeated(part, least, most)
        else:
            return part
        if self._source[self._at : self._at + 1] in ("*", "+", "?", "{") and self._at < len(self._source):
            raise self._wrong("one repetition of each part; put it in brackets to repeat it again")
        return found

    def _matched(self, pattern: re.Pattern[str], accepted: str) -> str:
        found = pattern.match(self._source, self._at)
        if found is None:
            raise self._wrong(accepted)
        for code in _CODE.findall(found[0]):
            number = int(code, 16)
            if number > 0x10FFFF or 0xD800 <= number <= 0xDFFF or not number:
                raise _invalid(f"{code} is no character", "a code point of Unicode")
        self._at = found.end()
        return found[0]

    def _skip(self, pattern: re.Pattern[str]) -> None:
        found = pattern.match(self._source, self._at)
        assert found is not None, "it matches nothing, too"
        self._at = found.end()

    def _wrong(self, accepted: str) -> InvalidInput:
        line = self._source.count("\n", 0, self._at) + 1
        near = self._source[self._at : self._at + 20].splitlines()[:1]
        return _invalid(f"line {line} of the grammar is wrong at {(near or ['its end'])[0]!r}", accepted)


def _needed(rules: Mapping[str, _Part]) -> dict[str, _Part]:
    """The rules that `root` needs, `root` first. Raises InvalidInput for one that is not defined."""
    needed, waiting = {"root": rules["root"]}, [rules["root"]]
    while waiting:
        for name, _ in _references(waiting.pop()):
            if name not in rules:
                raise _invalid(f"the rule {name!r} is not defined", f"one of {', '.join(list(rules)[:20])}")
            if name not in needed:
                needed[name] = rules[name]
                waiting.append(rules[name])
    return needed


def _references(part: _Part, is_last: bool = True) -> Iterator[tuple[str, bool]]:
    """The names in a part, and whether each is at the end of its alternative."""
    match part:
        case _Reference(name):
            yield name, is_last
        case _Sequence(parts):
            for place, one in enumerate(parts):
                yield from _references(one, is_last and place == len(parts) - 1)
        case _Alternatives(parts):
            for one in parts:
                yield from _references(one, is_last)
        case _Repeated(one):
            yield from _references(one, False)
        case _:
            return


class _Bounds:
    """The bounds of a grammar."""

    def __init__(self, rules: Mapping[str, _Part]) -> None:
        self._rules = rules
        #: By rule, the rules that it refers to, and those of them in the middle of an alternative.
        self._all = {name: {other for other, _ in _references(part)} for name, part in rules.items()}
        self._inner = {name: {other for other, last in _references(part) if not last} for name, part in rules.items()}
        self._open: dict[str, int] = {}
        self._fixed: dict[str, bool] = {}
        #: By rule, the ways in which it can begin.
        self._ways: dict[str, int] = {}

    def check(self) -> None:
        """Raises InvalidInput."""
        for name, others in self._inner.items():
            for other in others:
                if name in self._reachable(other):
                    message = f"the rule {name!r} refers to itself (through {other!r}) before the end of an alternative"
                    raise _invalid(message, "rules that refer to themselves at the end; for nested texts a JSON Schema")
        empty = self._possibly_empty()
        self._refuse_left_recursion(empty)
        expanded = min(sum(_expanded(part) for part in self._rules.values()), _MANY)
        if expanded > MAX_EXPANDED:
            raise _invalid(f"the grammar has {expanded} parts with all repetitions", f"at most {MAX_EXPANDED}")
        if (opened := self._open_of_rule("root")) > MAX_OPEN:
            message = f"up to {opened} alternatives of the grammar can be open at the same time"
            raise _invalid(message, f"at most {MAX_OPEN}: fewer alternatives, or rules of a fixed length")

    def _reachable(self, name: str) -> set[str]:
        found, waiting = {name}, [name]
        while waiting:
            for other in self._all[waiting.pop()] - found:
                found.add(other)
                waiting.append(other)
        return found

    def _possibly_empty(self) -> set[str]:
        """The rules that match the empty text."""
        found: set[str] = set()
        while True:
            new = {name for name, part in self._rules.items() if name not in found and _is_empty(part, found)}
            if not new:
                return found
            found |= new

    def _refuse_left_recursion(self, empty: set[str]) -> None:
        left = {name: set(_first(part, empty)) for name, part in self._rules.items()}
        while free := [name for name, others in left.items() if not any(other in left for other in others)]:
            for name in free:
                del left[name]
                self._ways[name] = min(1 + self._ways_of(self._rules[name], empty), _MANY)
        if left:
            names = ", ".join(repr(name) for name in list(left)[:5])
            raise _invalid(f"the rules {names} can begin with themselves", "a text before the reference")
        if (most := max(self._ways.values())) > MAX_WAYS:
            raise _invalid(f"there are {most} ways to a first character", f"at most {MAX_WAYS}")

    def _ways_of(self, part: _Part, empty: set[str]) -> int:
        """The ways in which a part can begin; those of the rules with which it begins are known."""
        match part:
            case _Reference(name):
                return self._ways[name]
            case _Sequence(parts):
                total = 0
                for one in parts:
                    total += self._ways_of(one, empty)
                    if not _is_empty(one, empty):
                        break
                return min(total, _MANY)
            case _Alternatives(parts):
                return min(sum(self._ways_of(one, empty) for one in parts), _MANY)
            case _Repeated(one, least, most):
                times = max(least, most or 1) if _is_empty(one, empty) else 1
                return min(self._ways_of(one, empty) * times, _MANY)
            case _:
                return 1

    def _open_of_rule(self, name: str) -> int:
        """The alternatives that can be open in a rule, and in those that continue it."""
        if name not in self._open:
            tail, waiting = {name}, [name]
            while waiting:
                current = waiting.pop()
                for other, is_last in _references(self._rules[current]):
                    if is_last and other not in tail:
                        tail.add(other)
                        waiting.append(other)
            self._open[name] = min(sum(self._open_of(self._rules[one], is_last=True) for one in tail), _MANY)
        return self._open[name]

    def _open_of(self, part: _Part, *, is_last: bool) -> int:
        match part:
            case _Characters():
                return 1
            case _Reference(name):
                return 0 if is_last else self._open_of_rule(name)
            case _Alternatives(parts):
                return min(sum(self._open_of(one, is_last=is_last) for one in parts), _MANY)
            case _Sequence(parts):
                last = len(parts) - 1
                found = [self._open_of(one, is_last=is_last and place == last) for place, one in enumerate(parts)]
                fixed = all(self._is_fixed(one) for one in parts[:-1])
                return min(max(found, default=0) if fixed else sum(found), _MANY)
            case _Repeated(one, least, most):
                times = 1 if self._is_fixed(one) else least + 1 if most is None else max(most, 1)
                return min(self._open_of(one, is_last=False) * times, _MANY)

    def _is_fixed(self, part: _Part) -> bool:
        """Whether all texts of a part have one length, and it has no alternatives."""
        match part:
            case _Characters():
                return True
            case _Reference(name):
                if name not in self._fixed:
                    self._fixed[name] = False  # also for one that refers to itself
                    self._fixed[name] = self._is_fixed(self._rules[name])
                return self._fixed[name]
            case _Sequence(parts):
                return all(map(self._is_fixed, parts))
            case _Repeated(one, least, most):
                return least == most and self._is_fixed(one)
            case _:
                return False


def _is_empty(part: _Part, empty: set[str]) -> bool:
    match part:
        case _Characters(text):
            return text == '""'
        case _Reference(name):
            return name in empty
        case _Sequence(parts):
            return all(_is_empty(one, empty) for one in parts)
        case _Alternatives(parts):
            return any(_is_empty(one, empty) for one in parts)
        case _Repeated(one, least):
            return not least or _is_empty(one, empty)


def _first(part: _Part, empty: set[str]) -> Iterator[str]:
    """The rules with which a part can begin."""
    match part:
        case _Reference(name):
            yield name
        case _Sequence(parts):
            for one in parts:
                yield from _first(one, empty)
                if not _is_empty(one, empty):
                    return
        case _Alternatives(parts):
            for one in parts:
                yield from _first(one, empty)
        case _Repeated(one):
            yield from _first(one, empty)
        case _:
            return


def _expanded(part: _Part) -> int:
    """The parts after llama.cpp has written out the repetitions."""
    match part:
        case _Characters(text):
            return len(text)
        case _Sequence(parts) | _Alternatives(parts):
            return 1 + sum(map(_expanded, parts))
        case _Repeated(one, least, most):
            return min(_expanded(one) * max(least + 1, most or 0), _MANY)
        case _:
            return 1


def _written(part: _Part) -> str:
    match part:
        case _Characters(text):
            return text
        case _Reference(name):
            return name
        case _Sequence(parts):
            return " ".join(_bracketed(one) for one in parts) or '""'
        case _Alternatives(parts):
            return " | ".join(map(_written, parts))
        case _Repeated(one, least, most):
            times = {(0, 1): "?", (0, _ENDLESS): "*", (1, _ENDLESS): "+"}.get((least, most))
            upto = "," if most is None else f",{most}"
            return _bracketed(one, repeated=True) + (times or f"{{{least}{'' if least == most else upto}}}")


def _bracketed(part: _Part, *, repeated: bool = False) -> str:
    needs = isinstance(part, _Alternatives | _Sequence) or (repeated and isinstance(part, _Repeated))
    return f"({_written(part)})" if needs else _written(part)


def _invalid(message: str, accepted: str) -> InvalidInput:
    return InvalidInput([Problem("", message, accepted)], "grammar")
