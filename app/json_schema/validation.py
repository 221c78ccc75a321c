"""
Validation: where a value deviates from a JSON Schema of the draft 2020-12.

Each keyword that is applied, each item that is compared and each name that is looked for is counted.
Messages show the beginning of a value only, however long it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from app.json_schema import keywords, references
from app.json_schema.references import Unresolvable
from app.json_schema.values import SHOWN, Deviation, Path, kind_of, shown
from app.kernel.errors import Problem
from app.kernel.security import regex

#: Units of work of one check: a keyword that is applied, a part of a value that is compared; some 2 µs each.
MAX_WORK = 1_000_000
#: What is said of one value at the most.
MAX_PROBLEMS = 20


def deviations(schema: Any, value: Any, *, formats: bool = False) -> Iterator[Deviation]:
    """
    Each deviation of the value, found as it is asked for; none when it conforms.

    With `formats`, the formats of `formats.CHECKS` are demanded too; they are annotations otherwise.
    """
    return _found(schema, value, root=schema, formats=formats)


def conforms(schema: Any, value: Any, *, root: Any = None) -> bool:
    """Whether the value conforms. References are looked up in `root`, where the schema is a part of another."""
    return next(_found(schema, value, root=schema if root is None else root, formats=False), None) is None


def value_problems(schema: Any, value: Any, where: str, accepted: str = "") -> list[Problem]:
    """The first deviations of the value as problems of the field `where`."""
    found = islice(deviations(schema, value), MAX_PROBLEMS)
    return [Problem(f"{where}{deviation.where}", deviation.message, accepted) for deviation in found]


def _found(schema: Any, value: Any, *, root: Any, formats: bool) -> Iterator[Deviation]:
    try:
        yield from Validation(root, formats=formats).deviations(schema, value, ())
    except (_Bound, Unresolvable, regex.PatternRefused, regex.TextTooLong) as error:
        yield Deviation((), f"it cannot be held against its schema: {error}")
    except RecursionError:
        yield Deviation((), "it cannot be held against its schema: the schema leads back to itself, or nests too deep")
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        # What `problems` would have refused: schemas of requests to models are not checked before.
        yield Deviation((), f"it cannot be held against its schema, which is none: {str(error)[:SHOWN]}")


class _Bound(Exception):
    """The check would take too much work."""


class Validation:
    """One check of one value: the schema whose references are followed, and the work that is left."""

    def __init__(self, root: Any, *, formats: bool) -> None:
        self._root = root
        #: Whether formats are demanded.
        self.formats = formats
        self._left = MAX_WORK
        self._targets: dict[str, Any] = {}

    def spend(self, units: int = 1) -> None:
        self._left -= units
        if self._left < 0:
            raise _Bound(f"that takes more than {MAX_WORK} steps of work")

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
            yield Deviation(path, f"{shown(value)} is not allowed here")
            return
        for keyword, demand in schema.items():
            check = keywords.OF_ANY.get(keyword)
            if check is None:
                kind, check = keywords.OF_KIND.get(keyword, (None, None))
                if check is None or kind_of(value) != kind:
                    continue
            self.spend()
            for found in check(self, demand, value, schema):
                yield found if not path else Deviation(path + found.path, found.message)
