"""
Validation: finds the deviations of a value from a JSON Schema of the draft 2020-12.

Each applied keyword, each compared item and each name that is searched for counts as work, which is limited.
Messages show only the beginning of a long value.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from app.json_schema import keywords, references
from app.json_schema.references import Unresolvable
from app.json_schema.values import MAX_EXCERPT, Deviation, Path, excerpt, type_of
from app.kernel.errors import Problem
from app.kernel.security import regex

#: Maximum units of work of one validation: an applied keyword, a compared part of a value; about 2 µs each.
MAX_WORK = 1_000_000
#: Maximum reported deviations of one value.
MAX_PROBLEMS = 20


def deviations(schema: Any, value: Any, *, formats: bool = False) -> Iterator[Deviation]:
    """
    Yields the deviations of the value, each found on demand; none when the value conforms.

    With `formats`, the formats in `formats.CHECKS` are checked too; otherwise they are annotations.
    """
    return _guarded(schema, value, root=schema, formats=formats)


def conforms(schema: Any, value: Any, *, root: Any = None, formats: bool = False) -> bool:
    """
    Returns whether the value conforms. References are resolved in `root`, if the schema is a part of another.

    `formats` as in `deviations`.
    """
    return next(_guarded(schema, value, root=schema if root is None else root, formats=formats), None) is None


def value_problems(schema: Any, value: Any, where: str, accepted: str = "") -> list[Problem]:
    """Returns the first deviations of the value as problems of the field `where`."""
    found = islice(deviations(schema, value), MAX_PROBLEMS)
    return [Problem(f"{where}{deviation.where}", deviation.message, accepted) for deviation in found]


def _guarded(schema: Any, value: Any, *, root: Any, formats: bool) -> Iterator[Deviation]:
    try:
        yield from Validation(root, formats=formats).deviations(schema, value, ())
    except (_WorkLimitExceeded, Unresolvable, regex.PatternRefused, regex.TextTooLong) as error:
        yield Deviation((), f"it cannot be validated: {error}")
    except RecursionError:
        yield Deviation((), "it cannot be validated: the schema refers to itself without end, or nests too deep")
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        # Such a schema would not pass `problems`, but schemas in requests to models are not checked before.
        yield Deviation((), f"it cannot be validated, because its schema is invalid: {str(error)[:MAX_EXCERPT]}")


class _WorkLimitExceeded(Exception):
    """The validation needs more than the maximum work."""


class Validation:
    """One validation of one value: the root schema of its references, and the remaining work."""

    def __init__(self, root: Any, *, formats: bool) -> None:
        self._root = root
        #: Whether formats are checked.
        self.formats = formats
        self._work_left = MAX_WORK
        self._targets: dict[str, Any] = {}

    def spend(self, units: int = 1) -> None:
        self._work_left -= units
        if self._work_left < 0:
            raise _WorkLimitExceeded(f"the validation needs more than {MAX_WORK} units of work")

    def target(self, reference: str) -> Any:
        if reference not in self._targets:
            self._targets[reference] = references.resolved(self._root, reference)
        return self._targets[reference]

    def conforms(self, schema: Any, value: Any) -> bool:
        return next(self.deviations(schema, value, ()), None) is None

    def deviations(self, schema: Any, value: Any, path: Path) -> Iterator[Deviation]:
        self.spend()
        if schema is True:
            return
        if schema is False:
            yield Deviation(path, f"{excerpt(value)} is not allowed here")
            return
        for keyword, constraint in schema.items():
            check = keywords.FOR_ANY_TYPE.get(keyword)
            if check is None:
                kind, check = keywords.FOR_ONE_TYPE.get(keyword, (None, None))
                if check is None or type_of(value) != kind:
                    continue
            self.spend()
            for found in check(self, constraint, value, schema):
                yield found if not path else Deviation(path + found.path, found.message)
