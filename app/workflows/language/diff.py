"""
The diff of two definitions: added, removed, changed and reordered values, each with its path.

Steps, and items of any other list of mappings with ids, are matched by id, at any position. A change of order alone (of
steps, of inputs, of a schema's keys) is a kind of its own: it does not change the execution, but it matters to a reader
and to a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class DefinitionChange:
    """One difference between two definitions."""

    kind: Literal["added", "removed", "changed", "reordered"]
    #: Such as `steps.draft.retry.max_attempts`; items of a list without ids have their index: `messages[1]`.
    path: str
    #: The old value; None for `added`; the keys or ids in their old order for `reordered`.
    old: Any
    #: The new value; None for `removed`; the keys or ids in their new order for `reordered`.
    new: Any


def between(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[DefinitionChange]:
    """Return the differences between two documents of definitions, in the order of the new one."""
    return list(_of_mappings("", old, new))


def _of_values(path: str, old: Any, new: Any) -> Iterator[DefinitionChange]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        yield from _of_mappings(path, old, new)
    elif isinstance(old, list) and isinstance(new, list):
        yield from _of_lists(path, old, new)
    elif type(old) is not type(new) or old != new:
        yield DefinitionChange("changed", path, old, new)


def _of_mappings(path: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[DefinitionChange]:
    for key in new:
        inner = f"{path}.{key}" if path else key
        if key in old:
            yield from _of_values(inner, old[key], new[key])
        else:
            yield DefinitionChange("added", inner, None, new[key])
    for key in old:
        if key not in new:
            yield DefinitionChange("removed", f"{path}.{key}" if path else key, old[key], None)
    yield from _of_order(path, [key for key in old if key in new], [key for key in new if key in old])


def _of_lists(path: str, old: Sequence[Any], new: Sequence[Any]) -> Iterator[DefinitionChange]:
    old_by_id, new_by_id = _by_id(old), _by_id(new)
    if old_by_id is not None and new_by_id is not None:
        yield from _of_mappings(path, old_by_id, new_by_id)
    elif all(isinstance(item, Mapping | list) for item in (*old, *new)):
        for i in range(max(len(old), len(new))):
            if i >= len(old):
                yield DefinitionChange("added", f"{path}[{i}]", None, new[i])
            elif i >= len(new):
                yield DefinitionChange("removed", f"{path}[{i}]", old[i], None)
            else:
                yield from _of_values(f"{path}[{i}]", old[i], new[i])
    elif old != new:
        yield DefinitionChange("changed", path, old, new)


def _by_id(items: Sequence[Any]) -> dict[str, Any] | None:
    """Return the items by id, each without its id; None when an item has no id or an id repeats."""
    ids = [item.get("id") if isinstance(item, Mapping) else None for item in items]
    if not all(isinstance(id_, str) for id_ in ids) or len(set(ids)) < len(ids):
        return None
    return {item["id"]: {key: value for key, value in item.items() if key != "id"} for item in items}


def _of_order(path: str, old: list[str], new: list[str]) -> Iterator[DefinitionChange]:
    if old != new:
        yield DefinitionChange("reordered", path, old, new)
